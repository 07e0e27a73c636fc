"""A comparison's folder: `comparison.json` says what is compared, `runs/` holds one JSON file per run.

Everything a report shows comes from these files, so a comparison that was stopped goes on as if it never had
been.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textlora.core.errors import StorageError, UsageError
from textlora.core.files import write_text

FILE = "comparison.json"
_WORDS = {"data_sha256": "other rows", "base_hash": "another base model"}


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Raises StorageError where the file is not a JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path}: not a file of a comparison ({error})", "remove it: its run is made again"
        ) from error
    if not isinstance(found, dict):
        raise StorageError(f"{path}: not a file of a comparison", "remove it: its run is made again")
    return found


def settled(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the comparison in `folder` once `settings` join it: lists of methods, rates and so on grow,
    nothing else may differ.

    Writes nothing.

    Raises:
        UsageError: the folder holds a comparison of other data or settings.
        StorageError: it holds something else.
    """
    path = folder / FILE
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output {folder}: is a file", "choose a folder")
    if not path.is_file():
        if folder.is_dir() and any(
            p.name != ".lock" and not p.name.endswith(".part") for p in folder.iterdir()
        ):
            raise StorageError(
                f"--output {folder}: is not empty and holds no comparison", "choose another folder"
            )
        return dict(settings)
    before, merged = read_json(path), dict(settings)
    for name, value in settings["fixed"].items():
        old = before["fixed"].get(name)
        if old != value:
            what = _WORDS.get(name) or f"--{name.replace('_', '-')} {_shown(old)}, now {_shown(value)}"
            raise UsageError(f"--output {folder}: holds a comparison with {what}", "choose another folder")
    merged["methods"] = list(dict.fromkeys([*before["methods"], *settings["methods"]]))
    merged["rows"] = sorted({*before["rows"], *settings["rows"]})
    merged["seeds"] = max(before["seeds"], settings["seeds"], key=len)
    for name in ("learning_rates", "sizes"):
        old, new = before[name], settings[name]
        merged[name] = {
            method: sorted({*old.get(method, ()), *new.get(method, ())}) for method in {**old, **new}
        }
    return merged


def _shown(value: Any) -> str:
    return "left out" if value is None else str(value)


def read_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Key -> record of every finished run. Raises StorageError for a damaged file."""
    return {
        path.name.removesuffix(".json"): read_json(path)
        for path in sorted((folder / "runs").glob("[!.]*.json"))
    }


def read_comparison(folder: Path | str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Settings and runs of a comparison in the form that `report.comparison` takes, alone or beside other
    comparisons.

    Raises:
        StorageError: there is none, or a file is damaged.
    """
    settings = read_json(Path(folder) / FILE)
    shown = settings.pop("shown", None)
    runs = read_runs(Path(folder))
    return settings, [runs[key] for key in shown if key in runs] if shown is not None else list(runs.values())


def better(metric_higher: bool, metric: str) -> Any:
    """Sort key of runs by what validation said, best first; of equals the lower loss, then the smaller rate
    and size."""

    def key(record: Mapping[str, Any]) -> tuple[Any, ...]:
        held = record.get("validation") or {}
        value, loss = held.get(metric), held.get("log_loss", held.get("mse"))
        failed = "error" in record or value is None
        sign = -1 if metric_higher else 1
        rate = record["learning_rate"] or 0.0
        return (
            "error" in record,
            failed,
            0.0 if failed else sign * value,
            float("inf") if loss is None else loss,
            rate,
            *record["size"].values(),
        )

    return key


def best_of(records: Sequence[Mapping[str, Any]], metric: str, higher: bool) -> Mapping[str, Any] | None:
    """The record that validation prefers; None where every one of them failed."""
    ranked = sorted(records, key=better(higher, metric))
    return ranked[0] if ranked and "error" not in ranked[0] else None

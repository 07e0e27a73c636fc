"""Methods side by side on one data set: each tuned alike on rows held out, repeated with several seeds,
scored on test once.

For every method its sizes and learning rates are tried on the first seed; the best of them is trained with
every seed and meets the test rows there. A run is one file, finished runs are skipped, and the report is made
from the files alone.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textlora.compare.halving import Budget
from textlora.compare.machine import machine
from textlora.compare.methods import METHODS, find_methods
from textlora.compare.runner import Record, Runner
from textlora.compare.store import FILE, read_comparison, settled, write_json
from textlora.core.config import TrainConfig
from textlora.core.errors import DataError, UsageError
from textlora.core.files import folder_lock, remove_parts
from textlora.metrics.scores import METRICS
from textlora.report.comparison.page import render, require_matplotlib
from textlora.training.prepare import Prepared, prepare
from textlora.training.run import versions

__all__ = ["Comparison", "compare", "read_comparison"]


@dataclass(frozen=True)
class Comparison:
    """What to compare. `config` holds the data and all that the methods share.

    Attributes:
        learning_rates: method -> rates in place of its own; the key "" is for every method that has rates.
        sizes: ranks or numbers of tokens in place of each method's own.
        seeds: how many, counted up from `config.seed`.
        rows: numbers of training rows for the curve over examples.
        budget: a time or a number of runs for all, such as 30m, 2h or 40runs (`halving.Budget`).
        name: of the data.
    """

    config: TrainConfig
    methods: tuple[str, ...]
    learning_rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    seeds: int = 3
    rows: tuple[int, ...] = ()
    budget: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        find_methods(self.methods)
        find_methods([name for name in self.learning_rates if name] or self.methods)
        for name, rates in self.learning_rates.items():
            if not all(0 < rate < float("inf") for rate in rates) or not rates:
                raise UsageError(f"--learning-rates {name}: every rate must be a finite number above 0")
            if name and not METHODS[name].rates:
                raise UsageError(f"--learning-rates {name}: this method has no learning rate")
        if self.budget is not None:
            Budget.parse(self.budget)
        if self.config.output is None:
            raise UsageError("no output folder", "name one with --output")
        for flag, values in (("sizes", self.sizes), ("rows", self.rows), ("seeds", (self.seeds,))):
            if any(value < 1 for value in values):
                raise UsageError(f"--{flag} {min(values)}: must be at least 1")

    def rates_of(self, method: str) -> list[float]:
        row = METHODS[method]
        return (
            sorted(set(self.learning_rates.get(method) or self.learning_rates.get("") or row.rates))
            if row.rates
            else []
        )

    def sizes_of(self, method: str) -> list[int]:
        row = METHODS[method]
        return sorted(set(self.sizes or row.sizes)) if row.size else []


def compare(
    asked: Comparison,
    sources: Mapping[str, Any] | None = None,
    *,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Run what is missing in `asked.config.output` and write the report there.

    Args:
        sources: rows or DataFrames by split in place of the settings' paths.
        on_record: called with a record of kind "begin" before every run and "end" after it.

    Returns:
        the summary of the report.

    Raises:
        TextloraError: what is wrong and where. A method that fails is no error: its row says why.
    """
    config = asked.config
    if config.test is None and "test" not in (sources or {}):
        raise UsageError("no test data", "name a file with --test: the methods are compared on it")
    require_matplotlib()
    if config.threads:
        torch.set_num_threads(config.threads)
    prepared = prepare(config, sources)
    if prepared.folds is None and "validation" not in prepared.sets:
        raise DataError(
            "no row is left for validation, which chooses between rates",
            "raise --limit-train, or give --validation",
        )
    folder, settings = Path(str(config.output)), _settings(asked, prepared)
    settled(folder, settings)  # refuses before anything is written
    with folder_lock(folder):
        remove_parts(folder)
        remove_parts(folder / "runs")
        settings = settled(folder, settings)
        write_json(folder / FILE, settings)
        runner = Runner(prepared, folder, settings, on_record)
        runner.all()
        write_json(folder / FILE, settings | {"left_out": runner.left_out, "shown": runner.shown()})
        return render(*read_comparison(folder), folder)


# Settings that every run shares and that make it what it is; --output, --threads and the like do not.
_FIXED = (
    "model", "revision", "pooling", "epochs", "scheduler", "warmup", "weight_decay", "batch_size", "batch_tokens", "gradient_accumulation_steps",
    "max_grad_norm", "metric", "class_weights", "label_smoothing", "max_length", "truncation", "lora_alpha", "lora_dropout", "seed",
    "precision", "limit_train", "limit_eval", "validation_share",
)  # fmt: skip


def _settings(asked: Comparison, prepared: Prepared) -> Record:
    """What `comparison.json` holds."""
    config, sets = asked.config, prepared.sets
    name = asked.name or _data_name(config)
    fixed = {item: getattr(config, item) for item in _FIXED} | {"name": name}
    fixed |= {
        "data_sha256": {split: _digest(prepared, split) for split in sets},
        "base_hash": prepared.model.base_hash(),
    }
    methods = list(dict.fromkeys(asked.methods))
    return {
        "data": name,
        "problem_type": prepared.schema.problem_type,
        "metric": prepared.metric,
        "higher_is_better": METRICS[prepared.metric].higher_is_better,
        "labels": list(prepared.schema.labels),
        "model": prepared.files.id or prepared.files.folder.name,
        "train_rows": len(sets["train"].rows),
        "validation_rows": len(sets["validation"].rows)
        if prepared.folds is None
        else int((prepared.folds >= 0).sum()),
        "folds": 0 if prepared.folds is None else len(set(prepared.folds[prepared.folds >= 0].tolist())),
        "pooling": prepared.pooling,
        "pooling_reason": prepared.pooling_reason,
        "split_lines": prepared.split_lines,
        "test_rows": len(sets["test"].rows),
        "epochs": float(config.epochs),
        "methods": methods,
        "descriptions": {name: row.what for name, row in METHODS.items()},
        "learning_rates": {method: asked.rates_of(method) for method in methods if METHODS[method].rates},
        "sizes": {method: asked.sizes_of(method) for method in methods if METHODS[method].size},
        "seeds": [config.seed + i for i in range(asked.seeds)],
        "rows": sorted(set(asked.rows)),
        "budget": asked.budget,
        "fixed": fixed,
        "test_labels": sets["test"].labels.tolist(),
        "versions": versions() | _fitting_version(),
        "machine": machine(prepared.device),
    }


def _data_name(config: TrainConfig) -> str:
    path = Path(config.train or "data")
    return (
        path.parent.name
        if path.stem.lower() in ("train", "training", "data") and path.parent.name
        else path.stem
    )


def _fitting_version() -> dict[str, str]:
    try:
        return {"scikit-learn": version("scikit-learn")}
    except PackageNotFoundError:
        return {}


def _digest(prepared: Prepared, split: str) -> str:
    """SHA-256 over the texts, token ids and labels of a split, in order."""
    data, digest = prepared.sets[split], hashlib.sha256()
    digest.update(np.ascontiguousarray(data.labels).tobytes())
    for row, encoded in zip(data.rows, data.encoded, strict=True):
        digest.update(f"{row.text}\0{row.text_pair or ''}\0".encode("utf-8", "surrogatepass"))
        digest.update(encoded.ids.tobytes())
    return digest.hexdigest()

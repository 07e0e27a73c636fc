"""Data sets of the `datasets` library: saved folders, hub ids, and the names behind class numbers."""

import json
import re
from pathlib import Path

from textlora.core.errors import DataError

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:[\w.-]+){0,2}")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form owner/name, owner/name:split or owner/name:config:split."""
    return HUB_ID.fullmatch(source) is not None


def is_saved_dataset(folder: Path) -> bool:
    """Whether `folder` was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def load_saved(folder: Path):
    """The Dataset or DatasetDict that `save_to_disk` wrote. Raises DataError if it cannot be read."""
    datasets = _library()

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises its own, pyarrow's and json's errors alike
        raise DataError(
            f"{folder} cannot be read as a saved data set: {_first_line(error)}",
            "save it again with save_to_disk",
        ) from error


def load_hub(name: str, split: str):
    """The Dataset behind owner/name[[:config]:split]; a split in the name goes before `split`.

    Raises:
        DataError: the hub cannot be reached, or there is no such data set, configuration or split.
    """
    datasets = _library()

    repo, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    _require_hub(repo)
    try:
        return datasets.load_dataset(repo, config, split=rest[-1] if rest else split)
    except Exception as error:  # network, hub and file errors of several libraries
        raise DataError(
            f"the data set {name} could not be had from the hub: {_first_line(error)}",
            "check the name and the network, or download it and give the local path",
        ) from error


def _require_hub(repo: str) -> None:
    """Ask the hub once for the data set: `datasets` would retry a dead connection for half a minute, with a
    line for each try."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    local = "check the name, or download it and give the local path"
    try:
        HfApi().dataset_info(repo, timeout=10)
    except OfflineModeIsEnabled:  # wanted: what is in the cache is used
        return
    except RepositoryNotFoundError as error:
        raise DataError(
            f"{repo}: no file here and no such data set on the hub (or it is private)", local
        ) from error
    except HfHubHTTPError:  # `datasets` may still have it in its cache, or says more
        return
    except Exception as error:  # no connection
        raise DataError(
            f"{repo}: no file here, and the hub cannot be reached",
            f"{local}; HF_HUB_OFFLINE=1 uses what was fetched before",
        ) from error


def arrow_table(dataset, split: str, name: str):
    """(pyarrow table, names of its classes) of a Dataset, or of the split `split` of a DatasetDict.

    Raises:
        DataError: there is no such split.
    """
    if isinstance(dataset, dict):
        wanted = next((names for names in SPLITS.values() if split in names), (split,))
        key = next((key for key in wanted if key in dataset), None)
        if key is None:
            raise DataError(
                f"{name} has no split {split!r}; it has {', '.join(map(str, dataset))}", "give one of these"
            )
        dataset = dataset[key]
    return dataset.with_format("arrow")[:], class_names(dataset.features.to_dict())


def stored_features(schema) -> dict:
    """The feature types that `datasets` leaves in a Parquet file's metadata; empty where there are none."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}


def class_names(features: dict) -> dict[str, list[str]]:
    """Column to class names, for ClassLabel columns and for lists of them, from
    `datasets.Features.to_dict()`."""
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        inner = feature
        if isinstance(inner, dict) and isinstance(inner.get("feature"), dict):
            inner = inner["feature"]
        elif isinstance(inner, list) and len(inner) == 1:
            inner = inner[0]
        if (
            isinstance(inner, dict)
            and inner.get("_type") == "ClassLabel"
            and isinstance(inner.get("names"), list)
        ):
            found[column] = inner["names"]
    return found


def _library():
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "saved and hub data sets need the datasets package",
            'install it with pip install "textlora[data]"',
        ) from error
    return datasets


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return text if len(text) <= 200 else text[:197] + "..."

"""What a foreign adapter does not say itself and files beside it may: number and names of its classes, the
task, the length of texts."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from textlora.adapters.folder import AdapterFolder
from textlora.core.config import PROBLEM_TYPES, REGRESSION, SINGLE_LABEL
from textlora.core.errors import AdapterError, UsageError

DEFAULT_MAX_LENGTH = 512
# The last layer of the classification heads of transformers: its rows are the classes.
_LAST = (
    "classifier.out_proj",
    "classifier.linear_out",
    "logits_proj",
    "sequence_summary.summary",
    "score",
    "classifier",
)


@dataclass(frozen=True)
class Facts:
    """Class names in order, transformers' name of the task, and where the names come from."""

    labels: tuple[str, ...]
    problem_type: str
    source: str


@dataclass(frozen=True)
class Length:
    """Tokens kept of a text, which part of a longer one, and where that is known from."""

    tokens: int
    truncation: str
    source: str


def class_count(tensors: Mapping[str, Tensor], path: Path) -> int:
    """Number of classes, read off the last layer of the head.

    Raises:
        AdapterError: the head was not saved.
    """
    for name in _LAST:
        weight = tensors.get(f"base_model.model.{name}.weight")
        if weight is not None and weight.ndim == 2:
            return weight.shape[0]
    raise AdapterError(
        f"{path}: the classifier is not in the file, so it would be random",
        "PEFT saves it only where task_type is SEQ_CLS or modules_to_save names it: train again with that",
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that may be missing or broken; then {}."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def named_labels(config: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """The `id2label` of a transformers config where it names `count` classes, and not LABEL_0, LABEL_1 ..."""
    table = config.get("id2label")
    if not isinstance(table, dict) or sorted(table) != sorted(map(str, range(count))):
        return None
    names = [table[str(i)] for i in range(count)]
    real = all(
        isinstance(name, str) and name.strip() and not re.fullmatch(r"LABEL_\d+", name) for name in names
    )
    return tuple(names) if real and len(set(names)) == count else None


def find_facts(
    folder: AdapterFolder,
    base: Mapping[str, Any],
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
) -> Facts:
    """Labels and task: those given, else of a config.json beside the adapter or its checkpoints, else of the
    base's config.

    Args:
        base: the base's config.json.

    Raises:
        AdapterError: the head was not saved, or nothing names its classes.
        UsageError: the labels or the task given do not fit the head.
    """
    path = folder.path
    count = class_count(folder.tensors, path)
    places = [
        path / "config.json",
        *([path.parent / "config.json"] if re.fullmatch(r"checkpoint-\d+", path.name) else []),
    ]
    found = [(str(place), read_json(place)) for place in places] + [("the base's config.json", base)]
    source, config = next(((name, config) for name, config in found if named_labels(config, count)), ("", {}))
    names = named_labels(config, count)
    if labels is not None:
        names, source = tuple(labels), "--labels"
        if len(names) != count:
            raise UsageError(
                f"--labels: {len(names)} name{'s' * (len(names) != 1)} for a head of {count} class{'es' * (count != 1)} ({path})"
            )
        if len(set(names)) != count or not all(isinstance(name, str) and name.strip() for name in names):
            raise UsageError("--labels: empty or doubled names")
    stated = config.get("problem_type")
    default = stated if stated in PROBLEM_TYPES.values() else REGRESSION if count == 1 else SINGLE_LABEL
    kind = PROBLEM_TYPES.get(problem_type or "", problem_type) or default
    if kind not in PROBLEM_TYPES.values():
        raise UsageError(f"unknown problem type {problem_type!r}", f"use {', '.join(PROBLEM_TYPES)}")
    if (kind == REGRESSION and count != 1) or (kind == SINGLE_LABEL and count == 1):
        raise UsageError(f"--problem-type {kind}: the head of {path} has {count} output{'s' * (count != 1)}")
    if kind == REGRESSION and names is None:
        names, source = ("value",), "one output"
    if names is None:
        raise AdapterError(
            f"{path} has no textlora.json, and neither it nor its base names its {count} classes",
            "name them in class order: --labels negative,positive",
        )
    return Facts(names, kind, source)


def find_length(places: Sequence[Path], limit: int, stated: Mapping[str, Any] | None = None) -> Length:
    """Length and side of truncation as they were in training, as far as files say.

    Args:
        places: folders that may hold the tokenizer that was used. Its tokenizer.json remembers the last
            truncation, that of training.
        limit: tokens the base takes.
        stated: source -> number of tokens or None, taken before what the tokenizer says.
    """
    used = next((content for place in places if (content := read_json(place / "tokenizer.json"))), {}).get(
        "truncation"
    )
    settings = next(
        (content for place in places if (content := read_json(place / "tokenizer_config.json"))), {}
    )
    used = used if isinstance(used, dict) else {}
    side = used.get("direction") or settings.get("truncation_side")
    truncation = "tail" if isinstance(side, str) and side.lower() == "left" else "head"
    known = {
        **(stated or {}),
        "truncation in tokenizer.json": used.get("max_length"),
        "tokenizer_config.json": settings.get("model_max_length"),
    }
    for source, tokens in known.items():
        if type(tokens) is int and 8 <= tokens <= limit:
            return Length(tokens, truncation, source)
    return Length(min(DEFAULT_MAX_LENGTH, limit), truncation, "the base model")

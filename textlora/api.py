"""`textlora.train`: the training job as one Python call."""

import dataclasses
from collections.abc import Callable
from typing import Any

from textlora.core.config import TrainConfig
from textlora.core.errors import UsageError
from textlora.inference.classifier import TextClassifier
from textlora.training.run import run_training


def train(
    train: Any,
    *,
    output: str,
    validation: Any = None,
    test: Any = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    resume: bool = False,
    allow_other_kernels: bool = False,
    **settings: Any,
) -> TextClassifier:
    """Train an adapter and load it.

    Args:
        train: path, hub id, list of (text, label) or (text, text_pair, label), list of dicts, DataFrame or
            Dataset.
        output: folder for the adapter.
        validation, test: as `train`; what happens without them is in `TrainConfig`.
        callback: called with every record of `run/metrics.jsonl` as it is made.
        resume: go on with the run in `output`.
        allow_other_kernels: do so although other kernels, or none, began it: the bytes will differ.
        settings: fields of `TrainConfig`.

    Returns:
        the classifier as loaded from `output`; its scores are in `.meta.scores`.

    Raises:
        TextloraError: what is wrong and where.
    """
    given = {"train": train, "validation": validation, "test": test}
    paths = {
        split: str(value)
        for split, value in given.items()
        if isinstance(value, str) or hasattr(value, "__fspath__")
    }
    sources = {split: value for split, value in given.items() if value is not None and split not in paths}
    unknown = sorted(set(settings) - {item.name for item in dataclasses.fields(TrainConfig)})
    if unknown:
        raise UsageError(f"unknown setting '{unknown[0]}'", "settings are the fields of textlora.TrainConfig")
    config = TrainConfig(output=str(output), **paths, **settings)
    run_training(
        config,
        sources,
        resume=resume,
        allow_other_kernels=allow_other_kernels,
        on_record=callback or (lambda record: None),
    )
    return TextClassifier.load(output, base=config.model, device=config.device)

"""What `tune` searches: which settings, in what range, and how a trial's parameters become settings of a run."""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from textlora.core.config import TrainConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

SEARCHED = ("learning_rate", "r", "target_modules", "layers", "lora_dropout", "epochs", "batch_size")
DEFAULT_TARGETS = "default"  # the base model's own, query and value


def free_settings(config: TrainConfig, given: Collection[str]) -> tuple[str, ...]:
    """Names of the settings to search: those that were not given. A token budget per step takes the place of
    the batch size."""
    kept = {*given} | ({"batch_size"} if config.batch_tokens else set())
    return tuple(name for name in SEARCHED if name not in kept)


def count_blocks(modules: Collection[str]) -> int:
    """Encoder blocks that hold some of these modules, by the first number in each name."""
    return max(1, len({found[1] for name in modules if (found := re.search(r"\.(\d+)\.", name))}))


def distributions(free: Collection[str], blocks: int, width: int) -> dict[str, "BaseDistribution"]:
    """Ranges of the settings `free`, in the order of `SEARCHED`.

    Args:
        blocks: encoder blocks of the base; `layers` is how many of the last ones get LoRA.
        width: of the base's hidden states; no rank may be larger.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    ranges = {
        "learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
        "r": IntDistribution(2, max(2, min(32, width)), log=True),
        "target_modules": CategoricalDistribution((DEFAULT_TARGETS, "all-linear")),
        "layers": IntDistribution(1, blocks),
        "lora_dropout": FloatDistribution(0.0, 0.3, step=0.05),
        "epochs": IntDistribution(1, 8),
        "batch_size": CategoricalDistribution((4, 8, 16, 32)),
    }
    return {name: ranges[name] for name in SEARCHED if name in free}


def start_parameters(
    config: TrainConfig, ranges: Mapping[str, "BaseDistribution"], blocks: int, rate: float
) -> dict[str, Any]:
    """What `train` would do with these settings, at this rate where they name none, as parameters of the
    first trial; what lies outside its range is left out."""
    layers = (
        blocks
        if config.layers == "all"
        else int(config.layers.removeprefix("last:"))
        if config.layers.startswith("last:")
        else 0
    )
    targets = DEFAULT_TARGETS if config.target_modules is None else ",".join(config.target_modules)
    values = {name: getattr(config, name) for name in SEARCHED} | {
        "layers": layers,
        "target_modules": targets,
    }
    values["learning_rate"] = config.learning_rate or rate
    found = {}
    for name, distribution in ranges.items():
        try:
            value = distribution.to_internal_repr(values[name])
        except ValueError:  # no such choice
            continue
        if distribution._contains(value):
            found[name] = distribution.to_external_repr(value)
    return found


def trial_settings(
    config: TrainConfig, given: Collection[str], parameters: Mapping[str, Any], blocks: int
) -> TrainConfig:
    """The settings of a trial's run.

    `lora_alpha` follows the rank, so that the update's scale, and with it the meaning of a learning rate,
    stays; unless it was given, or rsLoRA sees to that.
    """
    changes = dict(parameters)
    if "layers" in changes:
        changes["layers"] = "all" if changes["layers"] == blocks else f"last:{changes['layers']}"
    if "target_modules" in changes:
        changes["target_modules"] = (
            None if changes["target_modules"] == DEFAULT_TARGETS else (changes["target_modules"],)
        )
    if "epochs" in changes:
        changes["epochs"] = float(changes["epochs"])
    if "r" in changes and "lora_alpha" not in given and not config.use_rslora:
        changes["lora_alpha"] = config.lora_alpha / config.r * changes["r"]
    return replace(config, **changes)

"""The learning rate: its default peak, and its course over the steps."""

import math

from textlora.core.config import TrainConfig
from textlora.training.prepare import Prepared


def default_rate(steps: int, classes: int = 1, pooling: str = "first") -> float:
    """Peak learning rate of a run that names none: a few steps have to go as far as many. Chosen on training
    rows of ten sets (docs/log.md).

    A mean-pooled head learns more at half of that where classes are few, and at all of it where they are
    many.
    """
    share = min(1.0, max(0.5, math.sqrt(classes / 10))) if pooling == "mean" else 1.0
    return max(1e-3, share * min(4e-3, 4e-3 * math.sqrt(128 / max(1, steps))))


def peak_rate(prepared: Prepared, steps: int) -> float:
    """The run's learning rate, or the default of a training of so many steps."""
    return prepared.config.learning_rate or default_rate(steps, len(prepared.schema.labels), prepared.pooling)


def rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Share of the peak learning rate at a step counted from 0: linear warm-up, then linear, cosine or
    constant."""
    warmup = int(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[
        config.scheduler
    ]

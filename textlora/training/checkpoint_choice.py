"""Scores of held-out rows, and which of several checkpoints they choose."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from textlora.inference.classifier import encoded_logits
from textlora.kernels.devices import Workers
from textlora.metrics.scores import METRICS, evaluate, standard_error
from textlora.training.hidden_state_cache import HiddenStates
from textlora.training.losses import Loss
from textlora.training.prepare import EncodedSet, Prepared


@dataclass(frozen=True)
class Evaluation:
    """Scores of held-out rows after `epoch` epochs: mean loss, metrics, logits (N, C)."""

    epoch: float
    loss: float
    metrics: dict[str, float | None]
    logits: np.ndarray


def judge(metric: str, value: float | None, best: float | None, rows: int) -> tuple[bool, bool]:
    """Whether a score is better than the best so far, and whether its weights are kept.

    Within a standard error of the best the rows cannot tell, and later weights are the better guess
    (docs/log.md).
    """
    sign = 1 if METRICS[metric].higher_is_better else -1
    better = value is not None and (best is None or sign * value > sign * best)
    best = value if better else best
    if best is None or value is None:  # a metric that is not defined yet cannot choose: the latest is kept
        return better, best is None
    return better, sign * value >= sign * best - standard_error(metric, best, rows)


def score(
    prepared: Prepared,
    data: EncodedSet,
    loss: Loss,
    workers: Workers | None = None,
    states: HiddenStates | None = None,
    **calibration: Any,
) -> tuple[float, dict[str, float | None], np.ndarray]:
    """Mean loss, metrics and logits (N, C) of a model on a set."""
    logits = encoded_logits(prepared.model, data.encoded, workers, states)
    return *score_logits(prepared, data.labels, logits, loss, **calibration), logits


def score_logits(
    prepared: Prepared, labels: np.ndarray, logits: np.ndarray, loss: Loss, **calibration: Any
) -> tuple[float, dict[str, float | None]]:
    """Mean loss and metrics of logits (N, C)."""
    rows = loss(torch.from_numpy(logits).to(prepared.device), torch.from_numpy(labels).to(prepared.device))
    weight = loss.weight(labels)
    metrics = evaluate(
        prepared.schema.problem_type, labels, logits, list(prepared.schema.labels), **calibration
    )
    return float(rows.sum()) / weight if weight else 0.0, metrics

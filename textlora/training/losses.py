"""What a step minimises: the weighted loss of each row."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.core.errors import UsageError
from textlora.metrics.calibration import class_prior
from textlora.training.prepare import Prepared


class Loss:
    """Weighted loss of each row, and its weight; the sum of the one over the sum of the other is what a step
    minimises.

    Cross-entropy with class weights and label smoothing, binary cross-entropy with a weight on positives, or
    squared error.
    """

    def __init__(self, prepared: Prepared):
        self.kind = prepared.schema.problem_type
        self.smoothing = prepared.config.label_smoothing
        self.class_weights = class_weights(
            prepared.config.class_weights, prepared.schema.labels, self.kind, prepared.sets["train"].labels
        )
        self.weights = (
            None
            if self.class_weights is None
            else torch.tensor(self.class_weights, dtype=torch.float32, device=prepared.device)
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Weighted loss of each row (B,) for logits (B, C)."""
        if self.kind == REGRESSION:
            return F.mse_loss(logits[:, 0], labels, reduction="none")
        if self.kind == MULTI_LABEL:
            smooth = labels * (1 - self.smoothing) + 0.5 * self.smoothing
            return F.binary_cross_entropy_with_logits(
                logits, smooth, pos_weight=self.weights, reduction="none"
            ).mean(1)
        return F.cross_entropy(
            logits, labels, weight=self.weights, label_smoothing=self.smoothing, reduction="none"
        )

    def weight(self, labels: np.ndarray) -> float:
        """Sum of the weights of rows with these labels."""
        if self.kind in (REGRESSION, MULTI_LABEL) or self.class_weights is None:
            return float(len(labels))
        return float(self.class_weights[labels].sum())


def prior_of(prepared: Prepared) -> np.ndarray | None:
    """`calibration.class_prior` of the training rows of a single-label task; None for other tasks."""
    if prepared.schema.problem_type != SINGLE_LABEL:
        return None
    return class_prior(
        prepared.sets["train"].labels, len(prepared.schema.labels), Loss(prepared).class_weights
    )


def class_weights(
    spec: str | None, names: tuple[str, ...], kind: str, labels: np.ndarray
) -> np.ndarray | None:
    """Weights (C,) from `balanced` or `label=weight,...`; unnamed labels get 1.

    `balanced` is N / (C n_c) for single-label tasks and (N - n_c) / n_c on positives for multi-label ones.

    Raises:
        UsageError: the task has no classes, or a label or number cannot be read.
    """
    if spec is None:
        return None
    if kind == REGRESSION:
        raise UsageError("--class-weights: a regression task has no classes")
    if spec == "balanced":
        if kind == MULTI_LABEL:
            positive = labels.sum(0)
            return np.where(positive > 0, (len(labels) - positive) / np.maximum(positive, 1), 1.0)
        counts = np.bincount(labels, minlength=len(names))
        return np.where(counts > 0, len(labels) / (len(names) * np.maximum(counts, 1)), 0.0)
    weights = np.ones(len(names))
    for part in spec.split(","):
        name, _, number = part.rpartition("=")
        if name not in names:
            raise UsageError(f"--class-weights {part}: no such label", f"labels are: {', '.join(names[:10])}")
        try:
            weights[names.index(name)] = float(number)
        except ValueError as error:
            raise UsageError(f"--class-weights {part}: '{number}' is not a number") from error
        if not 0 <= weights[names.index(name)] < math.inf:
            raise UsageError(f"--class-weights {part}: a weight must be a finite number, at least 0")
    return weights

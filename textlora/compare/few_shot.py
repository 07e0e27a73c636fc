"""Contrastive training of the encoder for few rows, then logistic regression on its features: the way of
SetFit (arXiv 2209.11055).

Texts of one class are drawn together and others pushed apart by the supervised contrastive loss (arXiv
2004.11362), which takes every pair of a step at once where SetFit draws pairs. A step has several texts of
several classes; the loop, schedule and optimizer are the trainer's.
"""

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.compare.full_finetuning import FullFinetuningModel
from textlora.core.config import SINGLE_LABEL
from textlora.core.errors import UsageError
from textlora.data.tokenize import PackedBatch
from textlora.model.base import BaseWeights
from textlora.model.encoder import PackedEncoder
from textlora.training.prepare import Prepared
from textlora.training.trainer import Trainer

ROWS_PER_STEP, MOST_CLASSES = 16, 8
TEMPERATURE = 0.1


class Embedder(FullFinetuningModel):
    """The whole encoder as a model whose outputs are pooled features of length 1, (B, H)."""

    def __init__(self, base: BaseWeights, device: str, encoder: PackedEncoder, pooling: str):
        super().__init__(base, "all", 1, pooling=pooling, device=device, encoder=encoder)
        self._leaves = {
            name: tensor for name, tensor in self._leaves.items() if not name.startswith("pooler.")
        }  # features do not pass it
        self.modules_to_save, self._trainable = [], self._leaves

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        return F.normalize(self.features(batch).float(), dim=1)


class Contrast:
    """The supervised contrastive loss, in the place of `losses.Loss`."""

    def __call__(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of each row (B,), 0 where no other is of its class; features (B, H) of length 1."""
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        alike = (labels[:, None] == labels[None, :]) & ~itself
        shares = torch.log_softmax(
            (features @ features.T / TEMPERATURE).masked_fill(itself, -torch.inf), dim=1
        )
        return -shares.masked_fill(~alike, 0.0).sum(1) / alike.sum(1).clamp(min=1)

    def weight(self, labels: np.ndarray) -> float:
        """How many rows have another of their class."""
        counts = np.unique(labels, return_counts=True)[1]
        return float(counts[counts > 1].sum())


def draw_steps(labels: np.ndarray, epochs: float, seed: int) -> list[tuple[float, list[int]]]:
    """Steps as `steps.plan` gives them: up to 8 classes, the same number of rows of each, 16 in all; as many
    rows as the epochs have."""
    rng = np.random.default_rng([seed, 9])
    places = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    count, steps = max(1, math.ceil(len(labels) * epochs / ROWS_PER_STEP)), []
    for i in range(count):
        classes = rng.permutation(len(places))[:MOST_CLASSES]
        each = max(2, ROWS_PER_STEP // len(classes))
        rows = [row for c in classes for row in rng.permutation(places[c])[:each].tolist()]
        steps.append((epochs * (i + 1) / count, rows))
    return steps


def train_embedder(prepared: Prepared, base: BaseWeights, encoder: PackedEncoder) -> Embedder:
    """Train on the run's rows.

    Raises:
        UsageError: the task is not single-label.
        TrainingError: the loss is not finite.
    """
    if prepared.schema.problem_type != SINGLE_LABEL:
        raise UsageError("few-shot needs one class per row")
    model = Embedder(base, prepared.device, encoder, prepared.pooling)
    train = prepared.sets["train"]
    steps = draw_steps(train.labels, prepared.config.epochs, prepared.config.seed)
    end = [steps[-1][0]]
    trainer = Trainer(
        replace(prepared, model=model, sets={"train": train}),
        None,
        end,
        loss=Contrast(),
        steps=steps,
        whole_steps=True,
    )
    for _ in trainer.records():
        pass
    return model

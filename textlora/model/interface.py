"""What every job asks of a classifier, stated in one place. Nothing else is read from a model."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from textlora.data.tokenize import PackedBatch
from textlora.kernels.devices import Runs


class Model(Runs, Protocol):
    """What the jobs need of a classifier. Tensors of `trainable` are float32 leaves under PEFT's file names."""

    path: str  # "packed" or "reference"
    # blocks below the lowest adapted one, always the same for a text; 0 where hidden states cannot be had
    depth: int
    width: int  # H of the hidden states above those blocks
    max_length: int
    gradient_checkpointing: bool
    target_modules: list[str]
    modules_to_save: list[str]

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        """Logits (B, C) float32 in packed order. `dropout_seed` draws LoRA's dropout masks, None means none;
        the base's own dropout is always off."""

    def trainable(self) -> dict[str, Tensor]: ...

    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None: ...

    def for_training(self) -> "Model":
        """The same classifier, the very tensors, as it trains fastest."""

    def for_inference(self, precision: str) -> "Model":
        """The same classifier as it predicts fastest, for good; `precision` is one of `config.PRECISIONS`.
        Raises UsageError where that cannot be had."""

    def base_hash(self) -> str: ...

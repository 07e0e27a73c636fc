"""A fresh classifier on a base, by the fastest executor that knows its architecture."""

import torch

from textlora.core.config import LoraConfig
from textlora.kernels.devices import torch_threads
from textlora.model.base import BaseFiles, BaseWeights, read_weights
from textlora.model.families import EncoderSpec, read_spec
from textlora.model.interface import Model
from textlora.model.packed_model import PackedModel


def open_model(
    files: BaseFiles,
    lora: LoraConfig,
    num_labels: int,
    *,
    pooling: str = "first",
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Model, str | None]:
    """A fresh classifier on a base: the packed path where the architecture has one, else transformers + peft.

    Returns:
        the model, and where it is the reference path the reason.
    """
    spec = read_spec(files.config)
    reason = spec if isinstance(spec, str) else _unpacked(spec, lora)
    if reason is not None:
        from textlora.model.reference_model import ReferenceModel  # brings transformers and peft, seconds

        return ReferenceModel.create(
            files.folder, lora, num_labels, pooling=pooling, seed=seed, device=device, dtype=dtype
        ), reason
    weights = read_weights(files.folder, spec, pooler=pooling == "first", dtype=dtype)
    with torch_threads(1):
        weights = BaseWeights(spec, {name: t.to(device) for name, t in weights.tensors.items()}, weights.hash)
        return PackedModel(weights, lora, num_labels, pooling, seed, device), None


def _unpacked(spec: EncoderSpec, lora: LoraConfig) -> str | None:
    """Why an adapter needs the reference path although its architecture has a packed one."""
    name = f"{spec.family.prefix}.embeddings_project"  # PEFT's all-linear takes ELECTRA's too
    return f"LoRA on '{name}' is not on the fast path" if name in (lora.target_modules or ()) else None

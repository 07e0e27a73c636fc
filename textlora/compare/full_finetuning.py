"""Training the base itself on the packed path: every tensor (full fine-tuning), all biases (BitFit), or
nothing but the head.

`textlora compare` needs these beside LoRA. They run on the same `PackedBatch`, encoder and loop; only what
carries a gradient differs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from textlora.core.config import LoraConfig
from textlora.data.tokenize import PackedBatch
from textlora.model.base import BaseWeights
from textlora.model.encoder import PackedEncoder
from textlora.model.packed_model import PackedModel

PARTS = ("all", "biases", "head")


class FullFinetuningModel(PackedModel):
    """A packed classifier without LoRA whose base tensors, or some of them, are trained beside the head.

    The base is never written: trained tensors are float32 copies of it, used in its place. Query, key and
    value stay stacked as the encoder has them (`0.qkv.weight`), which changes nothing for an optimizer that
    works number by number. The head starts as that of a default LoRA run with the same seed.

    Args:
        part: "all", "biases" (arXiv 2106.10199), or "head": the features of a text then never change and may
            be given as `batch.hidden` (B, H).
        others: of `PackedModel`: pooling, seed, device, encoder.
    """

    def __init__(self, base: BaseWeights, part: str, num_labels: int, **others: Any):
        super().__init__(base, LoraConfig(), num_labels, **others)
        head = {name: tensor for name, tensor in self._trainable.items() if ".lora_" not in name}
        self.target_modules, self._slots = [], {}
        self.depth = base.spec.layers if part == "head" else 0
        tensors = {f"embeddings.{name}": tensor for name, tensor in self.encoder.embeddings.items()}
        tensors |= {
            f"{i}.{name}": tensor
            for i, block in enumerate(self.encoder.blocks)
            for name, tensor in block.items()
        }
        if any(self._frozen(layer) for layer in self._head):
            tensors |= {name: base.tensors[name] for name in ("pooler.weight", "pooler.bias")}
        chosen = {
            "all": lambda name: True,
            "biases": lambda name: name.endswith("bias"),
            "head": lambda name: False,
        }[part]
        self._leaves = {
            name: t.to(torch.float32, copy=True).requires_grad_()
            for name, t in tensors.items()
            if chosen(name)
        }
        self._trainable = self._leaves | head

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        """Logits (B, C); there is no LoRA, so nothing is dropped."""
        return self.head(self.features(batch))

    def features(self, batch: PackedBatch) -> Tensor:
        """What the head sees of each text, (B, H)."""
        if batch.hidden is not None:
            return batch.hidden
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        return self._trained_encoder().forward(batch, {}, pooling=self.pooling, checkpointing=checkpointing)

    def _trained_encoder(self) -> PackedEncoder:
        """The base's encoder with the trained tensors in their places, in the precision of the base."""
        if not self._leaves:
            return self.encoder
        encoder = self.encoder.plain()  # laid out, weights are others and get no gradients
        place = lambda prefix, tensors: {
            name: self._placed(f"{prefix}.{name}", tensor) for name, tensor in tensors.items()
        }
        encoder.embeddings = place("embeddings", self.encoder.embeddings)
        encoder.blocks = [place(str(i), block) for i, block in enumerate(self.encoder.blocks)]
        return encoder

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        return self._leaves[name].to(self.dtype) if name in self._leaves else tensor

    def _base_tensor(self, ours: str) -> Tensor:
        return self._leaves.get(ours, self.base.tensors[ours])

    @property
    def one_core(self) -> bool:
        return not self._leaves and super().one_core

    @property
    def mixes(self) -> bool:
        return not self._leaves


class FeatureModel(FullFinetuningModel):
    """The frozen encoder (part "head") as a model whose outputs are the features (B, H)."""

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        return self.features(batch).float()


def transformers_names(model: FullFinetuningModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Trained tensors, or their gradients, under the names of the transformers classifier; q, k and v apart
    again."""
    family = model.base.spec.family
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block, _, rest = name.partition(".")
        if rest.startswith("qkv."):
            for slot, part in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                named[f"{family.module(int(block), slot)}.{rest.removeprefix('qkv.')}"] = part
        elif block == "pooler":
            named[f"{model._head[0].module}.{rest}"] = tensor
        elif name in model._leaves:
            theirs = model.base.spec.tensors()[name]
            named[f"{family.prefix}.{theirs}"] = tensor
        else:
            named[name.removeprefix("base_model.model.")] = tensor
    return named

"""PiSSA (arXiv 2404.02948): A and B start as the principal part of each weight, and only what is left of the
weight stays frozen.

    W = U S V^T,   A0 = sqrt(S_r / s) V_r^T,   B0 = U_r sqrt(S_r / s),   W_rest = W - s B0 A0

The base that is shared is never edited, so what is saved is an ordinary LoRA of rank 2r on it: s (B A - B0
A0) is the product of [B, -B0] and [A; A0].
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from textlora.core.config import LoraConfig
from textlora.model.adapter_tensors import PREFIX
from textlora.model.base import BaseWeights
from textlora.model.encoder import PackedEncoder
from textlora.model.packed_model import PackedModel


def principal(weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r), float32, such that `scaling * B0 @ A0` is the best approximation of
    `weight` (out, in) of rank r."""
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


class PissaModel(PackedModel):
    """A packed classifier whose LoRA starts at the principal singular vectors.

    Args:
        starts: full module name -> (A0, B0) that another model of this base and these settings has computed;
            filled with what is missing.
        others: of `PackedModel`: pooling, seed, device, encoder.
    """

    def __init__(
        self,
        base: BaseWeights,
        lora: LoraConfig,
        num_labels: int,
        starts: dict[str, tuple[Tensor, Tensor]],
        **others: Any,
    ):
        super().__init__(base, lora, num_labels, **others)
        rest = {}
        with torch.no_grad():
            for full, (layer, slot) in self._slots.items():
                if full not in starts:
                    starts[full] = principal(
                        base.tensors[f"{layer}.{slot}.weight"], lora.r, self._scalings[full]
                    )
                A, B = starts[full]
                weight = base.tensors[f"{layer}.{slot}.weight"]
                rest[f"{layer}.{slot}.weight"] = (weight.float() - self._scalings[full] * (B @ A)).to(
                    weight.dtype
                )
                self._trainable[f"{PREFIX}{full}.lora_A.weight"].copy_(A)
                self._trainable[f"{PREFIX}{full}.lora_B.weight"].copy_(B)
        self.encoder = PackedEncoder(replace(base, tensors=base.tensors | rest)).for_training()
        self._starts = {full: starts[full] for full in self._slots}

    def ordinary(self) -> tuple[LoraConfig, dict[str, Tensor]]:
        """The same classifier as LoRA of rank 2r on the unchanged base: its settings, and its tensors under
        PEFT's names."""
        tensors = {name: tensor.detach() for name, tensor in self._trainable.items()}
        for full, (A, B) in self._starts.items():
            a, b = f"{PREFIX}{full}.lora_A.weight", f"{PREFIX}{full}.lora_B.weight"
            tensors[a], tensors[b] = torch.cat([tensors[a], A]), torch.cat([tensors[b], -B], dim=1)
        r = 2 * self.lora.r
        return replace(self.lora, r=r, lora_alpha=self.lora.scaling * r, use_rslora=False), tensors

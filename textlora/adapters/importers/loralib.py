"""loralib checkpoints (microsoft/LoRA, arXiv 2106.09685) to PEFT's names.

loralib saves `<layer>.lora_A` (r, in) and `<layer>.lora_B` (out, r) and scales by lora_alpha / r; lora_alpha
is not in the file. Its `MergedLinear` is a fused q, k, v layer with LoRA on n of the three parts, each with
an A and B of its own: lora_A (n r, in) stacks the As, lora_B (n out/3, r) the Bs, and a part's update is B_g
A_g on its rows.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textlora.adapters.folder import peft_config
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, UsageError

_SIBLINGS = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
    ("q", "k", "v"),
)
_PARTS = {
    3: (0, 1, 2),
    2: (0, 2),
}  # adapted parts of a fused q, k, v layer by their number; two are q and v, as in loralib's README


@dataclass(frozen=True)
class Converted:
    """PEFT's config and tensors, and by full layer name the update of its weight as loralib defines it, for
    checking."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    updates: dict[str, Tensor]


def to_peft(
    path: Path,
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, tuple[int, ...]],
    lora_alpha: float | None,
) -> Converted:
    """Tensors under PEFT's names.

    Args:
        path: of the checkpoint, for messages.
        tensors: as saved.
        parameters: name -> shape of every parameter of the transformers classifier the checkpoint belongs to.
        lora_alpha: as in training.

    Raises:
        AdapterError: a tensor does not fit the model.
        UsageError: `lora_alpha` is not given.
    """
    layers = {
        name.removesuffix(".lora_A"): tensor for name, tensor in tensors.items() if name.endswith(".lora_A")
    }
    if not layers:
        raise AdapterError(f"{path}: holds no tensor named <layer>.lora_A", "is this a loralib checkpoint?")
    ranks: dict[str, int] = {}
    placed: dict[str, tuple[Tensor, Tensor]] = {}
    updates: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for layer, A in layers.items():
        B = tensors.get(f"{layer}.lora_B")
        if B is None or A.ndim != 2 or B.ndim != 2 or not B.shape[1] or A.shape[0] % B.shape[1]:
            raise AdapterError(
                f"{path}: '{layer}' has no lora_A (r, in) and lora_B (out, r) that fit each other"
            )
        r = B.shape[1]
        if lora_alpha is None:
            raise UsageError(
                f"{path} does not say its scale, lora_alpha / {r}",
                "pass the lora_alpha it was trained with as --lora-alpha",
            )
        for name, a, b, update in _places(path, layer, A, B, parameters):
            if name in placed:
                raise AdapterError(f"{path}: two tensors for the layer '{name}'")
            ranks[name], alphas[name] = a.shape[0], lora_alpha * a.shape[0] / r
            placed[name], updates[name] = (a, b), update * (lora_alpha / r)
    found: dict[str, Tensor] = {}
    for name, (a, b) in placed.items():
        found |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    rest = {name: tensor for name, tensor in tensors.items() if not name.endswith((".lora_A", ".lora_B"))}
    if whole := next((name for name in placed if f"{name}.weight" in rest), None):
        what = f"{path}: holds the weight of the adapted layer '{whole}', and loralib may have merged the update into it"
        raise AdapterError(what, "save lora_state_dict(model) and the head alone")
    bias = _bias(path, rest, placed, parameters)
    renamed = {
        name: name.removesuffix("bias") + "base_layer.bias" if name.removesuffix(".bias") in placed else name
        for name in rest
    }
    found |= {f"base_model.model.{renamed[name]}": tensor for name, tensor in rest.items()}
    first = next(iter(placed))
    lora = LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={name: r for name, r in ranks.items() if r != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        bias=bias,
    )
    modules = sorted({name.rpartition(".")[0] for name in rest})
    return Converted(peft_config(lora, list(placed), modules, "first", None, None), found, updates)


def _bias(
    path: Path, rest: Mapping[str, Tensor], layers: Collection[str], parameters: Mapping[str, tuple[int, ...]]
) -> str:
    """PEFT's word for the biases saved without their weights: those of the adapted layers, or all of them."""
    alone = {
        name for name in rest if name.endswith(".bias") and name.removesuffix("bias") + "weight" not in rest
    }
    if not alone:
        return "none"
    if alone == {f"{layer}.bias" for layer in layers}:
        return "lora_only"
    if alone == {name for name in parameters if name.endswith(".bias")} - rest.keys() | alone:
        return "all"
    raise AdapterError(
        f"{path}: holds the bias '{min(alone)}' of the base, but neither those of the adapted layers nor all"
    )


def _places(
    path: Path, layer: str, A: Tensor, B: Tensor, parameters: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """(layer, A, B, update before scaling) for each dense layer of the model that one pair of tensors belongs
    to."""
    groups, r = A.shape[0] // B.shape[1], B.shape[1]
    shape = parameters.get(f"{layer}.weight")
    if groups == 1 and shape == (B.shape[0], A.shape[1]):
        return [(layer, A, B, B @ A)]
    parts = _PARTS.get(groups)
    if parts is None or B.shape[0] % groups:
        why = f"lora_A {tuple(A.shape)} and lora_B {tuple(B.shape)} fit neither a layer of this base nor two or three parts of a fused one"
        raise AdapterError(f"{path}: '{layer}': {why}", "pass the base it was trained on as --model")
    width, each = B.shape[0] // groups, list(zip(A.split(r), B.split(B.shape[0] // groups), strict=True))
    if shape == (
        3 * width,
        A.shape[1],
    ):  # fused in this model too: one LoRA of rank n r, zero where a part or pair does not meet
        fused, update = torch.zeros(3 * width, groups * r), torch.zeros(3 * width, A.shape[1])
        for k, (part, (a, b)) in enumerate(zip(parts, each, strict=True)):
            fused[part * width : (part + 1) * width, k * r : (k + 1) * r] = b
            update[part * width : (part + 1) * width] = b @ a
        return [(layer, A, fused, update)]
    parent = layer.rpartition(".")[0]
    for names in _SIBLINGS:
        if all(parameters.get(f"{parent}.{name}.weight") == (width, A.shape[1]) for name in names):
            return [
                (f"{parent}.{names[part]}", a, b, b @ a) for part, (a, b) in zip(parts, each, strict=True)
            ]
    raise AdapterError(
        f"{path}: the base has no layer '{layer}' of {3 * width} x {A.shape[1]}",
        "pass the base it was trained on as --model",
    )

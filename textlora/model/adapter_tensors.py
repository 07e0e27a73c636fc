"""An adapter's tensors by PEFT's names: copied strictly, heads required, scaled and shifted, counted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from textlora.core.errors import AdapterError
from textlora.kernels.devices import torch_threads
from textlora.model.base import all_finite

PREFIX = "base_model.model."


def require_heads(modules_to_save: Sequence[str], given: Mapping[str, Tensor]) -> None:
    """Refuse an adapter that lacks a whole head module, which the base has no weights for either.

    The commonest loss in PEFT folders (peft issues 310, 577, 876, 2171). Raises AdapterError.
    """
    for module in modules_to_save:
        if not any(f".{module}." in name and ".lora_" not in name for name in given):
            raise AdapterError(
                f"head module '{module}' is neither in the base nor in the adapter, so it would be random",
                f"train again with '{module}' in PEFT's modules_to_save",
            )


def copy_strictly(mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy `given` into `mine` in place.

    Raises:
        AdapterError: a tensor is missing, unknown, of another shape, or holds values that are not finite.
    """
    for name in mine:
        if name not in given:
            raise AdapterError(f"tensor '{name}' is missing from the adapter")
    for name, tensor in given.items():
        if name not in mine:
            raise AdapterError(f"tensor '{name}' of the adapter has no place in this model")
        if tensor.shape != mine[name].shape:
            raise AdapterError(
                f"tensor '{name}' has shape {tuple(tensor.shape)}, this model needs {tuple(mine[name].shape)}"
            )
        if not all_finite(tensor):
            raise AdapterError(f"tensor '{name}' holds values that are not finite numbers")
    with torch.no_grad(), torch_threads(1):
        for name, tensor in given.items():
            mine[name].copy_(tensor)


def scaled_head(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The same tensors with the weight and bias of the head's last layer, which stand last, multiplied by
    `factor` as copies: every logit is then `factor` times as large."""
    last = list(tensors)[-1].rpartition(".")[0]
    return {
        name: t.detach() * factor if name.rpartition(".")[0] == last and factor != 1 else t
        for name, t in tensors.items()
    }


def shifted_head(
    tensors: Mapping[str, Tensor], shift: Sequence[float] | None, sign: int = 1
) -> dict[str, Tensor]:
    """The same tensors with `shift` (C,) added to the head's last bias, which stands last, as a copy; with
    sign -1 taken off it."""
    if shift is None:
        return dict(tensors)
    name, bias = list(tensors.items())[-1]
    return {**tensors, name: bias.detach() + sign * torch.tensor(shift, dtype=bias.dtype, device=bias.device)}


def parameter_counts(tensors: Mapping[str, Any]) -> tuple[int, int]:
    """Numbers of parameters: (A, B and magnitudes, head)."""
    adapter = sum(math.prod(t.shape) for name, t in tensors.items() if ".lora_" in name)
    return adapter, sum(math.prod(t.shape) for t in tensors.values()) - adapter

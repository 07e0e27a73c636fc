"""Products of the frozen base, for inference: weights laid out once for the processor, bias and GELU in the same pass.

oneDNN runs float32 products 8 to 12% faster on weights laid out for it, and a fused GELU saves a pass over the widest rows (docs/log.md). It
keeps about a mebibyte for each shape it has seen, and packed batches hardly repeat one: so rows come in steps, and products of more rows are cut.
"""

import platform
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.int8 import Int8Weight

STEP = 32  # tokens; a batch is filled up to a whole number of steps ...
MOST = 1024  # rows of one product


@dataclass(frozen=True)
class LaidOutWeight:
    """Weight (out, in) of a dense layer, float32, in oneDNN's own order, beside the plain one."""

    plain: Tensor
    laid_out: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "LaidOutWeight":
        return cls(weight, torch.ops.mkldnn._reorder_linear_weight(weight, MOST))

    @property
    def shape(self) -> torch.Size:
        return self.plain.shape

    def __getitem__(self, rows: slice) -> "LaidOutWeight | Tensor":
        return self if rows == slice(None) else self.plain[rows]

    def product(self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
        """`f(x W^T + b) + residual`, or the plain weight's where T is no whole number of steps."""
        if len(x) % STEP or (residual is not None and activation is not None):
            return dense(x, self.plain, bias, activation, residual)
        if len(x) > MOST:
            rests = [None] * -(-len(x) // MOST) if residual is None else residual.split(MOST)
            return torch.cat([self.product(part, bias, activation, rest) for part, rest in zip(x.split(MOST), rests, strict=True)])
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.laid_out, bias, "add")
        if activation == "gelu":
            return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, bias, "gelu", [], "none")
        return activate(torch.ops.mkldnn._linear_pointwise(x, self.laid_out, bias, "none", [], ""), activation)


Weight = Tensor | Int8Weight | LaidOutWeight


def activate(x: Tensor, name: str | None) -> Tensor:
    """Apply an activation by its transformers name; None is the identity."""
    if name is None:
        return x
    if name == "gelu":
        return F.gelu(x)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if name == "relu" else torch.tanh(x)


def dense(x: Tensor, weight: Weight, bias: Tensor | None, activation: str | None = None, residual: Tensor | None = None) -> Tensor:
    """A frozen dense layer and what follows it, `f(x W^T + b) + residual`: x (T, in) to (T, out)."""
    if isinstance(weight, LaidOutWeight):
        return weight.product(x, bias, activation, residual)
    y = activate(F.linear(x, weight, bias) if isinstance(weight, Tensor) else weight.product(x, bias), activation)
    return y if residual is None else residual + y


def lays_out(weight: Tensor) -> bool:
    """Whether `LaidOutWeight` works here and gains: float32 on an x86 processor, with oneDNN in this torch."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and platform.machine().lower() in ("x86_64", "amd64")
    return fits and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def filled_up(tokens: int) -> int:
    """`tokens` up to the next whole number of steps."""
    return -(-tokens // STEP) * STEP

"""Dense layers of a frozen base in 8-bit integers, for inference: weights rounded once, one scale per output; activations as they come, one
scale per token. So a token's result depends on no other token of the batch, and integer sums are exact.

Scheme: symmetric, `q = round(x / s)`, `s = max|x| / 127`, as vector-wise quantisation in Dettmers et al. 2022 (arXiv 2208.07339, section 2.1), without its outlier part.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from textlora.errors import UsageError

LEVELS = 127


@dataclass(frozen=True)
class Int8Weight:
    """Weight of a dense layer: q (out, in) int8 and scale (out,) float32, `W = scale q`."""

    q: Tensor
    scale: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        scale = weight.abs().amax(1).clamp_min(1e-12).div(LEVELS)
        return cls((weight / scale.unsqueeze(1)).round_().to(torch.int8).contiguous(), scale)

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def __getitem__(self, rows: slice) -> "Int8Weight":
        return Int8Weight(self.q[rows], self.scale[rows])

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + b`: (T, in) to (T, out)."""
        scale = x.abs().amax(1, keepdim=True).clamp_min_(1e-12).div_(LEVELS)
        y = torch._int_mm((x / scale).round_().to(torch.int8), self.q.t()) * scale
        return y.mul_(self.scale) if bias is None else torch.addcmul(bias, y, self.scale)


def require_int8(device: torch.device | str) -> None:
    """Check that integer products are exact here: some processors saturate their 16-bit sums.

    Raises:
        UsageError: no integer products on this device, or wrong ones.
    """
    if torch.device(device).type != "cpu":
        raise UsageError("--precision int8: only on CPUs", "leave it out, or use --device cpu")
    x = torch.full((64, 64), LEVELS, dtype=torch.int8)
    try:
        right = bool((torch._int_mm(x, x.t()) == 64 * LEVELS**2).all())
    except (RuntimeError, AttributeError) as error:
        raise UsageError("--precision int8: this torch has no integer products here", "leave it out") from error
    if not right:
        raise UsageError("--precision int8: integer products overflow on this processor", "leave it out")

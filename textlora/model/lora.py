"""The equation, three times: slow and plain, fused for training, and as a weight difference for merging.

    y = x W^T + b + s (x A^T) B^T        W [out, in] frozen, A [r, in], B [out, r], s = lora_alpha / r

(arXiv 2106.09685; rsLoRA: s = lora_alpha / sqrt(r), arXiv 2312.03732). A starts Kaiming-uniform and B at
zero, so a fresh adapter changes nothing. DoRA (arXiv 2402.09353) scales each output row of the adapted weight
to a learned length:

    y = c (x W^T + s (x A^T) B^T) + b    c = m / ||W + s B A||_row, the norm held constant in the gradient
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.kernels.packed_linear import PackedTrainingWeight, dense, dense_back


@dataclass(frozen=True)
class Lora:
    """LoRA on one dense layer: A (r, in), B (out, r), scale s, DoRA's magnitude (out,) or None, dropout on
    its input."""

    A: Tensor
    B: Tensor
    scaling: float
    magnitude: Tensor | None = None
    dropout: float = 0.0


def init_lora(out: int, inner: int, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, inner) Kaiming-uniform with a = sqrt(5), as PEFT and loralib have it, and B (out, r) at zero;
    float32."""
    bound = 1 / math.sqrt(inner)
    return torch.empty(r, inner).uniform_(-bound, bound, generator=generator), torch.zeros(out, r)


def weight_norm(weight: Tensor, lora: Lora) -> Tensor:
    """Row lengths (out,) of `W + s B A`, without a gradient (section 4.3 of the DoRA paper)."""
    with torch.no_grad():
        return torch.linalg.vector_norm(
            weight.float() + lora.scaling * (lora.B.float() @ lora.A.float()), dim=1
        )


def dora_scale(weight: Tensor, lora: Lora) -> Tensor | None:
    """DoRA's factor `c` (out,) on the adapted output of a dense layer; None where the adapter is not DoRA."""
    return None if lora.magnitude is None else lora.magnitude / weight_norm(weight, lora)


def delta(weight: Tensor, lora: Lora) -> Tensor:
    """What merging adds to `weight`, (out, in): `s B A`, or with DoRA `c (W + s B A) - W`."""
    change, scale = lora.scaling * (lora.B @ lora.A), dora_scale(weight, lora)
    return change if scale is None else scale.unsqueeze(1) * (weight + change) - weight


def reference_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, loras: Sequence[tuple[int, Lora]]
) -> Tensor:
    """The formula as written, by autograd, one adapted slice at a time: the oracle of `lora_linear`. No
    dropout."""
    outputs, at = [], 0
    for start, lora in loras:
        stop = start + lora.B.shape[0]
        outputs.append(F.linear(x, weight[at:start]))
        part = F.linear(x, weight[start:stop]) + lora.scaling * (x @ lora.A.T) @ lora.B.T
        scale = dora_scale(weight[start:stop], lora)
        if scale is not None:
            part = scale * part
        outputs.append(part)
        at = stop
    outputs.append(F.linear(x, weight[at:]))
    y = torch.cat(outputs, dim=-1)
    return y if bias is None else y + bias


def lora_linear(
    x: Tensor,
    weight: Tensor | PackedTrainingWeight,
    bias: Tensor | None,
    loras: Sequence[tuple[int, Lora]],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Dense layer with LoRA on slices of its output: x (T, in) to (T, out).

    Args:
        weight: (out, in), frozen; several layers that read the same x may be stacked into it.
        loras: (first output row, Lora) in ascending order.
        generator: draws the dropout masks; None means no dropout.
    """
    if not loras:
        return dense(x, weight, bias)
    dora = any(lora.magnitude is not None for _, lora in loras)
    masks = [
        torch.rand(x.shape, generator=generator, device=x.device) >= lora.dropout
        if generator is not None and lora.dropout
        else None
        for _, lora in loras
    ]
    pairs = [tensor for _, lora in loras for tensor in (lora.A, lora.B)]
    starts = [start for start, _ in loras]
    scalings = [lora.scaling for _, lora in loras]
    keeps = [1 - lora.dropout for _, lora in loras]
    y = _LoraLinear.apply(x, weight, None if dora else bias, starts, scalings, keeps, masks, *pairs)
    if not dora:
        return y
    pieces, at = [], 0
    for start, lora in loras:
        stop = start + lora.B.shape[0]
        pieces.append(y.new_ones(start - at))
        scale = dora_scale(weight[start:stop], lora)
        pieces.append(y.new_ones(stop - start) if scale is None else scale.to(y.dtype))
        at = stop
    pieces.append(y.new_ones(weight.shape[0] - at))
    y = y * torch.cat(pieces)
    return y if bias is None else y + bias


class _LoraLinear(torch.autograd.Function):
    """Fused forward and backward: keeps x and the small u = x A^T only, writes into slices, no gradient for
    W.

    Adapters that see the same x share one product with all their A, side by side: x and its gradient are read
    and written once.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, starts, scalings, keeps, masks, *pairs):
        y = dense(x, weight, bias)
        dropped = any(mask is not None for mask in masks)
        groups = [[k] for k in range(len(starts))] if dropped else [list(range(len(starts)))]
        scaled = [(scaling * B).to(x.dtype) for scaling, B in zip(scalings, pairs[1::2], strict=True)]
        joined = [torch.cat([pairs[2 * k] for k in group]).to(x.dtype) for group in groups]
        us = []
        for group, A in zip(groups, joined, strict=True):
            us.append(_masked(x, masks[group[0]], keeps[group[0]]) @ A.T)
            for k, u in zip(group, us[-1].split([scaled[k].shape[1] for k in group], 1), strict=True):
                y[:, starts[k] : starts[k] + len(scaled[k])].addmm_(u, scaled[k].T)
        ctx.save_for_backward(x, *scaled, *joined, *us, *(mask for mask in masks if mask is not None))
        ctx.weight, ctx.groups, ctx.starts, ctx.scalings, ctx.keeps = weight, groups, starts, scalings, keeps
        ctx.masked, ctx.dtype = [mask is not None for mask in masks], pairs[0].dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        n, m = len(ctx.starts), len(ctx.groups)
        x, *rest = ctx.saved_tensors
        scaled = rest[:n]
        joined = rest[n : n + m]
        us = rest[n + m : n + 2 * m]
        given = iter(rest[n + 2 * m :])
        masks = [next(given) if masked else None for masked in ctx.masked]
        dx = dense_back(dy, ctx.weight) if ctx.needs_input_grad[0] else None
        grads: list[torch.Tensor] = []
        for group, A, u in zip(ctx.groups, joined, us, strict=True):
            ranks = [scaled[k].shape[1] for k in group]
            parts = [dy[:, ctx.starts[k] : ctx.starts[k] + len(scaled[k])] for k in group]
            du = torch.cat([part @ scaled[k] for k, part in zip(group, parts, strict=True)], 1)
            mask, keep = masks[group[0]], ctx.keeps[group[0]]
            dA = (du.T @ _masked(x, mask, keep)).to(ctx.dtype).split(ranks)
            if dx is not None and mask is None:
                dx.addmm_(du, A)
            elif dx is not None:
                dx += _masked(du @ A, mask, keep)
            for k, part, one, inner in zip(group, parts, dA, u.split(ranks, 1), strict=True):
                grads += [one, (part.T @ inner).to(ctx.dtype).mul_(ctx.scalings[k])]
        return dx, None, None, None, None, None, None, *grads


def _masked(x: Tensor, mask: Tensor | None, keep: float) -> Tensor:
    return x if mask is None else x * mask / keep

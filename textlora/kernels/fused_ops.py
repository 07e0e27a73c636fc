"""What lies between the products of a block, with gradients: bias and GELU, and bias, residual sum and norm;
whole blocks; and means of texts.

On a CPU each of the former is one pass of C (passes.c), which torch takes two to four for, and all blocks are
one call (train.c). The base's tensors get no gradient.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from textlora.kernels import bindings
from textlora.kernels.block_training import Adapted, Blocks, Piece


def fits(*base: Tensor) -> bool:
    """Whether these biases, weights and shifts (width,) of the base can be given here, where they get no
    gradient."""
    return all(bindings.has_passes(tensor) for tensor in base)


def add_gelu(product: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(product + bias)`, (T, width). Writes over the product, which nobody else may read."""
    if torch.is_grad_enabled() and product.requires_grad:
        return _Gelu.apply(product, bias)
    bindings.gelu(product, bias, product, False)
    return product


def add_norm(
    product: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """`layer_norm(product + bias + residual)`, (T, width); the last four of (width,). Writes over the
    product, which nobody else may read."""
    return _Norm.apply(product, bias, residual.contiguous(), weight, shift, eps)


def mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean of each text's rows, (T, width) to (B, width); cu_seqlens (B+1,) int32."""
    return (
        _Mean.apply(x, cu_seqlens)
        if torch.is_grad_enabled() and x.requires_grad
        else bindings.mean(x.contiguous(), cu_seqlens)
    )


def blocks(
    x: Tensor,
    frozen: Blocks,
    cu_seqlens: Tensor,
    adapters: Sequence[Adapted],
    first: int,
    last: int,
    only_first: bool,
    again: bool,
) -> Tensor:
    """Blocks `first` to `last` - 1, (T, width) to (T, width), or (B, width) with `only_first`, with LoRA on
    query, key or value, in order of blocks and columns: x and every A and B get gradients. `again`: keep each
    block's input alone for the way back."""
    pairs = [tensor for one in adapters for tensor in (one.A, one.B)]
    lowest = last
    if torch.is_grad_enabled():
        wanted = [one.block for one in adapters if one.A.requires_grad or one.B.requires_grad]
        lowest = first if x.requires_grad else min(wanted, default=last)
    return _Blocks.apply(
        x.contiguous(), frozen, Piece(cu_seqlens, adapters, first, last, lowest, only_first, again), *pairs
    )


class _Gelu(torch.autograd.Function):
    """Keeps the slope in the product's place, so that the way back is one multiplication."""

    @staticmethod
    def forward(ctx, product, bias):
        out, slope = torch.empty_like(product), product.detach()
        bindings.gelu(slope, bias, out, True)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad), None


class _Norm(torch.autograd.Function):
    """Keeps the normed sum in the product's place and one number a row; the gradient of both addends takes
    its place in turn."""

    @staticmethod
    def forward(ctx, product, bias, residual, weight, shift, eps):
        out, scale, normed = torch.empty_like(product), product.new_empty(len(product)), product.detach()
        bindings.norm(normed, bias, residual, weight, shift, out, scale, eps)
        ctx.save_for_backward(normed, scale, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        bindings.norm_back(grad.contiguous(), weight, normed, scale)
        torch.autograd.graph.increment_version(
            normed
        )  # a second way back would find the gradient here: torch refuses it
        return normed, None, normed, None, None, None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens):
        ctx.save_for_backward(cu_seqlens)
        ctx.rows = len(x)
        return bindings.mean(x.contiguous(), cu_seqlens)

    @staticmethod
    def backward(ctx, grad):
        (cu_seqlens,) = ctx.saved_tensors
        return bindings.mean_back(grad.contiguous(), cu_seqlens, ctx.rows), None


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, frozen, piece, *pairs):
        y, kept = frozen.forward(x, piece)
        ctx.save_for_backward(x, kept, *pairs)
        ctx.frozen = frozen
        ctx.piece = replace(piece, adapters=[replace(one, A=None, B=None) for one in piece.adapters])
        return y

    @staticmethod
    def backward(ctx, grad):
        x, kept, *pairs = ctx.saved_tensors
        adapters = [
            replace(one, A=A, B=B)
            for one, A, B in zip(ctx.piece.adapters, pairs[::2], pairs[1::2], strict=True)
        ]
        dx, found = ctx.frozen.back(
            grad.contiguous(), kept, x, replace(ctx.piece, adapters=adapters), ctx.needs_input_grad[0]
        )
        torch.autograd.graph.increment_version(
            kept
        )  # a second way back would find gradients here: torch refuses it
        return dx, None, None, *(tensor for pair in found for tensor in pair)

"""What lies between the products of a block, with gradients: bias and GELU, and bias, residual sum and norm.

On a CPU each is one pass of C (native/passes.c), which torch takes two to four for; the base's biases, norm weights and shifts get no gradient.
Both write over the product they are given, which nobody else may read.
"""

import torch
from torch import Tensor

from textlora import native


def fits(*base: Tensor) -> bool:
    """Whether these biases, weights and shifts (width,) of the base can be given here, where they get no gradient."""
    return all(native.has_passes(tensor) for tensor in base)


def add_gelu(product: Tensor, bias: Tensor | None) -> Tensor:
    """`gelu(product + bias)`, (T, width)."""
    if torch.is_grad_enabled() and product.requires_grad:
        return _Gelu.apply(product, bias)
    native.gelu(product, bias, product, False)
    return product


def add_norm(product: Tensor, bias: Tensor, residual: Tensor, weight: Tensor, shift: Tensor, eps: float) -> Tensor:
    """`layer_norm(product + bias + residual)`, (T, width); the last four of (width,)."""
    return _Norm.apply(product, bias, residual.contiguous(), weight, shift, eps)


class _Gelu(torch.autograd.Function):
    """Keeps the slope in the product's place, so that the way back is one multiplication."""

    @staticmethod
    def forward(ctx, product, bias):
        out, slope = torch.empty_like(product), product.detach()
        native.gelu(slope, bias, out, True)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad), None


class _Norm(torch.autograd.Function):
    """Keeps the normed sum in the product's place and one number a row; the gradient of both addends takes its place in turn."""

    @staticmethod
    def forward(ctx, product, bias, residual, weight, shift, eps):
        out, scale, normed = torch.empty_like(product), product.new_empty(len(product)), product.detach()
        native.norm(normed, bias, residual, weight, shift, out, scale, eps)
        ctx.save_for_backward(normed, scale, weight)
        return out

    @staticmethod
    def backward(ctx, grad):
        normed, scale, weight = ctx.saved_tensors
        native.norm_back(grad.contiguous(), weight, normed, scale)
        torch.autograd.graph.increment_version(normed)  # a second way back would find the gradient here: torch refuses it
        return normed, None, normed, None, None, None

"""Attention over packed texts: inside each text only, by the fastest way of the device.

Shapes: T tokens, B texts, H width, h heads, d = H / h.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.data.tokenize import Layout
from textlora.kernels import bindings
from textlora.model.adapter_batch import ScaledLora

# torch's attention takes twice as long for 15 keys as for 16 (docs/log.md): a few keys that nobody looks at
# are added where that gains
KEYS, ODD_BELOW = 16, 80


@cache
def flash() -> Callable[..., Tensor] | None:
    """torch's attention over texts of any lengths. Imported when a GPU asks for it: torch's compiler comes
    along, two seconds of a start."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn


def in_one_call(x: Tensor) -> bool:
    """Whether texts of all lengths go through one call of flash attention (arXiv 2307.08691): on a GPU, in
    half precision."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and flash() is not None


def attend(projected: Tensor, queries: Tensor | None, layout: Layout, heads: int) -> Tensor:
    """Self-attention inside each text.

    Args:
        projected: (T, 3H) q, k, v of every token; or (T, 2H) k, v when `queries` are given. Rows after the
            last token give zeros on a CPU.
        queries: (B, H) queries of the first tokens only, or None.
        layout: where the texts lie.

    Returns:
        (T, H), or (B, H) where queries were given.
    """
    if in_one_call(projected):
        return _attend_varlen(projected, queries, layout, heads)
    if projected.device.type == "cpu":
        return _RunAttention.apply(projected, queries, layout, heads)
    return attend_plain(projected, queries, layout, heads)


def _attend_varlen(projected: Tensor, queries: Tensor | None, layout: Layout, heads: int) -> Tensor:
    *q, k, v = projected.unflatten(1, (3 if queries is None else 2, heads, -1)).unbind(1)
    if queries is None:
        return flash()(
            q[0], k, v, layout.cu_seqlens, layout.cu_seqlens, layout.longest, layout.longest
        ).flatten(1)
    firsts = torch.arange(len(queries) + 1, dtype=torch.int32, device=queries.device)
    return flash()(
        queries.unflatten(1, (heads, -1)), k, v, firsts, layout.cu_seqlens, 1, layout.longest
    ).flatten(1)


def attend_plain(projected: Tensor, queries: Tensor | None, layout: Layout, heads: int) -> Tensor:
    """`attend` by torch's own attention and autograd: the way in float32 on a GPU, and the oracle of the
    others."""
    outputs, runs = [], layout.runs
    sizes = [count * length for _, count, _, length in runs]
    for (first, count, _, length), part in zip(runs, projected.split(sizes), strict=True):
        *q, k, v = part.view(count, length, 3 if queries is None else 2, heads, -1).permute(2, 0, 3, 1, 4)
        q = (
            q[0]
            if queries is None
            else queries[first : first + count].view(count, 1, heads, -1).transpose(1, 2)
        )
        outputs.append(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3])
        )
    return torch.cat(outputs)


def attend_first(
    x: Tensor,
    queries: Tensor,
    layout: Layout,
    heads: int,
    weight: Tensor,
    value_bias: Tensor,
    key: ScaledLora | None,
    value: ScaledLora | None,
) -> Tensor:
    """Attention of one query per text without forming any key or value, exact up to rounding.

    For head h with `W_k,h` and `W_v,h` (d, H): `scores = (q_h W_k,h) X^T`, where the key's bias adds the same
    number to every score and so falls out of the softmax, and `out_h = (p_h X) W_v,h^T + b_v,h`. The only
    products over all tokens have h rows per text.

    Args:
        x: (T, H) input of the block, more rows do not matter; queries: (B, H), one per text.
        weight: (2H, H), keys then values; value_bias: (H,).
        key, value: LoRA on them, one for all texts or one per text.

    Returns:
        (B, H)
    """
    count, width = queries.shape
    d = width // heads
    key_weight, value_weight = weight[:width].view(heads, d, width), weight[width:].view(heads, d, width)
    q = queries * d**-0.5
    if key is not None and key.scale is not None:
        q = q * key.scale.to(q.dtype)
    q = q.view(count, heads, d)
    keys = torch.bmm(q.transpose(0, 1), key_weight).transpose(0, 1)
    if key is not None:
        keys = keys + (q.unsqueeze(2) @ _by_head(key.B, heads)).squeeze(2) @ key.A
    keys = keys.contiguous()
    means = []
    for first, texts, start, length in layout.runs:
        tokens = x[start : start + texts * length].view(texts, length, width)
        shares = torch.softmax(torch.bmm(keys[first : first + texts], tokens.transpose(1, 2)), dim=-1)
        means.append(torch.bmm(shares, tokens))
    mean = torch.cat(means)
    out = torch.bmm(mean.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1)
    if value is not None:
        out = out + (
            (mean @ value.A.transpose(-1, -2)).unsqueeze(2) @ _by_head(value.B, heads).transpose(-1, -2)
        ).squeeze(2)
    out = out.reshape(count, width)
    if value is not None and value.scale is not None:
        out = out * value.scale.to(out.dtype)
    return out + value_bias


def _by_head(B: Tensor, heads: int) -> Tensor:
    """(out, r) to (heads, d, r), with or without a leading dimension."""
    return B.unflatten(-2, (heads, -1))


class _RunAttention(torch.autograd.Function):
    """On a CPU: one call of `native.attention` for all texts that it takes; for others torch's flash
    attention, one call per stretch of equal lengths, gradients written into one buffer, since plain autograd
    would make a zero-filled (T, 3H) gradient for every slice.
    """

    @staticmethod
    def _divided(
        projected: Tensor, queries: Tensor | None, layout: Layout, heads: int
    ) -> tuple[int, list[tuple[int, int, int, int]]]:
        """How many texts, the first ones, go through one call, and the stretches of the others."""
        d, rest = projected.shape[1] // 3 / heads, layout.runs
        if (
            queries is not None
            or projected.dtype != torch.float32
            or d not in bindings.HEADS
            or not bindings.lanes()
        ):
            return 0, rest
        left = [run for run in rest if run[3] > bindings.LONGEST]  # texts lie shortest first
        return left[0][0] if left else len(layout.cu_seqlens) - 1, left

    @staticmethod
    def _views(
        projected: Tensor, queries: Tensor | None, run: tuple[int, int, int, int], heads: int
    ) -> list[Tensor]:
        first, count, start, length = run
        parts = projected[start : start + count * length].view(
            count, length, 3 if queries is None else 2, heads, -1
        )
        views = list(parts.permute(2, 0, 3, 1, 4))
        if queries is not None:
            views.insert(0, queries[first : first + count].view(count, 1, heads, -1).transpose(1, 2))
        return views

    @staticmethod
    def forward(ctx, projected, queries, layout, heads):
        width, runs = projected.shape[1] // (3 if queries is None else 2), layout.runs
        out = projected.new_empty((projected if queries is None else queries).shape[0], width)
        together, left = _RunAttention._divided(projected, queries, layout, heads)
        sums = []
        if together:
            projected = projected.contiguous()
            bindings.attention(projected, out, layout.cu_seqlens, together, heads)
        for run in left:
            q, k, v = _RunAttention._views(projected, queries, run, heads)
            mask = None
            if not ctx.needs_input_grad[0] and run[3] < ODD_BELOW and run[3] % KEYS >= KEYS // 2:
                extra = KEYS - run[3] % KEYS
                k, v = F.pad(k, (0, 0, 0, extra)), F.pad(v, (0, 0, 0, extra))
                mask = F.pad(k.new_zeros(run[3]), (0, extra), value=-torch.inf).expand(1, 1, q.shape[2], -1)
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)
            _RunAttention._rows(out, queries, run).copy_(part.transpose(1, 2).reshape(-1, width))
            sums.append(lse)
        if queries is None:
            out[sum(count * length for _, count, _, length in runs) :].zero_()
        ctx.save_for_backward(projected, queries, out if left else None, *sums)
        ctx.layout, ctx.heads, ctx.together, ctx.left = layout, heads, together, left
        return out

    @staticmethod
    def _rows(out: Tensor, queries: Tensor | None, run: tuple[int, int, int, int]) -> Tensor:
        first, count, start, length = run
        return out[start : start + count * length] if queries is None else out[first : first + count]

    @staticmethod
    def backward(ctx, grad):
        projected, queries, out, *sums = ctx.saved_tensors
        heads = ctx.heads
        d_projected = torch.empty_like(projected)
        d_queries = None if queries is None else torch.empty_like(queries)
        grad = grad.contiguous()
        if ctx.together:
            bindings.attention_back(projected, grad, d_projected, ctx.layout.cu_seqlens, ctx.together, heads)
        for run, lse in zip(ctx.left, sums, strict=True):
            views = _RunAttention._views(projected, queries, run, heads)
            targets = _RunAttention._views(d_projected, d_queries, run, heads)
            rows = [
                _RunAttention._rows(t, queries, run)
                .view(run[1], -1, heads, targets[0].shape[-1])
                .transpose(1, 2)
                for t in (grad, out)
            ]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                rows[0], *views, rows[1], lse, 0.0, False
            )
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
        return d_projected, d_queries, None, None

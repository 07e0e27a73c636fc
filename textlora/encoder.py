"""One packed forward for BERT-like encoders: no padding, LoRA by slot, only first tokens in the last layer where that is enough.

Shapes: T tokens, B texts, H width, h heads, d = H / h. Post-norm blocks as in Devlin et al. 2018 (arXiv 1810.04805).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.base import BaseWeights
from textlora.errors import UsageError
from textlora.lora import Lora, lora_linear
from textlora.tokens import PackedBatch

Runs = list[tuple[int, int, int, int]]
Loras = Mapping[tuple[int, str], Lora]


def activate(x: Tensor, name: str | None) -> Tensor:
    """Apply an activation by its transformers name; None is the identity."""
    if name is None:
        return x
    if name == "gelu":
        return F.gelu(x)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if name == "relu" else torch.tanh(x)


class PackedEncoder:
    """The frozen encoder over packed batches. Holds the base's tensors, q, k and v stacked; never changes them."""

    def __init__(self, weights: BaseWeights):
        self.spec = weights.spec
        tensors = weights.tensors
        self.embeddings = {name.removeprefix("embeddings."): t for name, t in tensors.items() if name.startswith("embeddings.")}
        self.blocks = []
        for i in range(self.spec.layers):
            block = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            for part in ("weight", "bias"):
                block[f"qkv.{part}"] = torch.cat([block.pop(f"{slot}.{part}") for slot in ("query", "key", "value")])
            self.blocks.append(block)

    def forward(self, batch: PackedBatch, loras: Loras, *, pooling: str = "first", generator: torch.Generator | None = None) -> Tensor:
        """Encode a batch.

        Args:
            loras: (layer, slot) -> LoRA, slots as in `families.SLOTS`.
            pooling: "first" gives each text's first token, "mean" the mean of its tokens.
            generator: draws LoRA dropout masks; None means no dropout.

        Returns:
            (B, H), texts in packed order.

        Raises:
            UsageError: a text is longer than the position table.
        """
        runs = batch.runs()
        if runs and runs[-1][3] > self.spec.max_length:
            raise UsageError(f"a text of {runs[-1][3]} tokens, the base model takes {self.spec.max_length}", "lower --max-length")
        x = self._embed(batch)
        firsts = batch.cu_seqlens[:-1].to(x.device)
        for i in range(self.spec.layers):
            last = i == self.spec.layers - 1 and pooling == "first"
            x = self._block(i, x, runs, loras, generator, firsts if last else None)
        if pooling == "first":
            return x if self.spec.layers else x[firsts]
        return torch.stack([part.mean(0) for part in x.split(batch.cu_seqlens.diff().tolist())])

    def _embed(self, batch: PackedBatch) -> Tensor:
        e = self.embeddings
        x = F.embedding(batch.ids, e["word"])
        if "type" in e:
            types = batch.type_ids if self.spec.family.uses_type_ids else torch.zeros_like(batch.type_ids)
            x = x + F.embedding(types, e["type"])
        x = x + F.embedding(self._positions(batch), e["position"])
        x = F.layer_norm(x, x.shape[-1:], e["norm.weight"], e["norm.bias"], self.spec.eps)
        return F.linear(x, e["project.weight"], e["project.bias"]) if "project.weight" in e else x

    def _positions(self, batch: PackedBatch) -> Tensor:
        """Rows (T,) of the position table. RoBERTa does not count a padding token, even one that a text spells out ("<pad>")."""
        offset = self.spec.position_offset
        if not offset:
            return batch.positions
        real = batch.ids != offset - 1
        counted = real.long().cumsum(0)
        first = torch.arange(real.numel(), device=real.device) - batch.positions
        before = (counted - real.long())[first]
        return torch.where(real, counted - before - 1 + offset, offset - 1)

    def _block(self, i: int, x: Tensor, runs: Runs, loras: Loras, generator: torch.Generator | None, firsts: Tensor | None) -> Tensor:
        w, hidden = self.blocks[i], self.spec.hidden

        def dense(value: Tensor, name: str, slots: tuple[str, ...], rows: slice = slice(None)) -> Tensor:
            adapted = [(k * hidden, loras[i, slot]) for k, slot in enumerate(slots) if (i, slot) in loras]
            return lora_linear(value, w[f"{name}.weight"][rows], w[f"{name}.bias"][rows], adapted, generator)

        if firsts is None:
            context = attend(dense(x, "qkv", ("query", "key", "value")), None, runs, self.spec.heads)
        else:
            keys_values = dense(x, "qkv", ("key", "value"), slice(hidden, None))
            x = x[firsts]
            context = attend(keys_values, dense(x, "qkv", ("query",), slice(hidden)), runs, self.spec.heads)
        x = self._norm(i, "attention_norm", x + dense(context, "attention_output", ("attention_output",)))
        inner = activate(dense(x, "intermediate", ("intermediate",)), self.spec.activation)
        return self._norm(i, "output_norm", x + dense(inner, "output", ("output",)))

    def _norm(self, i: int, name: str, x: Tensor) -> Tensor:
        w = self.blocks[i]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self.spec.eps)


def attend(projected: Tensor, queries: Tensor | None, runs: Runs, heads: int) -> Tensor:
    """Self-attention inside each text.

    Args:
        projected: (T, 3H) q, k, v of every token; or (T, 2H) k, v when `queries` are given.
        queries: (B, H) queries of the first tokens only, or None.
        runs: stretches of texts of one length, from `PackedBatch.runs`.

    Returns:
        (T, H), or (B, H) where queries were given.
    """
    if projected.device.type == "cpu":
        return _RunAttention.apply(projected, queries, runs, heads)
    return attend_plain(projected, queries, runs, heads)


def attend_plain(projected: Tensor, queries: Tensor | None, runs: Runs, heads: int) -> Tensor:
    """`attend` by torch's own attention and autograd: the way of every device but the CPU, and the oracle of the CPU's."""
    outputs = []
    sizes = [count * length for _, count, _, length in runs]
    for (first, count, _, length), part in zip(runs, projected.split(sizes), strict=True):
        *q, k, v = part.view(count, length, 3 if queries is None else 2, heads, -1).permute(2, 0, 3, 1, 4)
        q = q[0] if queries is None else queries[first : first + count].view(count, 1, heads, -1).transpose(1, 2)
        outputs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, q.shape[1] * q.shape[3]))
    return torch.cat(outputs)


class _RunAttention(torch.autograd.Function):
    """torch's CPU flash attention, one call per stretch of equal lengths, gradients written into one buffer.

    Plain autograd would make a zero-filled (T, 3H) gradient for every slice.
    """

    @staticmethod
    def _views(projected: Tensor, queries: Tensor | None, run: tuple[int, int, int, int], heads: int) -> list[Tensor]:
        first, count, start, length = run
        parts = projected[start : start + count * length].view(count, length, 3 if queries is None else 2, heads, -1)
        views = list(parts.permute(2, 0, 3, 1, 4))
        if queries is not None:
            views.insert(0, queries[first : first + count].view(count, 1, heads, -1).transpose(1, 2))
        return views

    @staticmethod
    def forward(ctx, projected, queries, runs, heads):
        width = projected.shape[1] // (3 if queries is None else 2)
        out = projected.new_empty((projected if queries is None else queries).shape[0], width)
        sums = []
        for run in runs:
            q, k, v = _RunAttention._views(projected, queries, run, heads)
            part, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            _RunAttention._rows(out, queries, run).copy_(part.transpose(1, 2).reshape(-1, width))
            sums.append(lse)
        ctx.save_for_backward(projected, queries, out, *sums)
        ctx.runs, ctx.heads = runs, heads
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
        for run, lse in zip(ctx.runs, sums, strict=True):
            views = _RunAttention._views(projected, queries, run, heads)
            targets = _RunAttention._views(d_projected, d_queries, run, heads)
            rows = [_RunAttention._rows(t, queries, run).view(run[1], -1, heads, targets[0].shape[-1]).transpose(1, 2) for t in (grad, out)]
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(rows[0], *views, rows[1], lse, 0.0, False)
            for target, part in zip(targets, parts, strict=True):
                target.copy_(part)
        return d_projected, d_queries, None, None

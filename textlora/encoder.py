"""One packed forward for BERT-like encoders: no padding, LoRA by slot, only first tokens in the last layer where that is enough.

A batch may bring the hidden states of its tokens at some depth (`PackedBatch.hidden`): the blocks below are then skipped.

Shapes: T tokens, B texts, H width, h heads, d = H / h. Post-norm blocks as in Devlin et al. 2018 (arXiv 1810.04805).
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textlora.base import BaseWeights
from textlora.errors import UsageError
from textlora.lora import Lora, dora_scale, lora_linear
from textlora.mixing import Folded, Mix
from textlora.products import Int8Weight, LaidOutWeight, activate, dense, filled_up, lays_out
from textlora.tokens import PackedBatch

# torch's attention takes twice as long for 15 keys as for 16 (docs/log.md): a few keys that nobody looks at are added where that gains
KEYS, ODD_BELOW = 16, 80

Runs = list[tuple[int, int, int, int]]
Loras = Mapping[tuple[int, str], Lora]


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
        self.weights: list[dict[str, Int8Weight]] | list[dict[str, LaidOutWeight]] | None = None

    def for_inference(self, precision: str = "float32") -> "PackedEncoder":
        """The same encoder with its dense layers in 8 bits, or laid out for this processor: no gradients, adapters as a `Mix`. The tensors are shared."""
        if precision != "int8" and not lays_out(self.embeddings["word"]):
            return self
        made, kind = copy.copy(self), Int8Weight if precision == "int8" else LaidOutWeight
        names = ("qkv", "attention_output", "intermediate", "output")
        made.weights = [{name: kind.of(block[f"{name}.weight"]) for name in names} for block in self.blocks]
        return made

    @property
    def int8(self) -> bool:
        return bool(self.weights) and isinstance(self.weights[0]["qkv"], Int8Weight)

    def forward(
        self, batch: PackedBatch, loras: Loras | Mix, *, pooling: str = "first", dropout_seed: int | None = None, checkpointing: bool = False
    ) -> Tensor:
        """Encode a batch.

        Args:
            loras: (layer, slot) -> LoRA, slots as in `families.SLOTS`; or the adapters of a mixed batch.
            pooling: "first" gives each text's first token, "mean" the mean of its tokens.
            dropout_seed: of the LoRA dropout masks; None means no dropout.
            checkpointing: keep only each block's input for the backward pass and compute the rest again (arXiv 1604.06174).

        Returns:
            (B, H), texts in packed order.

        Raises:
            UsageError: a text is longer than the position table.
        """
        runs = self._runs(batch)
        x = self._filled(self._embed(batch) if batch.hidden is None else batch.hidden)
        firsts = batch.cu_seqlens[:-1].to(x.device)
        for i in range(batch.depth, self.spec.layers):
            last = i == self.spec.layers - 1 and pooling == "first"
            arguments = (i, x, runs, loras, dropout_seed, firsts if last else None)
            x = checkpoint(self._block, *arguments, use_reentrant=False, preserve_rng_state=False) if checkpointing else self._block(*arguments)
        if pooling == "first":
            return x if self.spec.layers else x[firsts]
        return torch.stack([part.mean(0) for part in x[: batch.tokens].split(batch.cu_seqlens.diff().tolist())])

    def prefix(self, batch: PackedBatch, depth: int) -> Tensor:
        """Hidden states (T, H) at the input of block `depth`, no adapter below it. Raises UsageError as `forward` does."""
        runs, x = self._runs(batch), self._filled(self._embed(batch))
        for i in range(depth):
            x = self._block(i, x, runs, {}, None, None)
        return x[: batch.tokens]

    def _filled(self, x: Tensor) -> Tensor:
        """Rows that belong to nobody up to a whole number of steps, where weights are laid out."""
        return x if self.weights is None else F.pad(x, (0, 0, 0, filled_up(len(x)) - len(x)))

    def _runs(self, batch: PackedBatch) -> Runs:
        runs = batch.runs()
        if runs and runs[-1][3] > self.spec.max_length:
            raise UsageError(f"a text of {runs[-1][3]} tokens, the base model takes {self.spec.max_length}", "lower --max-length")
        return runs

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

    def _block(self, i: int, x: Tensor, runs: Runs, loras: Loras | Mix, dropout_seed: int | None, firsts: Tensor | None) -> Tensor:
        w, hidden = self.blocks[i], self.spec.hidden
        generator = None if dropout_seed is None else torch.Generator(x.device).manual_seed(dropout_seed + i)

        def linear(
            value: Tensor, name: str, slots: tuple[str, ...], rows: slice = slice(None), activation: str | None = None, residual: Tensor | None = None
        ) -> Tensor:
            weight, bias = (w[f"{name}.weight"] if self.weights is None else self.weights[i][name])[rows], w[f"{name}.bias"][rows]
            if isinstance(loras, Mix):
                return loras.linear(i, slots, value, weight, bias, activation, residual)
            adapted = [(k * hidden, loras[i, slot]) for k, slot in enumerate(slots) if (i, slot) in loras]
            if not adapted:
                return dense(value, weight, bias, activation, residual)
            y = activate(lora_linear(value, weight, bias, adapted, generator), activation)
            return y if residual is None else residual + y

        def folded(slot: str, weight: Tensor) -> Folded | None:
            if isinstance(loras, Mix):
                return loras.folded((i, slot))
            lora = loras.get((i, slot))
            return None if lora is None else Folded(lora.A.to(x.dtype), (lora.scaling * lora.B).to(x.dtype), dora_scale(weight, lora))

        if firsts is None:
            context = attend(linear(x, "qkv", ("query", "key", "value")), None, runs, self.spec.heads)
        else:
            tokens, x = x, x[firsts]
            runs_of_tokens, runs = runs, [(0, x.shape[0], 0, 1)]
            queries = linear(x, "qkv", ("query",), slice(hidden))
            if generator is not None and any((i, slot) in loras and loras[i, slot].dropout for slot in ("key", "value")):  # masks are drawn per token
                context = attend(linear(tokens, "qkv", ("key", "value"), slice(hidden, None)), queries, runs_of_tokens, self.spec.heads)
            else:
                weight, bias = w["qkv.weight"][hidden:], w["qkv.bias"][2 * hidden :]
                key, value = folded("key", weight[:hidden]), folded("value", weight[hidden:])
                context = attend_first(tokens, queries, runs_of_tokens, self.spec.heads, weight, bias, key, value)
        x = self._norm(i, "attention_norm", linear(context, "attention_output", ("attention_output",), residual=x))
        inner = linear(x, "intermediate", ("intermediate",), activation=self.spec.activation)
        return self._norm(i, "output_norm", linear(inner, "output", ("output",), residual=x))

    def _norm(self, i: int, name: str, x: Tensor) -> Tensor:
        w = self.blocks[i]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], self.spec.eps)


def attend(projected: Tensor, queries: Tensor | None, runs: Runs, heads: int) -> Tensor:
    """Self-attention inside each text.

    Args:
        projected: (T, 3H) q, k, v of every token; or (T, 2H) k, v when `queries` are given. Rows after the last token give zeros.
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


def attend_first(
    x: Tensor, queries: Tensor, runs: Runs, heads: int, weight: Tensor, value_bias: Tensor, key: Folded | None, value: Folded | None
) -> Tensor:
    """Attention of one query per text without forming any key or value, exact up to rounding.

    For head h with `W_k,h` and `W_v,h` (d, H): `scores = (q_h W_k,h) X^T`, where the key's bias adds the same number to every score and so
    falls out of the softmax, and `out_h = (p_h X) W_v,h^T + b_v,h`. The only products over all tokens have h rows per text.

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
    for first, texts, start, length in runs:
        tokens = x[start : start + texts * length].view(texts, length, width)
        shares = torch.softmax(torch.bmm(keys[first : first + texts], tokens.transpose(1, 2)), dim=-1)
        means.append(torch.bmm(shares, tokens))
    mean = torch.cat(means)
    out = torch.bmm(mean.transpose(0, 1), value_weight.transpose(1, 2)).transpose(0, 1)
    if value is not None:
        out = out + ((mean @ value.A.transpose(-1, -2)).unsqueeze(2) @ _by_head(value.B, heads).transpose(-1, -2)).squeeze(2)
    out = out.reshape(count, width)
    if value is not None and value.scale is not None:
        out = out * value.scale.to(out.dtype)
    return out + value_bias


def _by_head(B: Tensor, heads: int) -> Tensor:
    """(out, r) to (heads, d, r), with or without a leading dimension."""
    return B.unflatten(-2, (heads, -1))


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

"""One packed forward for BERT-like encoders: no padding, LoRA by slot, only first tokens in the last layer
where that is enough.

A batch may bring the hidden states of its tokens at some depth (`PackedBatch.hidden`): the blocks below are
then skipped.

Shapes: T tokens, B texts, H width, h heads, d = H / h. Post-norm blocks as in Devlin et al. 2018 (arXiv
1810.04805).
"""

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from textlora.core.errors import UsageError
from textlora.data.tokenize import Layout, PackedBatch
from textlora.kernels import bindings, block_inference, block_training, fused_ops
from textlora.kernels.block_inference import Jobs
from textlora.kernels.packed_linear import (
    Bf16x2Weight,
    PackedTrainingWeight,
    PackedWeight,
    Weight,
    activate,
    dense,
    filled_up,
    lays_out,
    prepare,
    prepare_for_training,
)
from textlora.model.adapter_batch import AdapterBatch, ScaledLora
from textlora.model.attention import attend, attend_first, in_one_call
from textlora.model.base import BaseWeights
from textlora.model.families import SLOTS
from textlora.model.lora import Lora, dora_scale, lora_linear

DENSE = ("qkv", "attention_output", "intermediate", "output")
STACKED = ("query", "key", "value")
Loras = Mapping[tuple[int, str], Lora]


class PackedEncoder:
    """The frozen encoder over packed batches. Holds the base's tensors, q, k and v stacked, of which the
    base's own become views; never changes them."""

    def __init__(self, weights: BaseWeights):
        self.spec = weights.spec
        tensors = weights.tensors
        self.embeddings = {
            name.removeprefix("embeddings."): t
            for name, t in tensors.items()
            if name.startswith("embeddings.")
        }
        self.blocks = []
        for i in range(self.spec.layers):
            block = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            for part in ("weight", "bias"):
                slots = [f"{slot}.{part}" for slot in STACKED]
                block[f"qkv.{part}"] = torch.cat([block.pop(slot) for slot in slots])
                tensors |= {
                    f"{i}.{slot}": rows
                    for slot, rows in zip(slots, block[f"qkv.{part}"].chunk(3), strict=True)
                }  # once in memory
            self.blocks.append(block)
        self.weights: list[dict[str, Weight]] | None = None
        self.together: block_inference.Blocks | block_training.Blocks | None = (
            None  # all blocks in one call, when predicting or in training
        )
        self.in_steps = False  # whether batches are filled up to whole steps, so that shapes repeat

    def plain(self) -> "PackedEncoder":
        """The same encoder on its tensors as they are, which may get gradients."""
        made = copy.copy(self)
        made.weights, made.together, made.in_steps = None, None, False
        return made

    def for_inference(self, precision: str = "float32") -> "PackedEncoder":
        """The same encoder in bfloat16, with its dense layers in 8 bits, or laid out for this processor: no
        gradients, adapters as an `AdapterBatch`."""
        made = self.plain()
        if precision == "bfloat16":
            made.embeddings, *made.blocks = (
                {name: t.to(torch.bfloat16) for name, t in part.items()}
                for part in (self.embeddings, *self.blocks)
            )
            return made
        if precision != "int8" and not lays_out(self.embeddings["word"]):
            return made
        fused_stack = precision != "int8" and self._in_c
        made.in_steps = not fused_stack
        made.weights = [
            {name: prepare(block[f"{name}.weight"], precision, fused_stack) for name in DENSE}
            for block in self.blocks
        ]
        if fused_stack:
            panels = [{name: weight.panels for name, weight in block.items()} for block in made.weights]
            made.together = block_inference.Blocks(self.blocks, panels, self.spec.heads, self.spec.eps)
        return made

    @property
    def _in_c(self) -> bool:
        """Whether compiled functions take whole blocks of this kind on this processor."""
        spec = self.spec
        narrow = (
            spec.hidden // spec.heads in bindings.HEADS
            and not spec.hidden % bindings.PASS_LANES
            and not spec.intermediate % bindings.PASS_LANES
        )
        return narrow and spec.activation == "gelu" and spec.layers > 0 and bindings.lanes() > 0

    def for_training(self) -> "PackedEncoder":
        """The same encoder with its dense layers, where this processor has what that takes, laid out forward
        and back: they can get no gradients."""
        made = copy.copy(self)
        weights = [
            {name: prepare_for_training(block[f"{name}.weight"]) for name in DENSE} for block in self.blocks
        ]
        if not all(
            isinstance(weight, PackedTrainingWeight) for block in weights for weight in block.values()
        ):
            return made
        made.weights = weights
        if self._in_c:
            both = [
                {name: block_training.Both(weight.forward, weight.back) for name, weight in block.items()}
                for block in weights
            ]
            made.together = block_training.Blocks(self.blocks, both, self.spec.heads, self.spec.eps)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.embeddings["word"].dtype

    @property
    def device(self) -> torch.device:
        return self.embeddings["word"].device

    @property
    def one_core(self) -> bool:
        """Whether a product takes one core whatever torch is told: little work is then worth sharing out,
        too."""
        kinds = Bf16x2Weight | PackedWeight | PackedTrainingWeight
        return self.weights is not None and any(
            isinstance(weight, kinds) for block in self.weights for weight in block.values()
        )

    @property
    def fused_stack(self) -> bool:
        """Whether all blocks are one call."""
        return self.together is not None

    def forward(
        self,
        batch: PackedBatch,
        loras: Loras | AdapterBatch,
        *,
        pooling: str = "first",
        dropout_seed: int | None = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Encode a batch.

        Args:
            loras: (layer, slot) -> LoRA, slots as in `families.SLOTS`; or the adapters of a mixed batch.
            pooling: "first" gives each text's first token, "mean" the mean of its tokens.
            dropout_seed: of the LoRA dropout masks; None means no dropout.
            checkpointing: keep only each block's input for the backward pass and compute the rest again
                (arXiv 1604.06174).

        Returns:
            (B, H), texts in packed order.

        Raises:
            UsageError: a text is longer than the position table.
        """
        layout = self._layout(batch)
        x = self._filled(self._embed(batch) if batch.hidden is None else batch.hidden.to(self.dtype))
        only_first = pooling == "first"
        x, done = self._at_once(
            x, batch.depth, self.spec.layers, layout, loras, dropout_seed, only_first, checkpointing
        )
        for i in range(done, self.spec.layers):
            arguments = (i, x, layout, loras, dropout_seed, only_first and i == self.spec.layers - 1)
            x = (
                checkpoint(self._block, *arguments, use_reentrant=False, preserve_rng_state=False)
                if checkpointing
                else self._block(*arguments)
            )
        if only_first:
            return x if self.spec.layers else x.index_select(0, layout.cu_seqlens[:-1])
        if bindings.has_passes(x):
            return fused_ops.mean(x[: batch.tokens], layout.cu_seqlens)
        if not in_one_call(x):
            return torch.stack(
                [part.mean(0) for part in x[: batch.tokens].split(batch.cu_seqlens.diff().tolist())]
            )
        owners = torch.searchsorted(
            layout.cu_seqlens[1:], torch.arange(len(x), dtype=torch.int32, device=x.device), right=True
        )
        sums = x.new_zeros(len(layout.cu_seqlens) - 1, x.shape[1], dtype=torch.float32).index_add(
            0, owners, x.float()
        )
        return sums / layout.cu_seqlens.diff().unsqueeze(1)

    def prefix(self, batch: PackedBatch, depth: int) -> Tensor:
        """Hidden states (T, H) at the input of block `depth`, no adapter below it. Raises UsageError as
        `forward` does."""
        layout, x = self._layout(batch), self._filled(self._embed(batch))
        x, done = self._at_once(x, 0, depth, layout, {}, None, False, False)
        for i in range(done, depth):
            x = self._block(i, x, layout, {}, None, False)
        return x[: batch.tokens]

    def _at_once(
        self,
        x: Tensor,
        first: int,
        last: int,
        layout: Layout,
        loras: Loras | AdapterBatch,
        dropout_seed: int | None,
        only_first: bool,
        checkpointing: bool,
    ) -> tuple[Tensor, int]:
        """Blocks from `first` on in one call, as many before `last` as it takes: what they give, and the
        block to go on with."""
        if self.together is None or layout.longest > bindings.LONGEST or first == last:
            return x, first
        if isinstance(self.together, block_training.Blocks):
            adapters, end = self._adapted(first, last, loras, dropout_seed)
            if end == first:
                return x, first
            only_first = only_first and end == self.spec.layers
            return fused_ops.blocks(
                x, self.together, layout.cu_seqlens, adapters, first, end, only_first, checkpointing
            ), end
        jobs = (
            loras.jobs(self.spec.layers, only_first)
            if isinstance(loras, AdapterBatch)
            else None
            if loras
            else Jobs.none(self.spec.layers)
        )
        return (
            (x, first)
            if jobs is None
            else (
                self.together.forward(x.contiguous(), layout.cu_seqlens, jobs, first, last, only_first),
                last,
            )
        )

    def _adapted(
        self, first: int, last: int, loras: Loras | AdapterBatch, dropout_seed: int | None
    ) -> tuple[list[block_training.Adapted], int]:
        """The adapters of blocks from `first` on that `block_training` takes, and the first block that it
        does not take."""
        found: list[block_training.Adapted] = []
        if isinstance(loras, AdapterBatch):
            return found, first
        for i in range(first, last):
            its = {slot: loras[i, slot] for slot in SLOTS if (i, slot) in loras}
            plain = all(
                lora.magnitude is None and (dropout_seed is None or not lora.dropout) for lora in its.values()
            )
            if not plain or not its.keys() <= set(STACKED):
                return found, i
            found += [
                block_training.Adapted(
                    lora.A, lora.B, lora.scaling, i, STACKED.index(slot) * self.spec.hidden
                )
                for slot, lora in its.items()
            ]
        return found, last

    def _filled(self, x: Tensor) -> Tensor:
        """Rows that belong to nobody up to a whole number of steps, where shapes should repeat."""
        return F.pad(x, (0, 0, 0, filled_up(len(x)) - len(x))) if self.in_steps else x

    def _layout(self, batch: PackedBatch) -> Layout:
        layout = batch.layout
        if batch.given_layout is None and layout.longest > self.spec.max_length:
            raise UsageError(
                f"a text of {layout.longest} tokens, the base model takes {self.spec.max_length}",
                "lower --max-length",
            )
        return layout

    def _embed(self, batch: PackedBatch) -> Tensor:
        e, names = self.embeddings, [name for name in ("word", "type", "position") if name in self.embeddings]
        types = batch.type_ids if self.spec.family.uses_type_ids else torch.zeros_like(batch.type_ids)
        places = {"word": batch.ids, "position": self._positions(batch), "type": types}
        if self.together and not e["word"].shape[1] % bindings.PASS_LANES:
            x = bindings.embed(
                [places[name] for name in names],
                [e[name] for name in names],
                e["norm.weight"],
                e["norm.bias"],
                self.spec.eps,
            )
        else:
            x = F.embedding(places["word"], e["word"])
            for name in names[1:]:
                x = x + F.embedding(places[name], e[name])
            x = F.layer_norm(x, x.shape[-1:], e["norm.weight"], e["norm.bias"], self.spec.eps)
        return F.linear(x, e["project.weight"], e["project.bias"]) if "project.weight" in e else x

    def _positions(self, batch: PackedBatch) -> Tensor:
        """Rows (T,) of the position table. RoBERTa does not count a padding token, even one that a text
        spells out ("<pad>")."""
        offset = self.spec.position_offset
        if not offset:
            return batch.positions
        real = batch.ids != offset - 1
        counted = real.long().cumsum(0)
        first = torch.arange(real.numel(), device=real.device) - batch.positions
        before = (counted - real.long())[first]
        return torch.where(real, counted - before - 1 + offset, offset - 1)

    def _block(
        self,
        i: int,
        x: Tensor,
        layout: Layout,
        loras: Loras | AdapterBatch,
        dropout_seed: int | None,
        only_first: bool,
    ) -> Tensor:
        w, hidden = self.blocks[i], self.spec.hidden
        generator = None if dropout_seed is None else torch.Generator(x.device).manual_seed(dropout_seed + i)

        def linear(
            value: Tensor,
            name: str,
            slots: tuple[str, ...],
            rows: slice = slice(None),
            activation: str | None = None,
            residual: Tensor | None = None,
            biased: bool = True,
        ) -> Tensor:
            weight = (w[f"{name}.weight"] if self.weights is None else self.weights[i][name])[rows]
            bias = w[f"{name}.bias"][rows] if biased else None
            if isinstance(loras, AdapterBatch):
                return loras.linear(i, slots, value, weight, bias, activation, residual)
            adapted = [(k * hidden, loras[i, slot]) for k, slot in enumerate(slots) if (i, slot) in loras]
            if not adapted:
                return dense(value, weight, bias, activation, residual)
            y = activate(lora_linear(value, weight, bias, adapted, generator), activation)
            return y if residual is None else residual + y

        def folded(slot: str, weight: Tensor) -> ScaledLora | None:
            if isinstance(loras, AdapterBatch):
                return loras.folded((i, slot))
            lora = loras.get((i, slot))
            return (
                None
                if lora is None
                else ScaledLora(
                    lora.A.to(x.dtype), (lora.scaling * lora.B).to(x.dtype), dora_scale(weight, lora)
                )
            )

        plain = not self.in_steps and not isinstance(loras, AdapterBatch)

        def widened(value: Tensor) -> Tensor:
            name, bias = "intermediate", w["intermediate.bias"]
            if plain and self.spec.activation == "gelu" and fused_ops.fits(bias):
                late = not bias.requires_grad  # added in the same pass, where it needs no gradient
                return fused_ops.add_gelu(
                    linear(value, name, (name,), biased=not late), bias if late else None
                )
            return linear(value, name, (name,), activation=self.spec.activation)

        def normed(value: Tensor, name: str, residual: Tensor, norm: str) -> Tensor:
            bias, weight, shift = w[f"{name}.bias"], w[f"{norm}.weight"], w[f"{norm}.bias"]
            if (
                plain
                and fused_ops.fits(bias, weight, shift)
                and not any(t.requires_grad for t in (bias, weight, shift))
            ):
                return fused_ops.add_norm(
                    linear(value, name, (name,), biased=False), bias, residual, weight, shift, self.spec.eps
                )
            return F.layer_norm(
                linear(value, name, (name,), residual=residual), weight.shape, weight, shift, self.spec.eps
            )

        if not only_first:
            context = attend(linear(x, "qkv", STACKED), None, layout, self.spec.heads)
        else:
            tokens, x = x, x.index_select(0, layout.cu_seqlens[:-1])
            queries = linear(x, "qkv", ("query",), slice(hidden))
            masked = generator is not None and any(
                (i, slot) in loras and loras[i, slot].dropout for slot in ("key", "value")
            )
            if masked or in_one_call(
                x
            ):  # masks are drawn per token; one call is faster than a few for each length
                context = attend(
                    linear(tokens, "qkv", ("key", "value"), slice(hidden, None)),
                    queries,
                    layout,
                    self.spec.heads,
                )
            else:
                weight, bias = w["qkv.weight"][hidden:], w["qkv.bias"][2 * hidden :]
                key, value = folded("key", weight[:hidden]), folded("value", weight[hidden:])
                context = attend_first(tokens, queries, layout, self.spec.heads, weight, bias, key, value)
        x = normed(context, "attention_output", x, "attention_norm")
        return normed(widened(x), "output", x, "output_norm")

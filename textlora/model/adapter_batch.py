"""Many adapters in one batch: the base's product once for all rows, then each stretch of one owner's rows
through its own A and B, in place.

For inference: no gradients.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from textlora.kernels.bindings import AdaptedLayer, add_adapted
from textlora.kernels.block_inference import Jobs
from textlora.kernels.packed_linear import Weight, activate, dense

Place = tuple[int, str]
PRODUCTS = (
    ("query", "key", "value"),
    ("query",),
    ("key", "value"),
    ("attention_output",),
    ("intermediate",),
    ("output",),
)  # slots of the encoder's dense layers
WHOLE = (PRODUCTS[0], *PRODUCTS[3:])  # of a block that forms queries, keys and values of all tokens


class ScaledLora(NamedTuple):
    """An adapted dense layer, ready to use: A (r, in), `s B` (out, r) and DoRA's factor (out,) or None; one
    per text: (B, r, in) ..."""

    A: Tensor
    B: Tensor
    scale: Tensor | None


class GroupedLora(NamedTuple):
    """Adapted layers that read the same x and whose outputs lie side by side: one product with every A, then
    each B.

    Many small products cost their calls more than their arithmetic, so what a call needs is made once.

    Attributes:
        A: (in, R), R the sum of the ranks.
        ranks: of each adapted layer.
        uses: for each its place among the outputs, `s B` as (r, out), and DoRA's factor (out,) or None.
        compiled: for each the same as `native.add_adapted` takes it; empty where that cannot be used.
    """

    A: Tensor
    ranks: tuple[int, ...]
    uses: tuple[tuple[int, Tensor, Tensor | None], ...]
    compiled: tuple[AdaptedLayer, ...] = ()


def joined(
    adapter: Mapping[Place, ScaledLora], turned: Mapping[Place, Tensor], layer: int, slots: Sequence[str]
) -> GroupedLora | None:
    """The layers of `slots` that an adapter changes; None where there are none. `turned` has each `s B` as
    (r, out)."""
    ones = [(k, adapter[layer, slot]) for k, slot in enumerate(slots) if (layer, slot) in adapter]
    if not ones:
        return None
    A = torch.cat([one.A for _, one in ones]) if len(ones) > 1 else ones[0][1].A
    ranks = tuple(one.A.shape[0] for _, one in ones)
    uses = tuple((k, turned[layer, slots[k]], one.scale) for k, one in ones)
    layers = [
        AdaptedLayer.of(part, B, scale, k * B.shape[1])
        for part, (k, B, scale) in zip(A.split(ranks), uses, strict=True)
    ]
    return GroupedLora(
        A.T, ranks, uses, tuple(layer for layer in layers if layer is not None) if all(layers) else ()
    )


class ScaledAdapter(dict[Place, ScaledLora]):
    """An adapter's layers by place, and `joined` for each product of the encoder."""

    def __init__(self, places: Mapping[Place, ScaledLora]):
        super().__init__(places)
        turned = {place: one.B.T.contiguous() for place, one in places.items()}
        made = {
            (layer, slots): joined(self, turned, layer, slots)
            for layer in {layer for layer, _ in self}
            for slots in PRODUCTS
        }
        self.joined = {place: one for place, one in made.items() if one is not None}
        self.jobs = self._jobs()

    def _jobs(self) -> np.ndarray | None:
        """A row for each adapted layer: number of its product, in, out, then what `Jobs.words` has behind the
        rows; None where C cannot take it."""
        if any(not one.compiled for one in self.joined.values()):
            return None
        found = [
            (layer * len(WHOLE) + WHOLE.index(slots), one.A.shape[1], one.B.shape[1], *one.words)
            for (layer, slots), joined in self.joined.items()
            if slots in WHOLE
            for one in joined.compiled
        ]
        return np.array(found, dtype=np.int64).reshape(-1, 8)


class AdapterBatch:
    """The adapters of one batch.

    Args:
        adapters: each one's layers; a place, (layer, slot), that it does not adapt is absent.
        owners: (B,) number of the adapter that owns each text, in packed order.
        lengths: (B,) tokens of each text.
    """

    def __init__(self, adapters: Sequence[ScaledAdapter], owners: Sequence[int], lengths: Sequence[int]):
        self.adapters, self.owners = adapters, owners
        self.alone = len(adapters) == 1
        self.texts, self.tokens = _stretches(owners, [1] * len(owners)), _stretches(owners, lengths)

    def folded(self, place: Place) -> ScaledLora | None:
        """A, B and factor of each text at a place; without the leading dimension where all texts have one
        owner; None where no one adapts it."""
        found = [adapter.get(place) for adapter in self.adapters]
        known = [one for one in found if one is not None]
        if not known:
            return None
        if self.alone:
            return known[0]
        r, like = max(one.A.shape[0] for one in known), known[0]
        A = like.A.new_zeros(len(found), r, like.A.shape[1])
        B = like.B.new_zeros(len(found), like.B.shape[0], r)
        scale = (
            like.B.new_ones(len(found), like.B.shape[0])
            if any(one.scale is not None for one in known)
            else None
        )
        for k, one in enumerate(found):
            if one is not None:
                A[k, : one.A.shape[0]], B[k, :, : one.A.shape[0]] = one.A, one.B
                if one.scale is not None:
                    scale[k] = one.scale
        owners = torch.tensor(self.owners, device=A.device)
        return ScaledLora(A[owners], B[owners], None if scale is None else scale[owners])

    def jobs(self, layers: int, only_first: bool) -> Jobs | None:
        """What the adapters add in all products of an encoder; None where C cannot take one. `only_first`:
        the last block has a row per text."""
        tables = [adapter.jobs for adapter in self.adapters]
        if any(table is None for table in tables):
            return None
        if not any(len(table) for table in tables):
            return Jobs.none(layers)
        sizes = np.array(
            [(tokens, texts) for (_, tokens), (_, texts) in zip(self.tokens, self.texts, strict=True)]
        )
        places = np.concatenate(
            [sizes.cumsum(0) - sizes, sizes], 1
        )  # of each stretch: first token, first text, tokens, texts
        table = np.concatenate([tables[owner] for owner, _ in self.tokens])
        places = np.repeat(places, [len(tables[owner]) for owner, _ in self.tokens], axis=0)
        count = layers * len(WHOLE)
        as_texts = (table[:, 0] >= count - len(WHOLE)) & only_first
        order = np.argsort(table[:, 0], kind="stable")
        rows = np.where(as_texts[:, None], places[:, 1::2], places[:, ::2])
        words = np.ascontiguousarray(np.concatenate([rows, table[:, 3:]], 1)[order])
        return Jobs(words, np.searchsorted(table[order, 0], np.arange(count + 1)), table[order, 1:3])

    def linear(
        self,
        layer: int,
        slots: tuple[str, ...],
        x: Tensor,
        weight: Weight,
        bias: Tensor,
        activation: str | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Dense layer whose output is that of `slots` side by side, and what follows it as in
        `packed_linear.dense`: x (T, in), or (B, in) of first tokens, to (T, out) or (B, out). Rows of x after
        the last token belong to nobody.
        """
        adapted = [adapter.joined.get((layer, slots)) for adapter in self.adapters]
        if not any(adapted):
            return dense(x, weight, bias, activation, residual)
        scaled = any(scale is not None for one in adapted if one is not None for _, _, scale in one.uses)
        early = not scaled and activation is None  # else the residual waits for what comes between
        y = dense(x, weight, None if scaled else bias, residual=residual if early else None)
        stretches = self.texts if len(x) == len(self.owners) else self.tokens
        if all(one is None or one.compiled for one in adapted):
            jobs, at = [], 0
            for owner, rows in stretches:
                jobs += (
                    [(at, rows, layer) for layer in adapted[owner].compiled]
                    if adapted[owner] is not None
                    else ()
                )
                at += rows
            add_adapted(x, y, jobs)
        else:
            _add_one_by_one(x, y, stretches, adapted, len(slots))
        y = activate(y.add_(bias) if scaled else y, activation)
        return y if early or residual is None else y.add_(residual)


def _add_one_by_one(
    x: Tensor,
    y: Tensor,
    stretches: Sequence[tuple[int, int]],
    adapted: Sequence[GroupedLora | None],
    slots: int,
) -> None:
    """What `native.add_adapted` does, by torch."""
    sizes, width = [size for _, size in stretches], y.shape[1] // slots
    count = sum(sizes)
    outs = [torch.split_with_sizes(y[:count, k * width : (k + 1) * width], sizes) for k in range(slots)]
    for n, ((owner, _), rows) in enumerate(
        zip(stretches, torch.split_with_sizes(x[:count], sizes), strict=True)
    ):
        one = adapted[owner]
        if one is None:
            continue
        for (k, B, scale), inner in zip(
            one.uses, torch.split_with_sizes(rows @ one.A, one.ranks, 1), strict=True
        ):
            outs[k][n].addmm_(inner, B)
            if scale is not None:
                outs[k][n].mul_(scale)


def _stretches(owners: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(owner, rows) of each stretch of neighbours with one owner."""
    found: list[tuple[int, int]] = []
    for owner, size in zip(owners, sizes, strict=True):
        if found and found[-1][0] == owner:
            found[-1] = (owner, found[-1][1] + size)
        else:
            found.append((owner, size))
    return found

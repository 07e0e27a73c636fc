"""Many adapters in one batch: the base's product once for all rows, then each stretch of one owner's rows through its own A and B, in place.

For inference: no gradients.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from textlora.products import Weight, activate, dense

Place = tuple[int, str]
TOGETHER = "qkv"  # place of the A of query, key and value one below another: small products cost their calls, and those three read the same x


class Folded(NamedTuple):
    """An adapted dense layer, ready to use: A (r, in), `s B` (out, r) and DoRA's factor (out,) or None; one per text: (B, r, in) ..."""

    A: Tensor
    B: Tensor
    scale: Tensor | None


def with_joined(adapter: Mapping[Place, Folded]) -> dict[Place, Folded]:
    """An adapter with places `TOGETHER` where more than one of query, key and value is adapted; their own A become parts of it."""
    made = dict(adapter)
    for layer in {layer for layer, _ in adapter}:
        slots = [slot for slot in ("query", "key", "value") if (layer, slot) in adapter]
        if len(slots) > 1:
            ones = [adapter[layer, slot] for slot in slots]
            together = torch.cat([one.A for one in ones])
            made[layer, TOGETHER] = ones[0]._replace(A=together)
            for slot, one, A in zip(slots, ones, together.split([one.A.shape[0] for one in ones]), strict=True):
                made[layer, slot] = one._replace(A=A)
    return made


class Mix:
    """The adapters of one batch.

    Args:
        adapters: each one's layers by place, (layer, slot), `with_joined`; a place it does not adapt is absent.
        owners: (B,) number of the adapter that owns each text, in packed order.
        lengths: (B,) tokens of each text.
    """

    def __init__(self, adapters: Sequence[Mapping[Place, Folded]], owners: Sequence[int], lengths: Sequence[int]):
        self.adapters, self.owners = adapters, owners
        self.alone = len(adapters) == 1
        self.texts, self.tokens = _stretches(owners, [1] * len(owners)), _stretches(owners, lengths)

    def folded(self, place: Place) -> Folded | None:
        """A, B and factor of each text at a place; without the leading dimension where all texts have one owner; None where no one adapts it."""
        found = [adapter.get(place) for adapter in self.adapters]
        known = [one for one in found if one is not None]
        if not known:
            return None
        if self.alone:
            return known[0]
        r, like = max(one.A.shape[0] for one in known), known[0]
        A = like.A.new_zeros(len(found), r, like.A.shape[1])
        B = like.B.new_zeros(len(found), like.B.shape[0], r)
        scale = like.B.new_ones(len(found), like.B.shape[0]) if any(one.scale is not None for one in known) else None
        for k, one in enumerate(found):
            if one is not None:
                A[k, : one.A.shape[0]], B[k, :, : one.A.shape[0]] = one.A, one.B
                if one.scale is not None:
                    scale[k] = one.scale
        owners = torch.tensor(self.owners, device=A.device)
        return Folded(A[owners], B[owners], None if scale is None else scale[owners])

    def linear(
        self, layer: int, slots: Sequence[str], x: Tensor, weight: Weight, bias: Tensor, activation: str | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Dense layer whose output is that of `slots` side by side, and what follows it as in `products.dense`: x (T, in), or (B, in) of first
        tokens, to (T, out) or (B, out). Rows of x after the last token belong to nobody.
        """
        places = [[adapter.get((layer, slot)) for adapter in self.adapters] for slot in slots]
        scaled = any(one is not None and one.scale is not None for known in places for one in known)
        if not any(one is not None for known in places for one in known):
            return dense(x, weight, bias, activation, residual)
        early = not scaled and activation is None  # else the residual waits for what comes between
        y = dense(x, weight, None if scaled else bias, residual=residual if early else None)
        stretches = self.texts if len(x) == len(self.owners) else self.tokens
        sizes = [size for _, size in stretches]
        count = sum(sizes)
        parts = [part.split(sizes) for part in y[:count].split(weight.shape[0] // len(slots), dim=1)]
        for n, ((owner, _), rows) in enumerate(zip(stretches, x[:count].split(sizes), strict=True)):
            ones = [(k, known[owner]) for k, known in enumerate(places) if known[owner] is not None]
            if not ones:
                continue
            together = self.adapters[owner].get((layer, TOGETHER)) if len(ones) > 1 else ones[0][1]
            for (k, one), inner in zip(ones, (rows @ together.A.T).split([one.A.shape[0] for _, one in ones], dim=1), strict=True):
                out = parts[k][n].addmm_(inner, one.B.T)
                if one.scale is not None:
                    out.mul_(one.scale)
        y = activate(y.add_(bias) if scaled else y, activation)
        return y if early or residual is None else y.add_(residual)


def _stretches(owners: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """(owner, rows) of each stretch of neighbours with one owner."""
    found: list[tuple[int, int]] = []
    for owner, size in zip(owners, sizes, strict=True):
        if found and found[-1][0] == owner:
            found[-1] = (owner, found[-1][1] + size)
        else:
            found.append((owner, size))
    return found

"""Many adapters in one batch: the base's product once for all rows, each text's own A and B beside it.

The A and B of a batch are stacked by text, (B, r, in) and (B, out, r), ranks padded with zeros to the largest, a missing place with
zeros: exact, and as many products as there are stretches of equal length however many adapters there are. For inference: no gradients.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Place = tuple[int, str]


class Folded(NamedTuple):
    """An adapted dense layer, ready to use: A (r, in), `s B` (out, r) and DoRA's factor (out,) or None; one per text: (B, r, in) ..."""

    A: Tensor
    B: Tensor
    scale: Tensor | None


class Mix:
    """The adapters of one batch.

    Args:
        adapters: each one's layers by place, (layer, slot); a place it does not adapt is absent.
        owners: (B,) number of the adapter that owns each text, in packed order.
    """

    def __init__(self, adapters: Sequence[Mapping[Place, Folded]], owners: Tensor):
        self.adapters, self.owners = adapters, owners
        self.alone = len(adapters) == 1

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
        return Folded(A[self.owners], B[self.owners], None if scale is None else scale[self.owners])

    def linear(self, layer: int, slots: Sequence[str], x: Tensor, weight: Tensor, bias: Tensor, runs: Sequence[tuple[int, int, int, int]]) -> Tensor:
        """Dense layer whose output is that of `slots` side by side: x (T, in) to (T, out).

        Args:
            runs: stretches of texts of one length, as `PackedBatch.runs` gives them.
        """
        width = weight.shape[0] // len(slots)
        found = [(k * width, folded) for k, slot in enumerate(slots) if (folded := self.folded((layer, slot))) is not None]
        scaled = any(folded.scale is not None for _, folded in found)
        y = F.linear(x, weight, None if scaled else bias)
        if not found:
            return y
        if self.alone:
            for start, folded in found:
                part = y[:, start : start + width].addmm_(x @ folded.A.T, folded.B.T)
                if folded.scale is not None:
                    part.mul_(folded.scale)
            return y.add_(bias) if scaled else y
        A = torch.cat([folded.A for _, folded in found], dim=1).transpose(1, 2)
        for first, texts, start, length in runs:
            rows, own = slice(start, start + texts * length), slice(first, first + texts)
            low = torch.bmm(x[rows].view(texts, length, -1), A[own])
            out, at = y[rows].view(texts, length, -1), 0
            for begin, folded in found:
                part, r = out[:, :, begin : begin + width], folded.B.shape[2]
                part += torch.bmm(low[:, :, at : at + r], folded.B[own].transpose(1, 2))
                if folded.scale is not None:
                    part *= folded.scale[own].unsqueeze(1)
                at += r
        return y.add_(bias) if scaled else y

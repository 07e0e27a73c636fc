"""A step's forward and backward on a GPU, recorded once for each shape and replayed (CUDA graphs).

A step on a BERT is a thousand small kernels. To start them one by one takes a host several times as long as
the GPU takes to run them (docs/log.md); a recording is started in one call. It is bound to shapes and
addresses: batches are filled up to one of a few sizes, with texts whose losses do not count, and copied to
where the recording reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from textlora.data.tokenize import Layout, PackedBatch

MOST = 48  # shapes that are recorded; others run as they are
_TENSORS = ("ids", "positions", "type_ids", "labels", "hidden")
Compute = Callable[[PackedBatch, Tensor], Sequence[Tensor | None]]


@dataclass(frozen=True)
class Filled:
    """A batch of a fixed shape, and (B,) float32 that is 1 for its own texts and 0 for those that fill it up."""

    batch: PackedBatch
    counted: Tensor

    @property
    def shape(self) -> tuple[int, int, int, bool]:
        return self.batch.tokens, len(self.counted), self.batch.layout.longest, self.batch.hidden is None

    def to(self, device: str | torch.device) -> "Filled":
        b = self.batch
        moved = {name: t.to(device) for name in _TENSORS if (t := getattr(b, name)) is not None}
        layout = Layout(b, b.layout.cu_seqlens.to(device), b.layout.longest)
        return Filled(replace(b, **moved, given_layout=layout), self.counted.to(device))

    def copy_(self, other: "Filled") -> None:
        """Take over the tensors of another batch of this shape."""
        for name in _TENSORS:
            if (mine := getattr(self.batch, name)) is not None:
                mine.copy_(getattr(other.batch, name))
        self.batch.layout.cu_seqlens.copy_(other.batch.layout.cu_seqlens)
        self.counted.copy_(other.counted)


def step_of(count: int, most: int) -> int:
    """Sizes come in steps of an eighth to a sixteenth of `count`, at most `most`."""
    return min(most, max(1, 2 ** (count.bit_length() - 4)))


def up_to(count: int, step: int) -> int:
    return -(-count // step) * step


def fill_up(batch: PackedBatch) -> Filled:
    """A packed batch as one of a few shapes: tokens 0 at position 0 as at least one more text, label 0."""
    lengths = batch.cu_seqlens.diff()
    texts = up_to(batch.size + 1, step_of(batch.size, 16))
    more = texts - batch.size
    tokens = up_to(batch.tokens + more, max(64, step_of(batch.tokens, 512)))
    rest = tokens - batch.tokens
    shares = torch.full((more,), rest // more).add_(torch.arange(more) < rest % more)
    longest = 1 << (max(int(lengths.max()), int(shares.max())) - 1).bit_length()
    bounds = torch.cat([batch.cu_seqlens, batch.tokens + shares.cumsum(0)]).to(torch.int32)
    longer = lambda t, by: torch.cat([t, t.new_zeros(by, *t.shape[1:])])
    made = replace(
        batch,
        **{name: longer(getattr(batch, name), rest) for name in ("ids", "positions", "type_ids")},
        labels=None if batch.labels is None else longer(batch.labels, more),
        hidden=None if batch.hidden is None else longer(batch.hidden, rest),
    )
    return Filled(
        replace(made, given_layout=Layout(made, bounds, longest)), longer(torch.ones(batch.size), more)
    )


class Recordings:
    """Adds what `compute` gives for one batch after another to `sums`.

    The first batch of a shape runs as it is, which also sets up what a recording must not; the second is
    recorded.

    Args:
        compute: (batch, counted) to one tensor for each of `sums`, or None where there is nothing to add;
            waits for nothing on the device.
        sums: tensors on the device; their addresses stay.
    """

    def __init__(self, compute: Compute, sums: Sequence[Tensor]):
        self._compute, self.device = compute, sums[0].device
        self._sums, self._used = list(sums), [False] * len(sums)
        self._seen: set[tuple] = set()
        self._kept: dict[tuple, tuple[Filled, torch.cuda.CUDAGraph]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def sums(self) -> list[Tensor | None]:
        """None where `compute` never gave anything."""
        return [total if used else None for total, used in zip(self._sums, self._used, strict=True)]

    def clear(self) -> None:
        torch._foreach_zero_(self._sums)  # type: ignore[attr-defined]

    def add(self, filled: Filled) -> None:
        shape = filled.shape
        if shape in self._kept:
            place, graph = self._kept[shape]
            place.copy_(filled)
            graph.replay()
        elif shape not in self._seen or len(self._kept) == MOST:
            self._seen.add(shape)
            self._add(filled.to(self.device))
        else:
            place, graph = filled.to(self.device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                self._add(place)
            self._kept[shape] = place, graph
            graph.replay()

    def _add(self, filled: Filled) -> None:
        found = self._compute(filled.batch, filled.counted)
        self._used = [part is not None for part in found]
        pairs = [(total, part) for total, part in zip(self._sums, found, strict=True) if part is not None]
        totals, parts = zip(*pairs, strict=True)
        torch._foreach_add_(totals, parts)  # type: ignore[attr-defined]

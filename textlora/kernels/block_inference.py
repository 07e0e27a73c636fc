"""The blocks of the frozen encoder for prediction (encode.c), with the adapters that own the texts of a
batch: one call a batch, on as many cores as torch has threads where it is called."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from textlora.kernels import bindings
from textlora.kernels.bindings import (
    HEADS,
    MOST_RANK,
    PASS_LANES,
    Panels,
    Product,
    attention_room,
    check,
    check_texts,
    hands,
    library,
    scratch_room,
    split_room,
    structure,
)

PRODUCTS = ("qkv", "attention_output", "intermediate", "output")
NORMS = ("attention_norm", "output_norm")

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_Block = structure("_Block", pointers=_pointer * (2 * len(PRODUCTS) + 2 * len(NORMS)))
_Encoder = structure(
    "_Encoder", blocks=_pointer, query=_pointer, key=_pointer, value=_pointer, layers=_long, width=_long, inner=_long, heads=_long,
    eps=_float, lanes=_int, halves=_int,
)  # fmt: skip
_Batch = structure(
    "_Batch", x=_pointer, y=_pointer, starts=_pointer, jobs=_pointer, ends=_pointer, scratch=_pointer, rooms=_pointer, halves=_pointer,
    rows=_long, texts=_long, first=_long, last=_long, firsts=_int, hands=_int,
)  # fmt: skip


@dataclass(frozen=True)
class Jobs:
    """What adapters add in a batch, product by product.

    Attributes:
        words: (n, 7) int64: first row, rows, addresses of A (r, in), B (r, out) with s in it and DoRA's
            factor (out,) or 0, r, first column. In the last block, where only first tokens are wanted, rows
            are texts.
        ends: (4 blocks + 1,) int64: the jobs of product p of block i are `ends[4 i + p]` to `ends[4 i + p +
            1]`.
        widths: (n, 2) int64, in and out of each.
    """

    words: np.ndarray
    ends: np.ndarray
    widths: np.ndarray

    @classmethod
    @cache
    def none(cls, blocks: int) -> "Jobs":
        return cls(
            np.zeros((0, 7), np.int64),
            np.zeros(len(PRODUCTS) * blocks + 1, np.int64),
            np.zeros((0, 2), np.int64),
        )


class Blocks:
    """The frozen tensors of post-norm blocks with GELU.

    Args:
        blocks: of each, weight and bias of `PRODUCTS` and `NORMS`, float32 on the CPU, as "qkv.bias".
        weights: of each, the weights of `PRODUCTS` laid out, all for vectors or all for matrix units.

    Raises:
        ValueError: heads, widths or processor that encode.c does not take.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Tensor]],
        weights: Sequence[Mapping[str, Product | Panels]],
        heads: int,
        eps: float,
    ):
        inner, width = weights[0]["intermediate"].out, weights[0]["intermediate"].inner
        self._shapes = np.array([(width, 3 * width), (width, width), (width, inner), (inner, width)])
        kinds = {type(weight) for block in weights for weight in block.values()}
        fits = all(
            (block[name].inner, block[name].out) == tuple(shape)
            for block in weights
            for name, shape in zip(PRODUCTS, self._shapes, strict=True)
        )
        if (
            not fits
            or len(kinds) != 1
            or width % heads
            or width // heads not in HEADS
            or width % PASS_LANES
            or inner % PASS_LANES
            or not bindings.lanes()
        ):
            raise ValueError(f"{heads} heads in a width of {width}, {inner} inside: not for this function")
        self.layers, self.width, d = len(blocks), width, width // heads
        query, key, value = blocks[-1]["qkv.weight"].split(width)
        last = [torch.cat([Product(part, turned).panels for part in weight.split(size)]) for weight, size, turned in (
            (query, width, False), (key, d, True), (value, d, False)
        )]  # fmt: skip
        self._held = (blocks, weights, last)  # C has their addresses
        made = (_Block * self.layers)()
        for place, block, laid_out in zip(made, blocks, weights, strict=True):
            pointers = []
            for name, (_, out) in zip(PRODUCTS, self._shapes, strict=True):
                check(block[f"{name}.bias"], (out,))
                pointers += laid_out[name].address, block[f"{name}.bias"].data_ptr()
            for name in NORMS:
                for part in ("weight", "bias"):
                    check(block[f"{name}.{part}"], (width,))
                    pointers.append(block[f"{name}.{part}"].data_ptr())
            place.pointers[:] = pointers
        self._blocks = made
        addresses = [tensor.data_ptr() for tensor in last]
        self._encoder = _Encoder(
            ctypes.addressof(made),
            *addresses,
            self.layers,
            width,
            inner,
            heads,
            eps,
            bindings.lanes(),
            kinds == {Panels},
        )

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Tensor,
        jobs: Jobs,
        first: int = 0,
        last: int | None = None,
        only_first: bool = False,
    ) -> Tensor:
        """The output of block `last - 1`, (T, width), or of the first token of each text, (B, width).

        Args:
            x: (T, width) float32, the input of block `first`; all rows belong to texts.
            cu_seqlens: (B+1,) int32; no text is empty or has more than `LONGEST` tokens.
            last: default: all blocks.
            only_first: give first tokens; `last` is then the end.
        """
        last, (rows, texts) = self.layers if last is None else last, (x.shape[0], cu_seqlens.shape[0] - 1)
        check(x, (rows, self.width))
        check_texts(cu_seqlens, rows, 1)
        if not 0 <= first < last <= self.layers or (only_first and last < self.layers):
            raise ValueError(f"blocks {first} to {last} of {self.layers} on {rows} rows of {texts} texts")
        self._check(jobs, rows, texts if only_first else rows)
        y = x.new_empty(texts if only_first else rows, self.width)
        batch = _Batch(
            x=x.data_ptr(), y=y.data_ptr(), starts=cu_seqlens.data_ptr(), jobs=jobs.words.ctypes.data, ends=jobs.ends.ctypes.data,
            rows=rows, texts=texts, first=first, last=last, firsts=only_first, hands=hands(rows),
        )  # fmt: skip
        given = ctypes.byref(self._encoder), ctypes.byref(batch)
        scratch = 4 * library().textlora_encode_scratch(*given)
        room = batch.hands * library().textlora_attention_scratch()
        halves = batch.hands * library().textlora_amx_scratch() if self._encoder.halves else 0
        with (
            scratch_room.lent(scratch) as numbers,
            attention_room.lent(room) as rooms,
            split_room.lent(halves) as split,
        ):
            batch.scratch, batch.rooms, batch.halves = numbers.data_ptr(), rooms.data_ptr(), split.data_ptr()
            library().textlora_encode(*given)
        return y

    def _check(self, jobs: Jobs, rows: int, rows_of_last: int) -> None:
        """Nothing else reaches C. Raises ValueError."""
        if jobs is Jobs.none(self.layers):
            return
        words, ends, count = jobs.words, jobs.ends, len(PRODUCTS) * self.layers
        ordered = (
            ends.shape == (count + 1,)
            and ends[0] == 0
            and ends[-1] == len(words)
            and (np.diff(ends) >= 0).all()
        )
        if (
            not ordered
            or any(not a.flags.c_contiguous or a.dtype != np.int64 for a in (words, ends))
            or words.shape[1:] != (7,)
        ):
            raise ValueError("jobs in no order")
        if not len(words):
            return
        product = np.repeat(np.arange(count), np.diff(ends))
        most = np.where(product >= count - len(PRODUCTS), rows_of_last, rows)
        inner, out = self._shapes[product % len(PRODUCTS)].T
        first, amount, rank, column = words[:, 0], words[:, 1], words[:, 5], words[:, 6]
        stacked = product % len(PRODUCTS) == 0
        fits = (jobs.widths[:, 0] == inner) & (jobs.widths[:, 1] == np.where(stacked, self.width, out))
        placed = np.where(stacked, (column % self.width == 0) & (column < out), column == 0) & (column >= 0)
        there = (
            (first >= 0)
            & (amount >= 0)
            & (first + amount <= most)
            & (rank > 0)
            & (rank <= MOST_RANK)
            & (words[:, 2:4] != 0).all(1)
        )
        if not (fits & placed & there).all():
            raise ValueError("a layer of another width, or rows that are not there")

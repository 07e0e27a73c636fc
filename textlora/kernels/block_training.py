"""The blocks of the frozen encoder with LoRA on query, key or value (train.c), forward and back, a call each
for a piece of a step."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from textlora.kernels import bindings
from textlora.kernels.bindings import (
    HEADS,
    PASS_LANES,
    Product,
    attention_room,
    check,
    check_texts,
    hands,
    library,
    scratch_room,
    structure,
)
from textlora.kernels.block_inference import NORMS, PRODUCTS

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_Block = structure("_Block", pointers=_pointer * (3 * len(PRODUCTS) + 2 * len(NORMS)))
_Encoder = structure(
    "_Encoder", blocks=_pointer, firsts=_pointer * 9, layers=_long, width=_long, inner=_long, heads=_long, eps=_float, lanes=_int
)  # fmt: skip
_Adapter = structure(
    "_Adapter", A=_pointer, B=_pointer, dA=_pointer, dB=_pointer, r=_long, column=_long, scaling=_float
)
_Call = structure(
    "_Call", x=_pointer, starts=_pointer, kept=_pointer, y=_pointer, grad=_pointer, dx=_pointer, scratch=_pointer, rooms=_pointer, adapters=_pointer,
    ends=_pointer, rows=_long, texts=_long, first=_long, last=_long, lowest=_long, firsts=_int, again=_int, hands=_int,
)  # fmt: skip


@dataclass(frozen=True)
class Both:
    """A dense layer's weight, laid out both ways."""

    forward: Product
    back: Product


@dataclass(frozen=True)
class Adapted:
    """LoRA on `width` outputs of the stacked q, k, v of a block, from `column` on: A (r, width), B (width,
    r)."""

    A: Tensor
    B: Tensor
    scaling: float
    block: int
    column: int


@dataclass(frozen=True)
class Piece:
    """What a call of blocks `first` to `last` - 1 works on.

    Attributes:
        cu_seqlens: (B+1,) int32; no text is empty or has more than `LONGEST` tokens.
        adapters: block by block, at most one on a column of a block.
        only_first: the output is that of the first token of each text, (B, width); `last` is then the end.
        lowest: the first block with a way back; `last` where there is none.
        again: keep each block's input alone and compute the rest again on the way back.
    """

    cu_seqlens: Tensor
    adapters: Sequence[Adapted]
    first: int
    last: int
    lowest: int
    only_first: bool
    again: bool


class Blocks:
    """The frozen tensors of post-norm blocks with GELU.

    Args:
        blocks: of each, weight and bias of `PRODUCTS` and `NORMS`, float32 on the CPU, as "qkv.bias".
        weights: of each, the weights of `PRODUCTS` laid out.

    Raises:
        ValueError: heads, widths or processor that train.c does not take.
    """

    def __init__(
        self,
        blocks: Sequence[Mapping[str, Tensor]],
        weights: Sequence[Mapping[str, Both]],
        heads: int,
        eps: float,
    ):
        inner, width = weights[0]["intermediate"].forward.out, weights[0]["intermediate"].forward.inner
        shapes = dict(
            zip(PRODUCTS, ((3 * width, width), (width, width), (inner, width), (width, inner)), strict=True)
        )
        both = [(block[name], shapes[name]) for block in weights for name in PRODUCTS]
        fits = all(
            (one.forward.out, one.forward.inner) == (one.back.inner, one.back.out) == shape
            for one, shape in both
        )
        if (
            not fits
            or width % heads
            or width // heads not in HEADS
            or width % PASS_LANES
            or inner % PASS_LANES
            or not bindings.lanes()
        ):
            raise ValueError(f"{heads} heads in a width of {width}, {inner} inside: not for this function")
        self.layers, self.width = len(blocks), width
        made = (_Block * len(blocks))()
        for place, block, laid_out in zip(made, blocks, weights, strict=True):
            pointers = []
            for name in PRODUCTS:
                check(block[f"{name}.bias"], shapes[name][:1])
                pointers += [
                    laid_out[name].forward.address,
                    laid_out[name].back.address,
                    block[f"{name}.bias"].data_ptr(),
                ]
            for name in NORMS:
                for part in ("weight", "bias"):
                    check(block[f"{name}.{part}"], (width,))
                    pointers.append(block[f"{name}.{part}"].data_ptr())
            place.pointers[:] = pointers
        query, key, value = blocks[-1]["qkv.weight"].split(width)
        last = [Product(query).panels, Product(query, turned=True).panels]
        for weight, keys in (
            (key, True),
            (value, False),
        ):  # of key and value of first tokens the roles of in and out are turned for keys
            last += [
                torch.cat([Product(rows, turned=turned).panels for rows in weight.split(width // heads)])
                for turned in (keys, not keys)
            ]
        self._held = (blocks, weights, made, last)  # C has their addresses
        addresses = [tensor.data_ptr() for tensor in last]
        firsts = (_pointer * 9)(
            *(address for k in range(3) for address in (*addresses[2 * k : 2 * k + 2], None))
        )
        self._encoder = _Encoder(
            ctypes.addressof(made), firsts, self.layers, width, inner, heads, eps, bindings.lanes()
        )

    def forward(self, x: Tensor, piece: Piece) -> tuple[Tensor, Tensor]:
        """The output of the last of these blocks, (T, width) or (B, width), and what `back` needs. x: (T,
        width) float32; all rows belong to texts."""
        call = self._call(x, piece)
        y = x.new_empty(call.texts if call.firsts else call.rows, self.width)
        kept = x.new_empty(library().textlora_train_kept(*self._given(call)))
        call.y, call.kept = y.data_ptr(), kept.data_ptr()
        self._run(library().textlora_train, call)
        return y, kept

    def back(
        self, grad: Tensor, kept: Tensor, x: Tensor, piece: Piece, with_input: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor | None, ...]]]:
        """From the gradient of the output that of x, where it is wanted, and of A and B of every adapter,
        None below `lowest`. Writes over `kept`."""
        found = [
            (None, None) if one.block < piece.lowest else (torch.empty_like(one.A), torch.empty_like(one.B))
            for one in piece.adapters
        ]
        call = self._call(x, piece, found)
        check(grad, (call.texts if call.firsts else call.rows, self.width))
        check(kept, (library().textlora_train_kept(*self._given(call)),))
        if with_input and piece.lowest != piece.first:
            raise ValueError(f"a gradient of x behind block {piece.lowest}")
        dx = x.new_empty(x.shape) if with_input else None
        call.kept = kept.data_ptr()
        call.grad = grad.data_ptr()
        call.dx = None if dx is None else dx.data_ptr()
        self._run(library().textlora_train_back, call)
        return dx, found

    def _call(
        self, x: Tensor, piece: Piece, found: Sequence[tuple[Tensor | None, ...]] = ()
    ) -> ctypes.Structure:
        """A call. Nothing else reaches C: raises ValueError."""
        rows, starts = x.shape[0], piece.cu_seqlens
        check(x, (rows, self.width))
        check_texts(starts, rows, 1)
        if (
            not 0 <= piece.first < piece.last <= self.layers
            or not piece.first <= piece.lowest <= piece.last
            or (piece.only_first and piece.last < self.layers)
        ):
            raise ValueError(f"blocks {piece.first} to {piece.last} of {self.layers}, back to {piece.lowest}")
        table, ends = (_Adapter * len(piece.adapters))(), np.zeros(self.layers + 1, dtype=np.int64)
        for place, one in zip(table, piece.adapters, strict=True):
            r = one.A.shape[0]
            check(one.A, (r, self.width))
            check(one.B, (self.width, r))
            if (
                one.column not in (0, self.width, 2 * self.width)
                or not r
                or not piece.first <= one.block < piece.last
            ):
                raise ValueError(f"an adapter of rank {r} on column {one.column} of block {one.block}")
            place.A = one.A.data_ptr()
            place.B = one.B.data_ptr()
            place.r = r
            place.column = one.column
            place.scaling = one.scaling
            ends[one.block + 1] += 1
        places = [(one.block, one.column) for one in piece.adapters]
        if places != sorted(set(places)):
            raise ValueError("adapters in no order")
        for place, gradients in zip(table, found, strict=bool(found)):
            place.dA, place.dB = (None if tensor is None else tensor.data_ptr() for tensor in gradients)
        np.cumsum(ends, out=ends)
        call = _Call(
            x=x.data_ptr(), starts=starts.data_ptr(), adapters=ctypes.addressof(table), ends=ends.ctypes.data, rows=rows, texts=starts.shape[0] - 1,
            first=piece.first, last=piece.last, lowest=piece.lowest, firsts=piece.only_first, again=piece.again, hands=hands(rows),
        )  # fmt: skip
        call.held = table, ends  # it has their addresses
        return call

    def _run(self, function, call: ctypes.Structure) -> None:
        size = 4 * library().textlora_train_scratch(*self._given(call))
        room = call.hands * library().textlora_attention_scratch()
        with attention_room.lent(room) as rooms, scratch_room.lent(size) as scratch:
            call.rooms, call.scratch = rooms.data_ptr(), scratch.data_ptr()
            function(*self._given(call))

    def _given(self, call: ctypes.Structure) -> tuple:
        return ctypes.byref(self._encoder), ctypes.byref(call)

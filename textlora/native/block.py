"""A whole block of the frozen encoder with LoRA on query, key or value, forward and back (block.c), one call each, on one core."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from textlora import native
from textlora.native import HEADS, PASS_LANES, Product, attention_room, check, check_texts, library, scratch_room, structure

MOST = 3  # adapters of a block

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_Dense = structure("_Dense", forward=_pointer, back=_pointer, bias=_pointer)
_Norm = structure("_Norm", weight=_pointer, shift=_pointer)
_Frozen = structure(
    "_Frozen",
    qkv=_Dense,
    output=_Dense,
    up=_Dense,
    down=_Dense,
    first=_Norm,
    second=_Norm,
    width=_long,
    inner=_long,
    heads=_long,
    eps=_float,
    lanes=_int,
)
_Adapter = structure("_Adapter", A=_pointer, B=_pointer, dA=_pointer, dB=_pointer, r=_long, column=_long, scaling=_float)
_Call = structure(
    "_Call", x=_pointer, starts=_pointer, kept=_pointer, y=_pointer, scratch=_pointer, room=_pointer,
    rows=_long, texts=_long, adapters=_long, rank=_long, slopes=_int, adapter=_Adapter * MOST,
)  # fmt: skip


@dataclass(frozen=True)
class Dense:
    """A dense layer: its weight laid out both ways, and its bias (out,)."""

    forward: Product
    back: Product
    bias: Tensor


@dataclass(frozen=True)
class Adapted:
    """LoRA on `width` outputs of the stacked q, k, v from `column` on: A (r, width), B (width, r)."""

    A: Tensor
    B: Tensor
    scaling: float
    column: int


class Block:
    """The frozen tensors of a post-norm block with GELU.

    Args:
        qkv, output, up, down: its dense layers.
        norms: weight and shift (width,) of the norm after attention and of that after the feed-forward.

    Raises:
        ValueError: heads, widths or processor that block.c does not take.
    """

    def __init__(self, qkv: Dense, output: Dense, up: Dense, down: Dense, norms: Sequence[tuple[Tensor, Tensor]], heads: int, eps: float):
        width, inner = output.forward.inner, up.forward.out
        shapes = {(3 * width, width): qkv, (width, width): output, (inner, width): up, (width, inner): down}
        fits = all((d.forward.out, d.forward.inner) == (d.back.inner, d.back.out) == shape for shape, d in shapes.items())
        if not fits or width % heads or width // heads not in HEADS or width % PASS_LANES or inner % PASS_LANES or not native.lanes():
            raise ValueError(f"{heads} heads in a width of {width}, {inner} inside: not for this function")
        for (out, _), dense in shapes.items():
            check(dense.bias, (out,))
        for norm in norms:
            for tensor in norm:
                check(tensor, (width,))
        self.width, self.heads = width, heads
        self._held = (qkv, output, up, down, norms)  # C has their addresses
        dense = [_Dense(d.forward.address, d.back.address, d.bias.data_ptr()) for d in (qkv, output, up, down)]
        self._frozen = _Frozen(*dense, *(_Norm(*(t.data_ptr() for t in norm)) for norm in norms), width, inner, heads, eps, native.lanes())

    def forward(self, x: Tensor, cu_seqlens: Tensor, adapters: Sequence[Adapted], with_gradient: bool) -> tuple[Tensor, Tensor]:
        """The block's output (T, width) and what `back` needs.

        Args:
            x: (T, width) float32; all rows belong to texts.
            cu_seqlens: (B+1,) int32; no text has more than `LONGEST` tokens.
        """
        call = self._call(x, cu_seqlens, adapters, with_gradient)
        y, kept = x.new_empty(x.shape), x.new_empty(library().textlora_block_kept(*self._given(call)))
        call.y, call.kept = y.data_ptr(), kept.data_ptr()
        self._run(library().textlora_block, call)
        return y, kept

    def back(
        self, grad: Tensor, kept: Tensor, x: Tensor, cu_seqlens: Tensor, adapters: Sequence[Adapted], with_input: bool
    ) -> tuple[Tensor | None, list[tuple[Tensor, Tensor]]]:
        """From the gradient of the output (T, width) that of x, where it is wanted, and of every A and B. Writes over `kept`."""
        check(grad, x.shape)
        call = self._call(x, cu_seqlens, adapters, True)
        check(kept, (library().textlora_block_kept(*self._given(call)),))
        dx, found = x.new_empty(x.shape) if with_input else None, [(one.A.new_empty(one.A.shape), one.B.new_empty(one.B.shape)) for one in adapters]
        call.y, call.kept = None if dx is None else dx.data_ptr(), kept.data_ptr()
        for place, (dA, dB) in zip(call.adapter, found, strict=False):
            place.dA, place.dB = dA.data_ptr(), dB.data_ptr()
        self._run(library().textlora_block_back, call, grad.data_ptr())
        return dx, found

    def _call(self, x: Tensor, cu_seqlens: Tensor, adapters: Sequence[Adapted], with_gradient: bool) -> ctypes.Structure:
        check(x, (x.shape[0], self.width))
        check_texts(cu_seqlens, x.shape[0])
        if len(adapters) > MOST or cu_seqlens[-1] != x.shape[0]:
            raise ValueError(f"{len(adapters)} adapters, {x.shape[0]} rows")
        call = _Call(x=x.data_ptr(), starts=cu_seqlens.data_ptr(), rows=x.shape[0], texts=cu_seqlens.shape[0] - 1, slopes=with_gradient)
        for one in adapters:
            r = one.A.shape[0]
            check(one.A, (r, self.width))
            check(one.B, (self.width, r))
            if one.column not in (0, self.width, 2 * self.width) or not r:
                raise ValueError(f"an adapter of rank {r} on column {one.column}")
            call.adapter[call.adapters] = _Adapter(one.A.data_ptr(), one.B.data_ptr(), None, None, r, one.column, one.scaling)
            call.adapters += 1
            call.rank += r
        return call

    def _run(self, function, call: ctypes.Structure, *rest: int) -> None:
        size = 4 * library().textlora_block_scratch(*self._given(call))
        with attention_room.lent(library().textlora_attention_scratch()) as room, scratch_room.lent(size) as scratch:
            call.room, call.scratch = room.data_ptr(), scratch.data_ptr()
            function(*self._given(call), *rest)

    def _given(self, call: ctypes.Structure) -> tuple:
        return ctypes.byref(self._frozen), ctypes.byref(call)

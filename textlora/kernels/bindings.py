"""What torch has no fast way for, in C: products on the matrix units (amx.c), attention (attention.c), the
small products of many adapters (grouped_lora.c), what lies between the products of a block (passes.c), products with
what follows them (product.c). train.py has all blocks in training, encode.py when predicting, in one call,
which several threads may share (crew.c).

They are there where the package was built with a C compiler on x86 Linux and the processor has what they use;
everything works without.
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from textlora.kernels.library import has_amx, lanes, library

LONGEST = 512  # tokens of a text
HEADS = (16, 32, 64)  # widths of a head
MOST_RANK, LANES = 256, 8
PASS_LANES = 16  # widths are multiples of it
HANDS, HELPERS = 64, 8  # threads of a call that has no crew, and of one that has, at most
HAND_ROWS = 32  # for each at least: all read all weights

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    """A C structure of these fields, in order."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


class _Room:
    """Memory for C to work in: as many pieces as calls at the same time, each as large as was asked for. They
    belong to no thread, since threads come and go."""

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    @contextmanager
    def lent(self, size: int) -> Iterator[Tensor]:
        """A piece of so many bytes or more, for as long as this lasts."""
        try:
            piece = self._free.pop()
        except IndexError:
            piece = torch.empty(0, dtype=torch.uint8)
        if piece.shape[0] < size:
            piece = torch.empty(size, dtype=torch.uint8)  # torch aligns to 64 bytes
        try:
            yield piece
        finally:
            self._free.append(piece)


attention_room, scratch_room, split_room = _Room(), _Room(), _Room()


class ThreadTeam:
    """Threads that do work of their own and then help with what others of them are at (crew.c): a call of C
    is cut into chunks that anybody may take."""

    def __init__(self, size: int):
        self.size, self._busy, self._lock = size, ctypes.c_int(size), threading.Lock()

    @contextmanager
    def member(self, number: int) -> Iterator[None]:
        """What a thread does meanwhile is its own work; then it helps until all have done theirs. Each number
        below the size is taken once."""
        if library() is None:
            yield
            return
        library().textlora_join(ctypes.byref(self._busy), number, self.size)
        try:
            yield
        finally:
            with self._lock:
                self._busy.value -= 1
            library().textlora_help()
            library().textlora_join(None, 0, 0)


def hands(rows: int) -> int:
    """Threads that a call on so many rows may have: of this thread's crew, for its cores, or as many as torch
    has here."""
    known = library().textlora_hands()
    return max(1, min(HELPERS if known else HANDS, known or torch.get_num_threads(), rows // HAND_ROWS))


def share_cores(count: int) -> None:
    """Calls of this thread, and of others that say the same, have as many threads together as there are
    cores: one that runs alone has them all, and gives them back when another begins."""
    if library() is not None:
        library().textlora_cores(count)


def attention(projected: Tensor, out: Tensor, cu_seqlens: Tensor, texts: int, heads: int) -> None:
    """Attention inside each of the first `texts` texts, on one core.

    Args:
        projected: (T, 3H) float32, q, k, v of every token; H / heads is one of `HEADS`.
        out: (T, H) float32; rows of those texts are written.
        cu_seqlens: (B+1,) int32; no text of these has more than `LONGEST` tokens.
    """
    check(out)
    _attention(projected, None, out, out.shape, cu_seqlens, texts, heads)


def attention_back(
    projected: Tensor, grad: Tensor, out: Tensor, cu_seqlens: Tensor, texts: int, heads: int
) -> None:
    """The gradient of `projected`, (T, 3H), from that of what `attention` gives, (T, H); the rest as there."""
    check(grad)
    check(out, projected.shape)
    _attention(projected, grad, out, grad.shape, cu_seqlens, texts, heads)


def _attention(
    projected: Tensor,
    grad: Tensor | None,
    out: Tensor,
    shape: torch.Size,
    cu_seqlens: Tensor,
    texts: int,
    heads: int,
) -> None:
    rows, width = shape
    check(projected, (rows, 3 * width))
    check_texts(cu_seqlens[: texts + 1], rows)
    if width % heads or width // heads not in HEADS or len(cu_seqlens) <= texts or not lanes():
        raise ValueError(f"{heads} heads in a width of {width}: not for this function")
    d = width // heads
    with attention_room.lent(library().textlora_attention_scratch()) as room:
        library().textlora_attention(
            *_addresses(projected, grad, out, cu_seqlens, room), texts, heads, 0, heads, d, d**-0.5, lanes()
        )


class AdaptedLayer(NamedTuple):
    """A dense layer of an adapter, as grouped_lora.c reads it.

    Attributes:
        A: (r, in); B: (r, out), with s in it; scale: DoRA's factor (out,) or None. Float32, on the CPU,
            contiguous.
        column: of the outputs that lie side by side, the first of this layer.
        words: addresses of the three, r and column.
    """

    A: Tensor
    B: Tensor
    scale: Tensor | None
    column: int
    words: tuple[int, ...]

    @classmethod
    def of(cls, A: Tensor, B: Tensor, scale: Tensor | None, column: int) -> "AdaptedLayer | None":
        """None where grouped_lora.c cannot take it: nothing compiled, another type or device, a width that is no
        multiple of 8, a rank above 256."""
        fits = all(
            t is None or (t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous())
            for t in (A, B, scale)
        )
        if not fits or A.shape[1] % LANES or B.shape[1] % LANES or len(A) > MOST_RANK or library() is None:
            return None
        return cls(
            A,
            B,
            scale,
            column,
            (A.data_ptr(), B.data_ptr(), 0 if scale is None else scale.data_ptr(), len(A), column),
        )


def add_adapted(x: Tensor, y: Tensor, jobs: Sequence[tuple[int, int, AdaptedLayer]]) -> None:
    """`y = (y + (x A^T) B) scale` in place for stretches of rows, each with an adapter's layer, on one core.

    Args:
        x: (T, in) float32; y: (T, outputs) float32.
        jobs: first row, number of rows, layer. All layers have the same widths.
    """
    if not jobs:
        return
    x, out = x.contiguous(), jobs[0][2].B.shape[1]
    check(x, (len(y), jobs[0][2].A.shape[1]))
    check(y)
    table = np.array([(row, rows, *layer.words) for row, rows, layer in jobs], dtype=np.int64)
    alike = all(layer.A.shape[1] == x.shape[1] and layer.B.shape[1] == out for _, _, layer in jobs)
    first, rows, column = table[:, 0], table[:, 1], table[:, -1]
    if (
        not alike
        or min(first.min(), rows.min(), column.min()) < 0
        or (first + rows).max() > len(y)
        or column.max() + out > y.shape[1]
    ):
        raise ValueError("a layer of another width, or rows that are not there")
    library().textlora_lora(
        x.data_ptr(), y.data_ptr(), table.ctypes.data, len(jobs), x.shape[1], y.shape[1], out
    )


def has_passes(x: Tensor) -> bool:
    """Whether `gelu`, `norm`, `mean` and their ways back take tensors like this one, (..., width)."""
    return (
        x.dtype == torch.float32 and x.device.type == "cpu" and not x.shape[-1] % PASS_LANES and lanes() > 0
    )


def gelu(h: Tensor, bias: Tensor | None, out: Tensor, slope: bool) -> None:
    """`out = gelu(h + bias)`, on one core; `h` becomes GELU's slope there or stays. (T, width) float32; `out`
    may be `h` where no slope is wanted."""
    check(h)
    check(out, h.shape)
    check(bias, (h.shape[1],))
    check_width(h)
    if not lanes():
        raise ValueError("no vectors here")
    library().textlora_gelu(*_addresses(h, bias, out), *h.shape, slope, lanes())


def norm(
    y: Tensor,
    bias: Tensor,
    residual: Tensor,
    weight: Tensor,
    shift: Tensor,
    out: Tensor,
    scale: Tensor,
    eps: float,
) -> None:
    """`out = layer_norm(y + bias + residual) weight + shift`, on one core. What `norm_back` needs: `y`
    becomes the sum normed, scale (T,) one by its deviation. (T, width) float32; the rest (width,)."""
    check(y)
    for tensor in (residual, out):
        check(tensor, y.shape)
    for tensor in (bias, weight, shift):
        check(tensor, (y.shape[1],))
    check(scale, (len(y),))
    check_width(y)
    library().textlora_norm(*_addresses(y, bias, residual, weight, shift, out, scale), *y.shape, eps)


def norm_back(grad: Tensor, weight: Tensor, normed: Tensor, scale: Tensor) -> None:
    """The gradient of the sum in `norm` from that of `out`, written over the sum normed, on one core."""
    check(grad, normed.shape)
    check(normed)
    check(weight, (normed.shape[1],))
    check(scale, (len(normed),))
    check_width(normed)
    library().textlora_norm_back(*_addresses(grad, weight, normed, scale), *normed.shape)


def mean(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean (B, width) of each text's rows, on one core: a thousandth of a forward.

    Args:
        x: (T, width) float32, all rows in texts.
        cu_seqlens: (B+1,) int32; no text is empty.
    """
    check(x)
    check_width(x)
    out = x.new_empty(_texts_of(cu_seqlens, len(x)), x.shape[1])
    library().textlora_mean(*_addresses(x, cu_seqlens, out), *out.shape)
    return out


def mean_back(grad: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """The gradient (T, width) of x in `mean`, T `rows`, from that of its means (B, width)."""
    check(grad, (_texts_of(cu_seqlens, rows), grad.shape[1]))
    check_width(grad)
    dx = grad.new_empty(rows, grad.shape[1])
    library().textlora_mean_back(*_addresses(grad, cu_seqlens, dx), *grad.shape)
    return dx


def _texts_of(cu_seqlens: Tensor, rows: int) -> int:
    """Number of texts, one behind the other and of any length, in all of so many rows. Raises ValueError."""
    check(cu_seqlens, dtype=torch.int32)
    starts = cu_seqlens.numpy()
    if (
        starts.ndim != 1
        or not starts.size
        or starts[0] != 0
        or starts[-1] != rows
        or (starts[1:] <= starts[:-1]).any()
    ):
        raise ValueError(f"texts in no order, or not all of {rows} rows: {starts.tolist()}")
    return len(starts) - 1


def embed(
    places: Sequence[Tensor], tables: Sequence[Tensor], weight: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """`layer_norm` of the sum of rows, one of each table: (T, width), on one core.

    Args:
        places: (T,) int64 each, rows of words, of token types where the base has them, and of positions.
        tables: (..., width) float32, in the same order.
        weight, shift: (width,).

    Raises:
        ValueError: a place outside its table, or anything else that C must not get.
    """
    width = tables[0].shape[1]
    for at, table in zip(places, tables, strict=True):
        check(at, places[0].shape, torch.int64)
        check(table, (len(table), width))
        numbers = at.numpy()
        low, high = numbers.min(initial=0), numbers.max(initial=0)
        if low < 0 or high >= len(table):
            raise ValueError(f"place {low} or {high} in a table of {len(table)} rows")
    for tensor in (weight, shift):
        check(tensor, (width,))
    check_width(tables[0])
    out = tables[0].new_empty(len(places[0]), width)
    named = [[given[0], given[1] if len(given) == 3 else None, given[-1]] for given in (places, tables)]
    library().textlora_embed(*_addresses(*named[0], *named[1], weight, shift, out), *out.shape, eps)
    return out


class Product:
    """Products with a frozen weight (out, in), float32 and on the CPU, or with it turned, on one core. No
    gradients."""

    def __init__(self, weight: Tensor, turned: bool = False):
        if not lanes():
            raise ValueError("no vectors here")
        plain = weight.detach().contiguous()
        check(plain)
        rows, columns = plain.shape
        self.inner, self.out, steps = (
            (rows, columns, (columns, 1)) if turned else (columns, rows, (1, columns))
        )
        self.panels = torch.empty(
            library().textlora_product_size(self.inner, self.out, lanes())
        )  # torch aligns to 64 bytes
        self.address = self.panels.data_ptr()
        library().textlora_product_lay_out(
            plain.data_ptr(), self.address, self.inner, self.out, *steps, 1.0, lanes()
        )

    def __call__(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x W^T + b`: (T, in) to (T, out), contiguous."""
        y = x.new_empty(x.shape[0], self.out)
        check(x, (x.shape[0], self.inner))
        check(bias, (self.out,))
        places = (
            x.data_ptr(),
            self.inner,
            self.address,
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            self.out,
            None,
        )
        library().textlora_product(*places, x.shape[0], self.inner, self.out, 0, lanes())
        return y


class Panels:
    """A weight (out, in), float32 and on the CPU, as amx.c wants it: twice 16 bits a number."""

    def __init__(self, weight: Tensor):
        if not has_amx():  # which also asks the system for the units
            raise ValueError("no matrix units here")
        self.out, self.inner = weight.shape
        plain = weight.detach().contiguous()
        check(plain)
        self._laid_out = torch.empty(
            library().textlora_amx_bytes(self.out, self.inner), dtype=torch.uint8
        )  # torch aligns to 64 bytes
        self.address = self._laid_out.data_ptr()
        library().textlora_amx_lay_out(plain.data_ptr(), self.out, self.inner, self.address)

    def product(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: bool) -> Tensor:
        """`f(x W^T + b) + residual`, f GELU or nothing: x (T, in) to (T, out), on one core, without
        gradients."""
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        y = x.new_empty(len(x), self.out)
        check(x, (len(x), self.inner))
        check(bias, (self.out,))
        check(residual, y.shape)
        with split_room.lent(library().textlora_amx_scratch()) as room:
            library().textlora_amx_product(
                *_addresses(x, self._laid_out, bias, residual, y, room), len(x), self.inner, self.out, gelu
            )
        return y


def check(
    tensor: Tensor | None, shape: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """Nothing else reaches C. Raises ValueError."""
    if tensor is None:
        return
    if (
        tensor.dtype != dtype
        or tensor.device.type != "cpu"
        or not tensor.is_contiguous()
        or (shape is not None and tensor.shape != shape)
    ):
        raise ValueError(
            f"{dtype} {shape} on the CPU wanted, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        )


def check_texts(cu_seqlens: Tensor, rows: int, least: int = 0) -> None:
    """Texts of `least` to `LONGEST` tokens, one behind the other, in so many rows; in all of them where none
    may be empty. Raises ValueError."""
    check(cu_seqlens, dtype=torch.int32)
    starts = cu_seqlens.numpy()
    lengths = starts[1:] - starts[:-1]
    inside = starts.size and starts[0] == 0 and (starts[-1] == rows if least else starts[-1] <= rows)
    if not (inside and lengths.min(initial=least) >= least and lengths.max(initial=least) <= LONGEST):
        raise ValueError(f"texts of {lengths.tolist()} tokens in {rows} rows: not for this function")


def check_width(tensor: Tensor) -> None:
    if tensor.ndim != 2 or tensor.shape[1] % PASS_LANES:
        raise ValueError(f"rows of {tensor.shape[-1]} numbers: not a multiple of {PASS_LANES}")


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]

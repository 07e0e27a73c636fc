"""Products of the frozen base: weights laid out once for the processor, in float32, for training both ways,
or in 8-bit integers.

In training torch's products pack a weight anew in every call, forward and back: a tenth of their time at some
600 rows (docs/log.md). Ours read it from panels (product.c).

So do predictions where all blocks are one call (block_inference.py). Elsewhere, with AVX-512 oneDNN runs
float32 products 8 to 12% faster on weights laid out for it, and bias, GELU and residual in the same pass.
Without, its GELU in that pass costs four times one of its own, and MKL on turned weights is a fifth faster
(docs/log.md). oneDNN keeps up to a mebibyte for each shape it has seen, and packed batches hardly repeat one:
so rows come in steps, and products of more rows are cut.

"high", as torch names it, is float32 with products from two bfloat16 numbers for each, on processors with AMX
(amx.c); on others it is float32.

In integers weights are rounded once, with a scale per output, and activations as they come, with a scale per
token. So a token's result depends on no other token of the batch, and integer sums are exact. Symmetric, `q =
round(x / s)`, `s = max|x| / 127`, as vector-wise quantisation in Dettmers et al. 2022 (arXiv 2208.07339,
section 2.1), without its outlier part.
"""

import platform
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.core.errors import UsageError
from textlora.kernels.bindings import Panels, Product, has_amx, lanes

STEP = 32  # tokens; a batch is filled up to a whole number of steps ...
MOST = 1024  # rows of one product
LEVELS = 127


@dataclass(frozen=True)
class _BesidePlain:
    """A weight (out, in) of a dense layer as a processor wants it, beside the plain one, of which parts are
    taken."""

    plain: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.plain.shape

    def __getitem__(self, rows: slice) -> "_BesidePlain | Tensor":
        return self if rows == slice(None) else self.plain[rows]


@dataclass(frozen=True)
class OneDnnWeight(_BesidePlain):
    """Weight (out, in) of a dense layer, float32, in oneDNN's own order."""

    laid_out: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "OneDnnWeight":
        return cls(weight, torch.ops.mkldnn._reorder_linear_weight(weight, MOST))

    def product(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """`f(x W^T + b) + residual`, or the plain weight's where T is no whole number of steps."""
        if len(x) % STEP or (residual is not None and activation is not None):
            return dense(x, self.plain, bias, activation, residual)
        if len(x) > MOST:
            rests = [None] * -(-len(x) // MOST) if residual is None else residual.split(MOST)
            return torch.cat(
                [
                    self.product(part, bias, activation, rest)
                    for part, rest in zip(x.split(MOST), rests, strict=True)
                ]
            )
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.laid_out, bias, "add")
        if activation == "gelu":
            return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, bias, "gelu", [], "none")
        return activate(
            torch.ops.mkldnn._linear_pointwise(x, self.laid_out, bias, "none", [], ""), activation
        )


@dataclass(frozen=True)
class TransposedWeight:
    """Weight of a dense layer, float32, turned to (in, out), as MKL multiplies it fastest."""

    turned: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "TransposedWeight":
        return cls(weight.t().contiguous())

    @property
    def shape(self) -> torch.Size:
        return self.turned.t().shape

    def __getitem__(self, rows: slice) -> "TransposedWeight":
        return TransposedWeight(self.turned[:, rows])

    def product(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """`f(x W^T + b) + residual`."""
        if residual is not None and activation is None:
            return (
                torch.addmm(residual, x, self.turned)
                if bias is None
                else torch.add(residual, bias).addmm_(x, self.turned)
            )
        y = activate(x @ self.turned if bias is None else torch.addmm(bias, x, self.turned), activation)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class Bf16x2Weight(_BesidePlain):
    """Weight (out, in) of a dense layer, float32, each number as two of bfloat16. One core computes a
    product."""

    panels: Panels

    @classmethod
    def of(cls, weight: Tensor) -> "Bf16x2Weight":
        return cls(weight, Panels(weight))

    def product(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """`f(x W^T + b) + residual`."""
        if activation in (None, "gelu"):
            return self.panels.product(x, bias, residual, activation == "gelu")
        y = activate(self.panels.product(x, bias, None, False), activation)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class PackedWeight(_BesidePlain):
    """Weight (out, in) of a dense layer, float32, laid out for products of our own. One core computes a
    product."""

    panels: Product

    @classmethod
    def of(cls, weight: Tensor) -> "PackedWeight":
        return cls(weight, Product(weight))

    def product(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """`f(x W^T + b) + residual`."""
        y = activate(self.panels(x.contiguous(), bias), activation)
        return y if residual is None else y.add_(residual)


@dataclass(frozen=True)
class PackedTrainingWeight(_BesidePlain):
    """Weight (out, in) of a dense layer, float32, laid out for products forward and back, with gradients of
    x. One core computes a product."""

    forward: Product
    back: Product

    @classmethod
    def of(cls, weight: Tensor) -> "PackedTrainingWeight":
        return cls(weight, Product(weight), Product(weight, turned=True))

    def product(
        self, x: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None
    ) -> Tensor:
        """`f(x W^T + b) + residual`."""
        late = bias is not None and bias.requires_grad
        y = _TwoWay.apply(x, self, None if late else bias)
        y = activate(y + bias if late else y, activation)
        return y if residual is None else residual + y


class _TwoWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return weight.forward(x.contiguous(), bias)

    @staticmethod
    def backward(ctx, grad):
        return ctx.weight.back(grad.contiguous()), None, None


class Int8Weight:
    """Weight of a dense layer: q (out, in) int8 and scale (out,) float32, `W = scale q`.

    On x86 q is in oneDNN's own order too, and has 7 bits where this processor's products overflow with 8.
    """

    def __init__(self, q: Tensor, scale: Tensor, laid_out: Tensor | None):
        self.q, self.scale, self.laid_out = q, scale, laid_out
        self._parts: dict[tuple[int | None, int | None], Int8Weight] = {}

    @classmethod
    def of(cls, weight: Tensor) -> "Int8Weight":
        on_x86 = lays_out(weight)
        levels = (exact_levels() or LEVELS) if on_x86 else LEVELS
        scale = weight.abs().amax(1).clamp_min(1e-12).div(levels)
        q = (weight / scale.unsqueeze(1)).round_().to(torch.int8).contiguous()
        return cls(q, scale, torch.ops.onednn.qlinear_prepack(q, None) if on_x86 and exact_levels() else None)

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def __getitem__(self, rows: slice) -> "Int8Weight":
        if rows == slice(None):
            return self
        key = rows.start, rows.stop
        if key not in self._parts:
            q = self.q[rows].contiguous()
            laid_out = None if self.laid_out is None else torch.ops.onednn.qlinear_prepack(q, None)
            self._parts[key] = Int8Weight(q, self.scale[rows], laid_out)
        return self._parts[key]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x W^T + b`: (T, in) to (T, out)."""
        scale = (
            torch.maximum(x.amax(1, keepdim=True), x.amin(1, keepdim=True).neg_())
            .clamp_min_(1e-12)
            .div_(LEVELS)
        )
        rounded = (x / scale).round_().to(torch.int8)
        if self.laid_out is None:
            y = torch._int_mm(rounded, self.q.t()) * self.scale
        else:
            more = filled_up(len(x)) - len(x)
            y = _unsigned_product(
                F.pad(rounded, (0, 0, 0, more)) if more else rounded, self.laid_out, self.scale
            )[: len(x)]
        return y.mul_(scale) if bias is None else torch.addcmul(bias, y, scale, out=y)


def _unsigned_product(x: Tensor, laid_out: Tensor, scale: Tensor) -> Tensor:
    """x (T, in) int8, -127 to 127, times an int8 weight and its scales. Overwrites x.

    oneDNN is fast with unsigned activations only (a thousand times); it takes the offset off again, in
    integers.
    """
    unsigned, none = (
        x.view(torch.uint8).bitwise_xor_(LEVELS + 1),
        torch.zeros_like(scale, dtype=torch.int64),
    )  # plus 128
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, LEVELS + 1, laid_out, scale, none, None, 1.0, 0, torch.float32, "none", [], ""
    )


@cache
def exact_levels() -> int | None:
    """The largest weight with which such products are exact on this processor, 8 bits or 7: without VNNI
    pairs are added in 16 bits, which overflow with 8. None where neither is."""
    for levels in (LEVELS, LEVELS // 2):
        q = torch.full((64, 64), levels, dtype=torch.int8)
        try:
            y = _unsigned_product(
                torch.full((STEP, 64), LEVELS, dtype=torch.int8),
                torch.ops.onednn.qlinear_prepack(q, None),
                torch.ones(64),
            )
        except (RuntimeError, AttributeError):  # no such product here
            return None
        if bool((y == 64 * LEVELS * levels).all()):
            return levels
    return None


Weight = (
    Tensor | Int8Weight | OneDnnWeight | TransposedWeight | Bf16x2Weight | PackedWeight | PackedTrainingWeight
)


def activate(x: Tensor, name: str | None) -> Tensor:
    """Apply an activation by its transformers name; None is the identity."""
    if name is None:
        return x
    if name == "gelu":
        return F.gelu(x)
    if name in ("gelu_new", "gelu_pytorch_tanh"):
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if name == "relu" else torch.tanh(x)


def dense(
    x: Tensor,
    weight: Weight,
    bias: Tensor | None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """A frozen dense layer and what follows it, `f(x W^T + b) + residual`: x (T, in) to (T, out)."""
    if isinstance(
        weight, OneDnnWeight | TransposedWeight | Bf16x2Weight | PackedWeight | PackedTrainingWeight
    ):
        return weight.product(x, bias, activation, residual)
    if isinstance(weight, Tensor):
        y = activate(F.linear(x, weight, bias), activation)
        return y if residual is None else residual + y
    y = activate(weight.product(x, bias), activation)
    return y if residual is None else y.add_(residual)


def dense_back(grad: Tensor, weight: Tensor | PackedTrainingWeight) -> Tensor:
    """The gradient of x in `x W^T`, `grad W`: (T, out) to (T, in)."""
    return grad @ weight if isinstance(weight, Tensor) else weight.back(grad.contiguous())


def lays_out(weight: Tensor) -> bool:
    """Whether laying out a float32 weight works here and gains: on an x86 processor, with oneDNN in this
    torch."""
    fits = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and platform.machine().lower() in ("x86_64", "amd64")
    )
    inner = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return fits and torch.backends.mkldnn.is_available() and inner


def prepare(weight: Tensor, precision: str, one_core: bool = False) -> Weight:
    """A weight (out, in) as this processor multiplies it fastest where `lays_out` holds, or in 8 bits;
    `precision` is one of `config.PRECISIONS`. `one_core`: in panels of our own."""
    if precision == "int8":
        return Int8Weight.of(weight)
    if precision == "high" and has_amx():
        return Bf16x2Weight.of(weight)
    if one_core:
        return PackedWeight.of(weight)
    return (
        OneDnnWeight if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else TransposedWeight
    ).of(weight)


def prepare_for_training(weight: Tensor) -> Tensor | PackedTrainingWeight:
    """A weight (out, in) as this processor multiplies it fastest forward and back."""
    fits = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.requires_grad
    return PackedTrainingWeight.of(weight) if fits and lanes() else weight


def filled_up(tokens: int) -> int:
    """`tokens` up to the next whole number of steps."""
    return -(-tokens // STEP) * STEP


def require_int8(device: torch.device | str) -> None:
    """Check that integer products are exact here: some processors saturate their 16-bit sums.

    Raises:
        UsageError: no integer products on this device, or wrong ones.
    """
    if torch.device(device).type != "cpu":
        raise UsageError("--precision int8: only on CPUs", "leave it out, or use --precision bfloat16")
    if lays_out(torch.empty(0)) and exact_levels():
        return
    x = torch.full((64, 64), LEVELS, dtype=torch.int8)
    try:
        right = bool((torch._int_mm(x, x.t()) == 64 * LEVELS**2).all())
    except (RuntimeError, AttributeError) as error:
        raise UsageError(
            "--precision int8: this torch has no integer products here", "leave it out"
        ) from error
    if not right:
        raise UsageError("--precision int8: integer products overflow on this processor", "leave it out")

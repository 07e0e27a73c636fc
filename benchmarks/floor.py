"""The arithmetic of a job, counted, and the time it would take if nothing else took any: sum of FLOP_i /
rate_i.

Rates are measured in the same process, at the encoder's own shapes, on as many single-threaded workers as the
engine uses: matrix products by (inner, outer) width at the mean number of tokens of a piece; attention by
text length, as many texts at once as a piece has, forward and backward apart. Norms, activations, residual
sums, the optimizer and Python are not counted: they are what the share leaves open.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from textlora.data.tokenize import Encoded, PackedBatch, pack
from textlora.inference.classifier import MIN_SHARE_ONE_CORE
from textlora.kernels.bindings import lanes
from textlora.kernels.devices import Workers, side_by_side
from textlora.kernels.packed_linear import dense, lays_out, prepare
from textlora.model.attention import attend
from textlora.model.families import EncoderSpec
from textlora.training.steps import MIN_PIECE, PIECE_TOKENS, divide

REPEAT_SECONDS = 0.05


@dataclass(frozen=True)
class Work:
    """Products (inner, outer) -> rows that go through them, and attention: length -> texts, forward and
    backward."""

    products: Counter
    attention: Counter
    attention_backward: Counter


def count(
    spec: EncoderSpec,
    lengths: Sequence[int],
    *,
    train: str | None,
    r: int = 8,
    adapted: int = 2,
    depth: int = 0,
) -> Work:
    """Work of one pass over texts of these lengths.

    Args:
        train: None for inference, "lora" for a step on `adapted` of q, k, v, "full" for every weight.
        depth: blocks below it come from a cache and are neither run forward nor back.
    """
    T, B, H, inner_width = sum(lengths), len(lengths), spec.hidden, spec.intermediate
    products, attention, back = Counter(), Counter(), Counter()

    def dense(rows: int, inner: int, outer: int, input_gradient: bool = True) -> None:
        products[inner, outer] += rows
        if train and input_gradient:
            products[outer, inner] += rows
        if train == "full":  # dW: the same number of multiplications, the rows are the inner dimension
            products[inner, outer] += rows

    def lora(rows: int, input_gradient: bool) -> None:
        for inner, outer in ((H, r), (r, H)) * (3 if train else 1):
            products[inner, outer] += (
                rows * adapted if inner == H or input_gradient or not train else rows * adapted // 2
            )

    for i in range(depth, spec.layers):
        first = train is not None and i == depth and train != "full"
        rows = T if i < spec.layers - 1 else B
        if i < spec.layers - 1:
            dense(T, H, 3 * H, not first)
            for length in lengths:
                attention[length] += 1
                if train:
                    back[length] += 1
        else:  # queries of the first tokens; every head reads the tokens twice, (heads, H) by (H, L)
            dense(B, H, H, not first)
            products[H, spec.heads] += 2 * T * (3 if train else 1)
            products[spec.hidden // spec.heads, H] += 2 * B * spec.heads * (2 if train else 1)
        if train == "lora":
            lora(rows, not first)
        dense(rows, H, H)
        dense(rows, H, inner_width)
        dense(rows, inner_width, H)
    return Work(products, attention, back)


def mean_piece(lengths: Sequence[int], batch_size: int = 8) -> int:
    """Tokens of a piece of a training step, in the mean."""
    steps = [range(at, min(at + batch_size, len(lengths))) for at in range(0, len(lengths), batch_size)]
    least = MIN_SHARE_ONE_CORE if lanes() else MIN_PIECE
    count = sum(
        len(divide(np.array(lengths), list(rows), torch.get_num_threads(), PIECE_TOKENS["cpu"], least))
        for rows in steps
    )
    return round(sum(lengths) / count)


def floor_seconds(
    spec: EncoderSpec, work: Work, piece_tokens: int, *, predicting: bool = False
) -> tuple[float, dict[str, float]]:
    """Seconds the work takes at measured rates, and the rates in GFLOP/s: of torch's products in training,
    whichever the engine takes, `predicting` of those on weights as the engine prepares them."""
    seconds, rates = 0.0, {}
    with side_by_side("cpu") as workers, torch.inference_mode(predicting), torch.no_grad():
        for (inner, outer), rows in sorted(work.products.items()):
            tokens = min(piece_tokens, rows)
            x, weight = torch.randn(tokens, inner), torch.randn(outer, inner)
            made = prepare(weight, "float32", lanes() > 0) if predicting and lays_out(weight) else weight
            rate = (
                2
                * tokens
                * inner
                * outer
                * _calls_per_second(workers, lambda x=x, made=made: dense(x, made, None))
            )
            rates[f"product {inner} to {outer}"] = rate / 1e9
            seconds += 2 * rows * inner * outer / rate
        for length, texts in sorted(work.attention.items()):
            at_once = max(1, min(round(texts / spec.layers), piece_tokens // length))
            seconds += texts / at_once / _calls_per_second(workers, _attention(spec, length, at_once))
    for length, texts in sorted(work.attention_backward.items()):
        at_once = max(1, min(round(texts / spec.layers), piece_tokens // length))
        with side_by_side("cpu") as workers:
            both, forward = (
                _calls_per_second(workers, _attention(spec, length, at_once, grad)) for grad in (True, False)
            )
        seconds += texts / at_once * (1 / both - 1 / forward)
    return seconds, rates


def zeros(lengths: Sequence[int], device: str = "cpu") -> PackedBatch:
    """A batch of texts of these lengths."""
    return pack(
        [Encoded(np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int8), n) for n in lengths], device=device
    )


def _attention(spec: EncoderSpec, length: int, texts: int, grad: bool = False) -> Callable[[], object]:
    projected = torch.randn(texts * length, 3 * spec.hidden, requires_grad=grad)
    cotangent = torch.randn(texts * length, spec.hidden)
    layout = zeros([length] * texts).layout

    def call() -> None:
        out = attend(projected, None, layout, spec.heads)
        if grad:
            torch.autograd.grad(out, projected, cotangent)

    return call


def _calls_per_second(workers: Workers, call: Callable[[], object]) -> float:
    """Calls per second of all workers together, each calling again and again."""

    def repeat(_: int) -> tuple[int, float]:
        call()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < REPEAT_SECONDS:
            call()
            done += 1
        return done, time.perf_counter() - start

    return sum(done / taken for done, taken in workers.map(repeat, range(workers.count)))

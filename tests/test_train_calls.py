"""Products laid out both ways, and all blocks forward and back in one call: against float64 with autograd at
every shape, on AVX-512 and on AVX2, and in a model beside the plain way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import settings as run_settings
from test_encode import frozen

from textlora.data.tokenize import Encoded, pack
from textlora.kernels import bindings, fused_ops
from textlora.kernels.bindings import Product
from textlora.kernels.block_inference import NORMS, PRODUCTS
from textlora.kernels.block_training import Adapted, Blocks, Both, Piece
from textlora.kernels.devices import side_by_side
from textlora.kernels.packed_linear import PackedTrainingWeight, dense, dense_back, prepare_for_training
from textlora.model.base import find_base
from textlora.model.encoder import PackedEncoder
from textlora.model.families import read_spec
from textlora.model.lora import Lora, reference_linear
from textlora.training.hidden_state_cache import build_prefix
from textlora.training.prepare import prepare
from textlora.training.trainer import Trainer

needs_vectors = pytest.mark.skipif(
    not bindings.lanes(), reason="this processor has no AVX2, or nothing was compiled"
)


def near(found: torch.Tensor, expected: torch.Tensor, bound: float, floor: float = 0.0) -> None:
    """To `bound` of the largest number, or of `floor` where all are small."""
    assert found.shape == expected.shape
    error = (found.double() - expected).abs().max().item()
    assert error <= bound * max(expected.abs().max().item(), floor), error


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 200), inner=st.integers(1, 70) | st.sampled_from([384, 1536]), out=st.integers(1, 130) | st.sampled_from([384, 1000]),
    biased=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_products_forward_and_back(lanes, rows, inner, out, biased, seed):
    g = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = (
        torch.randn(shape, generator=g) for shape in ((rows, inner), (out, inner), (out,), (rows, out))
    )
    made = PackedTrainingWeight.of(weight)
    exact = x.double() @ weight.double().T + (bias if biased else 0)
    size = x.double().abs() @ weight.double().abs().T + 1
    assert ((made.forward(x, bias if biased else None) - exact).abs() <= 1e-6 * size).all()
    exact, size = grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs()
    assert ((made.back(grad) - exact).abs() <= 1e-6 * size).all()
    if rows > 1:
        assert torch.equal(made.forward(x)[:1], made.forward(x[:1]))  # rows stand alone


@needs_vectors
def test_products_in_a_graph_and_by_parts():
    g = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(shape, generator=g) for shape in ((7, 24), (48, 24), (48,), (7, 48))
    )
    made = prepare_for_training(weight)
    assert isinstance(made, PackedTrainingWeight)
    assert made.shape == weight.shape
    assert made[:] is made
    assert torch.equal(made[8:20], weight[8:20])
    x.requires_grad_()
    bias.requires_grad_()
    for activation in (None, "gelu"):
        found, expected = (dense(x, w, bias, activation, residual) for w in (made, weight))
        np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), atol=1e-5)
        grads = [torch.autograd.grad(y.square().sum(), (x, bias)) for y in (found, expected)]
        for one, other in zip(*grads, strict=True):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        dense_back(residual, made).numpy(), dense_back(residual, weight).numpy(), atol=1e-5
    )
    for other in (weight.double(), weight.clone().requires_grad_()):
        assert prepare_for_training(other) is other


@needs_vectors
@pytest.mark.parametrize("wrong", ["width", "bias", "type", "strides"])
def test_no_product_of_anything_else(wrong):
    x, bias = torch.zeros(5, 24), torch.zeros(9 if wrong == "bias" else 48)
    x = {"width": torch.zeros(5, 23), "type": x.double(), "strides": torch.zeros(24, 5).t()}.get(wrong, x)
    with pytest.raises(ValueError, match="wanted"):
        Product(torch.zeros(48, 24))(x, bias)


def in_c(blocks: list[dict[str, torch.Tensor]], heads: int) -> Blocks:
    both = [
        {
            name: Both(*(Product(block[f"{name}.weight"], turned) for turned in (False, True)))
            for name in PRODUCTS
        }
        for block in blocks
    ]
    return Blocks(blocks, both, heads, 1e-5)


def by_torch(
    blocks: list[dict[str, torch.Tensor]],
    x: torch.Tensor,
    lengths: list[int],
    heads: int,
    loras: dict[int, list[tuple[int, Lora]]],
    only_first: bool,
) -> torch.Tensor:
    """The oracle: the formulas as written, one text at a time."""
    width = x.shape[1]
    for i, t in blocks:
        contexts = []
        for part in reference_linear(x, t["qkv.weight"], t["qkv.bias"], loras.get(i, [])).split(lengths):
            q, k, v = part.view(len(part), 3, heads, -1).permute(1, 2, 0, 3)
            contexts.append(
                (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v)
                .transpose(0, 1)
                .reshape(len(part), width)
            )
        named = lambda name, t=t: (t[f"{name}.weight"], t[f"{name}.bias"])
        x = F.layer_norm(
            F.linear(torch.cat(contexts), *named("attention_output")) + x,
            (width,),
            *named("attention_norm"),
            1e-5,
        )
        x = F.layer_norm(
            F.linear(F.gelu(F.linear(x, *named("intermediate"))), *named("output")) + x,
            (width,),
            *named("output_norm"),
            1e-5,
        )
    return torch.stack([part[0] for part in x.split(lengths)]) if only_first else x


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12) | st.just([1]) | st.just([3, 200]), head=st.sampled_from([(1, 16), (2, 32), (3, 16), (1, 64), (18, 16)]),
    inner=st.sampled_from([16, 48, 112, 256]), layers=st.integers(1, 3), first=st.integers(0, 2), only_first=st.booleans(), again=st.booleans(), with_input=st.booleans(),
    ranks=st.dictionaries(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.integers(1, 20)), threads=st.sampled_from([1, 3]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_blocks_are_the_formulas_with_gradients(
    lanes, lengths, head, inner, layers, first, only_first, again, with_input, ranks, threads, seed
):
    g, lengths = torch.Generator().manual_seed(seed), sorted(lengths)
    first, heads, width, rows = min(first, layers - 1), head[0], head[0] * head[1], sum(lengths)
    t = frozen(layers, width, inner, g)
    x = torch.randn(rows, width, generator=g)
    out = len(lengths) if only_first else rows
    leaves, adapters = [x.requires_grad_(with_input)], []
    for (i, k), r in sorted(ranks.items()):
        if first <= i < layers:
            leaves += [
                torch.randn(shape, generator=g).div_(math.sqrt(shape[1])).requires_grad_()
                for shape in ((r, width), (width, r))
            ]
            adapters.append(Adapted(*leaves[-2:], 0.5 + k, i, k * width))
    grad = torch.randn(out, width, generator=g)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    given_ = (in_c(t, heads), cu_seqlens, adapters, first, layers, only_first, again)
    count = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = fused_ops.blocks(x, *given_)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        gradients = torch.autograd.grad(found, wanted, grad) if wanted else ()
        with torch.no_grad():
            near(fused_ops.blocks(x, *given_), found.detach().double(), 1e-6)
    finally:
        torch.set_num_threads(count)
    wide, loras = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves], {}
    for n, one in enumerate(adapters):
        loras.setdefault(one.block, []).append((one.column, Lora(*wide[1 + 2 * n : 3 + 2 * n], one.scaling)))
    exact = list(enumerate({name: tensor.double() for name, tensor in block.items()} for block in t))[first:]
    expected = by_torch(exact, wide[0], lengths, heads, loras, only_first)
    near(found.detach(), expected.detach(), 1e-5)
    if wanted:
        for one, other in zip(
            gradients,
            torch.autograd.grad(expected, [leaf for leaf in wide if leaf.requires_grad], grad.double()),
            strict=True,
        ):
            near(one, other, 2e-4, 0.1)  # of one token the gradient of q and k is zero


@needs_vectors
def test_the_same_bits_whoever_helps():
    """On one thread, on some that a call starts, on those of workers, and with each block computed again."""
    g, lengths = torch.Generator().manual_seed(0), [5, 5, 9, 14, 20, 31, 40, 77, 150, 200]
    t, x = frozen(3, 64, 128, g), torch.randn(sum(lengths), 64, generator=g)
    pairs = [
        (torch.randn(4, 64, generator=g).requires_grad_(), torch.randn(64, 4, generator=g).requires_grad_())
        for _ in range(6)
    ]
    adapters = [Adapted(*pair, 0.3, n // 2, n % 2 * 128) for n, pair in enumerate(pairs)]
    made, cu_seqlens = in_c(t, 4), torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)

    def sums(again: bool) -> list[torch.Tensor]:
        y = fused_ops.blocks(x, made, cu_seqlens, adapters, 0, 3, True, again)
        return [
            y.detach(),
            *torch.autograd.grad(y.square().sum(), [tensor for pair in pairs for tensor in pair]),
        ]

    count, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found += [sums(False), sums(True)]
            with side_by_side("cpu") as workers:
                found += workers.map(sums, [False, True, False])
    finally:
        torch.set_num_threads(count)
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))


@needs_vectors
def test_a_second_way_back_is_refused_and_inputs_stay():
    g = torch.Generator().manual_seed(0)
    t, x = frozen(2, 32, 64, g), torch.randn(9, 32, generator=g)
    before = [*(tensor.clone() for block in t for tensor in block.values()), x.clone()]
    y = fused_ops.blocks(
        x.requires_grad_(), in_c(t, 2), torch.tensor([0, 4, 9], dtype=torch.int32), [], 0, 2, False, False
    )
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert all(
        torch.equal(one, other)
        for one, other in zip(before, [*(tensor for block in t for tensor in block.values()), x], strict=True)
    )


@needs_vectors
@pytest.mark.parametrize(
    "wrong",
    [
        "x",
        "texts",
        "empty",
        "rows",
        "rank",
        "column",
        "twice",
        "B",
        "block",
        "range",
        "lowest",
        "first",
        "grad",
        "kept",
        "input",
    ],
)
def test_no_blocks_outside_their_bounds(wrong):
    g = torch.Generator().manual_seed(0)
    made, x = in_c(frozen(2, 32, 64, g), 2), torch.randn(9, 32, generator=g)
    r = 0 if wrong == "rank" else 4
    one = Adapted(
        torch.zeros(r, 32),
        torch.zeros(32, 5 if wrong == "B" else r),
        1.0,
        2 if wrong == "block" else 1,
        8 if wrong == "column" else 0,
    )
    starts = {"texts": [0, 12, 9], "rows": [0, 4, 8], "empty": [0, 0, 9]}.get(wrong, [0, 4, 9])
    first, last, lowest, only_first = {
        "range": (0, 3, 0, False),
        "lowest": (1, 2, 0, False),
        "first": (0, 1, 0, True),
        "input": (0, 2, 1, False),
    }.get(wrong, (0, 2, 0, False))
    piece = Piece(
        torch.tensor(starts, dtype=torch.int32),
        [one] * (2 if wrong == "twice" else 1),
        first,
        last,
        lowest,
        only_first,
        False,
    )
    if wrong in ("grad", "kept", "input"):
        y, kept = made.forward(x, piece)
        with pytest.raises(ValueError, match=r"wanted|gradient of x"):
            made.back(
                y[:, :16] if wrong == "grad" else y, kept[1:] if wrong == "kept" else kept, x, piece, True
            )
        return
    with pytest.raises(ValueError, match=r"wanted|texts|adapters|rank|blocks"):
        made.forward(x.double() if wrong == "x" else x, piece)


@needs_vectors
@pytest.mark.parametrize("wrong", ["heads", "width", "shape", "norm"])
def test_no_blocks_of_other_shapes(wrong):
    t = frozen(1, 24 if wrong == "width" else 32, 64, torch.Generator().manual_seed(0))
    if wrong == "shape":
        t[0]["output.weight"] = t[0]["output.weight"][:, :48].contiguous()
    if wrong == "norm":
        t[0][f"{NORMS[1]}.weight"] = t[0][f"{NORMS[1]}.weight"][:16].contiguous()
    with pytest.raises(ValueError, match=r"not for this function|wanted"):
        in_c(t, 4 if wrong == "heads" else 3 if wrong == "width" else 2)


def sums(trainer: Trainer, lengths: list[int]) -> list[torch.Tensor]:
    g = np.random.default_rng(0)
    encoded = [Encoded(g.integers(5, 40, n).astype(np.int32), np.zeros(n, dtype=np.int8), n) for n in lengths]
    return [
        part
        for part in trainer._sums(pack(encoded, np.zeros(len(lengths), dtype=np.int64), "cpu"), seed=7)
        if part is not None
    ]


@needs_vectors
@pytest.mark.parametrize("changes", [
    {}, {"slots": ("query", "key", "value")}, {"target_modules": ("all-linear",)}, {"slots": ("key", "output")}, {"use_dora": True}, {"lora_dropout": 0.3},
    {"gradient_checkpointing": True}, {"pooling": "mean"}, {"layers": "last:1"},
])  # fmt: skip
@pytest.mark.parametrize("family", FAST)
def test_a_step_is_that_of_plain_weights(tmp_path, family, changes):
    """Whichever settings go through whole blocks and whichever do not."""
    base = make_tiny(family, tmp_path / "base", num_attention_heads=2)
    if "slots" in changes:
        changes = {
            "target_modules": tuple(
                read_spec(find_base(str(base)).config).family.block[slot] for slot in changes["slots"]
            )
        }
    trainer = Trainer(prepare(run_settings(tmp_path, base, **changes)))
    with torch.no_grad():
        for name, tensor in trainer.parameters.items():
            if ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    encoder, found = trainer.model.encoder, []
    for plain in (False, True):
        if plain:
            assert isinstance(encoder.together, Blocks)
            assert all(
                isinstance(weight, PackedTrainingWeight)
                for block in encoder.weights
                for weight in block.values()
            )
            encoder.weights, encoder.together = None, None
        found.append(sums(trainer, [3, 9, 14]))
    for one, other in zip(*found, strict=True):
        near(one, other.double(), 2e-4, 1e-3)


@needs_vectors
@pytest.mark.parametrize("layers", ["all", "last:1"])
def test_a_run_is_that_of_plain_weights(tmp_path, layers):
    """Steps, evaluations and states below the lowest adapted block."""
    base, runs = make_tiny("bert", tmp_path / "base", num_attention_heads=2, num_hidden_layers=3), []
    for plain in (False, True):
        prepared = prepare(run_settings(tmp_path, base, layers=layers, learning_rate=3e-3))
        assert isinstance(prepared.model.encoder.together, Blocks)
        if plain:
            prepared.model.encoder = PackedEncoder(prepared.model.base)
        runs.append(list(Trainer(prepared, build_prefix(prepared)).records()))
    assert {record["kind"] for record in runs[0]} == {"step", "evaluation"}
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert runs[0][0]["loss"] > runs[0][-2]["loss"]

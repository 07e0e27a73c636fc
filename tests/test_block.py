"""Products laid out both ways and whole blocks in C: against float64 with autograd at every shape, on AVX-512 and on AVX2, and in a model beside the plain way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, make_tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import settings as run_settings

from textlora import native, passes
from textlora.base import find_base
from textlora.encoder import PackedEncoder
from textlora.families import read_spec
from textlora.lora import Lora, reference_linear
from textlora.native import Product
from textlora.native.block import Adapted, Block, Dense
from textlora.prefix import build_prefix
from textlora.prepare import prepare
from textlora.products import TwoWayWeight, dense, dense_back, prepare_for_training
from textlora.tokens import Encoded, pack
from textlora.training import Trainer

needs_vectors = pytest.mark.skipif(not native.lanes(), reason="this processor has no AVX2, or nothing was compiled")


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
    x, weight, bias, grad = (torch.randn(shape, generator=g) for shape in ((rows, inner), (out, inner), (out,), (rows, out)))
    made = TwoWayWeight.of(weight)
    exact, size = x.double() @ weight.double().T + (bias if biased else 0), x.double().abs() @ weight.double().abs().T + 1
    assert ((made.forward(x, bias if biased else None) - exact).abs() <= 1e-6 * size).all()
    exact, size = grad.double() @ weight.double(), grad.double().abs() @ weight.double().abs()
    assert ((made.back(grad) - exact).abs() <= 1e-6 * size).all()
    if rows > 1:
        assert torch.equal(made.forward(x)[:1], made.forward(x[:1]))  # rows stand alone


@needs_vectors
def test_products_in_a_graph_and_by_parts():
    g = torch.Generator().manual_seed(0)
    x, weight, bias, residual = (torch.randn(shape, generator=g) for shape in ((7, 24), (48, 24), (48,), (7, 48)))
    made = prepare_for_training(weight)
    assert isinstance(made, TwoWayWeight)
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
    np.testing.assert_allclose(dense_back(residual, made).numpy(), dense_back(residual, weight).numpy(), atol=1e-5)
    for other in (weight.double(), weight.clone().requires_grad_()):
        assert prepare_for_training(other) is other


@needs_vectors
@pytest.mark.parametrize("wrong", ["width", "bias", "type", "strides"])
def test_no_product_of_anything_else(wrong):
    x, bias = torch.zeros(5, 24), torch.zeros(9 if wrong == "bias" else 48)
    x = {"width": torch.zeros(5, 23), "type": x.double(), "strides": torch.zeros(24, 5).t()}.get(wrong, x)
    with pytest.raises(ValueError, match="wanted"):
        Product(torch.zeros(48, 24))(x, bias)


def frozen(width: int, inner: int, g: torch.Generator) -> dict[str, torch.Tensor]:
    """A block's tensors, so that sums stay about one."""
    shapes = {"qkv": (3 * width, width), "output": (width, width), "up": (inner, width), "down": (width, inner)}
    tensors = {}
    for name, (out, into) in shapes.items():
        tensors[name], tensors[f"{name}.bias"] = torch.randn(out, into, generator=g) / math.sqrt(into), torch.randn(out, generator=g) / 4
    for name in ("first", "second"):
        tensors[name], tensors[f"{name}.shift"] = 1 + torch.randn(width, generator=g) / 4, torch.randn(width, generator=g) / 4
    return tensors


def in_c(t: dict[str, torch.Tensor], heads: int, eps: float = 1e-12) -> Block:
    layers = [Dense(Product(t[name]), Product(t[name], turned=True), t[f"{name}.bias"]) for name in ("qkv", "output", "up", "down")]
    return Block(*layers, [(t[name], t[f"{name}.shift"]) for name in ("first", "second")], heads, eps)


def by_torch(
    t: dict[str, torch.Tensor], x: torch.Tensor, lengths: list[int], heads: int, loras: list[tuple[int, Lora]], eps: float = 1e-12
) -> torch.Tensor:
    """The oracle: the formulas as written, one text at a time."""
    width = x.shape[1]
    qkv = reference_linear(x, t["qkv"], t["qkv.bias"], loras)
    contexts = []
    for part in qkv.split(lengths):
        q, k, v = part.view(len(part), 3, heads, -1).permute(1, 2, 0, 3)
        contexts.append((torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v).transpose(0, 1).reshape(len(part), width))
    x = F.layer_norm(F.linear(torch.cat(contexts), t["output"], t["output.bias"]) + x, (width,), t["first"], t["first.shift"], eps)
    y = F.linear(F.gelu(F.linear(x, t["up"], t["up.bias"])), t["down"], t["down.bias"])
    return F.layer_norm(y + x, (width,), t["second"], t["second.shift"], eps)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6) | st.just([1]) | st.just([3, 200]), head=st.sampled_from([(1, 16), (2, 32), (3, 16), (1, 64)]),
    inner=st.sampled_from([16, 48, 112, 256]), ranks=st.dictionaries(st.sampled_from([0, 1, 2]), st.integers(1, 20)), with_input=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_a_block_is_the_formula_with_gradients(lanes, lengths, head, inner, ranks, with_input, seed):
    g, lengths = torch.Generator().manual_seed(seed), sorted(lengths)
    heads, width, rows = head[0], head[0] * head[1], sum(lengths)
    t, x, grad = frozen(width, inner, g), torch.randn(rows, width, generator=g), torch.randn(rows, width, generator=g)
    leaves, adapters = [x.requires_grad_(with_input)], []
    for k, r in sorted(ranks.items()):
        pair = [torch.randn(shape, generator=g).div_(math.sqrt(shape[1])).requires_grad_() for shape in ((r, width), (width, r))]
        leaves += pair
        adapters.append(Adapted(*pair, 0.5 + k, k * width))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    found = passes.block(x, in_c(t, heads, 1e-5), cu_seqlens, adapters)
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    loras = [(one.column, Lora(*wide[1 + 2 * i : 3 + 2 * i], one.scaling)) for i, one in enumerate(adapters)]
    expected = by_torch({name: tensor.double() for name, tensor in t.items()}, wide[0], lengths, heads, loras, 1e-5)
    near(found.detach(), expected.detach(), 1e-5)
    wanted = [(leaf, other) for leaf, other in zip(leaves, wide, strict=True) if leaf.requires_grad]
    if wanted:
        pairs = zip(
            *(
                torch.autograd.grad(y, of, d)
                for y, of, d in ((found, [w[0] for w in wanted], grad), (expected, [w[1] for w in wanted], grad.double()))
            ),
            strict=True,
        )
        for one, other in pairs:
            near(one, other, 1e-4, 0.1)  # of one token the gradient of q and k is zero
    with torch.no_grad():
        near(passes.block(x, in_c(t, heads, 1e-5), cu_seqlens, adapters), found.detach().double(), 1e-6)


@needs_vectors
def test_a_second_way_back_is_refused_and_inputs_stay():
    g = torch.Generator().manual_seed(0)
    t, x = frozen(32, 64, g), torch.randn(9, 32, generator=g)
    before = {name: tensor.clone() for name, tensor in t.items()} | {"x": x.clone()}
    y = passes.block(x.requires_grad_(), in_c(t, 2), torch.tensor([0, 4, 9], dtype=torch.int32), [])
    y.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in {**t, "x": x}.items())


@needs_vectors
@pytest.mark.parametrize("wrong", ["x", "texts", "rows", "rank", "column", "many", "B", "grad", "kept"])
def test_no_block_outside_its_bounds(wrong):
    g = torch.Generator().manual_seed(0)
    made, x, starts = in_c(frozen(32, 64, g), 2), torch.randn(9, 32, generator=g), [0, 4, 9]
    one = Adapted(
        torch.zeros(0 if wrong == "rank" else 4, 32),
        torch.zeros(32, 0 if wrong == "rank" else 5 if wrong == "B" else 4),
        1.0,
        8 if wrong == "column" else 0,
    )
    x = x.double() if wrong == "x" else x
    starts = {"texts": [0, 12, 9], "rows": [0, 4, 8]}.get(wrong, starts)
    given_ = (torch.tensor(starts, dtype=torch.int32), [one] * (4 if wrong == "many" else 1))
    if wrong in ("grad", "kept"):
        y, kept = made.forward(x, *given_, True)
        with pytest.raises(ValueError, match="wanted"):
            made.back(y[:, :16] if wrong == "grad" else y, kept[1:] if wrong == "kept" else kept, x, *given_, True)
        return
    with pytest.raises(ValueError, match=r"wanted|texts|adapters|rank"):
        made.forward(x, *given_, True)


@needs_vectors
@pytest.mark.parametrize("wrong", ["heads", "width", "shape", "norm"])
def test_no_block_of_other_shapes(wrong):
    t = frozen(24 if wrong == "width" else 32, 64, torch.Generator().manual_seed(0))
    if wrong == "shape":
        t["down"] = t["down"][:, :48].contiguous()
    if wrong == "norm":
        t["second"] = t["second"][:16].contiguous()
    with pytest.raises(ValueError, match=r"not for this function|wanted"):
        in_c(t, 4 if wrong == "heads" else 3 if wrong == "width" else 2)


def sums(trainer: Trainer, lengths: list[int]) -> list[torch.Tensor]:
    g = np.random.default_rng(0)
    encoded = [Encoded(g.integers(5, 40, n).astype(np.int32), np.zeros(n, dtype=np.int8), n) for n in lengths]
    return [part for part in trainer._sums(pack(encoded, np.zeros(len(lengths), dtype=np.int64), "cpu"), seed=7) if part is not None]


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
        changes = {"target_modules": tuple(read_spec(find_base(str(base)).config).family.block[slot] for slot in changes["slots"])}
    trainer = Trainer(prepare(run_settings(tmp_path, base, **changes)))
    with torch.no_grad():
        for name, tensor in trainer.parameters.items():
            if ".lora_B." in name:
                tensor.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    encoder, found = trainer.model.encoder, []
    for plain in (False, True):
        if plain:
            assert len(encoder.whole) == 2
            assert all(isinstance(weight, TwoWayWeight) for block in encoder.weights for weight in block.values())
            encoder.weights, encoder.whole = None, []
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
        assert len(prepared.model.encoder.whole) == 3
        if plain:
            prepared.model.encoder = PackedEncoder(prepared.model.base)
        runs.append(list(Trainer(prepared, build_prefix(prepared)).records()))
    assert {record["kind"] for record in runs[0]} == {"step", "evaluation"}
    for one, other in zip(*runs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert runs[0][0]["loss"] > runs[0][-2]["loss"]

"""The compiled functions: against float64 at every shape, beside oneDNN's own use of the matrix units; what
happens without them; the build.

What needs AVX-512, AVX2 or AMX is skipped where there is none: attention is the other kind's or torch's there
and `--precision high` is float32, tested as such.
"""

import importlib.util
import os
import platform
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import KINDS, adapters, engine_of, random_texts  # noqa: F401

from textlora import TextClassifier
from textlora.data.tokenize import Encoded, pack
from textlora.inference.classifier import encoded_logits
from textlora.kernels import bindings, fused_ops
from textlora.kernels import library as kernels_library
from textlora.kernels.bindings import LONGEST, Panels, has_amx, lanes
from textlora.kernels.packed_linear import Bf16x2Weight, activate, dense, lays_out, prepare
from textlora.model import attention
from textlora.model.adapter_batch import AdapterBatch, ScaledAdapter, ScaledLora

ROOT = Path(__file__).resolve().parent.parent
needs_amx = pytest.mark.skipif(not has_amx(), reason="this processor has no AMX, or nothing was compiled")
needs_vectors = pytest.mark.skipif(not lanes(), reason="this processor has no AVX2, or nothing was compiled")
needs_library = pytest.mark.skipif(bindings.library() is None, reason="nothing was compiled")


def draw(rows: int, inner: int, out: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(shape, generator=g) for shape in ((rows, inner), (out, inner), (out,), (rows, out))
    )


def bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of the error of a product whose terms are right to 2^-16 each: two numbers cut to 16 bits, one product
    of remainders left out."""
    return 3 * 2**-16 * (x.double().abs() @ weight.double().abs().T) + 1e-6


@needs_amx
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300), inner=st.integers(1, 100) | st.sampled_from([384, 1023, 1024, 1025, 1536, 3100]), out=st.integers(1, 150),
    activation=st.sampled_from([None, "gelu", "relu", "gelu_new"]), with_bias=st.booleans(), with_residual=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_product_is_the_formula(rows, inner, out, activation, with_bias, with_residual, seed):
    x, weight, bias, residual = draw(rows, inner, out, seed)
    made, before = Bf16x2Weight.of(weight), residual.clone()
    with torch.inference_mode():
        found = dense(x, made, bias if with_bias else None, activation, residual if with_residual else None)
    expected = x.double() @ weight.double().T + (bias.double() if with_bias else 0)
    expected = activate(expected, activation) + (residual.double() if with_residual else 0)
    assert found.shape == (rows, out)
    assert (
        (found - expected).abs() <= 1.2 * bound(x, weight)
    ).all()  # GELU is up to 1.13 times as steep as the identity
    assert torch.equal(residual, before)


@needs_amx
def test_right_to_sixteen_bits_and_not_only_eight():
    x, weight, *_ = draw(256, 384, 1152)
    error = (
        Bf16x2Weight.of(weight).product(x, None, None, None) - x.double() @ weight.double().T
    ).square().mean().sqrt() / 384**0.5
    assert 1e-7 < error < 6e-6  # float32's own is 4e-7, bfloat16's 2e-3


@needs_amx
def test_gelu_to_the_ends_of_float32():
    x = torch.cat(
        [torch.linspace(-12, 12, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, -1e30, 3e38])]
    )
    found = Bf16x2Weight.of(torch.ones(1, 1)).product(x.unsqueeze(1), None, "gelu", None).flatten()
    assert torch.isfinite(found).all()
    np.testing.assert_allclose(
        found[:4001].numpy(), torch.nn.functional.gelu(x[:4001].double()).numpy(), atol=2e-4, rtol=0
    )
    sharp = (
        Bf16x2Weight.of(torch.ones(1, 1))
        .product((x[:4001] * 256).round().unsqueeze(1) / 256, None, "gelu", None)
        .flatten()
    )  # 16 bits hold these
    np.testing.assert_allclose(
        sharp.numpy(),
        torch.nn.functional.gelu((x[:4001].double() * 256).round() / 256).numpy(),
        atol=1e-6,
        rtol=2e-7,
    )


@needs_amx
def test_rows_depend_on_no_other_row():
    x, weight, bias, residual = draw(300, 100, 70)
    made = Bf16x2Weight.of(weight)
    whole = made.product(x, bias, "gelu", residual)
    for rows in (slice(0, 1), slice(31, 33), slice(0, 40), slice(17, 300)):
        assert torch.equal(made.product(x[rows], bias, "gelu", residual[rows]), whole[rows])
    x[40:] = torch.nan
    assert torch.equal(made.product(x, bias, "gelu", residual)[:40], whole[:40])


@needs_amx
def test_views_and_wide_strides():
    x, weight, bias, residual = draw(64, 96, 64)
    wide, turned = torch.cat([x, x], 1), weight.T.contiguous().T
    expected = Bf16x2Weight.of(weight).product(x, bias, None, residual)
    assert torch.equal(
        Bf16x2Weight.of(turned).product(wide[:, 96:], bias, None, residual.T.contiguous().T), expected
    )


@needs_amx
@pytest.mark.parametrize("wrong", ["double", "width", "bias", "residual"])
def test_nothing_else_reaches_c(wrong):
    x, weight, bias, residual = draw(8, 40, 24)
    made = Bf16x2Weight.of(weight).panels
    x = x.double() if wrong == "double" else x[:, :39] if wrong == "width" else x
    with pytest.raises(ValueError, match="float32"):
        made.product(
            x, bias[:-1] if wrong == "bias" else bias, residual[:-1] if wrong == "residual" else None, False
        )
    with pytest.raises(ValueError, match="float32"):
        Panels(weight.double())


@needs_amx
def test_beside_others_on_the_same_units():
    """oneDNN remembers which tiles it has set, a thread at a time: what is set here is put back."""
    x, weight, bias, _ = draw(128, 256, 128)
    made, eight = Bf16x2Weight.of(weight), prepare(weight, "int8")
    half, small = x.bfloat16(), weight.bfloat16()

    def both(_: int) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [
                torch.nn.functional.linear(half, small),
                made.product(x, bias, None, None),
                eight.product(x, bias),
                half @ small.T,
            ]

    first = both(0)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(both, range(64)):
            assert all(torch.equal(a, b) for a, b in zip(found, first, strict=True))


def batch_of(lengths: list[int]):
    return pack([Encoded(np.zeros(n, dtype=np.int32), np.zeros(n, dtype=np.int8), n) for n in lengths])


@pytest.fixture(params=[16, 8])
def kind(request, monkeypatch):
    """Attention and GELU in vectors of so many numbers, where this processor has them."""
    if bindings.lanes() < request.param:
        pytest.skip("not on this processor, or nothing was compiled")
    monkeypatch.setattr(bindings, "lanes", lambda: request.param)
    return request.param


FIXED = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # the fixture is one choice


@FIXED
@given(
    lengths=st.lists(st.integers(1, 140) | st.sampled_from([16, 300, LONGEST, LONGEST + 1]), min_size=1, max_size=8),
    heads=st.integers(1, 3), d=st.sampled_from([8, 16, 32, 64]), more=st.integers(0, 3), size=st.sampled_from([0.1, 1.0, 4.0]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_attention_is_the_formula(kind, lengths, heads, d, more, size, seed):
    """By the compiled function, longer texts and other widths by torch's, rows that belong to nobody zero;
    and its gradient."""
    g = torch.Generator().manual_seed(seed)
    layout, rows = batch_of(lengths).layout, sum(lengths)
    projected = size * torch.randn(rows + more, 3 * heads * d, generator=g)
    leaf, wide = projected[:rows].clone().requires_grad_(), projected[:rows].double().requires_grad_()
    found = attention.attend(projected, None, layout, heads)
    with_gradient = attention.attend(leaf, None, layout, heads)
    expected = attention.attend_plain(wide, None, layout, heads)
    q, k, v = projected[:rows].view(rows, 3, heads, d).double().unbind(1)
    scores = (
        float(q.norm(dim=-1).max() * k.norm(dim=-1).max()) / d**0.5
    )  # at most; a score's rounding is a share's relative error
    assert (found[:rows] - expected).abs().max() <= 1e-6 * (1 + scores) * v.abs().max()
    assert not found[rows:].any()
    if d in bindings.HEADS and max(lengths) <= LONGEST:
        assert torch.equal(with_gradient, found[:rows])
    cotangent = torch.randn(rows, heads * d, generator=g)
    (back,), (wanted,) = (
        torch.autograd.grad(with_gradient, leaf, cotangent),
        torch.autograd.grad(expected, wide, cotangent.double()),
    )
    assert (back - wanted).abs().max() <= 3e-7 * (10 + scores) * wanted.abs().max()


def test_attention_of_a_text_depends_on_no_other(kind):
    g = torch.Generator().manual_seed(0)
    projected = torch.randn(7 + 20 + 33, 3 * 64, generator=g)
    whole = attention.attend(projected, None, batch_of([7, 20, 33]).layout, 2)
    projected[:7] = torch.nan
    projected[27:] = torch.inf
    assert torch.equal(attention.attend(projected, None, batch_of([7, 20, 33]).layout, 2)[7:27], whole[7:27])
    assert torch.equal(attention.attend(projected[7:27], None, batch_of([20]).layout, 2), whole[7:27])


def test_gradient_of_a_text_depends_on_no_other(kind):
    g = torch.Generator().manual_seed(0)
    projected, cotangent = torch.randn(7 + 20 + 33, 3 * 64, generator=g), torch.randn(60, 64, generator=g)

    def back(rows, lengths):
        leaf = projected[rows].clone().requires_grad_()
        return torch.autograd.grad(
            attention.attend(leaf, None, batch_of(lengths).layout, 2), leaf, cotangent[rows]
        )[0]

    whole = back(slice(None), [7, 20, 33])
    projected[:7], cotangent[27:] = torch.nan, torch.inf
    assert torch.equal(back(slice(None), [7, 20, 33])[7:27], whole[7:27])
    assert torch.equal(back(slice(7, 27), [20]), whole[7:27])


@needs_vectors
@pytest.mark.parametrize("wrong", ["heads", "width", "long", "past", "type", "texts", "order"])
def test_no_attention_outside_its_bounds(wrong):
    out = torch.zeros(300, 64)
    starts = torch.tensor([0, 10, 100, 300 if wrong == "past" else 200], dtype=torch.int32)
    texts = 3
    heads = 2
    projected = torch.zeros(300, 192, dtype=torch.float64 if wrong == "type" else torch.float32)
    if wrong == "past":
        out, projected = out[:250], projected[:250]
    if wrong == "long":
        starts[2] = 10 + LONGEST + 1
    if wrong == "order":
        starts[1] = 150
    if wrong == "width":
        projected = projected[:, :128].contiguous()
    with pytest.raises(ValueError, match=r"not for this|wanted"):
        bindings.attention(
            projected, out, starts, 4 if wrong == "texts" else texts, 3 if wrong == "heads" else heads
        )
    with pytest.raises(ValueError, match=r"not for this|wanted"):
        bindings.attention_back(
            projected,
            out,
            torch.zeros_like(projected),
            starts,
            4 if wrong == "texts" else texts,
            3 if wrong == "heads" else heads,
        )
    assert not out.any()


def layer_of(
    inner: int, out: int, r: int, column: int, scaled: bool, g: torch.Generator
) -> bindings.AdaptedLayer:
    A, B, scale = (torch.randn(shape, generator=g) for shape in ((r, inner), (r, out), (out,)))
    made = bindings.AdaptedLayer.of(A, B, scale if scaled else None, column)
    assert made is not None
    return made


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    stretches=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 40), st.booleans(), st.integers(0, 2)), min_size=1, max_size=12),
    inner=st.sampled_from([8, 24, 64]), out=st.sampled_from([8, 40]), more=st.integers(0, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_small_products_are_the_formula(stretches, inner, out, more, seed):
    """Stretches of any length, none too, ranks odd and even, with DoRA's factor and without; other rows and
    columns stay as they are."""
    g = torch.Generator().manual_seed(seed)
    rows = sum(count for count, *_ in stretches) + more
    x, y = torch.randn(rows, inner, generator=g), torch.randn(rows, 3 * out, generator=g)
    expected, at, jobs = y.double(), 0, []
    for count, r, scaled, place in stretches:
        layer = layer_of(inner, out, r, place * out, scaled, g)
        jobs.append((at, count, layer))
        part = expected[at : at + count, layer.column : layer.column + out]
        part += x[at : at + count].double() @ layer.A.double().T @ layer.B.double()
        if scaled:
            part *= layer.scale.double()
        at += count
    bindings.add_adapted(x, y, jobs)
    np.testing.assert_allclose(
        y.numpy(), expected.numpy(), atol=1e-3 if inner * 40 > 2000 else 5e-4, rtol=1e-5
    )
    assert torch.equal(y[at:].double(), expected[at:])


@needs_library
def test_small_products_depend_on_no_other_row_and_take_views():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 48, generator=g)
    y = torch.randn(9, 16, generator=g)
    layer = layer_of(24, 16, 5, 0, False, g)
    whole = y.clone()
    bindings.add_adapted(x[:, :24], whole, [(0, 9, layer)])
    alone = y[4:7].clone()
    bindings.add_adapted(x[4:7, :24].contiguous(), alone, [(0, 3, layer)])
    assert torch.equal(alone, whole[4:7])
    bindings.add_adapted(x[:, :24], y, [])
    assert not torch.equal(y, whole)


@needs_library
@pytest.mark.parametrize("wrong", ["rows", "before", "column", "inner", "out", "type"])
def test_no_small_product_outside_its_bounds(wrong):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 24, generator=g), torch.zeros(9, 32)
    job = (
        -1 if wrong == "before" else 0,
        10 if wrong == "rows" else 9,
        layer_of(24, 16, 5, 17 if wrong == "column" else 0, False, g),
    )
    jobs = [
        job,
        (0, 1, layer_of(32 if wrong == "inner" else 24, 8 if wrong == "out" else 16, 5, 0, False, g)),
    ]
    y = y.double() if wrong == "type" else y
    with pytest.raises(ValueError, match=r"another width|wanted"):
        bindings.add_adapted(x, y, jobs)
    assert not y.any()


@needs_library
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_mixed_layer_with_and_without(scaled, activation, monkeypatch):
    g = torch.Generator().manual_seed(0)

    def adapter(r: int, *slots: str) -> ScaledAdapter:
        draw = lambda *shape: torch.randn(shape, generator=g)
        return ScaledAdapter(
            {(0, slot): ScaledLora(draw(r, 24), draw(16, r), draw(16) if scaled else None) for slot in slots}
        )

    ones = [adapter(3, "query", "value"), adapter(8, "key"), ScaledAdapter({})]
    x, weight, bias, residual = draw(20, 24, 48)
    found = []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("textlora.model.adapter_batch.AdaptedLayer.of", lambda *_: None)
            ones = [ScaledAdapter(one) for one in ones]
        assert all(bool(one.compiled) == compiled for made in ones for one in made.joined.values())
        mix = AdapterBatch(ones, [0, 1, 1, 2, 0], [3, 4, 5, 1, 4])
        found.append(
            mix.linear(
                0, ("query", "key", "value"), x, weight, bias, activation, None if activation else residual
            )
        )
    np.testing.assert_allclose(found[0].numpy(), found[1].numpy(), atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("shape", [(5, 23, 16), (5, 24, 12), (257, 24, 16)])
def test_layers_that_torch_computes(shape):
    r, inner, out = shape
    assert bindings.AdaptedLayer.of(torch.zeros(r, inner), torch.zeros(r, out), None, 0) is None
    assert (
        bindings.AdaptedLayer.of(
            torch.zeros(5, 24, dtype=torch.bfloat16), torch.zeros(5, 16, dtype=torch.bfloat16), None, 0
        )
        is None
    )


@pytest.mark.parametrize("family", FAST)
def test_high_predicts_as_float32_does(family, adapters, tiny_base):  # noqa: F811
    """With the units or without, merged and in a mixed batch."""
    folders, base = adapters(family), tiny_base(family)
    engine = engine_of(folders, base, precision="high")
    for folder, made in zip(folders, KINDS, strict=True):
        texts = random_texts(9, 4)
        pairs = random_texts(9, 5) if made.pairs else None
        classifier = TextClassifier.load(folder, base=str(base), device="cpu", precision="high")
        plain, fast = classifier.plain_logits(texts, pairs), classifier.logits(texts, pairs)
        scale = np.maximum(1, np.abs(plain))
        assert (
            np.abs((fast - plain) / scale).max() < 1e-3
        )  # these weights magnify rounding some hundred times (tests/test_engine.py)
        mixed = np.array([one.logits for one in engine.predict(texts, folder.name, pairs)])
        assert np.abs((mixed - plain) / scale).max() < 1e-3
        if lays_out(torch.zeros(1)):
            assert isinstance(classifier.running.encoder.weights[0]["qkv"], Bf16x2Weight) == has_amx()


@needs_amx
def test_little_work_is_shared_out(adapters, tiny_base):  # noqa: F811
    """Its products take one core each, so two batches of 40 tokens run side by side, where float32 takes one
    batch and all cores."""
    folder, sizes = adapters(FAST[0])[0], {}
    for precision in ("float32", "high"):
        classifier = TextClassifier.load(
            folder, base=str(tiny_base(FAST[0])), device="cpu", precision=precision
        )
        encoded, ran = classifier.tokenizer.encode(["the film was good"] * 14), []
        workers = SimpleNamespace(
            count=2,
            map=lambda function, items, ran=ran: ran.append(len(items)) or [function(item) for item in items],
        )
        encoded_logits(classifier.running, encoded, workers)
        sizes[precision] = ran
    assert sizes == {"float32": [1], "high": [2]}


def test_without_the_units_high_is_float32(monkeypatch):
    monkeypatch.setattr("textlora.kernels.packed_linear.has_amx", lambda: False)
    _, weight, *_ = draw(1, 64, 64)
    assert type(prepare(weight, "high")) is type(prepare(weight, "float32"))


@pytest.fixture
def no_cache():
    """What is known of the library is asked for anew, and forgotten afterwards."""
    for known in (kernels_library._opened, bindings.library, bindings.has_amx, bindings.lanes):
        known.cache_clear()
    yield
    for known in (kernels_library._opened, bindings.library, bindings.has_amx, bindings.lanes):
        known.cache_clear()


@pytest.mark.parametrize("content", [None, b"not a library"])
def test_library_that_cannot_be_used(content, tmp_path, monkeypatch, no_cache):
    said = "textlora was installed without a C compiler, or not on x86-64 Linux"
    if content is not None:
        (tmp_path / "made.so").write_bytes(content)
    monkeypatch.setattr(kernels_library, "LIBRARY", tmp_path / "made.so")
    assert bindings.library() is None
    assert not bindings.has_amx()
    with pytest.raises(ValueError, match="no matrix units"):
        Panels(torch.zeros(8, 8))
    assert not bindings.lanes()
    assert kernels_library.instruction_sets() == ""
    assert kernels_library.why_not() == (
        said if content is None else "made.so cannot be loaded; install textlora again"
    )
    g = torch.Generator().manual_seed(0)
    projected, layout = torch.randn(60, 3 * 64, generator=g), batch_of([7, 20, 33]).layout
    found = attention.attend(projected, None, layout, 2)
    expected = attention.attend_plain(projected, None, layout, 2)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-6)


def test_library_of_another_version(monkeypatch, no_cache):
    monkeypatch.setattr(kernels_library, "VERSION", -1)
    assert bindings.library() is None
    assert (
        kernels_library.why_not() == "_kernels.so is of another version of textlora; install textlora again"
    )


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("cc") is None,
    reason="compiled on x86 Linux",
)
def test_build_compiles_it():
    assert kernels_library.LIBRARY.is_file(), "install textlora again: its build compiles textlora/kernels"


def hook(root: Path) -> tuple[SimpleNamespace, list[str]]:
    """hatch_build.py's hook over a copy of the sources, and what it warns of."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (root / "textlora" / "kernels").mkdir(parents=True)
    for source in module.SOURCES:
        shutil.copy(kernels_library.LIBRARY.parent / Path(source).name, root / source)
    said: list[str] = []
    made = module.Compile(str(root), {}, None, None, "", "wheel")
    made._BuildHookInterface__app = SimpleNamespace(display_warning=said.append)
    return made, said


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_build_without_a_compiler_is_pure_python(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", compiler)
    made, said = hook(tmp_path)
    (tmp_path / "textlora" / "kernels" / "_kernels.so").write_bytes(b"of an older version")
    data = {"artifacts": [], "pure_python": True}
    made.initialize("standard", data)
    assert data == {"artifacts": [], "pure_python": True}
    if sys.platform == "linux" and platform.machine() == "x86_64":
        assert sorted(os.listdir(tmp_path / "textlora" / "kernels")) == [
            f"{name}.c"
            for name in (
                "amx",
                "attention",
                "crew",
                "encode",
                "first",
                "grouped_lora",
                "passes",
                "product",
                "train",
            )
        ]
        assert len(said) == 1
        assert "not compiled" in said[0]


WIDTHS = st.integers(1, 40).map(lambda n: 16 * n)


def passes_inputs(rows, width, size, seed):
    g = torch.Generator().manual_seed(seed)
    product, residual, grad = (size * torch.randn(rows, width, generator=g) for _ in range(3))
    bias, weight, shift = (torch.randn(width, generator=g) for _ in range(3))
    return product, residual, grad, bias, weight, shift


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40), width=WIDTHS, size=st.sampled_from([1e-3, 1.0, 5.0]), seed=st.integers(0, 2**31)
)
def test_gelu_and_norm_are_the_formula_with_gradients(rows, width, size, seed):
    product, residual, grad, bias, weight, shift = passes_inputs(rows, width, size, seed)

    def both(function, *leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        out = function(*(leaf * 1 for leaf in leaves))  # what is given is written over, and leaves may not be
        return out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))

    assert torch.equal(fused_ops.add_gelu(product + bias, None), fused_ops.add_gelu(product.clone(), bias))
    found, (found_grad,) = both(lambda p: fused_ops.add_gelu(p, bias), product)
    wanted, (wanted_grad,) = both(lambda p: torch.nn.functional.gelu(p + bias.double()), product.double())
    assert ((found - wanted).abs() <= 3e-7 * wanted.abs().clamp(min=1) + 1e-7).all()
    assert ((found_grad - wanted_grad).abs() <= 1e-6 * grad.abs()).all()
    found, found_grads = both(
        lambda p, r: fused_ops.add_norm(p, bias, r, weight, shift, 1e-12), product, residual
    )
    norm = lambda p, r: torch.nn.functional.layer_norm(
        p + bias.double() + r, (width,), weight.double(), shift.double(), 1e-12
    )
    wanted, wanted_grads = both(norm, product.double(), residual.double())
    torch.testing.assert_close(found, wanted.float(), atol=2e-5, rtol=0)
    for one, other in zip(found_grads, wanted_grads, strict=True):
        torch.testing.assert_close(one, other.float(), atol=1e-5 * float(other.abs().max()) + 1e-7, rtol=0)


@needs_library
def test_passes_without_gradients_are_the_same_bits_and_rows_stand_alone():
    product, residual, _, bias, weight, shift = passes_inputs(33, 384, 1.0, 0)
    with torch.no_grad():
        alone = (
            fused_ops.add_gelu(product.clone(), bias),
            fused_ops.add_norm(product.clone(), bias, residual, weight, shift, 1e-12),
        )
    leaf = product.clone().requires_grad_()
    assert torch.equal(fused_ops.add_gelu(leaf * 1, bias), alone[0])
    assert torch.equal(fused_ops.add_norm(leaf * 1, bias, residual, weight, shift, 1e-12), alone[1])
    with torch.no_grad():
        assert torch.equal(fused_ops.add_gelu(product[7:9].clone(), bias), alone[0][7:9])
        assert torch.equal(
            fused_ops.add_norm(product[7:9].clone(), bias, residual[7:9], weight, shift, 1e-12), alone[1][7:9]
        )


@needs_library
def test_gelu_everywhere(kind):
    """The pieces of its polynomials and where they meet: to rounding."""
    x = torch.linspace(-8, 8, 160_016).view(-1, 16)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    out, wanted = fused_ops.add_gelu(leaf * 1, None), torch.nn.functional.gelu(wide)
    assert ((out - wanted).abs() <= 1e-7 * x.abs().clamp(min=1)).all()
    slopes = [torch.autograd.grad(y.sum(), of)[0] for y, of in ((out, leaf), (wanted, wide))]
    assert (slopes[0] - slopes[1]).abs().max() <= 1.5e-7


@needs_library
def test_gelu_at_the_ends_of_float32_and_without_numbers(kind):
    x = torch.tensor(
        [
            [
                0.0,
                -0.0,
                1e-30,
                -1e-30,
                5.0,
                -5.0,
                11.9,
                -11.9,
                12.1,
                -12.1,
                100.0,
                -100.0,
                3e38,
                -3e38,
                torch.nan,
                1.0,
            ]
        ]
    )
    leaf = x.clone().requires_grad_()
    out = fused_ops.add_gelu(leaf * 1, torch.zeros(16))
    (slope,) = torch.autograd.grad(out.sum(), leaf)
    wide = x.double().requires_grad_()
    (wanted,) = torch.autograd.grad(torch.nn.functional.gelu(wide).sum(), wide)
    assert out[0, 14].isnan()
    assert slope[0, 14].isnan()
    keep = [i for i in range(16) if i != 14]
    torch.testing.assert_close(
        out[0, keep], torch.nn.functional.gelu(x.double())[0, keep].float(), atol=1e-7, rtol=3e-7
    )
    torch.testing.assert_close(slope[0, keep], wanted[0, keep].float(), atol=1e-6, rtol=0)


@needs_library
def test_a_second_way_back_is_refused():
    product, residual, _, bias, weight, shift = passes_inputs(4, 32, 1.0, 0)
    for function in (
        lambda p: fused_ops.add_gelu(p, bias),
        lambda p: fused_ops.add_norm(p, bias, residual, weight, shift, 1e-12),
    ):
        leaf = product.clone().requires_grad_()
        total = function(leaf * 1).sum()
        torch.autograd.grad(total, leaf, retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaf)


@needs_library
@pytest.mark.parametrize("wrong", ["width", "type", "shape", "strides"])
def test_no_pass_over_anything_else(wrong):
    product, residual, _, bias, weight, shift = passes_inputs(4, 32, 1.0, 0)
    if wrong == "width":
        product, residual, bias, weight, shift = (
            t[..., :24].contiguous() for t in (product, residual, bias, weight, shift)
        )
    if wrong == "type":
        product = product.double()
    if wrong == "shape":
        bias = bias[:16].contiguous()
    if wrong == "strides":
        product = product.t().contiguous().t()
    with torch.no_grad(), pytest.raises(ValueError):
        fused_ops.add_gelu(product, bias)
    with torch.no_grad(), pytest.raises(ValueError):
        fused_ops.add_norm(product, bias, residual, weight, shift, 1e-12)


def test_passes_are_for_float32_of_whole_vectors():
    assert fused_ops.fits(torch.zeros(32)) == (bindings.library() is not None)
    assert not fused_ops.fits(torch.zeros(32), torch.zeros(24))
    assert not fused_ops.fits(torch.zeros(32, dtype=torch.bfloat16))

"""Products on weights laid out for the processor: against float64, at every number of rows, and through the
encoder and the engine."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FAST
from test_engine import KINDS, adapters, engine_of, random_texts  # noqa: F401

from textlora import TextClassifier
from textlora.kernels.devices import bounded_memory
from textlora.kernels.packed_linear import (
    MOST,
    STEP,
    OneDnnWeight,
    TransposedWeight,
    activate,
    dense,
    filled_up,
    lays_out,
    prepare,
)
from textlora.model import encoder

needs_layout = pytest.mark.skipif(
    not lays_out(torch.zeros(1)), reason="weights are laid out on x86 processors with oneDNN only"
)
kinds = pytest.mark.parametrize("kind", [pytest.param(OneDnnWeight, marks=needs_layout), TransposedWeight])


@kinds
@pytest.mark.parametrize("rows", [1, STEP - 1, STEP, 5 * STEP, MOST, MOST + 2 * STEP])
@pytest.mark.parametrize(
    ("activation", "with_residual"),
    [(None, False), (None, True), ("gelu", False), ("gelu", True), ("relu", False), ("gelu_new", False)],
)
def test_product_is_the_formula(kind, rows, activation, with_residual):
    g = torch.Generator().manual_seed(rows)
    x, weight, bias, residual = (
        torch.randn(shape, generator=g) for shape in ((rows, 48), (96, 48), (96,), (rows, 96))
    )
    before = residual.clone()
    expected = activate(x.double() @ weight.double().T + bias.double(), activation) + (
        residual.double() if with_residual else 0
    )
    with torch.inference_mode():
        made = kind.of(weight)
        found = dense(x, made, bias, activation, residual if with_residual else None)
        part = dense(x, made[10:30], bias[10:30], activation, residual[:, 10:30] if with_residual else None)
        bare = dense(x, made, None, activation, residual if with_residual else None)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)
    np.testing.assert_allclose(part.numpy(), expected[:, 10:30].numpy(), atol=2e-5)
    without = activate(x.double() @ weight.double().T, activation) + (
        residual.double() if with_residual else 0
    )
    np.testing.assert_allclose(bare.numpy(), without.numpy(), atol=2e-5)
    assert made.shape == weight.shape
    assert torch.equal(residual, before)


@kinds
def test_rows_do_not_depend_on_what_fills_a_batch_up(kind):
    g = torch.Generator().manual_seed(0)
    made, x = kind.of(torch.randn(96, 48, generator=g)), torch.randn(2 * STEP, 48, generator=g)
    with torch.inference_mode():
        once = dense(x, made, None)
        x[STEP:] = torch.nan
        again = dense(x, made, None)
    assert torch.equal(once[:STEP], again[:STEP])


@needs_layout
def test_kind_for_this_processor(monkeypatch):
    for capability, kind in (
        ("AVX512", OneDnnWeight),
        ("AVX2", TransposedWeight),
        ("DEFAULT", TransposedWeight),
    ):
        monkeypatch.setattr(
            torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability
        )
        assert isinstance(prepare(torch.zeros(8, 8), "float32"), kind)


def test_onednn_is_back_when_the_last_one_leaves():
    """Two that come and go as threads do, neither inside the other; what fills its batches up asks for
    nothing."""
    plain = SimpleNamespace(device="cpu", dtype=torch.float32, in_steps=False)
    before = torch.backends.mkldnn.enabled
    first, second = bounded_memory(plain), bounded_memory(plain)
    with bounded_memory(SimpleNamespace(device="cpu", dtype=torch.float32, in_steps=True)):
        assert torch.backends.mkldnn.enabled == before
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mkldnn.enabled
    second.__exit__(None, None, None)
    assert torch.backends.mkldnn.enabled == before


def test_filled_up():
    assert [filled_up(n) for n in (1, STEP, STEP + 1, MOST)] == [STEP, STEP, 2 * STEP, MOST]


@kinds
@pytest.mark.parametrize("family", FAST)
def test_what_predicts_is_what_was_trained(family, kind, adapters, tiny_base, monkeypatch):  # noqa: F811
    """Merged, laid out and filled up against the adapter beside the plain base, for every kind of adapter;
    the engine against both."""
    monkeypatch.setattr(encoder, "prepare", lambda weight, *_: kind.of(weight))
    folders, base = adapters(family), tiny_base(family)
    engine = engine_of(folders, base)
    for folder, made in zip(folders, KINDS, strict=True):
        texts = random_texts(9, 4)
        pairs = random_texts(9, 5) if made.pairs else None
        classifier = TextClassifier.load(folder, base=str(base), device="cpu")
        plain, fast = classifier.plain_logits(texts, pairs), classifier.logits(texts, pairs)
        scale = np.maximum(1, np.abs(plain))
        assert np.abs((fast - plain) / scale).max() < 3e-5  # a merged weight is rounded once more
        mixed = np.array([one.logits for one in engine.predict(texts, folder.name, pairs)])
        assert np.abs((mixed - plain) / scale).max() < 3e-5
        assert classifier.model.encoder.weights is None  # what was loaded is left as it was
        assert not lays_out(torch.zeros(1)) or isinstance(classifier.running.encoder.weights[0]["qkv"], kind)

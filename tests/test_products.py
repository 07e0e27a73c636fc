"""Products on weights laid out for the processor: against float64, at every number of rows, and through the encoder and the engine."""

import numpy as np
import pytest
import torch
from conftest import FAST
from test_engine import KINDS, adapters, engine_of, random_texts  # noqa: F401

from textlora import TextClassifier
from textlora.products import MOST, STEP, LaidOutWeight, activate, dense, filled_up, lays_out

needs_layout = pytest.mark.skipif(not lays_out(torch.zeros(1)), reason="weights are laid out on x86 processors with oneDNN only")


@needs_layout
@pytest.mark.parametrize("rows", [1, STEP - 1, STEP, 5 * STEP, MOST, MOST + 2 * STEP])
@pytest.mark.parametrize(
    ("activation", "with_residual"), [(None, False), (None, True), ("gelu", False), ("gelu", True), ("relu", False), ("gelu_new", False)]
)
def test_product_is_the_formula(rows, activation, with_residual):
    g = torch.Generator().manual_seed(rows)
    x, weight, bias, residual = (torch.randn(shape, generator=g) for shape in ((rows, 48), (96, 48), (96,), (rows, 96)))
    before = residual.clone()
    expected = activate(x.double() @ weight.double().T + bias.double(), activation) + (residual.double() if with_residual else 0)
    with torch.inference_mode():
        found = dense(x, LaidOutWeight.of(weight), bias, activation, residual if with_residual else None)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=2e-5)
    assert torch.equal(residual, before)


@needs_layout
def test_rows_do_not_depend_on_what_fills_a_batch_up():
    g = torch.Generator().manual_seed(0)
    made, x = LaidOutWeight.of(torch.randn(96, 48, generator=g)), torch.randn(2 * STEP, 48, generator=g)
    with torch.inference_mode():
        once = dense(x, made, None)
        x[STEP:] = torch.nan
        again = dense(x, made, None)
    assert torch.equal(once[:STEP], again[:STEP])
    assert made[:].plain is made.plain
    assert torch.equal(made[10:20], made.plain[10:20])


def test_filled_up():
    assert [filled_up(n) for n in (1, STEP, STEP + 1, MOST)] == [STEP, STEP, 2 * STEP, MOST]


@pytest.mark.parametrize("family", FAST)
def test_what_predicts_is_what_was_trained(family, adapters, tiny_base):  # noqa: F811
    """Merged, laid out and filled up against the adapter beside the plain base, for every kind of adapter; the engine against both."""
    folders, base = adapters(family), tiny_base(family)
    engine = engine_of(folders, base)
    for folder, kind in zip(folders, KINDS, strict=True):
        texts = random_texts(9, 4)
        pairs = random_texts(9, 5) if kind.pairs else None
        classifier = TextClassifier.load(folder, base=str(base), device="cpu")
        plain, fast = classifier.plain_logits(texts, pairs), classifier.logits(texts, pairs)
        scale = np.maximum(1, np.abs(plain))
        assert np.abs((fast - plain) / scale).max() < 3e-5  # a merged weight is rounded once more
        mixed = np.array([one.logits for one in engine.predict(texts, folder.name, pairs)])
        assert np.abs((mixed - plain) / scale).max() < 3e-5
        assert classifier.model.encoder.weights is None  # what was loaded is left as it was

"""The 8-bit base: its product against the formula, its independence of the batch, and the same answers from
every door."""

import json

import numpy as np
import pytest
import torch
from conftest import FAST
from test_engine import KINDS, adapters, engine_of, random_texts  # noqa: F401

from textlora import AdapterEngine, TextClassifier
from textlora.core.config import MULTI_LABEL
from textlora.core.errors import UsageError
from textlora.kernels.packed_linear import Int8Weight, exact_levels, lays_out, require_int8


def rounded(x: np.ndarray, levels: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers and scales of the rows of x, float64."""
    scale = np.abs(x).max(1, keepdims=True) / levels
    return np.rint(x / scale), scale


def drawn(
    rows: int, inner: int, outer: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, inner, generator=g),
        torch.randn(outer, inner, generator=g),
        torch.randn(outer, generator=g),
    )


@pytest.mark.parametrize(
    "shape", [(1, 32, 96), (7, 48, 32), (65, 384, 1152), (64, 384, 1152), (3, 20, 7), (32, 20, 7)]
)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    "levels", [127, 63, None]
)  # on x86 as this processor has it, with 7 bits, without oneDNN
def test_product_is_the_formula(shape, with_bias, levels, monkeypatch):
    best = exact_levels()
    monkeypatch.setattr(
        "textlora.kernels.packed_linear.exact_levels", lambda: levels and min(levels, best or 0)
    )
    x, weight, bias = drawn(*shape)
    used = min(levels, best or 127) if levels and lays_out(weight) else 127
    (qx, sx), (qw, sw) = rounded(x.double().numpy()), rounded(weight.double().numpy(), used)
    expected = (qx @ qw.T) * sx * sw.T + (bias.double().numpy() if with_bias else 0)
    found = Int8Weight.of(weight).product(x, bias if with_bias else None).numpy()
    edge = (
        1.01 * (np.abs(qx).max() + np.abs(qw).max()) * sx * sw.T
    )  # a value half way between two levels may go either way in float32
    assert (np.abs(found - expected) <= np.maximum(1e-4, edge)).all()
    assert np.median(np.abs(found - expected)) < 1e-5
    assert (
        np.abs(found - (x @ weight.T + (bias if with_bias else 0)).numpy()).max()
        < 0.03 * 127 / used * np.abs(expected).max() + 0.05
    )


def test_a_row_does_not_depend_on_the_others():
    x, weight, bias = drawn(64, 64, 96)  # whole steps: laid out together, plain alone
    x[7] *= 1000
    x[8] = 0
    made = Int8Weight.of(weight)
    together = made.product(x, bias)
    for i in (0, 7, 8, 49):
        assert torch.equal(made.product(x[i : i + 1], bias)[0], together[i])
    assert torch.equal(together[8], bias)
    assert torch.equal(made[10:30].product(x, bias[10:30]), together[:, 10:30])


@pytest.mark.parametrize("family", FAST)
def test_engine_and_classifier_agree_in_int8(family, adapters, tiny_base):  # noqa: F811
    folders, base, texts = adapters(family), tiny_base(family), random_texts(24, 3)
    exact = engine_of(folders, base)
    engine = AdapterEngine(str(base), device="cpu", precision="int8")
    for folder in folders:
        engine.add(folder, folder.name)
    singles = [folder for folder, kind in zip(folders, KINDS, strict=True) if not kind.pairs]
    names = [singles[i % len(singles)].name for i in range(len(texts))]
    mixed, plain = engine.predict(texts, names), exact.predict(texts, names)
    apart = []
    for folder in singles:
        rows = [i for i, name in enumerate(names) if name == folder.name]
        alone = TextClassifier.load(folder, base=str(base), device="cpu", precision="int8").predict(
            [texts[i] for i in rows]
        )
        for i, one in zip(rows, alone, strict=True):
            scale = max(1, *map(abs, plain[i].logits))
            apart.append(np.abs(np.subtract(one.logits, mixed[i].logits)).max() / scale)
            assert np.abs(np.subtract(one.logits, plain[i].logits)).max() / scale < 0.3
    assert np.median(apart) < 1e-5
    assert max(apart) < 0.1  # where a value was rounded the other way
    differences = [np.abs(np.subtract(a.logits, b.logits)).max() for a, b in zip(mixed, plain, strict=True)]
    assert 1e-6 < np.median(differences) < 0.1


def test_texts_that_adapters_share_in_int8(adapters, tiny_base):  # noqa: F811
    top = [
        folder for folder, kind in zip(adapters("bert"), KINDS, strict=True) if kind.lora.layers == "last:1"
    ]
    engine = AdapterEngine(str(tiny_base("bert")), device="cpu", precision="int8")
    for folder in top:
        engine.add(folder, folder.name)
    text = random_texts(1, 9)[0]
    together = engine.predict([text] * len(top), [folder.name for folder in top])
    for folder, found in zip(top, together, strict=True):
        alone = engine.predict([text], folder.name)[0]
        np.testing.assert_allclose(found.logits, alone.logits, atol=0.02 * max(1, *map(abs, alone.logits)))


def test_where_it_cannot_be_had(adapters, tiny_base, monkeypatch):  # noqa: F811
    with pytest.raises(UsageError, match="only on CPUs"):
        require_int8("cuda:0")
    monkeypatch.setattr("textlora.kernels.packed_linear.exact_levels", lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "_int_mm", lambda a, b: torch.full((a.shape[0], b.shape[1]), 32767, dtype=torch.int32)
        )
        with pytest.raises(UsageError, match="overflow on this processor"):
            TextClassifier.load(adapters("bert")[0], base=str(tiny_base("bert")), precision="int8")
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_int_mm")
        with pytest.raises(UsageError, match="no integer products here"):
            AdapterEngine(str(tiny_base("bert")), precision="int8")


def test_predict_command(adapters, tiny_base, cli, tmp_path):  # noqa: F811
    k = next(i for i, kind in enumerate(KINDS) if kind.task != MULTI_LABEL and kind.labels == 3)
    data = tmp_path / "texts.txt"
    data.write_text("good film\nvery bad plot\n")
    command = [
        "predict",
        str(adapters("bert")[k]),
        "--model",
        str(tiny_base("bert")),
        "--data",
        str(data),
        "--json",
        "--logits",
    ]
    plain, int8 = (cli(*command, *more) for more in ((), ("--precision", "int8")))
    assert plain[0] == int8[0] == 0
    for a, b in zip(plain[1].splitlines(), int8[1].splitlines(), strict=True):
        a, b = json.loads(a)["logits"], json.loads(b)["logits"]
        assert a != b
        np.testing.assert_allclose(a, b, atol=0.1 * max(1, *map(abs, a)))

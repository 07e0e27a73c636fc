"""Mean pooling: means of texts in C, and every way to a prediction against transformers + peft and a mean in
float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_tiny
from test_encoder import compare
from test_engine import Kind, engine_of, make_adapter, random_texts

from textlora import TextClassifier
from textlora.core.config import LoraConfig
from textlora.data.tokenize import pack
from textlora.kernels import bindings, fused_ops
from textlora.model.encoder import PackedEncoder
from textlora.model.reference_model import ReferenceModel
from textlora.server.worker import Worker

needs_vectors = pytest.mark.skipif(
    not bindings.lanes(), reason="nothing was compiled, or this processor has no such vectors"
)
KINDS = (
    Kind(LoraConfig(r=4), 3, pooling="mean"),
    Kind(LoraConfig(r=7, target_modules=("all-linear",)), 77, pooling="mean"),
    Kind(
        LoraConfig(r=3, use_dora=True, target_modules=("query", "key", "attention.output.dense")),
        2,
        pooling="mean",
    ),
    Kind(LoraConfig(r=16, use_rslora=True, layers="last:1"), 4, pooling="mean"),
    Kind(LoraConfig(r=4), 3),
)
TEXTS = random_texts(40, 5)


def starts_of(lengths):
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


@needs_vectors
@pytest.mark.parametrize("lengths", [[1], [1, 2, 3, 31, 32, 33, 64, 65], [700, 1, 512]])
@pytest.mark.parametrize("width", [16, 48, 384])
def test_means_and_their_gradient(lengths, width):
    draw = torch.Generator().manual_seed(width)
    x, grad = (torch.randn(rows, width, generator=draw) + 1 for rows in (sum(lengths), len(lengths)))
    wide = x.double().requires_grad_()
    expected = torch.stack([part.mean(0) for part in wide.split(lengths)])
    expected.backward(grad.double())
    x.requires_grad_()
    found = fused_ops.mean(x, starts_of(lengths))
    found.backward(grad)
    assert (found.double() - expected).abs().max() < 5e-7
    assert (x.grad.double() - wide.grad).abs().max() < 5e-7
    with torch.inference_mode():
        assert torch.equal(fused_ops.mean(x.detach(), starts_of(lengths)), found)


@needs_vectors
@pytest.mark.parametrize("starts", [[0, 2, 2, 5], [0, 3], [1, 5], [0, 4, 2, 5], []])
def test_texts_that_are_not_all_rows(starts):
    with pytest.raises(ValueError, match="texts in no order"):
        bindings.mean(torch.zeros(5, 16), torch.tensor(starts, dtype=torch.int32))
    with pytest.raises(ValueError, match="texts in no order"):
        bindings.mean_back(
            torch.zeros(max(0, len(starts) - 1), 16), torch.tensor(starts, dtype=torch.int32), 5
        )


@needs_vectors
def test_other_types_do_not_reach_the_functions():
    for x, starts in (
        (torch.zeros(5, 16).double(), starts_of([5])),
        (torch.zeros(5, 16), starts_of([5]).long()),
        (torch.zeros(5, 8), starts_of([5])),
    ):
        with pytest.raises(ValueError, match=r"wanted|not a multiple"):
            bindings.mean(x, starts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base whose blocks are one call, an adapter of each kind on it, and logits of `TEXTS` by each in
    float64."""
    root = tmp_path_factory.mktemp("mean")
    base = make_tiny("bert", root / "base", num_attention_heads=2, num_hidden_layers=3)
    folders = [make_adapter(root / f"kind-{k}", base, kind, seed=k) for k, kind in enumerate(KINDS)]
    return base, folders, [oracle(folder, base, kind) for folder, kind in zip(folders, KINDS, strict=True)]


def oracle(folder, base, kind):
    reference = ReferenceModel.from_adapter(folder, base, kind.labels, pooling=kind.pooling)
    reference._net.double()
    encoded = TextClassifier.load(folder, base=str(base), device="cpu").tokenizer.encode(TEXTS)
    with torch.inference_mode():
        return np.concatenate(
            [
                reference._net(**reference._run(pack([one]), (0, 1, 0, len(one.ids)))).logits.numpy()
                for one in encoded
            ]
        )


def close(found, expected, tolerance=3e-5):
    assert found.shape == expected.shape
    assert (np.abs(found - expected) <= tolerance * np.maximum(1, np.abs(expected))).all(), np.abs(
        found - expected
    ).max()


@pytest.mark.parametrize("k", range(len(KINDS)))
def test_predictions_of_one_adapter(made, k):
    base, folders, expected = made
    classifier = TextClassifier.load(folders[k], base=str(base), device="cpu")
    assert expected[k].dtype == np.float64
    assert np.ptp(expected[k], axis=0).min() > 0.01
    close(classifier.plain_logits(TEXTS), expected[k])
    close(classifier.logits(TEXTS), expected[k])
    for at in (0, 7):
        close(classifier.logits(TEXTS[at : at + 1]), expected[k][at : at + 1])


@pytest.mark.parametrize("k", range(len(KINDS)))
def test_predictions_in_8_bits(made, k):
    """Batches are filled up to whole steps there, with rows that belong to no text: a text alone, with most
    of its rows such, has what it has in a batch."""
    base, folders, expected = made
    classifier = TextClassifier.load(folders[k], base=str(base), device="cpu", precision="int8")
    together = classifier.logits(TEXTS)
    scale = np.maximum(1, np.abs(expected[k]).max())
    assert np.median(np.abs(together - expected[k])) < 0.1 * scale
    assert np.corrcoef(together.ravel(), expected[k].ravel())[0, 1] > 0.98
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    assert np.median(np.abs(alone - together)) < 1e-5 * scale  # but where a value was rounded the other way


def test_mixed_batches(made):
    """Adapters of different ranks, DoRA and heads on texts of all lengths, one of first tokens among them; in
    the server's process, too."""
    base, folders, expected = made
    engine = engine_of(folders, base)
    owners = [(3 * i) % len(folders) for i in range(len(TEXTS))]
    names = [folders[k].name for k in owners]
    found = engine.predict(TEXTS, names)
    answers = Worker(engine).handle("answers", (TEXTS, names, [None] * len(TEXTS)))
    assert answers[0] == "ok"
    for i, k in enumerate(owners):
        close(np.array(found[i].logits), expected[k][i])
        close(np.array(answers[1][i][4]), expected[k][i])
    shared = engine.predict(
        [TEXTS[0]] * len(folders), [folder.name for folder in folders]
    )  # one text, whose lower blocks adapters share
    for k, one in enumerate(shared):
        close(np.array(one.logits), expected[k][0])


@pytest.mark.parametrize("k", range(len(KINDS)))
def test_training_by_compiled_blocks(made, k):
    """Logits and gradients against transformers + peft."""
    base, folders, _ = made
    classifier = TextClassifier.load(folders[k], base=str(base), device="cpu")
    slow = ReferenceModel.from_adapter(folders[k], base, KINDS[k].labels, pooling=KINDS[k].pooling)
    compare(classifier.model.for_training(), slow, pack(classifier.tokenizer.encode(TEXTS[:9])))


def test_known_states_of_lower_blocks(made):
    """The prefix cache: `last:1` on states that were computed before."""
    base, folders, expected = made
    classifier = TextClassifier.load(folders[3], base=str(base), device="cpu")
    model, encoded = classifier.model, classifier.tokenizer.encode(TEXTS)
    assert model.depth == 2
    for way in (model, model.for_training()):
        batch = pack(encoded)
        with torch.no_grad():
            hidden = way.encoder.prefix(batch, model.depth)
            found = np.empty_like(expected[3])
            found[batch.rows.numpy()] = way.forward(replace(batch, hidden=hidden, depth=model.depth)).numpy()
        close(found, expected[3])


def test_without_compiled_functions(made, monkeypatch):
    base, folders, expected = made
    monkeypatch.setattr(bindings, "has_passes", lambda x: False)
    monkeypatch.setattr(PackedEncoder, "_in_c", False)
    close(TextClassifier.load(folders[0], base=str(base), device="cpu").logits(TEXTS), expected[0])

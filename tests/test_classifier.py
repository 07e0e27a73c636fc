"""`TextClassifier`: an answer does not depend on what else is asked, in which order, or in what batches."""

import numpy as np
import pytest
import torch
from conftest import random_adapter
from support import forked, single_rows, trained

from textlora import TextClassifier
from textlora.adapters.golden_texts import GOLDEN_TEXTS
from textlora.core.errors import UsageError
from textlora.inference.classifier import encoded_logits
from textlora.model.packed_model import PackedModel


@pytest.fixture
def classifier(single) -> TextClassifier:
    return TextClassifier.load(single.folder, base=single.config.model)


TEXTS = [*(text for text, _ in single_rows(30, 11)), "x", "the " * 60, "caf\u00e9 \u00fcber 123", "\u2028?"]


def test_a_text_gets_one_answer_whatever_stands_beside_it(classifier):
    together = classifier.logits(TEXTS)
    alone = np.concatenate([classifier.logits([text]) for text in TEXTS])
    assert together.shape == (34, 2)
    assert np.allclose(together, alone, atol=2e-6)
    order = np.random.default_rng(0).permutation(34)
    assert np.allclose(classifier.logits([TEXTS[i] for i in order]), together[order], atol=2e-6)


@pytest.mark.parametrize("tokens", [1, 16, 50, 10_000])
def test_batches_of_any_size_give_the_same(classifier, tokens, monkeypatch):
    expected = classifier.logits(TEXTS)
    monkeypatch.setattr("textlora.inference.classifier.EVAL_TOKENS", {"cpu": tokens})
    assert np.allclose(
        encoded_logits(classifier.model, classifier.tokenizer.encode(TEXTS)), expected, atol=2e-6
    )


def test_answers_come_twice_the_same_to_the_bit(single, classifier):
    again = TextClassifier.load(single.folder, base=single.config.model)
    assert np.array_equal(again.logits(TEXTS), classifier.logits(TEXTS))


def test_long_texts_are_cut_as_in_training(classifier):
    words = "good " * 10 + "bad " * 80
    assert np.array_equal(
        classifier.logits([words]), classifier.logits(["good " * 10 + "bad " * 20])
    )  # 30 words and 2 special tokens
    assert [len(e.ids) for e in classifier.tokenizer.encode([words])] == [32]


def test_prediction_and_record(classifier):
    (prediction,) = classifier.predict("good fun film")
    logits = np.array(prediction.logits) / classifier.meta.temperature
    expected = np.exp(logits) / np.exp(logits).sum()
    assert list(prediction.scores) == ["neg", "pos"]
    assert list(prediction.scores.values()) == pytest.approx(expected.tolist(), abs=1e-6)
    assert prediction.label == ["neg", "pos"][int(expected.argmax())]
    assert prediction.labels == (prediction.label,)
    assert prediction.score == max(prediction.scores.values())
    assert classifier.record(prediction) == {
        "label": prediction.label,
        "score": prediction.score,
        "scores": prediction.scores,
    }
    assert classifier.record(prediction, True)["logits"] == list(prediction.logits)


def test_predict_leaves_no_gradients_and_no_dropout(tiny_base, tmp_path_factory):
    run = trained(tiny_base, tmp_path_factory, lora_dropout=0.5)
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    assert np.array_equal(classifier.logits(TEXTS), classifier.logits(TEXTS))
    assert all(tensor.grad is None for tensor in classifier.model.trainable().values())


def test_verify_measures_the_golden_examples(classifier):
    assert classifier.verify() < 1e-6
    stored = np.array([row["logits"] for row in classifier.meta.golden])
    random_adapter(classifier.model)
    with pytest.raises(
        Exception,
        match=r"this adapter: golden example [1-8] gives logits that differ by [0-9.]+ from those stored",
    ):
        classifier.verify()
    assert not np.allclose(classifier.logits(list(GOLDEN_TEXTS)), stored, atol=1e-3)


def precision() -> list[object]:
    """How exactly torch multiplies float32 matrices, asked in the old style and in the new one; the old
    refuses to say after the new was used."""

    def ask(what):
        try:
            return what()
        except RuntimeError:
            return "new style"

    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    return [
        ask(what)
        for what in (
            torch.get_float32_matmul_precision,
            lambda: cuda.allow_tf32,
            lambda: cuda.fp32_precision,
            lambda: cpu.fp32_precision,
        )
    ]


SWITCHES = [
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "pass",
]


@pytest.mark.parametrize("switch", SWITCHES)
def test_golden_examples_are_computed_in_plain_float32(single, monkeypatch, switch):
    """Whatever the process has switched on: TF32, bfloat16 products, autocast. The golden examples see none
    of it, and it stays switched on."""

    def job() -> int:
        exec(switch, {"torch": torch})
        before, seen = precision(), []
        forward = PackedModel.forward

        def watched(model, batch):
            seen.append(
                (
                    precision(),
                    torch.is_autocast_enabled("cpu"),
                    torch.is_autocast_enabled("cuda"),
                    model.dtype,
                )
            )
            return forward(model, batch)

        monkeypatch.setattr(PackedModel, "forward", watched)
        with torch.autocast("cpu", torch.bfloat16):
            TextClassifier.load(single.folder, base=single.config.model, device="cpu")
            assert torch.is_autocast_enabled("cpu")
        assert seen
        assert all(
            found == (["highest", False, "ieee", "ieee"], False, False, torch.float32) for found in seen
        ), seen
        assert precision() == before
        return 0

    assert forked(job) == (0, "", "")  # a fork, since torch has no way back from some of these


def test_nothing_to_encode(classifier):
    with pytest.raises(UsageError, match="there are no texts"):
        classifier.logits([])


def test_labels_are_the_folders_own(single):
    with pytest.raises(UsageError, match="has its own labels"):
        TextClassifier.load(single.folder, base=single.config.model, labels=["a", "b"])
    assert TextClassifier.load(
        single.folder, base=single.config.model, labels=["neg", "pos"]
    ).meta.labels == ("neg", "pos")


def test_loading_does_not_touch_the_global_generator(single):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    TextClassifier.load(single.folder, base=single.config.model).predict(TEXTS)
    assert torch.equal(torch.get_rng_state(), before)

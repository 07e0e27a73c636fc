"""Mean-pooled adapters merged: sentence-transformers and the pipeline give `predict`'s scores, and no class
answers with a head it made up."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FAST, SLOW, random_adapter
from safetensors.torch import load_file, save_file
from test_merge import LABELS, TEXTS, close, make_adapter, merged
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CamembertForSequenceClassification,
    pipeline,
)

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter, write_side_file
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LoraConfig
from textlora.core.errors import AdapterError, UsageError, VerificationError
from textlora.model.base import find_base
from textlora.model.lora import delta
from textlora.model.open import open_model
from textlora.transform import fresh_process, merge
from textlora.transform.extract import extract
from textlora.transform.sentence_transformers import load_pooled, modelling
from textlora.transform.transformers_names import named_loras

TASKS = [
    pytest.param(SINGLE_LABEL, LABELS, False, id="single-label"),
    pytest.param(MULTI_LABEL, ("warm", "long", "praise"), False, id="multi-label"),
    pytest.param(REGRESSION, ("value",), False, id="regression"),
    pytest.param(SINGLE_LABEL, ("no", "yes"), True, id="pairs"),
]


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path_factory) -> None:
    """Copies of modelling files go where they disturb nobody."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules"))
    )
    monkeypatch.setattr(sys, "path", [*sys.path])


def by_pipeline(folder: Path, classifier: TextClassifier, pairs: list[str] | None = None) -> np.ndarray:
    """Scores (N, C) as anybody gets them from a merged folder."""
    mean = classifier.meta.pooling == "mean"
    ask = pipeline(
        "text-classification", model=str(folder), trust_remote_code=mean, truncation=True, top_k=None
    )
    answers = ask(
        TEXTS if pairs is None else [{"text": a, "text_pair": b} for a, b in zip(TEXTS, pairs, strict=True)]
    )
    return np.array(
        [
            [{a["label"]: a["score"] for a in answer}[label] for label in classifier.meta.labels]
            for answer in answers
        ]
    )


def by_encode(folder: Path, kind: str, pairs: list[str] | None = None) -> np.ndarray:
    """Scores (N, C) of sentence-transformers; the softmax or sigmoid is ours to take."""
    from sentence_transformers import SentenceTransformer

    given = TEXTS if pairs is None else list(zip(TEXTS, pairs, strict=True))
    logits = SentenceTransformer(str(folder), device="cpu").encode(given, convert_to_tensor=True)
    return {SINGLE_LABEL: lambda x: x.softmax(1), MULTI_LABEL: torch.sigmoid, REGRESSION: lambda x: x}[kind](
        logits.float()
    ).numpy()


def by_predict(classifier: TextClassifier, pairs: list[str] | None = None) -> np.ndarray:
    return np.array([list(row.scores.values()) for row in classifier.predict(TEXTS, pairs)])


def with_temperature(folder: Path, base: Path, **changes: Any) -> TextClassifier:
    """The same folder as an older textlora, or this one, wrote it."""
    write_side_file(folder, replace(read_adapter(folder).meta, **changes))
    return TextClassifier.load(folder, base=str(base))


@pytest.mark.parametrize("family", FAST + SLOW)
def test_every_reader_gives_predicts_scores(family, tiny_base, tmp_path, near):
    base, output = tiny_base(family), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", target_modules=("all-linear",))
    result = merged(classifier, base, tmp_path / "a", output, rows=[(text, None) for text in TEXTS])
    assert (result["rows"], result["pooling"]) == (13, "mean")
    assert result["score_difference"] <= 1e-5
    expected = by_predict(classifier)
    assert np.ptp(expected, axis=0).max() > 0.01  # the texts are told apart
    assert np.abs(by_pipeline(output, classifier) - expected).max() <= 1e-5
    assert np.abs(by_encode(output, SINGLE_LABEL) - expected).max() <= 1e-5


@pytest.mark.parametrize("family", FAST + SLOW)
def test_no_class_makes_up_a_tensor(family, tiny_base, tmp_path, near):
    """Pipeline class and bare encoder take every tensor from the files (but a pooler that the base has none
    of); the family's own class refuses."""
    base, output = tiny_base(family), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean")
    merged(classifier, base, tmp_path / "a", output)
    net, info = AutoModelForSequenceClassification.from_pretrained(
        output, trust_remote_code=True, output_loading_info=True
    )
    assert type(net).__name__.startswith("MeanPooled")
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    encoder, info = AutoModel.from_pretrained(output, output_loading_info=True)
    _, before = AutoModel.from_pretrained(base, output_loading_info=True)
    assert info["missing_keys"] == before["missing_keys"]
    assert not info["mismatched_keys"]
    old, written = AutoModel.from_pretrained(base).state_dict(), encoder.state_dict()
    prefix, loras = f"{encoder.base_model_prefix}.", named_loras(classifier.model)
    for name, tensor in old.items():
        if name not in info["missing_keys"]:
            lora = loras.get(prefix + name.removesuffix(".weight"))
            expected = (
                tensor
                if lora is None or not name.endswith(".weight")
                else tensor + delta(tensor.double(), lora)
            )
            torch.testing.assert_close(written[name], expected.float(), rtol=1e-6, atol=1e-7)
    for options in ({}, {"trust_remote_code": False}):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            AutoModelForSequenceClassification.from_pretrained(output, **options)
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        pipeline("text-classification", model=str(output))
    if family == "camembert":
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            CamembertForSequenceClassification.from_pretrained(output)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize(("kind", "labels", "pairs"), TASKS)
def test_tasks(kind, labels, pairs, family, tiny_base, tmp_path, near):
    base, output = tiny_base(family), tmp_path / "m"
    thresholds = (0.5, 0.25, 0.75) if kind == MULTI_LABEL else None
    classifier = make_adapter(
        tmp_path / "a", base, pooling="mean", labels=labels, kind=kind, pairs=pairs, thresholds=thresholds
    )
    seconds = TEXTS[::-1] if pairs else None
    merged(
        classifier,
        base,
        tmp_path / "a",
        output,
        rows=list(zip(TEXTS, seconds or [None] * len(TEXTS), strict=True)),
    )
    expected = by_predict(classifier, seconds)
    assert np.abs(by_pipeline(output, classifier, seconds) - expected).max() <= 1e-5
    assert np.abs(by_encode(output, kind, seconds) - expected).max() <= 1e-5


def test_the_files_of_sentence_transformers(tiny_base, tmp_path, near):
    base, output = tiny_base("bert"), tmp_path / "m"
    merged(make_adapter(tmp_path / "a", base, pooling="mean", max_length=20), base, tmp_path / "a", output)
    read = lambda name: json.loads((output / name).read_text(encoding="utf-8"))
    assert [(part["path"], part["type"]) for part in read("modules.json")] == [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
        ("2_Dense", "sentence_transformers.models.Dense"),
    ]
    assert read("sentence_bert_config.json")["max_seq_length"] == 20
    assert [key for key, value in read("1_Pooling/config.json").items() if value is True] == [
        "pooling_mode_mean_tokens"
    ]
    dense = read("2_Dense/config.json")
    assert (dense["in_features"], dense["out_features"], dense["activation_function"]) == (
        32,
        3,
        "torch.nn.modules.linear.Identity",
    )
    whole = load_file(output / "model.safetensors")
    alone = load_file(output / "2_Dense" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in whole.items() if name in ("classifier.weight", "classifier.bias")} == {
        "classifier.weight": (0,), "classifier.bias": (0,),
    }  # fmt: skip
    assert all(
        torch.equal(alone[f"linear.{part}"], whole[f"classifier.mean.{part}"]) for part in ("weight", "bias")
    )
    for path in output.rglob("*"):
        assert path.stat().st_mode & 0o777 == (
            output.stat().st_mode & 0o777
            if path.is_dir()
            else (output / "config.json").stat().st_mode & 0o777
        )


@pytest.mark.parametrize("truncation", ["head", "tail"])
def test_long_texts_are_cut_as_the_adapter_cuts(truncation, tiny_base, tmp_path, near):
    base, output = tiny_base("bert"), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", truncation=truncation, max_length=20)
    merged(classifier, base, tmp_path / "a", output)
    assert len(AutoTokenizer.from_pretrained(output)(TEXTS[3])["input_ids"]) > 20
    assert np.abs(by_encode(output, SINGLE_LABEL) - by_predict(classifier)).max() <= 1e-5
    assert np.abs(by_pipeline(output, classifier) - by_predict(classifier)).max() <= 1e-5


def test_head_tail_rows_are_left_out_and_said(tiny_base, tmp_path, near):
    base, output = tiny_base("bert"), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", truncation="head-tail", max_length=20)
    result = merged(classifier, base, tmp_path / "a", output)
    longer = sum(
        e.full > 20 for e in classifier.tokenizer.encode([row["text"] for row in classifier.meta.golden])
    )
    assert (result["rows"], result["left_out"]) == (8 - longer, longer)
    assert "head-tail truncation, which neither library has" in (output / "README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["bert", "bert-no-pooler", "distilbert"])
def test_half_precision(dtype, family, tiny_base, tmp_path, near):
    base, output = tiny_base(family), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean")
    result = merged(classifier, base, tmp_path / "a", output, dtype, [(text, None) for text in TEXTS])
    for name in ("model.safetensors", "2_Dense/model.safetensors"):
        assert {tensor.dtype for tensor in load_file(output / name).values()} == {getattr(torch, dtype)}
    assert result["difference"] == pytest.approx(result["rounding"], abs=1e-5)
    assert 1e-6 < result["score_difference"] < 0.01
    assert np.abs(by_encode(output, SINGLE_LABEL) - by_predict(classifier)).max() < 0.02
    assert np.abs(by_pipeline(output, classifier) - by_predict(classifier)).max() < 0.02


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("kind", [SINGLE_LABEL, MULTI_LABEL])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_a_temperature_goes_into_the_head(family, kind, pooling, tiny_base, tmp_path, near):
    """Of a folder of an older textlora, whose readers divide by it: merged scores are predict's, and so are
    those extracted again."""
    base = tiny_base(family)
    make_adapter(tmp_path / "a", base, pooling=pooling, kind=kind)
    plain = by_predict(TextClassifier.load(tmp_path / "a", base=str(base)))
    classifier = with_temperature(tmp_path / "a", base, temperature=0.37)
    expected = by_predict(classifier)
    assert np.abs(plain - expected).max() > 0.02
    assert merged(classifier, base, tmp_path / "a", tmp_path / "m")["score_difference"] <= 1e-5
    assert np.abs(by_pipeline(tmp_path / "m", classifier) - expected).max() <= 1e-5
    note = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))["textlora"]
    assert (note["temperature"], note["fitted_temperature"]) == (1.0, pytest.approx(0.37))
    extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert (again.meta.temperature, again.meta.fitted_temperature) == (1.0, pytest.approx(0.37))
    assert np.abs(by_predict(again) - expected).max() <= 1e-5


def test_temperature_of_a_regression_has_no_effect(tiny_base, tmp_path, near):
    base = tiny_base("bert")
    make_adapter(tmp_path / "a", base, pooling="mean", kind=REGRESSION, labels=("value",))
    classifier = with_temperature(tmp_path / "a", base, temperature=3.0)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    assert np.abs(by_encode(tmp_path / "m", REGRESSION) - by_predict(classifier)).max() <= 1e-5


def test_a_fitted_temperature_in_the_head_is_noted_only(tiny_base, tmp_path, near):
    base = tiny_base("bert")
    make_adapter(tmp_path / "a", base, pooling="mean")
    classifier = with_temperature(tmp_path / "a", base, fitted_temperature=1.9)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    assert np.abs(by_encode(tmp_path / "m", SINGLE_LABEL) - by_predict(classifier)).max() <= 1e-5
    extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    assert TextClassifier.load(tmp_path / "x", base=str(base)).meta.fitted_temperature == 1.9


@pytest.mark.parametrize("family", [*FAST, "deberta-v2", "albert"])
def test_extract_gives_the_adapter_again_and_runs_no_code(family, tiny_base, tmp_path, near):
    base = tiny_base(family)
    places = {"target_modules": ("all-linear",), "layers": "last:1"} if family != "albert" else {}
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", r=3, **places)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    ours = next((tmp_path / "m").glob("*.py"))
    ours.write_text("raise SystemExit('this code was run')\n", encoding="utf-8")
    result = extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    assert result["r"] == 3
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert again.meta.pooling == "mean"
    assert close(again.logits(TEXTS), classifier.logits(TEXTS))


def test_extract_refuses_half_a_folder(tiny_base, tmp_path, near, cli):
    base = tiny_base("bert")
    merged(make_adapter(tmp_path / "a", base, pooling="mean"), base, tmp_path / "a", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["classifier.mean.bias"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    said = cli.fails("extract", tmp_path / "m", "--base", base, "--output", tmp_path / "x", output=tmp_path)
    assert "tensor 'classifier.mean.bias' is missing" in said


@pytest.mark.parametrize("family", FAST)
def test_the_folder_is_a_base_too(family, tiny_base, tmp_path, near):
    """Its encoder alone: what lies beside it is no part of the base."""
    base = tiny_base(family)
    merged(make_adapter(tmp_path / "a", base, pooling="mean"), base, tmp_path / "a", tmp_path / "m")
    model, reason = open_model(find_base(str(tmp_path / "m")), LoraConfig(r=2), 4, pooling="mean")
    assert reason is None
    random_adapter(model)


# --- the proof ---


def test_the_command_in_a_fresh_process(tiny_base, tmp_path, cli, monkeypatch):
    said = []

    def listen(*arguments: Any, **options: Any) -> Any:
        done = subprocess.run(*arguments, **options)
        said.append((json.loads(done.stdout.splitlines()[-1]), options["env"]["HF_MODULES_CACHE"]))
        return done

    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(run=listen))
    base, output = tiny_base("bert"), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean")
    code, out, err = cli("merge", tmp_path / "a", "--model", base, "--output", output, "--device", "cpu")
    assert (code, err) == (0, "")
    assert (
        float(
            next(
                line
                for line in out.splitlines()
                if line.startswith("largest score difference from predict: ")
            ).rpartition(" ")[2]
        )
        <= 1e-5
    )
    record, cache = said[0]
    assert "textlora" not in record["imported"]
    assert "sentence_transformers" in record["imported"]
    assert not Path(cache).exists()
    assert np.abs(by_pipeline(output, classifier) - by_predict(classifier)).max() <= 1e-5


def test_without_sentence_transformers_its_steps_are_taken_by_hand(tiny_base, tmp_path, near, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    base, output = tiny_base("roberta"), tmp_path / "m"
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", pairs=True)
    asked = []
    real = merge.ask_fresh
    monkeypatch.setattr(merge, "ask_fresh", lambda *given: asked.append(real(*given)) or asked[0])
    merged(classifier, base, tmp_path / "a", output)
    rows = [(row["text"], row["text_pair"]) for row in classifier.meta.golden]
    assert close(asked[0].encoded, classifier.logits(*zip(*rows, strict=True)))


@pytest.mark.parametrize("damage", ["dense", "head", "pooling", "guard", "length", "code"])
def test_a_folder_that_answers_otherwise_is_refused(damage, tiny_base, tmp_path, cli, near, monkeypatch):
    base, real = tiny_base("bert"), merge.ask_fresh
    make_adapter(tmp_path / "a", base, pooling="mean")

    def spoil(folder: Path, rows: Any, kind: str) -> Any:
        def change(name: str, edit: Any) -> None:
            tensors = load_file(folder / name)
            edit(tensors)
            save_file(tensors, folder / name, {"format": "pt"})

        if damage == "dense":
            change("2_Dense/model.safetensors", lambda tensors: tensors["linear.bias"].add_(0.01))
        elif damage == "head":
            change("model.safetensors", lambda tensors: tensors["classifier.mean.bias"].add_(0.01))
        elif damage == "guard":
            whole = {"classifier.weight": torch.zeros(3, 32), "classifier.bias": torch.zeros(3)}
            change("model.safetensors", lambda tensors: tensors.update(whole))
        elif damage == "code":
            path = next(folder.glob("*.py"))
            path.write_text(
                path.read_text(encoding="utf-8").replace("states * mask", "states"), encoding="utf-8"
            )
        else:
            name = "1_Pooling/config.json" if damage == "pooling" else "sentence_bert_config.json"
            changes = (
                {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
                if damage == "pooling"
                else {"max_seq_length": 8}
            )
            (folder / name).write_text(
                json.dumps(json.loads((folder / name).read_text(encoding="utf-8")) | changes),
                encoding="utf-8",
            )
        return real(folder, rows, kind)

    monkeypatch.setattr(merge, "ask_fresh", spoil)
    if (
        damage == "code"
    ):  # one text at a time has no padding to leave out: that is what the batches of a pipeline are for
        assert cli("merge", tmp_path / "a", "--model", base, "--output", tmp_path / "m")[0] == 0
        return
    said = cli.fails(
        "merge", tmp_path / "a", "--model", base, "--output", tmp_path / "m", code=1, output=tmp_path
    )
    assert ("without trust_remote_code" if damage == "guard" else "more than rounding explains") in said


def test_scores_beyond_the_tolerance_are_refused(tiny_base, tmp_path, near, monkeypatch):
    base, real = tiny_base("bert"), merge.ask_fresh
    classifier = make_adapter(tmp_path / "a", base)
    monkeypatch.setattr(
        merge, "ask_fresh", lambda *given: replace(found := real(*given), scores=found.scores + 1.5e-5)
    )
    with pytest.raises(VerificationError, match=r"scores up to 1\.[4-7]e-05 away from predict's"):
        merged(classifier, base, tmp_path / "a", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_the_modelling_file_needs_classes_of_transformers(tiny_base):
    net = load_pooled(tiny_base("bert"), 3)
    net.bert.__class__ = type("OwnModel", (type(net.bert),), {})
    with pytest.raises(UsageError, match="transformers offers no OwnModel"):
        modelling(net)


def test_an_adapter_with_a_tensor_that_has_no_place_is_refused(tiny_base, tmp_path):
    base = tiny_base("bert")
    classifier = make_adapter(tmp_path / "a", base, pooling="mean")
    classifier.model._trainable["base_model.model.strange.weight"] = torch.zeros(2)
    with pytest.raises(AdapterError, match=r"no tensor 'strange\.weight'"):
        merged(classifier, base, tmp_path / "a", tmp_path / "m")

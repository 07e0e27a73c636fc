"""Adapter folders: PEFT reads ours, we read PEFT's, and nothing that was damaged or swapped is believed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import CONFIG, SIDE, WEIGHTS, Cli, Trained, settings, single_rows, snapshot, trained
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from textlora import TextClassifier
from textlora.adapters.folder import _self_hash, read_adapter, read_meta, write_weights
from textlora.adapters.golden_texts import GOLDEN_PAIRS, GOLDEN_TEXTS
from textlora.core.errors import AdapterError, ModelError, TextloraError, UsageError
from textlora.model.reference_model import ReferenceModel
from textlora.training.run import run_training
from textlora.transform.inspect import inspect_folder, relabel_folder, summary_lines

TEXTS = [
    "the plot was great",
    "dull and boring film",
    "it",
    "the actor said good story and then it was slow " * 3,
    "1, 2 and 3!",
]


def peft_logits(
    base: Path,
    folder: Path,
    texts: list[str],
    pairs: list[str] | None = None,
    labels: int = 2,
    length: int = 32,
) -> np.ndarray:
    """(N, C) of plain transformers + peft, with the tokenizer as saved in the adapter folder, one text at a
    time."""
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels), folder
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").is_file() else base)
    kinds = model.config.model_type in (
        "bert",
        "electra",
    )  # the tiny tokenizer is of no class that would know
    rows = []
    with torch.inference_mode():
        for i, text in enumerate(texts):
            inputs = tokenizer(
                text,
                None if pairs is None else pairs[i],
                truncation=True,
                max_length=length,
                return_tensors="pt",
                return_token_type_ids=kinds,
            )
            rows.append(model(**inputs).logits[0].numpy())
    return np.array(rows)


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool((np.abs(ours - theirs) <= tolerance * np.maximum(1, np.abs(theirs))).all())


@pytest.fixture
def folder(single, tmp_path) -> Path:
    """A copy of a trained adapter, without its run."""
    return Path(shutil.copytree(single.folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("run")))


@pytest.fixture
def base(single) -> str:
    return str(single.config.model)


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit textlora.json as someone would who also knows how to make its hash fit."""
    content = json.loads((folder / SIDE).read_text(encoding="utf-8"))
    edit(content)
    content["sha256"] = _self_hash(content)
    (folder / SIDE).write_text(json.dumps(content), encoding="utf-8")


# --- PEFT reads ours ---


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("bert-no-pooler", {}),
        ("roberta", {}),
        ("distilbert", {}),
        ("electra", {}),
        ("bert", {"use_dora": True, "target_modules": ("all-linear",), "learning_rate": 0.02}),
        ("roberta", {"use_rslora": True, "layers": "last:1", "target_modules": ("query", "key", "dense")}),
    ],
)
def test_peft_gives_our_logits(tiny_base, tmp_path_factory, family, changes):
    run = trained(tiny_base, tmp_path_factory, family, **changes)
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    assert classifier.model.path == "packed"
    theirs = peft_logits(tiny_base(family), run.folder, TEXTS)
    assert close(classifier.logits(TEXTS), theirs)
    untrained = peft_logits(tiny_base(family), untrained_copy(run), TEXTS)
    assert np.abs(untrained - theirs).max() > 1e-2  # B does something


def untrained_copy(run: Trained) -> Path:
    """The adapter with B at zero."""
    target = run.folder.parent / "untrained"
    if not target.exists():
        shutil.copytree(run.folder, target, ignore=shutil.ignore_patterns("run"))
        tensors = load_file(target / WEIGHTS)
        save_file(
            {name: t * 0 if ".lora_B." in name else t for name, t in tensors.items()},
            target / WEIGHTS,
            {"format": "pt"},
        )
    return target


@pytest.mark.parametrize(("task", "labels"), [("multi", 3), ("regression", 1)])
def test_peft_gives_our_logits_for_other_tasks(tiny_base, tmp_path_factory, task, labels):
    run = trained(tiny_base, tmp_path_factory, task=task)
    ours = TextClassifier.load(run.folder, base=run.config.model).logits(TEXTS)
    assert ours.shape == (5, labels)
    assert close(ours, peft_logits(tiny_base("bert"), run.folder, TEXTS, labels=labels))


def test_peft_gives_our_logits_for_pairs(tiny_base, tmp_path_factory):
    run = trained(tiny_base, tmp_path_factory, task="pairs")
    pairs = TEXTS[::-1]
    ours = TextClassifier.load(run.folder, base=run.config.model).logits(TEXTS, pairs)
    theirs = peft_logits(tiny_base("bert"), run.folder, TEXTS, pairs)
    assert close(ours, theirs)


def test_golden_logits_are_those_of_peft(single, tiny_base):
    meta = read_meta(single.folder)
    assert tuple(row["text"] for row in meta.golden) == GOLDEN_TEXTS
    stored = np.array([row["logits"] for row in meta.golden])
    assert close(stored, peft_logits(tiny_base("bert"), single.folder, list(GOLDEN_TEXTS)), 1e-6)


def test_golden_examples_are_no_training_rows(single, tiny_base, tmp_path_factory):
    pairs = read_meta(trained(tiny_base, tmp_path_factory, task="pairs").folder)
    assert [(row["text"], row["text_pair"]) for row in pairs.golden] == list(GOLDEN_PAIRS)
    stored = "".join(
        (single.folder / name).read_text(encoding="utf-8") for name in (SIDE, "README.md", CONFIG)
    )
    texts = [text for seed, count in ((0, 40), (1, 16), (2, 16)) for text, _ in single_rows(count, seed)]
    assert len(texts) == 72
    assert [text for text in texts if text in stored] == []


# --- we read PEFT's ---


def peft_folder(base: Path, target: Path, labels: int = 2, **changes: Any) -> np.ndarray:
    """Save an adapter that PEFT made, B drawn at random; its logits for TEXTS."""
    torch.manual_seed(5)
    given = {
        "task_type": "SEQ_CLS",
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["query", "value"],
        "init_lora_weights": False,
    }
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels),
        PeftLoraConfig(**(given | changes)),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.requires_grad and ".lora_" not in name) or "lora_magnitude" in name:
                parameter.add_(
                    0.2 * torch.randn(parameter.shape)
                )  # a magnitude of B A at its start, or a bias as it was, would prove nothing
    model.save_pretrained(target)
    return peft_logits(
        base, target, TEXTS, labels=labels, length=48
    )  # such a folder does not say; we take what the base can


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("bert", {}),
        ("bert", {"use_rslora": True, "lora_dropout": 0.3, "layers_to_transform": [1]}),
        ("bert", {"use_dora": True}),
        ("roberta", {"target_modules": "all-linear"}),
        ("distilbert", {"target_modules": ["q_lin", "lin1"]}),
        ("electra", {}),
        (
            "bert",
            {
                "rank_pattern": {"layer.0.*query": 2, "query": 3},
                "alpha_pattern": {r"^bert.encoder.layer.1.attention.self.value": 9, "query": 5},
            },
        ),
        (
            "roberta",
            {
                "rank_pattern": {"value": 7},
                "alpha_pattern": {"query": 1.5},
                "use_rslora": True,
                "use_dora": True,
            },
        ),
        ("bert", {"target_modules": "all-linear", "use_dora": True, "rank_pattern": {"pooler.dense": 2}}),
        ("bert", {"bias": "lora_only", "target_modules": ["query", "intermediate.dense"]}),
        ("bert", {"bias": "all", "target_modules": "all-linear"}),
        ("electra", {"bias": "all"}),
        ("distilbert", {"bias": "all", "use_dora": True, "target_modules": ["q_lin", "k_lin"]}),
        ("bert", {"modules_to_save": ["pooler"]}),
        ("bert-no-pooler", {"modules_to_save": ["pooler.dense", "classifier"]}),
        (
            "xlm-roberta",
            {"modules_to_save": ["LayerNorm", "word_embeddings", "classifier", "classifier", "score"]},
        ),
        ("bert", {"init_lora_weights": "mica"}),
        ("bert", {"fan_in_fan_out": True}),
    ],
)
def test_folders_that_peft_saved(tiny_base, tmp_path, family, changes):
    theirs = peft_folder(tiny_base(family), tmp_path / "peft", **changes)
    classifier = TextClassifier.load(tmp_path / "peft", base=str(tiny_base(family)), labels=["a", "b"])
    assert classifier.model.path == "packed"
    assert close(classifier.logits(TEXTS), theirs)
    assert [p.label for p in classifier.predict(TEXTS)] == ["ab"[i] for i in theirs.argmax(1)]


def test_peft_folder_needs_label_names(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    with pytest.raises(AdapterError) as caught:
        TextClassifier.load(tmp_path / "peft")
    assert str(caught.value) == (
        f"{tmp_path / 'peft'} has no textlora.json, and neither it nor its base names its 2 classes; "
        "name them in class order: --labels negative,positive"
    )
    with pytest.raises(UsageError, match=r"^--labels: 3 names for a head of 2 classes \("):
        TextClassifier.load(tmp_path / "peft", labels=["a", "b", "c"])
    with pytest.raises(UsageError, match=r"^--labels: empty or doubled names"):
        TextClassifier.load(tmp_path / "peft", labels=["a", "a"])
    with pytest.raises(UsageError, match=r"^--problem-type regression: the head of .* has 2 outputs"):
        TextClassifier.load(tmp_path / "peft", labels=["a", "b"], problem_type="regression")


def test_other_kinds_of_adapters_are_refused(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "IA3"}', encoding="utf-8")
    with pytest.raises(AdapterError, match="peft_type 'IA3', textlora runs LORA adapters"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).write_text("{", encoding="utf-8")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(tmp_path)
    (tmp_path / CONFIG).unlink()
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)


# --- damage and tampering ---

HASHED = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json")


def refused(folder: Path, base: str) -> str:
    with pytest.raises(AdapterError) as caught:
        TextClassifier.load(folder, base=base)
    with pytest.raises(AdapterError):
        inspect_folder(folder)
    return caught.value.message


@pytest.mark.parametrize("name", HASHED)
def test_one_flipped_bit(folder, base, name):
    data = bytearray((folder / name).read_bytes())
    for place in (0, len(data) // 2, len(data) - 1):
        data[place] ^= 1
        (folder / name).write_bytes(data)
        assert refused(folder, base) == f"{folder / name}: was changed after it was saved (SHA-256 differs)"
        data[place] ^= 1
    (folder / name).write_bytes(data)
    TextClassifier.load(folder, base=base)


@pytest.mark.parametrize("name", HASHED)
def test_removed_file(folder, base, name):
    (folder / name).unlink()
    assert refused(folder, base) == f"{folder / name} is missing"


def test_every_bit_of_the_side_file_counts(folder, base):
    """Any flip is refused, but for those in white space and those that write the same value in another way."""
    data = bytearray((folder / SIDE).read_bytes())
    plain = json.loads(data)
    missed = []
    for place in range(0, len(data), 7):
        data[place] ^= 1
        (folder / SIDE).write_bytes(data)
        try:
            read_meta(folder)
            missed.append(place)
        except AdapterError:
            pass
        data[place] ^= 1
    for place in missed:
        data[place] ^= 1
        assert json.loads(data) == plain
        data[place] ^= 1


@pytest.mark.parametrize(
    ("before", "after"),
    [('"neg"', '"fine"'), ('"max_length": 32', '"max_length": 16'), ('"problem_type": "single_label', '"problem_type": "multi_label'), ('"pooling": "first"', '"pooling": "mean"')],
)  # fmt: skip
def test_edited_side_file(folder, base, before, after):
    text = (folder / SIDE).read_text(encoding="utf-8")
    assert before in text
    (folder / SIDE).write_text(text.replace(before, after, 1), encoding="utf-8")
    assert refused(folder, base) == f"{folder / SIDE}: was changed after it was saved"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": "1"}', "\udcff"])
def test_side_file_that_is_none(folder, base, text):
    (folder / SIDE).write_bytes(text.encode("utf-8", "surrogateescape"))
    assert refused(folder, base).startswith(f"{folder / SIDE}: not ")


def test_newer_format(folder, base):
    rewrite(folder, lambda content: content.update(format=2))
    assert refused(folder, base) == f"{folder / SIDE}: written by a newer textlora (format 2)"


def test_keys_of_a_later_version_are_no_harm(folder, base):
    rewrite(folder, lambda content: content.update(mood="sunny"))
    assert read_meta(folder).labels == ("neg", "pos")
    TextClassifier.load(folder, base=base)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "run/config.toml", "..", ".", "a/../b"])
def test_file_names_that_leave_the_folder(folder, base, name):
    (folder.parent / "secret").write_text("s", encoding="utf-8")
    rewrite(folder, lambda content: content["files"].update({name: "0" * 64}))
    assert refused(folder, base) == f"{folder / SIDE}: file name '{name}' leaves the folder"


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_side_file_without_a_hash_for_what_matters(folder, base, name):
    rewrite(folder, lambda content: content["files"].pop(name))
    assert refused(folder, base) == f"{folder / SIDE}: has no hash for {name}"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("labels", "neg,pos", "'labels' is missing or of the wrong type"),
        ("max_length", "32", "'max_length' is missing or of the wrong type"),
        ("base", None, "'base' is missing or of the wrong type"),
        ("golden", {}, "'golden' is missing or of the wrong type"),
    ],
)
def test_side_file_of_other_types(folder, base, key, value, said):
    rewrite(folder, lambda content: content.update({key: value}))
    assert refused(folder, base) == f"{folder / SIDE}: {said}"


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(labels=["a", "b", "c"]),
        lambda c: c.update(labels=[]),
        lambda c: c.update(problem_type="sorting"),
        lambda c: c.update(pooling="max"),
        lambda c: c.update(truncation="middle"),
        lambda c: c.update(temperature=0),
        lambda c: c.update(temperature=float("nan")),
        lambda c: c.update(max_length=-1),
        lambda c: c.update(max_length=True),
        lambda c: c.update(thresholds=[0.5]),
        lambda c: c.update(thresholds="high"),
        lambda c: c.update(base={}),
        lambda c: c.update(base=c["base"] | {"hash": None}),
        lambda c: c.update(base=c["base"] | {"hash": "sha256:0"}),
        lambda c: c.update(golden=[{"text": "ok"}]),
        lambda c: c.update(golden=["ok"]),
        lambda c: c.update(golden=[{"text": "ok", "text_pair": None, "logits": [1.0]}]),
        lambda c: c.update(golden=[{"text": "ok", "text_pair": None, "logits": ["x", "y"]}]),
        lambda c: c.update(golden=[{"text": "ok", "text_pair": None, "logits": [9.0, 9.0]}]),
        lambda c: c.update(files=c["files"] | {"tokenizer.json": 3}),
    ],
)
def test_side_file_made_to_mislead_is_refused_in_words(folder, base, edit):
    """With hashes that fit: still one error of ours, never a stray exception, and never an answer."""
    rewrite(folder, edit)
    with pytest.raises(TextloraError):
        TextClassifier.load(folder, base=base).predict(TEXTS)


def test_other_weights_of_the_same_shape(folder, base, tmp_path):
    other = make_tiny("bert", tmp_path / "other", seed=9)
    with pytest.raises(AdapterError) as caught:
        TextClassifier.load(
            folder, base=str(other), verify=False
        )  # the hash is no part of what may be skipped
    assert caught.value.message == f"{folder} was trained on another base than {other} (weights differ)"
    facts = inspect_folder(folder, str(other))
    assert facts["fits"] is False
    assert facts["fits_why"].startswith("names and shapes fit, but the weights differ: sha256:")


def test_one_base_weight_that_differs(folder, base, tmp_path):
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 5] += 1e-6
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterError, match="was trained on another base"):
        TextClassifier.load(folder, base=str(other))


def test_other_architecture(folder, tiny_base):
    for family in ("roberta", "distilbert", "electra", "modernbert"):
        with pytest.raises(AdapterError) as caught:
            TextClassifier.load(folder, base=str(tiny_base(family)))
        assert caught.value.message == f"{folder} was trained on a bert, {tiny_base(family)} is a {family}"


def test_tensor_that_is_not_finite(folder, base):
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.classifier.bias"][0] = float("nan")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / SIDE).unlink()
    with pytest.raises(
        AdapterError,
        match=r"tensor 'base_model\.model\.classifier\.bias' holds values that are not finite numbers",
    ):
        TextClassifier.load(folder, base=base, labels=["a", "b"])


def test_golden_examples_catch_what_hashes_cannot(folder, base):
    """A tokenizer swapped together with its hash, as another program's copy may do."""
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(text.replace('"the"', '"teh"'), encoding="utf-8")
    import hashlib

    digest = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    rewrite(folder, lambda content: content["files"].update({"tokenizer.json": digest}))
    with pytest.raises(
        AdapterError,
        match=r"golden example 1 gives logits that differ by 0\.\d+ from those stored with the adapter",
    ):
        TextClassifier.load(folder, base=base)
    TextClassifier.load(folder, base=base, verify=False)


def test_card_may_be_edited(folder, base):
    (folder / "README.md").write_text("my notes", encoding="utf-8")
    TextClassifier.load(folder, base=base)
    facts = inspect_folder(folder)
    assert facts["edited"] == ["README.md"]
    assert summary_lines(facts)[-1] == "changed since it was saved: README.md"
    (folder / "README.md").unlink()
    TextClassifier.load(folder, base=base)


# --- what is in a folder ---


def test_weights_are_the_same_bytes_whenever_they_are_saved(single, tmp_path):
    tensors = load_file(single.folder / WEIGHTS)
    for name in ("a", "b"):
        write_weights(
            tmp_path / name, json.loads((single.folder / CONFIG).read_text(encoding="utf-8")), tensors
        )
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (single.folder / WEIGHTS).read_bytes()


def test_two_runs_of_one_seed_give_one_folder(single, tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"))
    run_training(config)
    for name in (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (Path(config.output) / name).read_bytes() == (single.folder / name).read_bytes(), name
    ours, theirs = read_meta(Path(config.output)), read_meta(single.folder)
    assert ours.files == theirs.files
    assert ours.golden == theirs.golden
    assert ours.scores == theirs.scores
    run_training(settings(tmp_path / "other", tiny_base("bert"), seed=7))
    assert (tmp_path / "other" / "out" / WEIGHTS).read_bytes() != (single.folder / WEIGHTS).read_bytes()


def test_no_local_path_in_what_is_passed_on(single, tiny_base):
    tensors = (single.folder / WEIGHTS).read_bytes()
    for name in (SIDE, CONFIG, "README.md", "tokenizer.json", "tokenizer_config.json"):
        text = (single.folder / name).read_text(encoding="utf-8")
        assert str(tiny_base("bert")) not in text, name
        assert str(single.folder.parent) not in text, name
    assert str(tiny_base("bert")).encode() not in tensors
    assert json.loads((single.folder / CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"] is None
    assert read_meta(single.folder).base["id"] is None


def test_base_of_a_local_run_is_found_again_or_asked_for(single, folder):
    assert TextClassifier.load(single.folder).meta.labels == ("neg", "pos")
    with pytest.raises(AdapterError) as caught:
        TextClassifier.load(folder)
    assert (
        str(caught.value)
        == f"{folder} names no base model (it was trained on a local folder); pass that folder as --model"
    )
    with pytest.raises(ModelError, match="no such folder"):
        TextClassifier.load(folder, base="/nowhere/at/all")


def test_no_pickle_is_written_or_read(single, monkeypatch):
    for path in single.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert data[:1] != b"\x80"
            assert data[:2] != b"PK"
            assert (
                path.suffix in (".json", ".md", ".safetensors", ".toml", ".jsonl", ".html")
                or path.name == ".lock"
            ), path.name

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was opened")

    for owner, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, name, never)
    assert TextClassifier.load(single.folder, base=single.config.model).verify() < 1e-6


def test_side_file_says_what_the_run_was(single):
    meta = read_meta(single.folder)
    assert (meta.labels, meta.problem_type, meta.pairs, meta.pooling) == (
        ("neg", "pos"),
        "single_label_classification",
        False,
        "first",
    )
    assert (meta.max_length, meta.truncation, meta.thresholds) == (32, "head", None)
    assert meta.base["model_type"] == "bert"
    assert meta.scores == {split: single.result[split] for split in ("validation", "test")}
    assert meta.training["rows"] == {"train": 40, "validation": 16, "test": 16}
    assert meta.training["settings"]["r"] == 4


def test_peft_config_says_what_was_trained(single):
    config = json.loads((single.folder / CONFIG).read_text(encoding="utf-8"))
    names = [f"bert.encoder.layer.{i}.attention.self.{slot}" for i in (0, 1) for slot in ("query", "value")]
    assert config["target_modules"] == names
    assert (config["r"], config["lora_alpha"], config["modules_to_save"], config["task_type"]) == (
        4,
        16,
        ["classifier"],
        "SEQ_CLS",
    )
    tensors = load_file(single.folder / WEIGHTS)
    ab = [f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB"]
    assert sorted(tensors) == sorted(
        [*ab, "base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    )


# --- mean pooling ---


def test_mean_pooling_is_ours_alone(tiny_base, tmp_path_factory):
    run = trained(tiny_base, tmp_path_factory, pooling="mean")
    with pytest.raises((KeyError, ValueError)):
        PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(tiny_base("bert"), num_labels=2), run.folder
        )
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    reference = ReferenceModel.from_adapter(run.folder, tiny_base("bert"), 2, pooling="mean")
    from textlora.inference.classifier import encoded_logits

    assert close(classifier.logits(TEXTS), encoded_logits(reference, classifier.tokenizer.encode(TEXTS)))
    assert "With PEFT and torch alone" in (run.folder / "README.md").read_text(encoding="utf-8")


# --- relabel ---


def test_relabel_renames_and_changes_nothing_else(folder, base):
    before, kept = TextClassifier.load(folder, base=base).predict(TEXTS), snapshot(folder)
    relabel_folder(folder, ("neg=negative", "pos=very good"))
    after = TextClassifier.load(folder, base=base).predict(TEXTS)
    names = {"neg": "negative", "pos": "very good"}
    assert [p.label for p in after] == [names[p.label] for p in before]
    assert [p.logits for p in after] == [p.logits for p in before]
    changed = [name for name, data in snapshot(folder).items() if kept[name] != data]
    assert changed == ["README.md", SIDE]
    assert "`negative`, `very good`" in (folder / "README.md").read_text(encoding="utf-8")
    assert inspect_folder(folder)["edited"] == []


def test_relabel_can_swap_two_names(folder, base):
    before = TextClassifier.load(folder, base=base).predict(TEXTS)
    relabel_folder(folder, ("neg=pos", "pos=neg"))
    assert read_meta(folder).labels == ("pos", "neg")
    swapped = {"neg": "pos", "pos": "neg"}
    assert [p.label for p in TextClassifier.load(folder, base=base).predict(TEXTS)] == [
        swapped[p.label] for p in before
    ]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("meh=fine",), "--relabel meh=fine: not old=new with a known label; labels are: neg, pos"),
        (("neg",), "--relabel neg: not old=new with a known label; labels are: neg, pos"),
        (("neg=",), "--relabel neg=: not old=new with a known label; labels are: neg, pos"),
        (("neg=pos",), "--relabel: two labels would have one name"),
    ],
)
def test_relabel_refuses(folder, changes, said):
    kept = snapshot(folder)
    with pytest.raises(UsageError) as caught:
        relabel_folder(folder, changes)
    assert str(caught.value) == said
    assert snapshot(folder) == kept


def test_relabel_on_the_command_line(folder, base, capfd):
    cli = Cli(capfd)
    code, out, err = cli("inspect", folder, "--relabel", "neg=no,pos=yes", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["labels"] == ["no", "yes"]
    kept = snapshot(folder)
    assert (
        cli.fails("inspect", folder, "--relabel", "neg=no")
        == "--relabel neg=no: not old=new with a known label; labels are: no, yes"
    )
    assert snapshot(folder) == kept

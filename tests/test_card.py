"""The code in the card of an adapter folder, run as it stands there: `predict`'s scores without textlora."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SLOW
from support import trained
from test_merge import TEXTS, make_adapter
from test_pooled import TASKS, by_predict, with_temperature
from transformers import AutoTokenizer

from textlora import TextClassifier
from textlora.adapters.card import model_card, pushed_card, relabelled
from textlora.adapters.folder import lora_config, read_adapter
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL

SCORES = {SINGLE_LABEL: lambda x: x.softmax(1), MULTI_LABEL: torch.sigmoid, REGRESSION: lambda x: x}


def blocks(card: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def loader(card: str, folder: Path, base: Path) -> str:
    """The block for PEFT, with the two paths that the card leaves open."""
    (block,) = (block for block in blocks(card) if "peft" in block)
    assert "textlora" not in block.replace("textlora.json", "")
    return block.replace("path/to/this/folder", str(folder)).replace("path/to/the/base/model", str(base))


def run_mean(block: str, texts: list[str], pairs: list[str] | None = None) -> dict[str, object]:
    """Run it on these texts in place of its own; the names it leaves behind."""
    given, count = repr(texts) + (f", {pairs!r}" if pairs else ""), block.count("tokenizer([")
    block = re.sub(r'tokenizer\(\["a text"\](, \["its pair"\])?', lambda _: f"tokenizer({given}", block)
    assert count == 1
    names: dict[str, object] = {}
    exec(block, names)
    return names


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", *SLOW])
@pytest.mark.parametrize(("kind", "labels", "pairs"), TASKS)
def test_mean_pooling_with_peft_and_torch_alone(kind, labels, pairs, family, tiny_base, tmp_path, capsys):
    base, folder, seconds = tiny_base(family), tmp_path / "a", TEXTS[::-1] if pairs else None
    settings = (
        {"use_dora": True, "use_rslora": True, "target_modules": ("all-linear",), "lora_dropout": 0.1}
        if pairs
        else {}
    )
    classifier = make_adapter(folder, base, pooling="mean", kind=kind, labels=labels, pairs=pairs, **settings)
    names = run_mean(loader((folder / "README.md").read_text(encoding="utf-8"), folder, base), TEXTS, seconds)
    assert np.abs(names["logits"].numpy() - classifier.logits(TEXTS, seconds)).max() <= 1e-5
    said = capsys.readouterr().out
    shown = json.loads("[" + said.replace("'", '"').replace("] [[", "], [[").strip() + "]")
    assert shown[0] == list(labels)
    assert np.abs(np.array(shown[1]) - by_predict(classifier, seconds)).max() <= 1e-5


def test_the_loader_is_short(tiny_base, tmp_path):
    base = tiny_base("bert")
    make_adapter(tmp_path / "a", base, pooling="mean")
    lines = loader((tmp_path / "a" / "README.md").read_text(encoding="utf-8"), tmp_path, base).splitlines()
    assert len([line for line in lines if line and not line.startswith(("import", "from", "folder"))]) <= 14


@pytest.mark.parametrize("task", ["single", "multi", "pairs"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_cards_of_trained_adapters(task, pooling, tiny_base, tmp_path_factory):
    run = trained(tiny_base, tmp_path_factory, task=task, pooling=pooling)
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    seconds = TEXTS[::-1] if task == "pairs" else None
    block = loader((run.folder / "README.md").read_text(encoding="utf-8"), run.folder, Path(run.config.model))
    if pooling == "mean":
        logits = run_mean(block, TEXTS, seconds)["logits"]
    else:
        names: dict[str, object] = {}
        exec(block, names)
        batch = AutoTokenizer.from_pretrained(run.folder)(
            TEXTS, seconds, padding=True, truncation=True, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = names["model"](**batch).logits / classifier.meta.temperature
    assert (
        np.abs(SCORES[classifier.meta.problem_type](logits).numpy() - by_predict(classifier, seconds)).max()
        <= 1e-5
    )


def card_of(folder: Path) -> str:
    read = read_adapter(folder)
    return model_card(read.meta, lora_config(read), "AutoModelForSequenceClassification", "", {}, "a")


def test_a_temperature_that_readers_apply_is_in_the_loader(tiny_base, tmp_path):
    base = tiny_base("bert")
    make_adapter(tmp_path / "a", base, pooling="mean")
    classifier = with_temperature(tmp_path / "a", base, temperature=0.37)
    logits = run_mean(loader(card_of(tmp_path / "a"), tmp_path / "a", base), TEXTS)["logits"]
    assert np.abs(logits.softmax(1).numpy() - by_predict(classifier)).max() <= 1e-5


@pytest.mark.parametrize("truncation", ["head", "tail", "head-tail"])
def test_long_texts(truncation, tiny_base, tmp_path):
    base = tiny_base("bert")
    classifier = make_adapter(tmp_path / "a", base, pooling="mean", truncation=truncation, max_length=20)
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    logits = run_mean(loader(card, tmp_path / "a", base), TEXTS)["logits"]
    apart = np.abs(logits.numpy() - classifier.logits(TEXTS)).max(axis=1)
    assert apart[[0, 1, 2, 4]].max() <= 1e-5
    assert (apart[3] > 1e-3) == (truncation == "head-tail") == ("has no head-tail truncation" in card)


def test_renamed_labels_are_the_loaders(tiny_base, tmp_path, cli):
    base = tiny_base("bert")
    make_adapter(tmp_path / "a", base, pooling="mean")
    assert cli("inspect", tmp_path / "a", "--relabel", "neg=down")[0] == 0
    card = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "`down`" in card
    assert "neg" not in relabelled(card, ["neg"], ["down"]).split("## Use")[0].replace("negative", "")
    assert run_mean(loader(card, tmp_path / "a", base), TEXTS)["labels"] == ["down", "neutral", "pos"]


def test_on_the_hub_the_files_are_fetched(tiny_base, tmp_path, monkeypatch):
    base, folder = tiny_base("bert"), tmp_path / "a"
    classifier = make_adapter(folder, base, pooling="mean")
    read = read_adapter(folder)
    block = loader(pushed_card(folder / "README.md", read.meta, lora_config(read), "me/mine"), folder, base)
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: asked.append(name) or str(folder))
    logits = run_mean(block, TEXTS)["logits"]
    assert asked == ["me/mine"]
    assert np.abs(logits.numpy() - classifier.logits(TEXTS)).max() <= 1e-5

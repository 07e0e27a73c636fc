"""Merging: the written folder against transformers + peft, against the unmerged adapter, and what is refused."""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import FAST, SLOW, random_adapter
from safetensors.torch import load_file, save_file
from support import WEIGHTS, single_rows, snapshot, write_csv
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from textlora import TextClassifier
from textlora.adapters.folder import AdapterMeta
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LoraConfig
from textlora.core.errors import VerificationError
from textlora.data.tokenize import TextTokenizer, load_tokenizer
from textlora.model.base import find_base
from textlora.model.interface import Model
from textlora.model.open import open_model
from textlora.transform import fresh_process, merge, transformers_names
from textlora.transform.extract import base_facts, write_adapter

TEXTS = [
    "the plot was great",
    "dull and boring film",
    "it",
    "the actor said good story and then it was slow " * 3,
    "1, 2 and 3!",
]
LABELS = ("neg", "neutral", "pos")
ALL_DORA = {"use_dora": True, "use_rslora": True, "target_modules": ("all-linear",)}


def make_adapter(
    folder: Path, base: Path, *, labels: Sequence[str] = LABELS, seed: int = 0, pooling: str = "first", max_length: int = 32,
    truncation: str = "head", kind: str = SINGLE_LABEL, pairs: bool = False, edit: Callable[[Model], None] | None = None,
    thresholds: tuple[float, ...] | None = None, **lora: Any,
) -> TextClassifier:  # fmt: skip
    """A random adapter, saved with golden examples by transformers + peft, and loaded again."""
    files = find_base(str(base))
    model, _ = open_model(files, LoraConfig(**({"r": 4} | lora)), len(labels), pooling=pooling)
    random_adapter(model, seed)
    if edit:
        with torch.no_grad():
            edit(model)
    tokenizer = TextTokenizer(
        load_tokenizer(base, files.config["model_type"]), min(max_length, model.max_length), truncation
    )
    meta = AdapterMeta(
        labels=tuple(labels), problem_type=kind, pairs=pairs, pooling=pooling, max_length=tokenizer.max_length, truncation=truncation,
        base=base_facts(files, model), thresholds=thresholds, textlora_version="test",
    )  # fmt: skip
    folder.mkdir(parents=True)
    return write_adapter(folder, folder.name, model, files, meta, tokenizer, base, "Random.")


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-5) -> bool:
    return bool((np.abs(ours - theirs) <= tolerance * np.maximum(1, np.abs(theirs))).all())


def transformers_logits(
    folder: Path, texts: Sequence[str], pairs: Sequence[str | None] | None = None
) -> np.ndarray:
    """(N, C) of a plain transformers folder, float32, one text at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        given = [
            tokenizer(text, None if pairs is None else pairs[i], truncation=True, return_tensors="pt")
            for i, text in enumerate(texts)
        ]
        return np.stack([model(**inputs).logits[0].numpy() for inputs in given])


def pefts_merge(adapter: Path, base: Path, labels: int = 3) -> torch.nn.Module:
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels)
    return peft.PeftModel.from_pretrained(net, adapter).merge_and_unload().eval()


def merged(
    classifier: TextClassifier,
    base: Path,
    adapter: Path,
    output: Path,
    dtype: str = "float32",
    rows: Sequence[Any] = (),
) -> dict[str, Any]:
    return merge.merge(classifier, find_base(str(base)), adapter, output, dtype, rows)


# --- the written folder is right ---


@pytest.mark.parametrize("settings", [{}, ALL_DORA], ids=["default", "dora"])
@pytest.mark.parametrize("family", FAST + SLOW)
def test_merged_equals_unmerged_and_peft(family, settings, tiny_base, tmp_path, near):
    base, adapter, output = tiny_base(family), tmp_path / "a", tmp_path / "m"
    before = snapshot(base)
    classifier = make_adapter(adapter, base, **settings)
    result = merged(classifier, base, adapter, output, rows=[(text, None) for text in TEXTS])
    assert (result["rows"], result["left_out"], result["layers"]) == (
        13,
        0,
        len(classifier.model.target_modules),
    )
    assert result["difference"] <= 1e-5 * max(1, result["largest_logit"])
    assert snapshot(base) == before

    unmerged = classifier.logits(TEXTS)
    assert close(transformers_logits(output, TEXTS), unmerged)
    theirs = dict(pefts_merge(adapter, base).named_parameters())
    net, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = dict(net.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    assert not close(
        np.stack(
            [
                plain(torch.from_numpy(classifier.tokenizer.encode([t])[0].ids[None])).logits[0].detach()
                for t in TEXTS
            ]
        ),
        unmerged,
        1e-2,
    )


@pytest.mark.parametrize("family", FAST + SLOW)
def test_config_keeps_the_bases_keys(family, tiny_base, tmp_path, near):
    base, adapter, output = tiny_base(family), tmp_path / "a", tmp_path / "m"
    merged(make_adapter(adapter, base), base, adapter, output)
    old, new = (json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (base, output))
    changed = {
        "architectures",
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "dtype",
        "torch_dtype",
        "textlora",
    }
    assert {key: value for key, value in old.items() if key not in changed} == {
        key: value for key, value in new.items() if key not in changed
    }
    assert new["id2label"] == {"0": "neg", "1": "neutral", "2": "pos"}
    assert new["label2id"] == {"neg": 0, "neutral": 1, "pos": 2}
    assert (new["num_labels"], new["problem_type"], new["dtype"]) == (3, SINGLE_LABEL, "float32")
    assert new["architectures"] == [type(AutoModelForSequenceClassification.from_pretrained(output)).__name__]
    files = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {path.name for path in output.iterdir()} == files
    assert len({path.stat().st_mode for path in output.iterdir()}) == 1


def test_the_command_in_a_fresh_process(tiny_base, tmp_path, cli, monkeypatch):
    """The real thing: a process that has no textlora, numbers before "saved", and a folder that pipeline
    takes."""
    said = []

    def listen(*arguments: Any, **options: Any) -> Any:
        done = subprocess.run(*arguments, **options)
        said.append(json.loads(done.stdout.splitlines()[-1]))
        return done

    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(run=listen))
    base, adapter, output = tiny_base("bert"), tmp_path / "a", tmp_path / "new" / "m"
    classifier = make_adapter(adapter, base, target_modules=("all-linear",))
    data = write_csv(tmp_path / "texts.csv", [[text] for text in TEXTS], ["text"])
    code, out, err = cli(
        "merge",
        adapter,
        "--model",
        base,
        "--output",
        output,
        "--data",
        data,
        "--limit-eval",
        3,
        "--device",
        "cpu",
    )
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "12 layers and the head merged into a copy of the base, in float32"
    assert lines[1].startswith(
        "largest logit difference on 11 rows, from the written files in a fresh process: "
    )
    assert float(lines[1].rpartition(" ")[2]) < 1e-5
    assert lines[3].startswith("largest score difference from predict: ")
    assert float(lines[3].rpartition(" ")[2]) < 1e-5
    assert lines[-1] == f"saved to {output}"
    assert list(output.parent.iterdir()) == [output]
    assert "textlora" not in said[0]["imported"]
    assert {"torch", "transformers", "tokenizers", "safetensors"} <= set(said[0]["imported"])
    answers = pipeline("text-classification", model=str(output), truncation=True, top_k=None)(TEXTS)
    for answer, prediction in zip(answers, classifier.predict(TEXTS), strict=True):
        assert answer[0]["label"] == prediction.label
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(prediction.scores, abs=1e-5)


def test_textlora_in_the_process_is_refused(tiny_base, tmp_path, monkeypatch):
    base, adapter = tiny_base("bert"), tmp_path / "a"
    said = {
        "logits": {"as_loaded": [[0.0]]},
        "scores": [[1.0]],
        "inputs": [],
        "labels": [],
        "strange": [],
        "imported": ["textlora", "torch"],
    }
    monkeypatch.setattr(
        fresh_process,
        "subprocess",
        SimpleNamespace(run=lambda *_, **__: SimpleNamespace(stdout=json.dumps(said))),
    )
    with pytest.raises(VerificationError, match="was loaded with textlora's help"):
        merged(make_adapter(adapter, base), base, adapter, tmp_path / "m")
    assert sorted(tmp_path.iterdir()) == [adapter]


# --- rounding ---


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("settings", [{}, ALL_DORA], ids=["lora", "dora"])
def test_half_precision_is_the_exact_merge_rounded_once(dtype, settings, tiny_base, tmp_path, near):
    base, adapter, output = tiny_base("bert"), tmp_path / "a", tmp_path / "m"
    classifier = make_adapter(adapter, base, **settings)
    result = merged(classifier, base, adapter, output, dtype, [(text, None) for text in TEXTS])
    kind, eps = getattr(torch, dtype), torch.finfo(getattr(torch, dtype)).eps
    written = load_file(output / "model.safetensors")
    exact = dict(pefts_merge(adapter, base).double().named_parameters())
    assert {tensor.dtype for tensor in written.values()} == {kind}
    for name, tensor in written.items():  # peft merges in float32, so by a last float32 digit off a tie
        assert (
            (tensor.double() - exact[name]).abs() <= eps / 2 * exact[name].abs() * (1 + 1e-3) + 1e-7
        ).all(), name
    assert result["difference"] == pytest.approx(result["rounding"], abs=1e-5)
    assert result["difference"] > 1e-5
    twice = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=3, dtype=kind
    )  # what peft does to a base in half precision
    twice = peft.PeftModel.from_pretrained(twice, adapter).merge_and_unload().float()
    by_name = dict(twice.named_parameters())
    norm = lambda tensors: sum(
        float((tensors[name].double() - exact[name]).square().sum()) for name in written
    )
    assert norm(written) < norm(by_name)
    net = AutoModelForSequenceClassification.from_pretrained(output)
    assert net.dtype == kind
    assert close(transformers_logits(output, TEXTS), classifier.logits(TEXTS), result["difference"] + 1e-6)


def test_command_reports_rounding(tiny_base, tmp_path, cli, near):
    base, adapter = tiny_base("bert"), tmp_path / "a"
    make_adapter(adapter, base)
    code, out, err = cli("merge", adapter, "--model", base, "--output", tmp_path / "m", "--dtype", "bfloat16")
    assert (code, err) == (0, "")
    assert "rounding the exact merge once makes " in out
    assert "computed in bfloat16 too, " in out


def test_values_beyond_float16_are_refused(tiny_base, tmp_path, cli):
    base, adapter = tiny_base("bert"), tmp_path / "a"

    def enlarge(model: Model) -> None:
        model.trainable()["base_model.model.classifier.weight"][0, 0] = 1e5

    make_adapter(adapter, base, edit=enlarge)
    said = cli.fails(
        "merge", adapter, "--model", base, "--output", tmp_path / "m", "--dtype", "float16", output=tmp_path
    )
    assert (
        said
        == "--dtype float16: tensor 'classifier.weight' holds 1e+05, which does not fit; choose bfloat16 or float32"
    )


# --- tasks, tokens, adapters of other makes ---


@pytest.mark.parametrize(
    ("kind", "labels", "pairs"),
    [
        (MULTI_LABEL, ("warm", "long", "praise"), False),
        (REGRESSION, ("value",), False),
        (SINGLE_LABEL, ("no", "yes"), True),
    ],
    ids=["multi-label", "regression", "pairs"],
)
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_pipeline_does_the_task(kind, labels, pairs, family, tiny_base, tmp_path, near):
    base, adapter, output = tiny_base(family), tmp_path / "a", tmp_path / "m"
    thresholds = (0.5, 0.25, 0.75) if kind == MULTI_LABEL else None
    classifier = make_adapter(adapter, base, labels=labels, kind=kind, pairs=pairs, thresholds=thresholds)
    merged(classifier, base, adapter, output)
    seconds = TEXTS[::-1] if pairs else None
    rows = [{"text": a, "text_pair": b} for a, b in zip(TEXTS, TEXTS[::-1], strict=True)] if pairs else TEXTS
    answers = pipeline("text-classification", model=str(output), truncation=True, top_k=None)(rows)
    for answer, prediction in zip(answers, classifier.predict(TEXTS, seconds), strict=True):
        expected = prediction.scores if kind != REGRESSION else {"value": prediction.score}
        assert {a["label"]: a["score"] for a in answer} == pytest.approx(expected, abs=1e-5)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert ("reaches its threshold: warm 0.500, long 0.250, praise 0.750." in card) == (kind == MULTI_LABEL)


@pytest.mark.parametrize(("truncation", "side"), [("head", "Right"), ("tail", "Left")])
def test_long_texts_are_cut_as_the_adapter_cuts(truncation, side, tiny_base, tmp_path, near):
    """Also where the base's own tokenizer.json pads and truncates to something else, as all-MiniLM-L6-v2's
    does."""
    base = Path(shutil.copytree(tiny_base("bert"), tmp_path / "base"))
    adapter = tmp_path / "a"
    output = tmp_path / "m"
    content = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 12, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    (base / "tokenizer.json").write_text(
        json.dumps(content | {"padding": content["padding"] | {"pad_token": "[PAD]"}}), encoding="utf-8"
    )
    classifier = make_adapter(adapter, base, truncation=truncation, max_length=20)
    result = merged(classifier, base, adapter, output, rows=[(text, None) for text in TEXTS])
    assert (result["rows"], result["left_out"]) == (13, 0)
    written = json.loads((output / "tokenizer.json").read_text(encoding="utf-8"))
    assert written["padding"] is None
    assert written["truncation"] == {
        "direction": side,
        "max_length": 20,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert (tokenizer.model_max_length, tokenizer.truncation_side) == (20, side.lower())
    assert len(tokenizer(TEXTS[3])["input_ids"]) > 20
    logits = pipeline(
        "text-classification", model=str(output), truncation=True, top_k=None, function_to_apply="none"
    )(TEXTS)
    assert close(
        np.array([[{a["label"]: a["score"] for a in row}[label] for label in LABELS] for row in logits]),
        classifier.logits(TEXTS),
    )


def test_head_tail_rows_are_left_out_and_counted(tiny_base, tmp_path, cli, near):
    base, adapter, output = tiny_base("bert"), tmp_path / "a", tmp_path / "m"
    classifier = make_adapter(adapter, base, truncation="head-tail", max_length=20)
    longer = sum(
        e.full > 20 for e in classifier.tokenizer.encode([row["text"] for row in classifier.meta.golden])
    )
    code, out, _ = cli("merge", adapter, "--model", base, "--output", output, "--json")
    assert code == 0
    assert (json.loads(out)["rows"], json.loads(out)["left_out"]) == (8 - longer, longer)
    assert longer > 0
    assert "head-tail" in (output / "README.md").read_text(encoding="utf-8")


PATTERNS = {
    "rank_pattern": {"layer.0.*": 2, "value.*": 6},
    "alpha_pattern": {"query.*": 3},
    "use_rslora": True,
}
POOLER = {"target_modules": ["query", "value", "pooler.dense"], "use_dora": True}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        (family, changes)
        for family in ("bert", "deberta-v2")
        for changes in (PATTERNS, {"bias": "all"}, {"bias": "lora_only"})
    ]
    + [("bert", POOLER)],
)
def test_adapters_of_peft(family, changes, tiny_base, tmp_path, cli, near):
    """Ranks per layer, LoRA on the pooler, trained biases: what PEFT saved is what is merged."""
    base, adapter, output = tiny_base(family), tmp_path / "a", tmp_path / "m"
    targets = ["query_proj", "value_proj"] if family == "deberta-v2" else ["query", "value"]
    whole = ["classifier"]
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    if family == "deberta-v2":  # its base has no pooler
        whole.append("pooler")
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "modules_to_save": whole} | changes
    model = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", **config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(adapter)
    code, out, err = cli(
        "merge",
        adapter,
        "--model",
        base,
        "--labels",
        "no,yes",
        "--output",
        output,
        "--data",
        golden_file(tmp_path),
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["rows"] == 5
    theirs = model.eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    with torch.inference_mode():
        expected = np.stack(
            [
                theirs(**tokenizer(text, return_tensors="pt", truncation=True)).logits[0].numpy()
                for text in TEXTS
            ]
        )
    assert close(transformers_logits(output, TEXTS), expected)


def golden_file(folder: Path) -> Path:
    return write_csv(folder / "rows.csv", [[text] for text in TEXTS], ["text"])


def test_plain_peft_folder_needs_rows(tiny_base, tmp_path, cli):
    base, adapter = tiny_base("bert"), tmp_path / "a"
    make_adapter(adapter, base)
    (adapter / "textlora.json").unlink()
    said = cli.fails(
        "merge", adapter, "--model", base, "--labels", "a,b,c", "--output", tmp_path / "m", output=tmp_path
    )
    assert (
        said
        == "this adapter carries no golden examples, so there is nothing to compare on; give rows with --data"
    )


# --- refused, and nothing left behind ---


@pytest.fixture
def adapter(tiny_base, tmp_path) -> Path:
    make_adapter(tmp_path / "a", tiny_base("bert"))
    return tmp_path / "a"


def test_output_in_use_is_refused(adapter, tiny_base, tmp_path, cli):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("x")
    for output in (tmp_path / "m", tmp_path / "m" / "mine.txt", adapter):
        said = cli.fails("merge", adapter, "--model", tiny_base("bert"), "--output", output, output=tmp_path)
        assert said == f"{output} exists and is not an empty folder; choose another --output"


def test_an_empty_folder_is_taken(adapter, tiny_base, tmp_path, cli, near):
    (tmp_path / "m").mkdir()
    assert cli("merge", adapter, "--model", tiny_base("bert"), "--output", tmp_path / "m")[0] == 0
    assert (tmp_path / "m" / "model.safetensors").is_file()


def test_bad_rows_adapter_and_base_are_refused(adapter, tiny_base, tmp_path, cli):
    base, output = tiny_base("bert"), tmp_path / "m"
    assert "no such" in cli.fails("merge", tmp_path / "none", "--output", output, output=tmp_path)
    assert "no such" in cli.fails(
        "merge",
        adapter,
        "--model",
        base,
        "--output",
        output,
        "--data",
        tmp_path / "none.csv",
        output=tmp_path,
    )
    blank = write_csv(tmp_path / "blank.csv", [["fine"], [" "]], ["text"])
    assert "empty text" in cli.fails(
        "merge", adapter, "--model", base, "--output", output, "--data", blank, output=tmp_path
    )
    paired = write_csv(tmp_path / "pairs.csv", [["a", "b"]], ["text", "text_pair"])
    assert "got pairs" in cli.fails(
        "merge", adapter, "--model", base, "--output", output, "--data", paired, output=tmp_path
    )
    said = cli.fails(
        "merge", adapter, "--model", tiny_base("bert-no-pooler"), "--output", output, output=tmp_path
    )
    assert "another base" in said
    tensors = load_file(adapter / WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, adapter / WEIGHTS, {"format": "pt"})
    assert "was changed after it was saved" in cli.fails(
        "merge", adapter, "--model", base, "--output", output, output=tmp_path
    )


@pytest.mark.parametrize("damage", ["changed", "missing", "renamed", "tokenizer", "labels"])
def test_a_written_folder_that_answers_otherwise_is_refused(
    damage, adapter, tiny_base, tmp_path, cli, near, monkeypatch
):
    """Whatever goes wrong between memory and disk, the proof sees it: exit code 1, no folder."""
    real = merge.ask_fresh

    def spoil(folder: Path, rows: Sequence[Any], kind: str) -> Any:
        tensors = load_file(folder / "model.safetensors")
        name = "bert.encoder.layer.1.output.dense.weight"
        if damage == "changed":
            tensors[name] = tensors[name] * 1.01
        elif damage == "missing":
            del tensors[name]
        elif damage == "renamed":
            tensors["bert.more.weight"] = tensors[name].clone()
        elif damage == "labels":
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            (folder / "config.json").write_text(
                json.dumps(config | {"id2label": {"0": "pos", "1": "neutral", "2": "neg"}}), encoding="utf-8"
            )
        else:
            content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
            content["normalizer"] = None
            (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return real(folder, rows, kind)

    monkeypatch.setattr(merge, "ask_fresh", spoil)
    said = cli.fails(
        "merge", adapter, "--model", tiny_base("bert"), "--output", tmp_path / "m", code=1, output=tmp_path
    )
    expected = {
        "changed": "more than rounding explains",
        "tokenizer": "tokenizer gives other tokens",
        "labels": "names other labels",
    }
    assert expected.get(damage, "transformers makes up, drops or cannot fit tensor") in said


def test_a_process_that_fails_or_is_interrupted_leaves_nothing(
    adapter, tiny_base, tmp_path, cli, monkeypatch
):
    arguments = ("merge", adapter, "--model", tiny_base("bert"), "--output", tmp_path / "new" / "m")
    dead = SimpleNamespace(stdout="", stderr="Killed\n", returncode=-9)
    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(run=lambda *_, **__: dead))
    assert "does not load in transformers (Killed)" in cli.fails(*arguments, code=1, output=tmp_path)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(run=stop))
    code, out, err = cli(*arguments)
    assert (code, out, err.strip()) == (130, "", "textlora: interrupted")
    assert sorted(tmp_path.iterdir()) == [adapter]


def test_a_full_disk_leaves_nothing(adapter, tiny_base, tmp_path, cli, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise transformers_names.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(torch.nn.Module, "save_pretrained", full, raising=False)
    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    said = cli.fails(
        "merge", adapter, "--model", tiny_base("bert"), "--output", tmp_path / "m", output=tmp_path
    )
    assert "No space left on device" in said
    assert "free some space" in said


def test_single_rows_are_labelled_data_too(adapter, tiny_base, tmp_path, cli, near):
    data = write_csv(tmp_path / "rows.csv", single_rows(12))
    code, out, _ = cli(
        "merge", adapter, "--model", tiny_base("bert"), "--output", tmp_path / "m", "--data", data, "--json"
    )
    assert code == 0
    result = json.loads(out)
    facts = {"output", "dtype", "pooling", "layers", "rows", "left_out", "largest_logit"}
    assert set(result) == facts | {"difference", "rounding", "as_loaded", "score_difference"}
    assert result["score_difference"] <= 1e-5
    assert result["rows"] == 20

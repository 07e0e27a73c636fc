"""ONNX files answer as the packed model does: merged, in int8, and one graph for any adapter; and what is
refused leaves nothing."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import FAST, make_tiny, random_adapter
from support import Cli, single_rows, snapshot, trained, write_csv
from transformers import AutoConfig, AutoTokenizer

from textlora import TextClassifier
from textlora.adapters.folder import AdapterMeta, peft_config, write_side_file, write_weights
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LoraConfig
from textlora.core.errors import UsageError, VerificationError
from textlora.data.tokenize import TextTokenizer, load_tokenizer
from textlora.metrics.calibration import decide, probabilities
from textlora.metrics.scores import evaluate
from textlora.model.base import find_base
from textlora.model.open import open_model
from textlora.transform.onnx import (
    adapter_inputs,
    adapters,
    export_adapter,
    export_base,
    export_classifier,
    merged,
    session,
)

TEXTS = [
    "the plot was great",
    "it",
    "dull and boring film",
    "the actor said good story and then it was slow " * 5,
    "1, 2 and 3!",
    "red blue door water",
]
PAIRS = ["good film", "the story was fun and the actor great", "no", "it was", "a train " * 30, "?"]
ALL_LINEAR = {"target_modules": ("all-linear",)}


def make(
    base: Path, labels: int = 3, *, seed: int = 0, kind: str = SINGLE_LABEL, pooling: str = "first", pairs: bool = False, truncation: str = "head",
    r: int = 4, **lora: Any,
) -> TextClassifier:  # fmt: skip
    """A classifier with every tensor of its adapter drawn at random."""
    files = find_base(str(base))
    model, _ = open_model(files, LoraConfig(r=r, **lora), labels, pooling=pooling)
    random_adapter(model, seed)
    model.load_trainable(
        model.trainable()
    )  # tensors of the base that the adapter has its own of take their places
    tokenizer = TextTokenizer(load_tokenizer(base, files.config["model_type"]), model.max_length, truncation)
    meta = AdapterMeta(
        labels=tuple(f"label {i}" for i in range(labels)), problem_type=kind, pairs=pairs, pooling=pooling, max_length=tokenizer.max_length,
        truncation=truncation, base={"id": None, "revision": None, "model_type": files.config["model_type"], "hash": model.base_hash()},
        textlora_version="test",
    )  # fmt: skip
    return TextClassifier(model, tokenizer, meta)


def save(classifier: TextClassifier, folder: Path) -> Path:
    folder.mkdir(parents=True)
    model = classifier.model
    write_weights(
        folder,
        peft_config(model.lora, model.target_modules, model.modules_to_save, model.pooling, None, None),
        model.trainable(),
    )
    write_side_file(folder, classifier.meta)
    return folder


def open_file(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(str(path), options)


def tokenized(
    folder: Path, texts: Sequence[str], pairs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """What somebody without textlora feeds: the folder's own tokenizer by transformers, one padded batch."""
    return dict(
        AutoTokenizer.from_pretrained(folder)(
            list(texts), pairs and list(pairs), padding=True, truncation=True, return_tensors="np"
        )
    )


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool(
        (np.abs(found - expected) <= tolerance * np.maximum(1, np.abs(expected))).all()
    )


def run(
    session: ort.InferenceSession, feed: Mapping[str, np.ndarray], options: ort.RunOptions | None = None
) -> np.ndarray:
    return session.run(["logits"], dict(feed), options)[0]


# --- the merged classifier ---

VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": ALL_LINEAR,
    "dora": ALL_LINEAR | {"use_dora": True, "use_rslora": True},
    "mean": {"pooling": "mean"},
    "own-biases": {"bias": "all", "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 3.0}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAST)
def test_merged_file_with_its_own_tokenizer_answers_as_the_packed_model(tiny_base, tmp_path, family, variant):
    base, out = tiny_base(family), tmp_path / "out"
    classifier = make(base, **VARIANTS[variant])
    result = export_classifier(classifier, find_base(str(base)), out)
    opened, expected = open_file(out / "model.onnx"), classifier.logits(TEXTS)
    assert result["golden"] < 1e-5
    assert np.abs(expected).max() > 0.1
    assert close(run(opened, tokenized(out, TEXTS)), expected)
    assert all(
        close(run(opened, tokenized(out, [text])), expected[i : i + 1]) for i, text in enumerate(TEXTS)
    )
    given = {"input_ids", "attention_mask"} | (
        {"token_type_ids"} if family.startswith(("bert", "electra")) else set()
    )
    assert {value.name for value in opened.get_inputs()} == given == set(tokenized(out, TEXTS))


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_activations(tmp_path, activation):
    base = make_tiny("bert", tmp_path / "base", hidden_act=activation)
    classifier = make(base)
    export_classifier(classifier, find_base(str(base)), tmp_path / "out")
    assert close(
        run(open_file(tmp_path / "out" / "model.onnx"), tokenized(tmp_path / "out", TEXTS)),
        classifier.logits(TEXTS),
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_pairs_with_segments_and_lora_on_the_pooler(tiny_base, tmp_path, family):
    base = tiny_base(family)
    places = {"target_modules": ("query", "bert.pooler.dense")} if family == "bert" else {}
    classifier = make(base, pairs=True, **places)
    export_classifier(classifier, find_base(str(base)), tmp_path / "out")
    feed, expected = tokenized(tmp_path / "out", TEXTS, PAIRS), classifier.logits(TEXTS, PAIRS)
    opened = open_file(tmp_path / "out" / "model.onnx")
    assert close(run(opened, feed), expected)
    if family != "roberta":
        assert feed["token_type_ids"].max() == 1
        assert not close(run(opened, feed | {"token_type_ids": 0 * feed["token_type_ids"]}), expected)


def test_a_padding_token_that_a_text_spells_out(tiny_base, tmp_path):
    base = tiny_base("roberta")
    classifier, texts = make(base), ["a<pad>b c", "<pad><pad> the plot", "x"]
    export_classifier(classifier, find_base(str(base)), tmp_path / "out")
    feed = tokenized(tmp_path / "out", texts)
    assert (feed["input_ids"][feed["attention_mask"] == 1] == 1).sum() == 3
    assert close(run(open_file(tmp_path / "out" / "model.onnx"), feed), classifier.logits(texts))


def test_a_text_gets_one_answer_whatever_pads_it(tiny_base, tmp_path):
    base = tiny_base("xlm-roberta")
    export_classifier(make(base), find_base(str(base)), tmp_path / "out")
    opened = open_file(tmp_path / "out" / "model.onnx")
    alone = run(opened, tokenized(tmp_path / "out", TEXTS[:1]))
    for others in (TEXTS[1:2], TEXTS[2:4], [TEXTS[3]] * 9):
        assert close(run(opened, tokenized(tmp_path / "out", [*TEXTS[:1], *others]))[:1], alone)


def test_the_file_is_sound_and_says_what_it_is(tiny_base, tmp_path):
    base, out = tiny_base("camembert"), tmp_path / "out"
    classifier = make(base, truncation="tail")
    result = export_classifier(classifier, find_base(str(base)), out)
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert result["opset"] == 17
    shapes = {
        value.name: [d.dim_param for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
        "logits": ["batch", "labels"],
    }
    assert {tensor.data_type for tensor in model.graph.initializer} == {
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.INT64,
    }
    assert result["bytes"] == {"model.onnx": (out / "model.onnx").stat().st_size}
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "model.onnx",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert json.loads(next(prop.value for prop in model.metadata_props if prop.key == "textlora")) == config
    assert config["architectures"] == ["CamembertForSequenceClassification"]
    assert config["textlora"]["max_length"] == 48
    assert config["textlora"]["base"]["hash"] == classifier.meta.base["hash"]
    read = AutoConfig.from_pretrained(out)
    assert (read.num_labels, read.problem_type, read.id2label) == (
        3,
        SINGLE_LABEL,
        {i: f"label {i}" for i in range(3)},
    )
    long = ["good " * 30 + "bad " * 60]
    assert close(run(open_file(out / "model.onnx"), tokenized(out, long)), classifier.logits(long))


def test_weights_beyond_what_one_file_takes(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "ONE_FILE", 1000)
    base, out = tiny_base("bert"), tmp_path / "out"
    classifier = make(base)
    result = export_classifier(classifier, find_base(str(base)), out, int8=True)
    assert set(result["bytes"]) >= {"model.onnx", "model.onnx_data", "model_quantized.onnx"}
    assert result["bytes"]["model.onnx_data"] > result["bytes"]["model.onnx"]
    assert close(run(open_file(out / "model.onnx"), tokenized(out, TEXTS)), classifier.logits(TEXTS))
    assert close(
        run(open_file(out / "model_quantized.onnx"), tokenized(out, TEXTS)), classifier.logits(TEXTS), 0.3
    )


@pytest.mark.parametrize("change", [lambda w: w * 1.01, lambda w: w * np.nan])
def test_a_file_that_answers_otherwise_is_not_kept(tiny_base, tmp_path, monkeypatch, change):
    base = tiny_base("bert")
    classifier, right = make(base), merged.merged_weights
    name = "bert.encoder.layer.1.output.dense.weight"
    monkeypatch.setattr(merged, "merged_weights", lambda *of: right(*of) | {name: change(right(*of)[name])})
    with pytest.raises(
        VerificationError,
        match=r"ONNX Runtime gives logits up to (0\.\d+|nan) away from textlora's, more than rounding explains",
    ):
        export_classifier(classifier, find_base(str(base)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- the command, with data and in int8 ---


def ask(cli: Cli, *arguments: object) -> dict[str, Any]:
    code, out, err = cli("export", *arguments, "--device", "cpu", "--json")
    assert (code, err) == (0, ""), err
    return json.loads(out)


@pytest.mark.parametrize("task", ["single", "multi", "regression", "pairs"])
def test_command_states_what_int8_costs(cli, tiny_base, tmp_path, tmp_path_factory, task):
    adapter, out = trained(tiny_base, tmp_path_factory, task=task), tmp_path / "out"
    data = adapter.config.test
    said = ask(
        cli, adapter.folder, "--model", adapter.config.model, "--output", out, "--int8", "--data", data
    )
    classifier = TextClassifier.load(adapter.folder, base=adapter.config.model)
    meta = classifier.meta
    lines = Path(data).read_text(encoding="utf-8").splitlines()
    if task == "multi":
        rows = [(json.loads(line)["text"], None, json.loads(line)["labels"]) for line in lines]
        labels = np.array([[name in row[2] for name in meta.labels] for row in rows])
    else:
        rows = [
            (*line.split(",")[: 1 + meta.pairs], *(() if meta.pairs else (None,)), line.split(",")[-1])
            for line in lines[1:]
        ]
        labels = np.array(
            [float(row[2]) if task == "regression" else meta.labels.index(row[2]) for row in rows]
        )
    texts, pairs = [row[0] for row in rows], [row[1] for row in rows] if meta.pairs else None
    applied = 1 if task == "regression" else meta.temperature
    expected = classifier.logits(texts, pairs) / applied
    thresholds = None if meta.thresholds is None else np.array(meta.thresholds)
    assert said["rows"] == 16
    assert said["golden"] < 1e-5
    for record, file in ((said, "model.onnx"), (said["int8"], "model_quantized.onnx")):
        # int8 rounds the activations of a batch together, so its answers depend on what stands beside a text:
        # the same batches as in the export
        encoded = classifier.tokenizer.encode(texts, pairs)
        golden = classifier.tokenizer.encode(
            [row["text"] for row in meta.golden], [row["text_pair"] for row in meta.golden]
        )
        found = session.session_logits(
            open_file(out / file), [*golden, *encoded], classifier.model.base.spec
        )[len(golden) :]
        assert record["difference"] == pytest.approx(
            float(np.abs(found - expected).max()), rel=1e-3, abs=2e-7 / min(1, applied)
        )
        wanted = evaluate(meta.problem_type, labels, found, list(meta.labels), thresholds=thresholds)
        assert record["test"] == pytest.approx(wanted, rel=1e-5)
        if task == "regression":
            assert "changed" not in record
        else:
            chosen = [
                decide(probabilities(x, meta.problem_type), meta.problem_type, thresholds)
                for x in (found, expected)
            ]
            assert record["changed"] == int((chosen[0] != chosen[1]).reshape(16, -1).any(axis=1).sum())
    assert said["difference"] < 1e-5
    assert 1e-4 < said["int8"]["difference"] < 1
    assert said["bytes"]["model_quantized.onnx"] < 0.8 * said["bytes"]["model.onnx"]


def test_what_the_command_prints(cli, tiny_base, tmp_path, tmp_path_factory):
    adapter = trained(tiny_base, tmp_path_factory)
    given = (adapter.folder, "--model", adapter.config.model, "--device", "cpu", "--threads", 1)
    code, out, err = cli(
        "export",
        *given,
        "--output",
        tmp_path / "a",
        "--int8",
        "--data",
        adapter.config.test,
        "--limit-eval",
        10,
    )
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("largest logit difference from textlora: ")
    assert lines[0].endswith(" on rows")
    assert lines[1].startswith("largest score difference from predict: ")
    assert float(lines[1].rpartition(" ")[2]) <= 1e-5
    assert lines[2].startswith("int8: largest logit difference ")
    assert lines[3].split() == ["metrics", "on", "10", "rows:", "float32", "int8"]
    assert lines[4].split()[0] == "accuracy"
    assert len(lines[4].split()) == 3
    assert any(line.startswith("int8 decides ") and line.endswith(" of 10 rows otherwise") for line in lines)
    assert lines[-1] == f"saved to {tmp_path / 'a'} (opset 17)"
    code, out, err = cli("export", *given, "--output", tmp_path / "a.onnx_adapter", "--as-adapter")
    assert out.splitlines()[-1] == f"saved to {tmp_path / 'a.onnx_adapter'} and {tmp_path / 'a.json'}"
    code, out, err = cli(
        "export", adapter.config.model, "--adapters-as-inputs", "--output", tmp_path / "b", "--threads", 1
    )
    assert out.splitlines()[1:3] == [
        "13 dense layers take LoRA; tried with 3 random adapters",
        out.splitlines()[2],
    ]


# --- one graph for any adapter ---


@pytest.fixture(scope="module")
def graphs(tiny_base, tmp_path_factory) -> Callable[..., ort.InferenceSession]:
    """`graphs(family)` opens the graph of a tiny base that takes adapters, made once."""
    made: dict[tuple[str, str], ort.InferenceSession] = {}

    def get(family: str, pooling: str = "first") -> ort.InferenceSession:
        if (family, pooling) not in made:
            out = tmp_path_factory.mktemp("graph") / "out"
            result = export_base(find_base(str(tiny_base(family))), out, pooling=pooling)
            assert result["golden"] < 1e-4
            made[family, pooling] = open_file(out / "model.onnx")
        return made[family, pooling]

    return get


ALIVE: list[ort.LoraAdapter] = []  # run options hold no reference to their adapter


def loaded(classifier: TextClassifier, base: Path, path: Path) -> ort.RunOptions:
    """Run options with the adapter, from its file, active."""
    export_adapter(classifier, find_base(str(base)), path)
    ALIVE.append(ort.LoraAdapter())
    ALIVE[-1].Load(str(path))
    options = ort.RunOptions()
    options.add_active_adapter(ALIVE[-1])
    return options


TEN = [  # labels, rank, what else
    (2, 4, {}), (3, 8, {"target_modules": ("query",)}), (5, 16, {"target_modules": ("all-linear",)}), (6, 4, {"use_dora": True}),
    (10, 12, {"use_rslora": True}), (20, 5, {"layers": "0", "target_modules": ("value", "output.dense")}), (28, 16, {"use_dora": True}),
    (40, 7, {"target_modules": ("bert.pooler.dense", "key")}), (64, 9, {"rank_pattern": {"value": 3}, "target_modules": ("query", "value")}),
    (77, 16, {"lora_alpha": 3.0, "target_modules": ("intermediate.dense",)}),
]  # fmt: skip


def test_ten_adapters_of_any_rank_and_number_of_labels_from_one_session(tiny_base, tmp_path, graphs):
    base, one = tiny_base("bert"), graphs("bert")
    adapters_ = [make(base, labels, seed=i, r=r, **lora) for i, (labels, r, lora) in enumerate(TEN)]
    active = [
        loaded(classifier, base, tmp_path / f"{i}.onnx_adapter") for i, classifier in enumerate(adapters_)
    ]
    encoded = adapters_[0].tokenizer.encode(TEXTS)
    feed = session.padded(encoded, adapters_[0].model.base.spec)
    expected = [classifier.logits(TEXTS) for classifier in adapters_]
    for _ in range(2):  # one after another, twice: an adapter leaves nothing behind
        for classifier, options, wanted in zip(adapters_, active, expected, strict=True):
            assert close(run(one, feed | adapter_inputs(classifier.model)), wanted)
            assert close(run(one, feed, options), wanted)
    assert [wanted.shape[1] for wanted in expected] == [2, 3, 5, 6, 10, 20, 28, 40, 64, 77]
    assert run(one, feed).shape == (6, 0)  # no adapter, no labels


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", FAST)
def test_every_family_takes_adapters(tiny_base, tmp_path, graphs, family, pooling):
    base, one = tiny_base(family), graphs(family, pooling)
    for seed, lora in enumerate(({"r": 3}, {"r": 6, "use_dora": True, **ALL_LINEAR})):
        classifier = make(base, 2 + seed, seed=seed, pooling=pooling, **lora)
        feed = session.padded(classifier.tokenizer.encode(TEXTS), classifier.model.base.spec)
        assert close(run(one, feed | adapter_inputs(classifier.model)), classifier.logits(TEXTS))
        assert close(
            run(one, feed, loaded(classifier, base, tmp_path / f"{seed}.onnx_adapter")),
            classifier.logits(TEXTS),
        )


def test_another_base_or_pooling_is_refused_by_onnx_runtime_itself(tiny_base, tmp_path, graphs):
    for family in ("roberta", "bert"):
        right = make(tiny_base(family))
        other = make_tiny(family, tmp_path / family, seed=1)
        twin = make(other)
        feed = session.padded(right.tokenizer.encode(TEXTS), right.model.base.spec)
        assert close(run(graphs(family), feed | adapter_inputs(right.model)), right.logits(TEXTS))
        with pytest.raises(Exception, match=r"Invalid input name: base\.[0-9a-f]{16}\.first"):
            run(graphs(family), feed | adapter_inputs(twin.model))
        with pytest.raises(Exception, match=r"base\.[0-9a-f]{16}\.first"):
            run(graphs(family), feed, loaded(twin, other, tmp_path / f"{family}.onnx_adapter"))
    with pytest.raises(
        Exception, match=r"Invalid input name: base\.[0-9a-f]{16}\.first"
    ):  # the same head, another pooling
        run(graphs("bert", "mean"), feed | adapter_inputs(right.model))


def test_half_an_adapter_gives_no_logits(tiny_base, graphs):
    classifier = make(tiny_base("roberta"))
    feed = session.padded(classifier.tokenizer.encode(TEXTS), classifier.model.base.spec)
    inputs = adapter_inputs(classifier.model)
    for name in (
        "classifier.dense.weight",
        "classifier.dense.bias",
        "classifier.out_proj.weight",
        "classifier.out_proj.bias",
    ):
        with pytest.raises(Exception, match=r"INVALID_ARGUMENT|FAIL|RUNTIME_EXCEPTION"):
            run(graphs("roberta"), feed | {key: value for key, value in inputs.items() if key != name})


def test_chosen_layers_only(tiny_base, tmp_path):
    base, out = tiny_base("electra"), tmp_path / "out"
    result = export_base(find_base(str(base)), out, target_modules=["query", "value"])
    one = open_file(out / "model.onnx")
    assert result["adapted"] == 4
    names = {
        value.name.rpartition(".")[0]
        for value in one.get_overridable_initializers()
        if value.name.endswith("lora_A")
    }
    assert names == {
        f"electra.encoder.layer.{i}.attention.self.{slot}" for i in (0, 1) for slot in ("query", "value")
    }
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert set(config["textlora"]["adapted"]) == names
    fits, more = make(base), make(base, **ALL_LINEAR)
    feed = tokenized(out, TEXTS)
    assert close(run(one, feed | adapter_inputs(fits.model)), fits.logits(TEXTS))
    with pytest.raises(Exception, match=r"electra\.encoder\.layer\.\d\.[a-z.]+\.lora_A"):
        run(one, feed | adapter_inputs(more.model))


def test_the_graph_is_sound_and_ranks_have_names_of_their_own(tiny_base, tmp_path):
    export_base(find_base(str(tiny_base("bert"))), tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    ranks = [
        value.type.tensor_type.shape.dim[0].dim_param
        for value in model.graph.input
        if value.name.endswith("lora_A")
    ]
    assert len(ranks) == len(set(ranks)) == 13  # six layers in each of two blocks, and the pooler


def test_adapter_file_and_its_facts(cli, tiny_base, tmp_path):
    base = tiny_base("distilbert")
    folder = save(make(base, kind=MULTI_LABEL), tmp_path / "adapter")
    said = ask(cli, folder, "--model", base, "--as-adapter", "--output", tmp_path / "x" / "mine.onnx_adapter")
    assert said["golden"] < 1e-5
    facts = json.loads((tmp_path / "x" / "mine.json").read_text(encoding="utf-8"))
    assert (facts["labels"], facts["problem_type"], facts["max_length"]) == (
        ["label 0", "label 1", "label 2"],
        MULTI_LABEL,
        48,
    )
    file = ort.AdapterFormat.read_adapter(
        str(tmp_path / "x" / "mine.onnx_adapter")
    )  # its arrays are views of it
    held = {name: value.numpy().copy() for name, value in file.get_parameters().items()}
    expected = adapter_inputs(TextClassifier.load(folder, base=str(base)).model)
    assert held.keys() == expected.keys()
    assert all(np.array_equal(held[name], expected[name]) for name in held)
    tensors = make(base, kind=MULTI_LABEL).model.trainable()
    name = "distilbert.transformer.layer.1.attention.v_lin"
    assert np.array_equal(
        held[f"{name}.lora_A"], tensors[f"base_model.model.{name}.lora_A.weight"].detach().numpy()
    )
    assert np.allclose(
        held[f"{name}.lora_B"],
        4 * tensors[f"base_model.model.{name}.lora_B.weight"].detach().numpy(),
        rtol=1e-6,
    )  # alpha 16, r 4
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["mine.json", "mine.onnx_adapter"]


@pytest.mark.parametrize("kind", [SINGLE_LABEL, MULTI_LABEL, REGRESSION])
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_scores_are_predicts_whatever_the_temperature(tiny_base, tmp_path, graphs, family, pooling, kind):
    """Of a folder of an older textlora, whose readers divide by it; in both kinds of files it is in the head."""
    base, labels = tiny_base(family), 1 if kind == REGRESSION else 3
    classifier = make(base, labels, kind=kind, pooling=pooling, pairs=True)
    classifier.meta = replace(classifier.meta, temperature=0.37)
    expected = np.array([list(row.scores.values()) for row in classifier.predict(TEXTS, PAIRS)])
    assert (np.abs(probabilities(classifier.logits(TEXTS, PAIRS), kind) - expected).max() > 0.02) == (
        kind != REGRESSION
    )
    result = export_classifier(classifier, find_base(str(base)), tmp_path / "out")
    feed = tokenized(tmp_path / "out", TEXTS, PAIRS)
    assert result["score_difference"] <= 1e-5
    assert (
        np.abs(probabilities(run(open_file(tmp_path / "out" / "model.onnx"), feed), kind) - expected).max()
        <= 1e-5
    )
    note = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["textlora"]
    export_adapter(classifier, find_base(str(base)), tmp_path / "x.onnx_adapter")
    facts = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    fitted = 1.0 if kind == REGRESSION else 0.37
    assert (
        (facts["temperature"], facts["fitted_temperature"])
        == (note["temperature"], note["fitted_temperature"])
        == (1.0, pytest.approx(fitted))
    )
    one, options = graphs(family, pooling), loaded(classifier, base, tmp_path / "y.onnx_adapter")
    assert np.abs(probabilities(run(one, feed, options), kind) - expected).max() <= 1e-5
    if kind != REGRESSION:
        inputs = adapter_inputs(classifier.model, classifier.meta.temperature)
        assert np.abs(probabilities(run(one, feed | inputs), kind) - expected).max() <= 1e-5


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_a_base_of_real_size(minilm, tmp_path, pooling):
    """all-MiniLM-L6-v2: the merged graph, and the adapter on the graph of the base."""
    lora, texts = LoraConfig(r=8, target_modules=("all-linear",)), [text * 8 for text in TEXTS]
    model, _ = open_model(minilm, lora, 5, pooling=pooling)
    random_adapter(model)
    tokenizer = TextTokenizer(load_tokenizer(minilm.folder, "bert"), 64, "head")
    base = {"id": minilm.id, "revision": None, "model_type": "bert", "hash": model.base_hash()}
    meta = AdapterMeta(
        tuple("abcde"),
        SINGLE_LABEL,
        False,
        pooling,
        64,
        "head",
        base,
        temperature=1.7,
        textlora_version="test",
    )
    classifier = TextClassifier(model, tokenizer, meta)
    expected = np.array([list(row.scores.values()) for row in classifier.predict(texts)])
    assert export_classifier(classifier, minilm, tmp_path / "out")["score_difference"] <= 1e-5
    feed = tokenized(tmp_path / "out", texts)
    assert (
        np.abs(
            probabilities(run(open_file(tmp_path / "out" / "model.onnx"), feed), SINGLE_LABEL) - expected
        ).max()
        <= 1e-5
    )
    export_base(minilm, tmp_path / "base", pooling=pooling)
    one = open_file(tmp_path / "base" / "model.onnx")
    assert (
        np.abs(probabilities(run(one, feed | adapter_inputs(model, 1.7)), SINGLE_LABEL) - expected).max()
        <= 1e-5
    )


def test_the_page_runs_as_written(cli, tiny_base, tmp_path, tmp_path_factory, monkeypatch):
    adapter = trained(tiny_base, tmp_path_factory)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(adapter.folder, "my-adapter")
    shutil.copy(adapter.config.test, "test.csv")
    page = (Path(__file__).resolve().parent.parent / "docs" / "onnx.md").read_text(encoding="utf-8")
    commands = [line.split()[1:] for line in page.splitlines() if line.startswith("textlora export ")]
    assert len(commands) == 3
    for command in commands:
        code, _, err = cli(
            *(adapter.config.model if word == "minilm" else word for word in command), "--threads", 1
        )
        assert (code, err) == (0, "")
    scope: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/onnx.md", "exec"), scope)
    decided, shape, apart = cli.capfd.readouterr().out.splitlines()
    assert (decided[0], shape) == ("[", "(2, 2)")
    assert float(apart) < 1e-6


# --- refusals ---


def refused(cli: Cli, tmp_path: Path, *arguments: object, code: int = 2) -> str:
    before = snapshot(tmp_path)
    said = cli.fails("export", *arguments, "--device", "cpu", code=code)
    assert snapshot(tmp_path) == before
    return said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ("--as-adapter", "--adapters-as-inputs"),
            "--adapters-as-inputs writes a base model and --as-adapter an adapter; give one of them",
        ),
        (("--as-adapter", "--int8"), "--int8 has no meaning for --as-adapter"),
        (("--as-adapter", "--data", "x.csv"), "--data has no meaning for --as-adapter"),
        (
            ("--adapters-as-inputs", "--limit-eval", "5"),
            "--limit-eval has no meaning for --adapters-as-inputs",
        ),
        (("--adapters-as-inputs", "--model", "minilm"), "--model has no meaning for --adapters-as-inputs"),
        (("--adapters-as-inputs", "--no-verify"), "--no-verify has no meaning for --adapters-as-inputs"),
        (("--target-modules", "query"), "--target-modules has no meaning for a merged classifier"),
        (("--pooling", "mean"), "--pooling has no meaning for a merged classifier"),
    ],
)
def test_options_of_another_mode(cli, tmp_path, flags, said):
    assert refused(cli, tmp_path, "anything", "--output", tmp_path / "out", *flags) == said


def test_outputs_that_are_in_the_way(cli, single, tmp_path):
    given = (single.folder, "--model", single.config.model)
    full, file = tmp_path / "full", tmp_path / "x.onnx_adapter"
    full.mkdir()
    (full / "kept").write_text("")
    file.write_text("")
    (tmp_path / "y.json").write_text("")
    assert (
        refused(cli, tmp_path, *given, "--output", full)
        == f"{full} exists and is not an empty folder; choose another --output"
    )
    assert refused(cli, tmp_path, single.config.model, "--adapters-as-inputs", "--output", full).startswith(
        f"{full} exists"
    )
    assert (
        refused(cli, tmp_path, *given, "--as-adapter", "--output", file)
        == f"{file} exists; choose another --output"
    )
    json_file = tmp_path / "y.json"
    assert (
        refused(cli, tmp_path, *given, "--as-adapter", "--output", tmp_path / "y.onnx_adapter")
        == f"{json_file} exists; choose another --output"
    )
    other = tmp_path / "z.onnx"
    assert (
        refused(cli, tmp_path, *given, "--as-adapter", "--output", other)
        == f"--output {other}: an adapter's file ends with .onnx_adapter"
    )


def test_data_that_does_not_fit(cli, single, tmp_path):
    given = (single.folder, "--model", single.config.model, "--output", tmp_path / "out", "--data")
    assert "no such file" in refused(cli, tmp_path, *given, tmp_path / "none.csv")
    rows = write_csv(tmp_path / "odd.csv", [*single_rows(4), ("fine", "meh")])
    assert "'meh'" in refused(cli, tmp_path, *given, rows)
    pairs = write_csv(tmp_path / "pairs.csv", [("a", "b", "pos")], ("sentence1", "sentence2", "label"))
    assert "trained on single texts and got pairs" in refused(cli, tmp_path, *given, pairs)


def test_folders_that_are_not_adapters_or_bases(cli, single, tmp_path):
    out = ("--output", tmp_path / "out")
    assert "no such adapter" in refused(cli, tmp_path, tmp_path / "none", *out)
    assert "no such folder" in refused(
        cli, tmp_path, tmp_path / "none" / "at" / "all", "--adapters-as-inputs", *out
    )
    assert "no config.json" in refused(cli, tmp_path, single.folder, "--adapters-as-inputs", *out)
    said = refused(
        cli, tmp_path, single.config.model, "--adapters-as-inputs", "--target-modules", "query,wings", *out
    )
    assert said.startswith("--target-modules wings: matches no dense layer")


def test_architectures_without_a_graph(cli, tiny_base, tmp_path, tmp_path_factory):
    base, out = tiny_base("mpnet"), tmp_path / "out"
    said = "no ONNX graph for this base: model type 'mpnet' is not on the fast path"
    assert refused(cli, tmp_path, base, "--adapters-as-inputs", "--output", out).startswith(said)
    folder = save(make(base, r=2, target_modules=("q",)), tmp_path / "adapter")
    given = (folder, "--model", base, "--output")
    assert refused(cli, tmp_path, *given, out).startswith(said)
    assert refused(cli, tmp_path, *given, tmp_path / "x.onnx_adapter", "--as-adapter").startswith(said)


def test_an_adapter_with_its_own_biases_is_no_input(tiny_base, tmp_path):
    base = tiny_base("bert")
    with pytest.raises(
        UsageError,
        match=r"has its own 'bert\.[a-z0-9.A-Z]+\.bias' of the base, which is no input of the graph; export it merged",
    ):
        export_adapter(make(base, bias="lora_only"), find_base(str(base)), tmp_path / "x.onnx_adapter")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_extra(cli, single, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    expected = 'textlora export needs onnx and onnxruntime; install them with pip install "textlora[onnx]"'
    assert refused(cli, tmp_path, single.folder, "--output", tmp_path / "out") == expected


def test_nothing_is_left_when_an_adapter_or_a_base_answers_otherwise(tiny_base, tmp_path, monkeypatch):
    base, right = tiny_base("bert"), adapters.adapter_inputs
    monkeypatch.setattr(
        adapters,
        "adapter_inputs",
        lambda *of: right(*of) | {"classifier.bias": right(*of)["classifier.bias"] + 0.01},
    )
    with pytest.raises(VerificationError, match=r"ONNX Runtime gives logits up to 0\.01 away"):
        export_adapter(make(base), find_base(str(base)), tmp_path / "x.onnx_adapter")
    with pytest.raises(VerificationError, match=r"ONNX Runtime gives logits up to 0\.01 away"):
        export_base(find_base(str(base)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy():
    code = (
        "import sys, io, contextlib\nfrom textlora.cli import run\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n    run(['export', '--help'])\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'numpy', 'transformers') if name in sys.modules])\n"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )

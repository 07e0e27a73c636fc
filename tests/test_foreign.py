"""Adapters of PEFT, the HF Trainer, AutoTrain and loralib come in with the logits they had, or not at all; no
file runs code."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import both_ways, make_tiny, random_batch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from support import CONFIG, SIDE, WEIGHTS, Cli, snapshot
from test_adapter import TEXTS, close, peft_folder, peft_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from textlora import TextClassifier
from textlora.adapters.folder import read_meta
from textlora.adapters.importers.source import read_source
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, TextloraError, UsageError
from textlora.transform.convert import convert

AB = ["a", "b"]


def named(base: Path, target: Path, names: Mapping[str, str], **config: Any) -> Path:
    """A copy of a base whose config.json names its classes."""
    shutil.copytree(base, target)
    content = json.loads((target / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(
        json.dumps(content | {"id2label": dict(names)} | config), encoding="utf-8"
    )
    return target


def edit(folder: Path, **changes: Any) -> Path:
    """Change keys of adapter_config.json; None removes one."""
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content = {
        key: value for key, value in (content | changes).items() if value is not None or key not in changes
    }
    (folder / CONFIG).write_text(json.dumps(content), encoding="utf-8")
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def error_of(kind: type[TextloraError], call: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """The message of an error of one kind, in one line; None where there is none. Any other error is a
    failure."""
    try:
        call(*args, **kwargs)
    except kind as error:
        message = str(error)
    else:
        return None
    assert "\n" not in message
    return message


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(AdapterError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- PEFT folders: every architecture, every feature, in and out again ---


@pytest.mark.parametrize(
    ("family", "changes", "path"),
    [
        (
            "bert",
            {
                "target_modules": "all-linear",
                "rank_pattern": {"pooler.dense": 2, "layer.1.*": 3},
                "use_rslora": True,
            },
            "packed",
        ),
        ("bert", {"bias": "all", "target_modules": "all-linear", "use_dora": True}, "packed"),
        ("roberta", {"bias": "lora_only", "alpha_pattern": {"value": 3.5}}, "packed"),
        ("xlm-roberta", {"target_modules": "all-linear"}, "packed"),
        ("electra", {"rank_pattern": {"query": 3}, "modules_to_save": ["LayerNorm"]}, "packed"),
        ("electra", {"target_modules": "all-linear"}, "reference"),
        (
            "distilbert",
            {"target_modules": ["q_lin", "v_lin"], "modules_to_save": ["classifier", "classifier", "score"]},
            "packed",
        ),
        (
            "modernbert",
            {
                "target_modules": ["Wqkv"],
                "rank_pattern": {"layers.0.attn.Wqkv": 6},
                "alpha_pattern": {"Wqkv": 3},
            },
            "reference",
        ),
        ("modernbert", {"target_modules": "all-linear", "use_dora": True}, "reference"),
        ("modernbert", {"target_modules": ["Wqkv", "Wi"], "modules_to_save": ["head"]}, "reference"),
        (
            "deberta-v2",
            {"target_modules": ["query_proj"], "modules_to_save": ["pooler"], "use_rslora": True},
            "reference",
        ),
        (
            "deberta-v2",
            {"target_modules": ["query_proj"], "modules_to_save": ["pooler"], "bias": "all"},
            "reference",
        ),
        ("albert", {"target_modules": "all-linear"}, "reference"),
    ],
)
def test_peft_in_and_out_again(tiny_base, tmp_path, family, changes, path):
    """PEFT's logits from the folder itself, from what it is converted to, and from PEFT on that."""
    base = tiny_base(family)
    theirs = peft_folder(base, tmp_path / "peft", **changes)
    direct = TextClassifier.load(tmp_path / "peft", base=str(base), labels=AB)
    assert direct.model.path == path
    assert close(direct.logits(TEXTS), theirs)

    result = convert(tmp_path / "peft", tmp_path / "ours", labels=AB)
    assert (result["source"], result["path"], result["labels"]) == ("PEFT", path, AB)
    assert result["difference"] <= 1e-5 * max(1, result["largest_logit"])
    ours = TextClassifier.load(tmp_path / "ours", base=str(base))
    assert close(ours.logits(TEXTS), theirs)
    assert ours.meta.base["hash"] == ours.model.base_hash()
    assert len(ours.meta.golden) == 8
    assert close(peft_logits(base, tmp_path / "ours", TEXTS, length=48), theirs)
    modules = json.loads((tmp_path / "ours" / CONFIG).read_text(encoding="utf-8"))["modules_to_save"]
    assert len(set(modules)) == len(modules)


MODULES = [
    f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1, 11) for name in ("query", "value")
] + ["bert.pooler.dense", "classifier"]


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    "query",
                    "self.query",
                    "uery",
                    "layer.1",
                    "bert",
                    ".*",
                    "layer.1.*",
                    r"layer\.[01]\..*",
                    "^bert.*value",
                    "dense$",
                    "",
                ]
            ),
            st.sampled_from(MODULES),
            st.text(alphabet="bert.qu|$^[]0-9", max_size=8),
        ),
        max_size=3,
    )
)
def test_patterns_match_as_in_peft(patterns):
    table = {}
    for k, pattern in enumerate(patterns):
        try:
            get_pattern_key([pattern], "x")
        except Exception:
            continue
        table[pattern] = k + 1
    lora = LoraConfig(r=99, lora_alpha=50, rank_pattern=table, alpha_pattern=table)
    for module in MODULES:
        expected = table.get(get_pattern_key(table.keys(), module), 99)
        assert lora.rank_of(module) == expected
        alpha = table.get(get_pattern_key(table.keys(), module), 50)
        assert lora.scaling_of(module) == alpha / expected


def test_unknown_keys_and_the_authors_card_are_kept(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft", r=3)
    edit(tmp_path / "peft", use_moonlight=[1, {"deep": None}], peft_version="9.9")
    (tmp_path / "peft" / "README.md").write_text("---\nlicense: mit\n---\nmy words", encoding="utf-8")
    convert(tmp_path / "peft", tmp_path / "ours", labels=AB)
    before, after = (
        json.loads((tmp_path / name / CONFIG).read_text(encoding="utf-8")) for name in ("peft", "ours")
    )
    assert after["use_moonlight"] == [1, {"deep": None}]
    assert {key for key in before if before[key] != after[key]} <= {
        "base_model_name_or_path",
        "modules_to_save",
        "target_modules",
        "init_lora_weights",
    }
    assert (tmp_path / "ours" / "README.md").read_text(encoding="utf-8") == "---\nlicense: mit\n---\nmy words"
    assert str(tiny_base("bert")) not in "".join(
        p.read_text(encoding="utf-8") for p in (tmp_path / "ours").glob("*.json")
    )


def test_our_own_card_in_place_of_pefts_template(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    assert "[More Information Needed]" in (tmp_path / "peft" / "README.md").read_text(encoding="utf-8")
    convert(tmp_path / "peft", tmp_path / "ours", labels=AB)
    card = (tmp_path / "ours" / "README.md").read_text(encoding="utf-8")
    assert 'pipeline_tag: "text-classification"' in card
    assert "`bert`, converted by textlora " in card
    assert "trained with textlora" not in card


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora"])
def test_starts_that_rewrote_the_base(tiny_base, tmp_path, start):
    """Saved as they are they are refused; what PEFT converts on saving is ordinary LoRA of twice the rank."""
    base = tiny_base("bert")
    torch.manual_seed(1)
    config = PeftLoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], init_lora_weights=start
    )
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "raw")
    said = refusal(TextClassifier.load, tmp_path / "raw", base=str(base), labels=AB)
    assert said == (
        f"{tmp_path / 'raw' / CONFIG}: init_lora_weights '{start}' rewrote the weights of the base before training, so the folder is wrong on the "
        "plain base; let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion) and add the head's tensors, which that leaves out"
    )
    model.save_pretrained(
        tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    assert ": the classifier is not in the file" in refusal(
        TextClassifier.load, tmp_path / "plain", base=str(base), labels=AB
    )
    head = {
        name: tensor for name, tensor in load_file(tmp_path / "raw" / WEIGHTS).items() if "classifier" in name
    }
    edit_tensors(tmp_path / "plain", lambda t: t.update(head))
    ours = TextClassifier.load(tmp_path / "plain", base=str(base), labels=AB)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with torch.inference_mode():
        theirs = [
            model.eval()(**tokenizer(text, truncation=True, max_length=48, return_tensors="pt"))
            .logits[0]
            .numpy()
            for text in TEXTS
        ]
    assert close(ours.logits(TEXTS), np.stack(theirs))
    assert ours.model.lora.r == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"init_lora_weights": "corda"}, "init_lora_weights 'corda' rewrote the weights of the base"),
        ({"init_lora_weights": "LoRA_GA"}, "init_lora_weights 'LoRA_GA' rewrote the weights of the base"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq' rewrote the weights of the base"),
        (
            {"init_lora_weights": "new_fashion"},
            "init_lora_weights 'new_fashion' is not known here, it may have rewritten the base",
        ),
        (
            {"task_type": "TOKEN_CLS"},
            "task_type 'TOKEN_CLS', textlora runs SEQ_CLS (sequence classification)",
        ),
        ({"peft_type": "ADALORA"}, "peft_type 'ADALORA', textlora runs LORA adapters"),
        ({"lora_bias": True}, "lora_bias (a bias on B) is not supported"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication (repeated layers) is not supported"),
        ({"use_qalora": True}, "use_qalora (QA-LoRA) is not supported"),
        ({"kasa_config": {"x": 1}}, "kasa_config (KaSA) is not supported"),
        ({"r": None}, "r is missing, not a whole number of at least 1"),
        ({"r": 4.0}, "r is 4.0, not a whole number of at least 1"),
        ({"r": True}, "r is True, not a whole number of at least 1"),
        ({"lora_alpha": None}, "lora_alpha is missing, not a number"),
        ({"lora_alpha": "16"}, "lora_alpha is '16', not a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number"),
        ({"use_rslora": "false"}, "use_rslora 'false' is not true or false"),
        ({"lora_dropout": 2}, "lora_dropout 2 is not a number from 0 to below 1"),
        (
            {"rank_pattern": {"(": 2}},
            "rank_pattern '(' is not a regular expression (missing ), unterminated subpattern at position 7)",
        ),
        ({"rank_pattern": {"query": 0}}, "rank_pattern 'query' is 0, not a whole number of at least 1"),
        ({"rank_pattern": ["query"]}, "rank_pattern ['query'] is not a mapping from module names"),
        ({"alpha_pattern": {"(.*)*x": 2}}, "alpha_pattern '(.*)*x' repeats too much"),
        ({"alpha_pattern": {"query": "2"}}, "alpha_pattern 'query' is '2', not a number"),
        ({"bias": "some"}, "bias 'some' is not none, all or lora_only"),
        (
            {"bias": "lora_only"},
            f"bias 'lora_only' trained biases of the base, but {WEIGHTS} does not hold them",
        ),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path 7 is not a name"),
        ({"revision": ["main"]}, "revision ['main'] is not a name"),
    ],
)
def test_configs_that_are_refused(tiny_base, tmp_path, changes, said):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    edit(tmp_path / "peft", **changes)
    assert refusal(TextClassifier.load, tmp_path / "peft", base=str(tiny_base("bert")), labels=AB).startswith(
        f"{tmp_path / 'peft' / CONFIG}: {said}"
    )
    assert said in refusal(
        convert, tmp_path / "peft", tmp_path / "ours", model=str(tiny_base("bert")), labels=AB
    )
    assert not (tmp_path / "ours").exists()


def test_config_that_is_not_json(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    for text in ("[" * 100_000, "", "null", '{"r": ' + "9" * 5000 + "}", "\ufeff{}"):
        (tmp_path / "peft" / CONFIG).write_text(text, encoding="utf-8")
        refusal(TextClassifier.load, tmp_path / "peft", base=str(tiny_base("bert")), labels=AB)


# --- heads that PEFT did not save ---


def test_lost_heads_are_refused_with_the_cause(tiny_base, tmp_path):
    def folder(family: str, **changes: Any) -> Path:
        shutil.rmtree(tmp_path / "peft", ignore_errors=True)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_base(family), num_labels=2)
        get_peft_model(model, PeftLoraConfig(r=2, init_lora_weights=False, **changes)).save_pretrained(
            tmp_path / "peft"
        )
        return tmp_path / "peft"

    def said(family: str) -> str:
        messages = [
            refusal(f, tmp_path / "peft", *more, labels=AB)
            for f, more in ((TextClassifier.load, ()), (convert, (tmp_path / "ours",)))
        ]
        assert not (tmp_path / "ours").exists()
        assert messages[0] == messages[1]
        return messages[0].removeprefix(str(tmp_path / "peft"))

    for kind in (None, TaskType.FEATURE_EXTRACTION):  # PEFT saves the head only for SEQ_CLS
        path = folder("bert", target_modules=["query"], task_type=kind)
        edit(path, task_type=None)
        assert said("bert") == (
            ": the classifier is not in the file, so it would be random; "
            "PEFT saves it only where task_type is SEQ_CLS or modules_to_save names it: train again with that"
        )
    cause = "is neither in the base nor in the adapter, so it would be random; train again with '{}' in PEFT's modules_to_save"
    folder("bert-no-pooler", target_modules=["query"], task_type="SEQ_CLS")
    assert said("bert-no-pooler") == ": head module 'pooler.dense' " + cause.format("pooler.dense")
    folder("deberta-v2", target_modules=["query_proj"], task_type="SEQ_CLS")  # peft issue 2171
    assert said("deberta-v2") == ": head module 'pooler' " + cause.format("pooler")
    folder("distilbert", target_modules=["q_lin"], task_type="SEQ_CLS")
    edit_tensors(
        tmp_path / "peft",
        lambda t: [t.pop(f"base_model.model.pre_classifier.{part}") for part in ("weight", "bias")],
    )
    assert said("distilbert") == ": head module 'pre_classifier' " + cause.format("pre_classifier")
    for family, name in (("bert-no-pooler", "bert.pooler.dense"), ("deberta-v2", "pooler.dense")):
        folder(family, target_modules="all-linear", task_type="SEQ_CLS")
        assert f": --target-modules {name}: the base has no weights for this layer" in said(family)


def test_every_tensor_counts(tiny_base, tmp_path):
    base = str(tiny_base("bert"))
    peft_folder(
        tiny_base("bert"),
        tmp_path / "peft",
        target_modules=["pooler.dense", "query"],
        bias="lora_only",
        rank_pattern={"pooler.dense": 2},
    )
    whole = (tmp_path / "peft" / WEIGHTS).read_bytes()
    names = list(load_file(tmp_path / "peft" / WEIGHTS))
    assert len(names) == 2 * 3 + 2 + 3
    for name in names:
        for change in (
            lambda t, name=name: t.pop(name),
            lambda t, name=name: t.update({name + "x": t.pop(name)}),
            lambda t, name=name: t.update({name: t[name][:-1].clone()}),
            lambda t, name=name: t.update({name: torch.full_like(t[name], float("nan"))}),
            lambda t, name=name: t.update({name: t[name].long()}),
            lambda t, name=name: t.update({"weight": t[name].clone()}),
            lambda t, name=name: t.update(
                {name.replace("base_model.", "base_model.model."): t[name].clone()}
            ),
        ):
            edit_tensors(tmp_path / "peft", change)
            with pytest.raises(TextloraError):
                TextClassifier.load(tmp_path / "peft", base=base, labels=AB)
            (tmp_path / "peft" / WEIGHTS).write_bytes(whole)
    TextClassifier.load(tmp_path / "peft", base=base, labels=AB)


def test_strange_tensors_on_the_reference_path(tiny_base, tmp_path):
    """Names that PEFT would take for modules to save, of parts that lie around or under the adapted layers."""
    base = tiny_base("modernbert")
    peft_folder(base, tmp_path / "peft", target_modules=["Wqkv"])
    whole = (tmp_path / "peft" / WEIGHTS).read_bytes()
    for name in (
        "model.weight",
        "model.layers.0.weight",
        "model.layers.0.attn.Wqkv.weight",
        "e.weight",
        "model.layers.7.attn.Wo.weight",
        "head.weight",
    ):
        edit_tensors(
            tmp_path / "peft", lambda t, name=name: t.update({f"base_model.model.{name}": torch.zeros(2)})
        )
        assert f"tensor 'base_model.model.{name}'" in refusal(
            TextClassifier.load, tmp_path / "peft", base=str(base), labels=AB
        )
        (tmp_path / "peft" / WEIGHTS).write_bytes(whole)


def test_doubled_tensors_must_agree(tiny_base, tmp_path):
    base = str(tiny_base("bert"))
    peft_folder(tiny_base("bert"), tmp_path / "peft", bias="all")
    name = "base_model.model.classifier.modules_to_save.bias"
    assert name in load_file(tmp_path / "peft" / WEIGHTS)
    edit_tensors(tmp_path / "peft", lambda t: t.update({name: t[name] + 1}))
    assert "tensor 'base_model.model.classifier.bias' stands twice, with different values" in refusal(
        TextClassifier.load, tmp_path / "peft", base=base, labels=AB
    )


def test_embeddings_that_were_trained(tiny_base, tmp_path):
    base = tiny_base("bert")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    get_peft_model(
        model, PeftLoraConfig(task_type="SEQ_CLS", target_modules=["query", "word_embeddings"])
    ).save_pretrained(tmp_path / "peft")
    assert "(LoRA on embeddings) is not supported" in refusal(
        TextClassifier.load, tmp_path / "peft", base=str(base), labels=AB
    )


def test_patterns_and_a_pooler_train_as_in_peft(tiny_base):
    """Logits, gradients and places of dropout masks on the fast path."""
    patterns = {"rank_pattern": {"layer.1.*": 2, "pooler.dense": 3}, "alpha_pattern": {"pooler.dense": 9}}
    for dora in (False, True):
        lora = LoraConfig(
            r=4, target_modules=("query", "value", "bert.pooler.dense"), use_dora=dora, **patterns
        )
        fast, slow = both_ways(tiny_base("bert"), lora)
        batch = random_batch([5, 1, 2, 3, 5, 48, 5, 8, 13])
        grads = []
        for model in (fast, slow):
            model.forward(batch).square().sum().backward()
            grads.append({name: tensor.grad for name, tensor in model.trainable().items()})
        torch.testing.assert_close(fast.forward(batch), slow.forward(batch), rtol=1e-5, atol=1e-5)
        assert list(grads[0]) == list(grads[1])
        for name, grad in grads[0].items():
            assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm() + 1e-7, name
        assert fast.loras()[2, "pooler"].A.shape == (3, 32)
    lora = LoraConfig(r=4, target_modules=("bert.pooler.dense",), lora_dropout=0.5)
    fast, _ = both_ways(tiny_base("bert"), lora)
    assert fast.depth == 1
    assert torch.equal(fast.forward(batch, 7), fast.forward(batch, 7))
    assert not torch.equal(fast.forward(batch, 7), fast.forward(batch, 8))


# --- labels, task, length ---


def test_labels_of_the_base_or_of_a_config_beside(tiny_base, tmp_path):
    base = named(tiny_base("bert"), tmp_path / "base", {"0": "no", "1": "yes"})
    out = tmp_path / "out"
    theirs = peft_folder(base, out / "checkpoint-5")
    direct = TextClassifier.load(out / "checkpoint-5")  # nothing is missing: base, labels, task
    assert direct.meta.labels == ("no", "yes")
    assert [p.label for p in direct.predict(TEXTS)] == [("no", "yes")[i] for i in theirs.argmax(1)]
    assert convert(out, tmp_path / "1")["labels_from"] == "the base's config.json"
    (out / "config.json").write_text(
        json.dumps({"id2label": {"0": "bad", "1": "good"}, "problem_type": "multi_label_classification"})
    )
    result = convert(out, tmp_path / "2")
    assert (result["labels"], result["labels_from"], result["problem_type"]) == (
        ["bad", "good"],
        str(out / "config.json"),
        "multi_label_classification",
    )
    result = convert(out, tmp_path / "3", labels=["x", "y"], problem_type="single-label")
    assert (result["labels"], result["labels_from"], result["problem_type"]) == (
        ["x", "y"],
        "--labels",
        "single_label_classification",
    )
    assert read_meta(tmp_path / "3").labels == ("x", "y")


@pytest.mark.parametrize(
    "names",
    [
        {"0": "LABEL_0", "1": "LABEL_1"}, {"0": "a", "1": "b", "2": "c"}, {"0": "a"}, {"0": "a", "1": "a"}, {"0": "a", "2": "b"},
        {"0": "a", "1": 3}, ["a", "b"], {"0": "a", "1": " "},
    ],
)  # fmt: skip
def test_names_that_are_none(tiny_base, tmp_path, names):
    shutil.copytree(tiny_base("bert"), tmp_path / "base")
    peft_folder(tmp_path / "base", tmp_path / "peft")
    (tmp_path / "peft" / "config.json").write_text(json.dumps({"id2label": names}))
    assert "neither it nor its base names its 2 classes" in refusal(TextClassifier.load, tmp_path / "peft")
    (tmp_path / "peft" / "config.json").write_text("{")
    assert "neither it nor its base names its 2 classes" in refusal(TextClassifier.load, tmp_path / "peft")


def test_one_output_is_regression(tiny_base, tmp_path):
    theirs = peft_folder(tiny_base("roberta"), tmp_path / "peft", labels=1)
    convert(tmp_path / "peft", tmp_path / "ours")
    for folder in ("peft", "ours"):
        classifier = TextClassifier.load(tmp_path / folder, base=str(tiny_base("roberta")))
        assert (classifier.meta.labels, classifier.meta.problem_type) == (("value",), "regression")
        assert [p.score for p in classifier.predict(TEXTS)] == pytest.approx(theirs[:, 0].tolist(), abs=1e-5)
    with pytest.raises(UsageError, match="has 1 output"):
        convert(tmp_path / "peft", tmp_path / "x", problem_type="single-label", labels=["a"])


def test_length_comes_from_what_training_left(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    length = lambda **more: (lambda r: (r["max_length"], r["max_length_from"]))(
        convert(tmp_path / "peft", tmp_path / "o", labels=AB, **more)
    )

    def found(**more: Any) -> tuple[int, str, str]:
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        return (*length(**more), read_meta(tmp_path / "o").truncation)

    assert found() == (48, "the base model", "head")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("bert"))
    tokenizer.model_max_length = 40
    tokenizer.save_pretrained(tmp_path / "peft")
    assert found() == (40, "tokenizer_config.json", "head")
    tokenizer.truncation_side = "left"
    tokenizer(["a text"], truncation=True, max_length=21)  # as training does
    tokenizer.save_pretrained(tmp_path / "peft")
    assert found() == (21, "truncation in tokenizer.json", "tail")
    long = " ".join(["good"] * 30 + ["bad"] * 30)
    theirs = peft_logits(tiny_base("bert"), tmp_path / "peft", [long], length=21)
    assert close(TextClassifier.load(tmp_path / "o", base=str(tiny_base("bert"))).logits([long]), theirs)
    (tmp_path / "peft" / "training_params.json").write_text(json.dumps({"max_seq_length": 30}))
    assert found() == (30, "max_seq_length in training_params.json", "tail")
    assert found(max_length=12) == (12, "--max-length", "tail")
    for tokens in (7, 49):
        with pytest.raises(UsageError, match=f"--max-length {tokens}: the base model takes 8 to 48 tokens"):
            convert(tmp_path / "peft", tmp_path / "x", labels=AB, max_length=tokens)


def test_converted_adapters_take_pairs_too(tiny_base, tmp_path):
    """A foreign folder does not say whether it was trained on pairs."""
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "ours", labels=AB)
    classifier = TextClassifier.load(tmp_path / "ours", base=str(tiny_base("bert")))
    theirs = peft_logits(tiny_base("bert"), tmp_path / "peft", TEXTS, TEXTS[::-1], length=48)
    assert close(np.array([p.logits for p in classifier.predict(TEXTS, TEXTS[::-1])]), theirs)


def test_tokenizer_with_tokens_the_base_does_not_know(tiny_base, tmp_path):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    tokenizer = AutoTokenizer.from_pretrained(tiny_base("bert"))
    tokenizer.add_tokens(["[NEW]"])
    tokenizer.save_pretrained(tmp_path / "peft")
    assert "they were resized in training" in refusal(
        convert, tmp_path / "peft", tmp_path / "ours", labels=AB
    )


# --- the HF Trainer and AutoTrain ---


@pytest.fixture(scope="module")
def trainer_output(tiny_base, tmp_path_factory) -> Path:
    """What the HF Trainer leaves after three steps with PEFT, pickles and all; the best checkpoint is not the
    last."""
    out = tmp_path_factory.mktemp("trainer") / "out"
    base = tiny_base("roberta")
    torch.manual_seed(0)
    config = PeftLoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False
    )
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(base, num_labels=2), config)
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = [
        dict(tokenizer(text, truncation=True, max_length=24)) | {"labels": i % 2}
        for i, text in enumerate(TEXTS)
    ]
    arguments = TrainingArguments(
        str(out), max_steps=3, save_steps=1, eval_steps=1, eval_strategy="steps", learning_rate=0.3, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=5, metric_for_best_model="loss", load_best_model_at_end=True, greater_is_better=True, lr_scheduler_type="constant",
        logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert {"training_args.bin", "optimizer.pt", "trainer_state.json", WEIGHTS} <= {
        p.name for p in (out / "checkpoint-3").iterdir()
    }
    return out


def state(folder: Path, best: str | None) -> None:
    content = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    (folder / "trainer_state.json").write_text(
        json.dumps(content | {"best_model_checkpoint": best}), encoding="utf-8"
    )


def test_trainer_output(trainer_output, tiny_base, tmp_path):
    base = tiny_base("roberta")
    out = Path(shutil.copytree(trainer_output, tmp_path / "out"))
    theirs = {n: peft_logits(base, trainer_output / f"checkpoint-{n}", TEXTS, length=24) for n in (1, 2, 3)}
    assert np.abs(theirs[3] - theirs[2]).max() > 1e-3
    best = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"]
    result = convert(out, tmp_path / "best", labels=AB)
    assert (result["source"], result["note"]) == (
        "the HF Trainer",
        f"{Path(best).name}, the best of 3 by trainer_state.json",
    )
    assert (result["max_length"], result["max_length_from"]) == (24, "truncation in tokenizer.json")
    for name, number in (("D:\\runs\\out\\checkpoint-1", 1), ("./out/checkpoint-2/", 2), (None, 3)):
        state(out / "checkpoint-3", name)
        result = convert(out, tmp_path / str(number), labels=AB)
        assert close(
            TextClassifier.load(tmp_path / str(number), base=str(base)).logits(TEXTS), theirs[number]
        )
    assert result["note"] == "checkpoint-3, the last of 3; trainer_state.json names no best one"
    result = convert(out / "checkpoint-1", tmp_path / "one", labels=AB)
    assert (result["source"], result["note"]) == ("the HF Trainer", "")
    assert close(TextClassifier.load(tmp_path / "one", base=str(base)).logits(TEXTS), theirs[1])
    state(out / "checkpoint-3", "out/checkpoint-9")
    assert (
        refusal(convert, out, tmp_path / "x", labels=AB)
        == f"{out}: its best checkpoint, checkpoint-9, is not there; name the checkpoint to convert"
    )
    shutil.copy(
        trainer_output / "checkpoint-2" / WEIGHTS, out
    )  # save_model into the output folder: that is what was wanted last
    for name in (CONFIG, "tokenizer.json"):
        shutil.copy(trainer_output / "checkpoint-2" / name, out)
    convert(out, tmp_path / "final", labels=AB)
    assert close(TextClassifier.load(tmp_path / "final", base=str(base)).logits(TEXTS), theirs[2])


def test_checkpoint_loads_directly(trainer_output, tiny_base):
    theirs = peft_logits(
        tiny_base("roberta"), trainer_output / "checkpoint-2", TEXTS, length=24
    )  # as its tokenizer.json says
    assert close(TextClassifier.load(trainer_output / "checkpoint-2", labels=AB).logits(TEXTS), theirs)


def test_autotrain_output(tiny_base, tmp_path):
    theirs = peft_folder(tiny_base("bert"), tmp_path / "project")
    edit(tmp_path / "project", base_model_name_or_path=None)
    (tmp_path / "project" / "training_params.json").write_text(
        json.dumps({"model": str(tiny_base("bert")), "max_seq_length": 20, "token": None})
    )
    (tmp_path / "project" / "config.json").write_text(json.dumps({"id2label": {"0": "ham", "1": "spam"}}))
    result = convert(tmp_path / "project", tmp_path / "ours")
    assert (result["source"], result["labels"], result["max_length"]) == ("AutoTrain", ["ham", "spam"], 20)
    classifier = TextClassifier.load(tmp_path / "ours", base=str(tiny_base("bert")))
    short = [i for i, e in enumerate(classifier.tokenizer.encode(TEXTS)) if e.full <= 20]
    assert close(classifier.logits([TEXTS[i] for i in short]), theirs[short])


@pytest.mark.parametrize("where", [".", "checkpoint-4"])
def test_whole_models_are_no_adapters(tiny_base, tmp_path, where):
    (tmp_path / "project").mkdir()
    shutil.copytree(tiny_base("bert"), tmp_path / "project" / where, dirs_exist_ok=True)
    said = refusal(convert, tmp_path / "project", tmp_path / "ours", labels=AB)
    assert said == (
        f"{tmp_path / 'project'}: holds a whole fine-tuned model and no adapter (AutoTrain trains text classifiers so); "
        "`textlora extract` makes an adapter of one whose change has low rank"
    )


# --- loralib ---


def loralib_file(
    base: Path,
    path: Path,
    layers: Mapping[str, tuple[int, tuple[bool, ...] | None]],
    alpha: float = 6,
    biases: str = "none",
) -> np.ndarray:
    """Write a checkpoint as loralib does, from `layer -> (rank, enable_lora of MergedLinear)`; logits of
    transformers with the updates merged.

    The update of a MergedLinear is computed as loralib does, by a grouped convolution.
    """
    torch.manual_seed(3)
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval()
    parameters = dict(net.named_parameters())
    saved: dict[str, torch.Tensor] = {}
    heads = [name for name in parameters if name.startswith(("classifier", "pre_classifier", "pooler"))]
    with torch.no_grad():
        for name in heads:
            parameters[name].copy_(0.3 * torch.randn(parameters[name].shape))
            saved[name] = parameters[name].clone()
        for layer, (r, enabled) in layers.items():
            parent = layer.rpartition(".")[0]
            fused = enabled is not None and f"{layer}.weight" not in parameters
            weights = (
                [parameters[f"{parent}.{name}.weight"] for name in ("query", "key", "value")]
                if fused
                else [parameters[f"{layer}.weight"]]
            )
            out, inner = sum(w.shape[0] for w in weights), weights[0].shape[1]
            count = sum(enabled) if enabled else 1
            A = torch.randn(r * count, inner) / inner**0.5
            B = torch.randn(out // (len(enabled) if enabled else 1) * count, r)
            update = F.conv1d(A.unsqueeze(0), B.unsqueeze(-1), groups=count).squeeze(0) * (alpha / r)
            if enabled:
                whole = torch.zeros(out, inner)
                rows = torch.tensor(enabled).view(-1, 1).expand(-1, out // len(enabled)).reshape(-1)
                whole[rows] = update
                update = whole
            for weight, part in zip(weights, update.split([w.shape[0] for w in weights]), strict=True):
                weight += part
            saved |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
        chosen = {
            "none": [],
            "lora_only": [f"{layer}.bias" for layer in layers],
            "all": [n for n in parameters if n.endswith(".bias")],
        }[biases]
        for name in chosen:
            parameters[name].add_(0.3 * torch.randn(parameters[name].shape))
            saved[name] = parameters[name].clone()
        torch.save(saved, path)
        tokenizer = AutoTokenizer.from_pretrained(base)
        kinds = net.config.model_type in ("bert", "electra")
        encoded = [
            tokenizer(text, truncation=True, max_length=48, return_tensors="pt", return_token_type_ids=kinds)
            for text in TEXTS
        ]
        return np.stack([net(**inputs).logits[0].numpy() for inputs in encoded])


ROBERTA = {
    f"roberta.encoder.layer.{i}.attention.self.{name}": (4, None)
    for i in (0, 1)
    for name in ("query", "value")
}


@pytest.mark.parametrize(
    ("family", "layers", "biases"),
    [
        ("roberta", ROBERTA, "none"),
        ("roberta", ROBERTA | {"roberta.encoder.layer.0.output.dense": (2, None)}, "lora_only"),
        ("distilbert", {"distilbert.transformer.layer.1.attention.q_lin": (3, None)}, "all"),
        (
            "bert",
            {
                "bert.encoder.layer.0.attention.self.qkv": (3, (True, False, True)),
                "bert.pooler.dense": (2, None),
            },
            "none",
        ),
        ("bert", {"bert.encoder.layer.1.attention.self.qkv_proj": (3, (True, True, True))}, "none"),
        ("modernbert", {f"model.layers.{i}.attn.Wqkv": (3, (True, False, True)) for i in (0, 1)}, "none"),
        (
            "modernbert",
            {"model.layers.1.attn.Wqkv": (4, (True, True, True)), "model.layers.0.attn.Wqkv": (2, None)},
            "none",
        ),
        ("deberta-v2", {"deberta.encoder.layer.0.attention.self.query_proj": (4, None)}, "none"),
    ],
)
def test_loralib_checkpoints(tiny_base, tmp_path, family, layers, biases):
    base = tiny_base(family)
    theirs = loralib_file(base, tmp_path / "lora.bin", layers, biases=biases)
    untouched = loralib_file(
        base,
        tmp_path / "none.bin",
        {name: (r, e) for name, (r, e) in layers.items()},
        alpha=1e-9,
        biases=biases,
    )
    assert np.abs(theirs - untouched).max() > 1e-2
    result = convert(tmp_path / "lora.bin", tmp_path / "ours", model=str(base), labels=AB, lora_alpha=6)
    assert result["source"] == "loralib"
    assert result["difference"] <= 1e-5 * max(1, result["largest_logit"])
    assert close(TextClassifier.load(tmp_path / "ours", base=str(base)).logits(TEXTS), theirs)
    assert close(peft_logits(base, tmp_path / "ours", TEXTS, length=48), theirs)
    assert json.loads((tmp_path / "ours" / CONFIG).read_text(encoding="utf-8"))["bias"] == biases


def test_loralib_files_that_are_refused(tiny_base, tmp_path, capfd):
    cli, base, out = Cli(capfd), tiny_base("roberta"), tmp_path / "out"
    loralib_file(base, tmp_path / "lora.bin", ROBERTA)
    saved = torch.load(tmp_path / "lora.bin")
    say = lambda *more: cli.fails("convert", tmp_path / "bad.pt", "--output", out, *more, output=tmp_path)
    full = ("--model", base, "--labels", "a,b", "--lora-alpha", "8")

    def write(**changes: torch.Tensor | None) -> None:
        torch.save({n: t for n, t in (saved | changes).items() if t is not None}, tmp_path / "bad.pt")

    layer = "roberta.encoder.layer.0.attention.self.query"
    write()
    assert (
        say("--labels", "a,b", "--lora-alpha", 8)
        == f"{tmp_path / 'bad.pt'} names no base model; pass it as --model"
    )
    assert say(*full[:4]) == (
        f"{tmp_path / 'bad.pt'} does not say its scale, lora_alpha / 4; pass the lora_alpha it was trained with as --lora-alpha"
    )
    assert "is not in the range x>0" in say(*full[:5], "0")
    assert "does not fit" not in say(*full[:2], *full[4:])
    assert "the base has no layer" not in say("--model", tiny_base("bert"), *full[2:])
    write(**{f"{layer}.lora_B": None})
    assert f"'{layer}' has no lora_A (r, in) and lora_B (out, r) that fit each other" in say(*full)
    write(**{f"{layer}.lora_B": saved[f"{layer}.lora_B"][:-1]})
    assert (
        f"'{layer}': lora_A (4, 32) and lora_B (31, 4) fit neither a layer of this base nor two or three parts"
        in say(*full)
    )
    write(**{f"{layer}.weight": torch.zeros(32, 32)})
    assert (
        f"holds the weight of the adapted layer '{layer}', and loralib may have merged the update into it"
        in say(*full)
    )
    write(**{f"{layer}.bias": torch.zeros(32)})
    assert (
        f"holds the bias '{layer}.bias' of the base, but neither those of the adapted layers nor all"
        in say(*full)
    )
    write(**{name: None for name in saved if "classifier" in name})
    assert "the classifier is not in the file, so it would be random" in say(*full)
    write(**{name: None for name in saved if "classifier.dense" in name})
    assert "tensor 'base_model.model.classifier.dense.weight' is missing from the adapter" in say(*full)
    write(**{name: None for name in saved if "lora_A" in name})
    assert "holds no tensor named <layer>.lora_A; is this a loralib checkpoint?" in say(*full)
    torch.save({"epoch": 3, "state": saved}, tmp_path / "bad.pt")
    assert "holds no tensors by name; save the state dict of the adapter alone" in say(*full)
    (tmp_path / "bad.pt").write_bytes(b"not a file of torch")
    assert "not a file of plain tensors, and opening it in another way could run code (" in say(*full)


# --- pickles ---


class _Boom:
    """Unpickling this makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def booms(mark: Path) -> list[bytes]:
    """A pickle that runs code, bare and as torch saves it."""
    torch.save({"a": torch.zeros(2), "b": _Boom(mark)}, mark.with_suffix(".tmp"))
    data = mark.with_suffix(".tmp").read_bytes()
    mark.with_suffix(".tmp").unlink()
    return [pickle.dumps(_Boom(mark)), data]


@pytest.mark.parametrize("kind", [0, 1], ids=["bare", "torch"])
def test_pickles_run_nothing(trainer_output, tiny_base, tmp_path, kind):
    mark, base = tmp_path / "mark", tmp_path / "base"
    shutil.copytree(tiny_base("roberta"), base)
    boom = booms(mark)[kind]
    source = Path(shutil.copytree(trainer_output, tmp_path / "out"))
    checkpoint = source / "checkpoint-3"
    state(checkpoint, "checkpoint-3")
    pickles = (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "adapter_model.bin",
        "pytorch_model.bin",
        "scaler.pt",
        "tokenizer.pkl",
    )
    for folder in (source, checkpoint, base):
        for name in pickles:
            (folder / name).write_bytes(boom)
    convert(source, tmp_path / "ours", model=str(base), labels=AB)
    TextClassifier.load(checkpoint, base=str(base), labels=AB).predict(TEXTS)
    TextClassifier.load(tmp_path / "ours", base=str(base)).predict(TEXTS)
    assert {p.suffix for p in (tmp_path / "ours").iterdir()} == {".json", ".md", ".safetensors"}

    (checkpoint / WEIGHTS).rename(tmp_path / "kept")
    assert "not a file of plain tensors, and opening it in another way could run code" in refusal(
        convert, source, tmp_path / "x", model=str(base), labels=AB
    )
    assert "the weights are a pickle (adapter_model.bin)" in refusal(
        TextClassifier.load, checkpoint, base=str(base), labels=AB
    )
    (tmp_path / "lora.bin").write_bytes(boom)
    refusal(convert, tmp_path / "lora.bin", tmp_path / "x", model=str(base), labels=AB, lora_alpha=8)
    (tmp_path / "kept").rename(checkpoint / WEIGHTS)
    for name in (
        WEIGHTS,
        CONFIG,
        "tokenizer.json",
        "tokenizer_config.json",
        "trainer_state.json",
        "config.json",
        "training_params.json",
    ):
        before = (checkpoint / name).read_bytes() if (checkpoint / name).exists() else None
        (checkpoint / name).write_bytes(boom)
        said = error_of(
            TextloraError, convert, checkpoint, tmp_path / f"with-{name}", model=str(base), labels=AB
        )
        assert (tmp_path / f"with-{name}").exists() == (said is None)
        (checkpoint / name).unlink() if before is None else (checkpoint / name).write_bytes(before)
    for name in (
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "sentencepiece.bpe.model",
    ):
        before = (base / name).read_bytes() if (base / name).exists() else None
        (base / name).write_bytes(boom)
        error_of(TextloraError, convert, checkpoint, tmp_path / "y", model=str(base), labels=AB)
        error_of(TextloraError, TextClassifier.load, checkpoint, base=str(base), labels=AB)
        shutil.rmtree(tmp_path / "y", ignore_errors=True)
        (base / name).unlink() if before is None else (base / name).write_bytes(before)
    assert not mark.exists()
    pickle.loads(booms(mark)[0])
    assert mark.exists()  # it would have


def test_plain_tensors_in_a_pickle_are_taken(tiny_base, tmp_path):
    """As older versions of PEFT saved, half precision included."""
    base = tiny_base("distilbert")
    peft_folder(base, tmp_path / "peft", target_modules=["q_lin"], bias="all")
    tensors = {name: tensor.half() for name, tensor in load_file(tmp_path / "peft" / WEIGHTS).items()}
    (tmp_path / "peft" / WEIGHTS).unlink()
    torch.save(tensors, tmp_path / "peft" / "adapter_model.bin")
    theirs = peft_logits(base, tmp_path / "peft", TEXTS, length=48)
    said = refusal(TextClassifier.load, tmp_path / "peft", base=str(base), labels=AB)
    assert said.endswith("; `textlora convert` takes the tensors out without running anything")
    convert(tmp_path / "peft", tmp_path / "ours", labels=AB)
    assert close(TextClassifier.load(tmp_path / "ours", base=str(base)).logits(TEXTS), theirs)
    assert {t.dtype for t in load_file(tmp_path / "ours" / WEIGHTS).values()} == {torch.float32}


# --- bad input ---


def test_bad_input_on_the_command_line(tiny_base, tmp_path, capfd):
    cli, base, peft = Cli(capfd), tiny_base("bert"), tmp_path / "peft"
    peft_folder(base, peft)
    say = lambda *arguments: cli.fails("convert", *arguments, output=tmp_path)
    good = ("--output", tmp_path / "ours", "--labels", "a,b")
    assert say(tmp_path / "nowhere" / "at", *good) == f"{tmp_path / 'nowhere' / 'at'}: no such folder or file"
    (tmp_path / "empty").mkdir()
    assert say(tmp_path / "empty", *good).startswith(
        f"{tmp_path / 'empty'}: no adapter_config.json, and no checkpoint with one; "
    )
    assert (
        say(peft / WEIGHTS, *good) == f"{peft / WEIGHTS} is a part of a PEFT folder; name the folder: {peft}"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    assert say(peft, "--output", tmp_path / "full", "--labels", "a,b") == (
        f"{tmp_path / 'full'} exists and is not an empty folder; choose another --output"
    )
    assert say(peft, "--output", tmp_path / "ours").endswith(
        "names its 2 classes; name them in class order: --labels negative,positive"
    )
    assert say(peft, "--output", tmp_path / "ours", "--labels", "a,b,c").startswith(
        "--labels: 3 names for a head of 2 classes"
    )
    assert "Missing option '--output'" in say(peft)
    assert (
        say(peft, *good, "--lora-alpha", 8)
        == f"--lora-alpha: {peft / CONFIG} has its own; leave it out; only loralib files lack it"
    )
    assert say(peft, *good, "--model", tmp_path / "nowhere" / "at").startswith(
        f"{tmp_path / 'nowhere' / 'at'}: no such folder"
    )
    assert f"{peft} does not fit {tiny_base('roberta')}: --target-modules bert.encoder" in say(
        peft, *good, "--model", tiny_base("roberta")
    )
    make_tiny("bert", tmp_path / "wide", hidden_size=40)
    assert "has shape (4, 32), this model needs (4, 40); pass the base it was trained on as --model" in say(
        peft, *good, "--model", tmp_path / "wide"
    )
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(peft / CONFIG, tmp_path / "both")
    assert f"{tmp_path / 'both'}: holds an adapter beside the base's weights" in say(
        peft, *good, "--model", tmp_path / "both"
    )
    shutil.move(peft, tmp_path / "named" / "spam")
    assert (
        say(tmp_path / "named", *good)
        == f"{tmp_path / 'named'} holds adapters by name: spam; name one: {tmp_path / 'named' / 'spam'}"
    )
    convert(tmp_path / "named" / "spam", tmp_path / "done", labels=AB)
    assert (
        say(tmp_path / "done", *good)
        == f"{tmp_path / 'done'} is a textlora adapter already; load it as it is"
    )
    edit(tmp_path / "named" / "spam", base_model_name_or_path=None)
    assert (
        say(tmp_path / "named" / "spam", *good)
        == f"{tmp_path / 'named' / 'spam'} names no base model; pass it as --model"
    )


def test_what_is_printed(tiny_base, tmp_path, capfd):
    cli = Cli(capfd)
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    code, out, err = cli(
        "convert", tmp_path / "peft", "--output", tmp_path / "1", "--labels", "a,b", "--json"
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    result = json.loads(out)
    assert result["adapter_parameters"] == 2 * 2 * 2 * 4 * 32
    assert result["head_parameters"] == 2 * 33
    code, out, _ = cli("convert", tmp_path / "peft", "--output", tmp_path / "2", "--labels", "a,b")
    assert code == 0
    assert out.splitlines()[0] == "made by PEFT"
    assert "labels: a, b (from --labels)" in out
    assert "largest difference of a logit from the source's on 8 texts: " in out
    assert snapshot(tmp_path / "1")[WEIGHTS] == snapshot(tmp_path / "2")[WEIGHTS]


def test_nothing_is_left_when_the_proof_fails(tiny_base, tmp_path, capfd, monkeypatch):
    peft_folder(tiny_base("bert"), tmp_path / "peft")
    monkeypatch.setattr(
        "textlora.transform.convert._source_logits", lambda *_: np.ones((8, 2), dtype=np.float32)
    )
    said = Cli(capfd).fails(
        "convert",
        tmp_path / "peft",
        "--output",
        tmp_path / "ours",
        "--labels",
        "a,b",
        code=1,
        output=tmp_path,
    )
    assert said.startswith("the converted adapter gives logits ")


# --- fuzzing ---

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["all", "LORA", "query", "\0", "../x", "gaussian"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=8) | st.sampled_from(["query", "(", "value"]), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "modules_to_save",
    "target_modules",
    "task_type",
    "peft_type",
    "base_model_name_or_path",
    "revision",
    "fan_in_fan_out",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
    "lora_bias",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "trainable_token_indices",
    "eva_config",
    "megatron_config",
    "layer_replication",
    "corda_config",
    "loftq_config",
    "runtime_config",
    "use_qalora",
    "ensure_weight_tying",
]


@pytest.fixture(scope="module")
def fuzzed(tiny_base, tmp_path_factory) -> tuple[Path, str, dict[str, Any], np.ndarray]:
    folder = tmp_path_factory.mktemp("fuzz") / "peft"
    theirs = peft_folder(tiny_base("bert"), folder)
    return folder, str(tiny_base("bert")), json.loads((folder / CONFIG).read_text(encoding="utf-8")), theirs


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), JSON, min_size=1, max_size=3),
    removed=st.sets(st.sampled_from(KEYS), max_size=1),
)
@example(changes={"rank_pattern": {"query": 10**400}}, removed=set())
@example(changes={"lora_alpha": 10**400}, removed=set())
@example(changes={"alpha_pattern": {"(?P<a>": 1}}, removed=set())
@example(changes={"rank_pattern": {"query": 64}}, removed=set())
def test_configs_made_up_give_an_answer_or_an_adapter_error(fuzzed, changes, removed):
    folder, base, config, theirs = fuzzed
    made_up = {key: value for key, value in (config | changes).items() if key not in removed}
    (folder / CONFIG).write_text(json.dumps(made_up), encoding="utf-8")
    answer = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    refused = error_of(AdapterError, TextClassifier.load, folder, base=base, labels=AB)
    if refused is None and not answer & {*changes, *removed}:
        assert close(TextClassifier.load(folder, base=base, labels=AB).logits(TEXTS), theirs)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=2))
@example(changes={"modules_to_save": ["("], "exclude_modules": 3})
@example(changes={"target_modules": ".*", "layers_to_transform": [0]})
@example(changes={"inference_mode": "x", "auto_mapping": {"parent_library": "os"}})
def test_converting_made_up_configs_leaves_nothing_or_an_adapter(fuzzed, tmp_path_factory, changes):
    """PEFT itself reads the config here, and may fail in any way."""
    folder, base, config, _ = fuzzed
    (folder / CONFIG).write_text(json.dumps(config | changes), encoding="utf-8")
    out = tmp_path_factory.mktemp("out") / "ours"
    if error_of(AdapterError, convert, folder, out, model=base, labels=AB) is None:
        TextClassifier.load(out, base=base)
    else:
        assert list(out.parent.iterdir()) == []


def test_reading_a_source_does_not_look_further_than_it_must(trainer_output, monkeypatch):
    """No pickle beside the weights is opened."""
    monkeypatch.setattr(torch, "load", None)
    assert read_source(trainer_output).folder.meta is None
    assert SIDE not in {p.name for p in trainer_output.rglob("*")}

"""Taking an adapter out of a merged model: the same logits and ranks again, and what is no adapter is
refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import FAST, SLOW, make_tiny
from safetensors.torch import load_file, save_file
from support import WEIGHTS, Cli
from test_merge import (
    ALL_DORA,
    LABELS,
    TEXTS,
    close,
    make_adapter,
    merged,
    pefts_merge,
    transformers_logits,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from textlora import TextClassifier
from textlora.adapters.golden_texts import GOLDEN_TEXTS
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.model.interface import Model
from textlora.transform.extract import extract


@pytest.fixture
def base(tiny_base) -> Path:
    return tiny_base("bert")


@pytest.fixture
def refused(tmp_path, cli: Cli, near) -> Callable[..., str]:
    """`refused(base, *flags)`: extract from `tmp_path / "m"` must end with code 2 and leave nothing."""

    def run(base: Path, *flags: object, code: int = 2) -> str:
        return cli.fails(
            "extract",
            tmp_path / "m",
            "--base",
            base,
            "--output",
            tmp_path / "x",
            *flags,
            code=code,
            output=tmp_path,
        )

    return run


def by_peft(
    base: Path,
    output: Path,
    *,
    r: int = 4,
    dtype: torch.dtype = torch.float32,
    labels: int = 2,
    scale: float = 0.2,
    **config: object,
) -> None:
    """A model merged and saved by peft and transformers alone."""
    torch.manual_seed(0)
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels, dtype=dtype)
    model = peft.get_peft_model(net, peft.LoraConfig(task_type="SEQ_CLS", r=r, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(
                    scale * torch.randn(parameter.shape) + (parameter if "lora" not in name else 0)
                )
    net = model.merge_and_unload()
    net.save_pretrained(output)
    inputs = [
        "input_ids",
        *(["token_type_ids"] if net.config.model_type == "bert" else []),
        "attention_mask",
    ]  # the tiny tokenizer does not say
    AutoTokenizer.from_pretrained(base, model_max_length=40, model_input_names=inputs).save_pretrained(output)


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


# --- round trips ---


@pytest.mark.parametrize("family", FAST + SLOW)
def test_merge_and_extract_give_the_same_logits(family, tiny_base, tmp_path, near):
    base = tiny_base(family)
    classifier = make_adapter(
        tmp_path / "a",
        base,
        target_modules=("all-linear",),
        layers="last:1" if family != "albert" else "all",
        r=3,
    )
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    result = extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    assert result["r"] == 3
    assert list(result["layers"]) == classifier.model.target_modules  # and no layer of the first block
    assert max(layer["residual"] for layer in result["layers"].values()) < 1e-6
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert close(again.logits(TEXTS), classifier.logits(TEXTS))
    old, new = load_file(tmp_path / "a" / WEIGHTS), load_file(tmp_path / "x" / WEIGHTS)
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        if name.endswith("lora_A.weight"):
            products = [t[name.replace("lora_A", "lora_B")] @ t[name] for t in (old, new)]
            torch.testing.assert_close(products[1], products[0] * 16 / 3, rtol=1e-4, atol=1e-6)
        elif ".lora_" not in name:
            assert torch.equal(new[name], tensor)
    kept = ("labels", "problem_type", "pairs", "pooling", "max_length", "truncation", "base")
    assert {key: getattr(again.meta, key) for key in kept} == {
        key: getattr(classifier.meta, key) for key in kept
    }
    assert [row["text"] for row in again.meta.golden] == list(GOLDEN_TEXTS)
    theirs = pefts_merge(tmp_path / "x", base)  # the folder is plain peft's too
    ids = [torch.from_numpy(e.ids[None]).long() for e in again.tokenizer.encode(TEXTS)]
    assert close(np.stack([theirs(row).logits[0].detach().numpy() for row in ids]), again.logits(TEXTS))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": MULTI_LABEL, "thresholds": (0.25, 0.5, 0.75)},
        {"kind": REGRESSION, "labels": ("value",)},
        {"pairs": True},
    ],
)
def test_the_task_survives(changes, base, tmp_path, near):
    classifier = make_adapter(tmp_path / "a", base, truncation="head-tail", max_length=24, **changes)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    for key in (
        "labels",
        "problem_type",
        "pairs",
        "max_length",
        "truncation",
        "thresholds",
        "temperature",
        "label_separator",
    ):
        assert getattr(again.meta, key) == getattr(classifier.meta, key), key
    pairs = TEXTS[::-1] if classifier.meta.pairs else None
    assert close(again.logits(TEXTS, pairs), classifier.logits(TEXTS, pairs))


def test_every_layer_keeps_its_own_rank(base, tmp_path, near):
    """Ranks are found layer by layer; A and B are filled up with zeros to the largest."""

    def edit(model: Model) -> None:
        for i, (name, tensor) in enumerate(model.trainable().items()):
            if name.endswith("lora_A.weight"):
                tensor[1 + i // 2 % 4 :] = 0

    classifier = make_adapter(tmp_path / "a", base, edit=edit)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    result = extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    assert [layer["rank"] for layer in result["layers"].values()] == [1, 2, 3, 4]
    assert result["r"] == 4
    assert close(TextClassifier.load(tmp_path / "x", base=str(base)).logits(TEXTS), classifier.logits(TEXTS))


def test_an_untouched_layer_is_not_adapted(base, tmp_path, near):
    name = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"
    classifier = make_adapter(tmp_path / "a", base, edit=lambda model: model.trainable()[name].zero_())
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    targets = json.loads((tmp_path / "x" / "adapter_config.json").read_text(encoding="utf-8"))[
        "target_modules"
    ]
    assert targets == [
        f"bert.encoder.layer.{k}"
        for k in ("0.attention.self.query", "0.attention.self.value", "1.attention.self.value")
    ]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_models_that_peft_merged(family, tiny_base, tmp_path, cli, near):
    """Labels, length and task as transformers has them; which texts it takes is not known, so single ones and
    pairs."""
    base = tiny_base(family)
    by_peft(
        base,
        tmp_path / "m",
        target_modules=r".*layer\.\d\..*(query|value|query_proj|intermediate\.dense|q_lin|lin1)",
    )
    code, out, err = cli("extract", tmp_path / "m", "--base", base, "--output", tmp_path / "x")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["layer", "rank", "left", "over", "rounding"]
    assert out.splitlines()[-1] == f"saved to {tmp_path / 'x'}"
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert (again.meta.labels, again.meta.problem_type, again.meta.max_length) == (
        ("LABEL_0", "LABEL_1"),
        SINGLE_LABEL,
        40,
    )
    assert close(again.logits(TEXTS), transformers_logits(tmp_path / "m", TEXTS), 1e-4)
    assert close(
        again.logits(TEXTS, TEXTS[::-1]), transformers_logits(tmp_path / "m", TEXTS, TEXTS[::-1]), 1e-4
    )


def test_a_trained_pooler_is_taken_from_the_merged_model(base, tmp_path, near):
    by_peft(base, tmp_path / "m", modules_to_save=["classifier", "pooler"])
    extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert close(again.logits(TEXTS), transformers_logits(tmp_path / "m", TEXTS), 1e-4)
    assert "base_model.model.bert.pooler.dense.weight" in load_file(tmp_path / "x" / WEIGHTS)


# --- rounding ---


def test_float16_is_taken_while_the_rounding_is_small(base, tmp_path, near):
    classifier = make_adapter(tmp_path / "a", base)
    merged(classifier, base, tmp_path / "a", tmp_path / "m", "float16")
    result = extract(str(tmp_path / "m"), str(base), tmp_path / "x")
    assert (result["dtype"], result["r"]) == ("float16", 4)
    assert result["residual"] == pytest.approx(
        result["rounding"], rel=0.3
    )  # what is left over is what rounding leaves
    assert 1e-5 < result["residual"] < 0.05
    again = TextClassifier.load(tmp_path / "x", base=str(base)).logits(TEXTS)
    far = np.abs(transformers_logits(tmp_path / "m", TEXTS) - classifier.logits(TEXTS)).max()
    assert (
        np.abs(again - classifier.logits(TEXTS)).max() < far + 1e-5
    )  # no worse than the rounded model itself


@pytest.mark.parametrize("widened", [False, True])
def test_an_adapter_drowned_by_bfloat16_is_refused(widened, base, tmp_path, refused):
    """Also where the rounded weights were saved as float32 again."""

    def shrink(model: Model) -> None:
        for name, tensor in model.trainable().items():
            if ".lora_B." in name:
                tensor.mul_(0.01)

    classifier = make_adapter(tmp_path / "a", base, edit=shrink)
    merged(classifier, base, tmp_path / "a", tmp_path / "m", "bfloat16")
    if widened:
        edited(
            tmp_path / "m",
            lambda tensors: tensors.update({name: tensor.float() for name, tensor in tensors.items()}),
        )
    said = refused(base)
    assert "rounding to bfloat16 drowned the adapter" in said
    assert "(at most 5% may be); merge it again with --dtype float32" in said
    shutil.rmtree(tmp_path / "m")
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    assert extract(str(tmp_path / "m"), str(base), tmp_path / "x")["r"] == 4


# --- what is no adapter ---


def test_dora_and_full_fine_tuning_have_no_low_rank(base, tmp_path, refused):
    merged(make_adapter(tmp_path / "a", base, **ALL_DORA), base, tmp_path / "a", tmp_path / "m")
    assert "it has no low rank: fine-tuned whole, or merged from DoRA" in refused(base)
    shutil.rmtree(tmp_path / "m")
    by_peft(base, tmp_path / "m")
    draw = torch.Generator().manual_seed(1)
    name = "bert.encoder.layer.0.output.dense.weight"
    edited(
        tmp_path / "m",
        lambda tensors: tensors[name].add_(0.01 * torch.randn(tensors[name].shape, generator=draw)),
    )
    assert f"of the difference of {name.removesuffix('.weight')} is left over (at most 5% may be)" in refused(
        base
    )


def test_a_rank_too_small_is_refused_and_the_right_one_named(base, tmp_path, refused):
    merged(make_adapter(tmp_path / "a", base), base, tmp_path / "a", tmp_path / "m")
    said = refused(base, "--r", 3)
    assert "at rank 3 " in said
    assert said.endswith("the spectrum shows rank 4, raise --r")
    assert refused(base, "--r", 0) == "--r 0: the rank must be at least 1"
    assert extract(str(tmp_path / "m"), str(base), tmp_path / "x", r=9)["r"] == 4


def test_a_smaller_rank_may_leave_out_a_twentieth(base, tmp_path, near):
    def edit(model: Model) -> None:
        for name, tensor in model.trainable().items():
            if name.endswith("lora_A.weight"):
                tensor[3].mul_(0.01)

    classifier = make_adapter(tmp_path / "a", base, edit=edit)
    merged(classifier, base, tmp_path / "a", tmp_path / "m")
    result = extract(str(tmp_path / "m"), str(base), tmp_path / "x", r=3)
    assert result["r"] == 3
    assert 1e-3 < result["residual"] < 0.05
    now = TextClassifier.load(tmp_path / "x", base=str(base)).logits(TEXTS)
    assert 1e-4 < np.abs(now - classifier.logits(TEXTS)).max() < 0.2


@pytest.mark.parametrize(
    "name",
    [
        "bert.embeddings.word_embeddings.weight",
        "bert.encoder.layer.1.output.LayerNorm.bias",
        "bert.encoder.layer.0.attention.self.query.bias",
    ],
)
def test_other_tensors_that_differ_are_refused(name, base, tmp_path, refused):
    merged(make_adapter(tmp_path / "a", base), base, tmp_path / "a", tmp_path / "m")
    edited(tmp_path / "m", lambda tensors: tensors[name].view(-1)[5:6].add_(1e-3))
    assert f"tensor '{name}' differs from the base (1 such outside dense layers and head)" in refused(base)


def test_another_base_is_refused(tiny_base, base, tmp_path, refused):
    merged(make_adapter(tmp_path / "a", base), base, tmp_path / "a", tmp_path / "m")
    assert "is --base the model it was merged into?" in refused(make_tiny("bert", tmp_path / "other", seed=1))
    assert f"{tmp_path / 'm'} is a bert, {tiny_base('roberta')} is a roberta" in refused(tiny_base("roberta"))
    assert "no such folder" in refused(tmp_path / "nowhere")
    larger = make_tiny("bert", tmp_path / "larger", vocab_size=300)
    assert "has shape" in refused(larger)


def test_damaged_and_unfitting_merged_folders_are_refused(base, tmp_path, refused, cli):
    merged(make_adapter(tmp_path / "a", base), base, tmp_path / "a", tmp_path / "m")
    whole = load_file(tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text(encoding="utf-8"))

    def write(tensors: dict[str, Tensor], **changes: object) -> None:
        save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")

    write({name: tensor for name, tensor in whole.items() if name != "classifier.weight"})
    assert "tensor 'classifier.weight' is missing or of another shape (1 in all)" in refused(base)
    write(whole | {"classifier.weight": whole["classifier.weight"] * float("nan")})
    assert "holds values that are not finite numbers" in refused(base)
    write(whole, id2label={"0": "a", "2": "b", "3": "c"})
    assert "config.json has no id2label for every class" in refused(base)
    write(whole, id2label={"0": "a", "1": "b", "2": "a"})
    assert "config.json gives two classes one name" in refused(base)
    write(whole, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}, num_labels=2)
    assert "is missing or of another shape" in refused(base)
    write(whole, problem_type="tagging")
    assert "'tagging' is not one that transformers knows" in refused(base)
    write({name: tensor for name, tensor in load_file(base / "model.safetensors").items() if name.startswith("bert.")} | {
        name: tensor for name, tensor in whole.items() if name.startswith("classifier.")
    })  # fmt: skip
    assert "no dense layer differs from the base, so there is no adapter in it" in refused(base)
    write(whole)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("x")
    assert "exists and is not an empty folder" in refused(base)


def test_json_record(base, tmp_path, cli, near):
    merged(make_adapter(tmp_path / "a", base), base, tmp_path / "a", tmp_path / "m")
    code, out, _ = cli("extract", tmp_path / "m", "--base", base, "--output", tmp_path / "x", "--json")
    assert code == 0
    result = json.loads(out)
    assert set(result) == {
        "output",
        "dtype",
        "r",
        "residual",
        "rounding",
        "layers",
        "difference",
        "rounding_difference",
    }
    assert result["dtype"] == "float32"
    assert result["difference"] < 1e-5
    assert TextClassifier.load(tmp_path / "x", base=str(base)).meta.labels == LABELS

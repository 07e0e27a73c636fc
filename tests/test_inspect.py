"""What `inspect` says: the spectrum against a full SVD in float64, counts, fingerprint, and whether and why
an adapter fits a base."""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_tiny, random_adapter
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import CONFIG, SIDE, WEIGHTS, Cli, trained
from transformers import AutoModelForSequenceClassification

from textlora.adapters.folder import read_adapter, write_side_file
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError
from textlora.model.base import find_base
from textlora.model.open import open_model
from textlora.transform.inspect import (
    compare,
    effective_rank,
    inspect_folder,
    relabel_folder,
    spectrum,
    summary_lines,
)


@pytest.fixture
def folder(tiny_base, tmp_path_factory, tmp_path) -> Path:
    """A copy of a trained adapter, without its run."""
    return Path(
        shutil.copytree(
            trained(tiny_base, tmp_path_factory).folder,
            tmp_path / "adapter",
            ignore=shutil.ignore_patterns("run"),
        )
    )


def peft_folder(base: Path, target: Path, **settings: object) -> Path:
    """A folder saved by PEFT with A, B and head at random."""
    torch.manual_seed(0)
    net = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3),
        PeftLoraConfig(task_type="SEQ_CLS", **settings),
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.3)
    net.save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("out", "inner", "r"), [(48, 32, 4), (32, 48, 4), (6, 5, 5), (7, 3, 5), (3, 7, 5), (1, 1, 1)]
)
def test_spectrum_is_that_of_the_whole_matrix(out, inner, r):
    generator = torch.Generator().manual_seed(out)
    A, B = torch.randn(r, inner, generator=generator), torch.randn(out, r, generator=generator)
    values = spectrum(A, B, 0.7)
    whole = np.linalg.svd(0.7 * B.double().numpy() @ A.double().numpy(), compute_uv=False)
    assert len(values) == min(r, out, inner)
    assert np.allclose(values, whole[: len(values)], rtol=1e-12)
    assert np.allclose(whole[len(values) :], 0, atol=1e-12)


def test_effective_rank():
    assert effective_rank([2.0, 2.0, 2.0]) == pytest.approx(3)
    assert effective_rank([5.0, 0.0]) == 1
    assert effective_rank([0.0, 0.0]) == 0
    assert effective_rank([3.0, 1.0]) == pytest.approx(
        math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    )


def test_layers_with_ranks_and_alphas_of_their_own(tiny_base, tmp_path):
    """PEFT's patterns with rsLoRA: what is shown is what PEFT itself multiplies by."""
    names = {"rank_pattern": {"layer.1.*query": 6}, "alpha_pattern": {"value": 3}}
    folder = peft_folder(
        tiny_base("bert"),
        tmp_path / "peft",
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        use_rslora=True,
        **names,
    )
    net = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_base("bert"), num_labels=3), folder
    )
    modules = dict(net.base_model.model.named_modules())
    facts = inspect_folder(folder)
    assert (facts["method"], len(facts["layers"])) == ("rsLoRA", 4)
    for layer in facts["layers"]:
        theirs = modules[layer["module"]]
        assert layer["scaling"] == pytest.approx(theirs.scaling["default"])
        assert (layer["r"], layer["lora_alpha"]) == (theirs.r["default"], theirs.lora_alpha["default"])
        whole = np.linalg.svd(theirs.get_delta_weight("default").double().detach().numpy(), compute_uv=False)
        assert np.allclose(layer["singular_values"], whole[: layer["r"]], rtol=1e-4, atol=1e-6)
        assert layer["frobenius"] == pytest.approx(float(theirs.get_delta_weight("default").norm()), rel=1e-5)
        assert layer["top"] == layer["singular_values"][0] == max(layer["singular_values"])
        assert (
            layer["parameters"]
            == theirs.lora_A["default"].weight.numel() + theirs.lora_B["default"].weight.numel()
        )
    assert (
        summary_lines(facts)[0]
        == f"{folder}: rsLoRA r and alpha by layer: 4 and 3, 4 and 8, 6 and 8, 4 adapted layers"
    )


def test_counts_apart(tiny_base, tmp_path):
    folder = peft_folder(
        tiny_base("roberta"), tmp_path / "peft", r=4, target_modules=["query"], use_dora=True
    )
    tensors = load_file(folder / WEIGHTS)
    facts = inspect_folder(folder)
    assert (facts["method"], facts["head"]) == ("DoRA", ["classifier.dense", "classifier.out_proj"])
    assert (
        facts["adapter_parameters"]
        == 2 * (4 * 32 + 32 * 4 + 32)
        == sum(layer["parameters"] for layer in facts["layers"])
    )
    assert facts["head_parameters"] == 32 * 32 + 32 + 3 * 32 + 3
    assert facts["adapter_parameters"] + facts["head_parameters"] == sum(t.numel() for t in tensors.values())
    assert facts["weights_bytes"] == (folder / WEIGHTS).stat().st_size
    assert facts["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert "A, B and magnitudes" in summary_lines(facts)[1]
    assert (
        summary_lines(facts)[2] == "no textlora.json: labels, task, length and base weights are not recorded"
    )


def test_biases_of_the_base_are_counted_apart(tiny_base, tmp_path):
    facts = inspect_folder(
        peft_folder(tiny_base("bert"), tmp_path / "peft", r=2, target_modules=["query"], bias="lora_only")
    )
    assert (facts["adapter_parameters"], facts["head_parameters"], facts["bias_parameters"]) == (
        2 * 2 * 64,
        3 * 32 + 3,
        2 * 32,
    )
    assert "99 head (classifier), 64 biases of the base; " in summary_lines(facts)[1]


def test_block_ten_stands_behind_block_nine(tmp_path):
    base = make_tiny("bert", tmp_path / "deep", num_hidden_layers=11)
    facts = inspect_folder(peft_folder(base, tmp_path / "peft", r=1, target_modules=["query"]))
    assert facts["target_modules"] == [f"bert.encoder.layer.{i}.attention.self.query" for i in range(11)]


# --- fingerprint ---


def test_fingerprint_is_of_what_is_computed(folder, tiny_base, tmp_path):
    """Stable under labels, card, order of tensors, precision that holds the values, and PEFT's own saving;
    any other value changes it."""
    first = inspect_folder(folder)["fingerprint"]
    relabel_folder(folder, ("neg=no",))
    (folder / "README.md").write_text("mine", encoding="utf-8")
    assert inspect_folder(folder)["fingerprint"] == first
    tensors = load_file(folder / WEIGHTS)
    (folder / SIDE).unlink()
    save_file({name: tensors[name].double() for name in sorted(tensors, reverse=True)}, folder / WEIGHTS)
    assert inspect_folder(folder)["fingerprint"] == first
    net = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(tiny_base("bert"), num_labels=2), folder
    )
    net.save_pretrained(tmp_path / "again")
    assert inspect_folder(tmp_path / "again")["fingerprint"] == first
    seen = {first}
    for name in tensors:
        changed = dict(tensors)
        changed[name] = tensors[name].clone()
        changed[name].view(torch.int32).view(-1)[0] ^= 1  # the lowest bit of one number
        save_file(changed, folder / WEIGHTS)
        seen.add(inspect_folder(folder)["fingerprint"])
    save_file(tensors, folder / WEIGHTS)
    for change in (
        {"lora_alpha": 17},
        {"use_rslora": True},
        {"alpha_pattern": {"layer.0.attention.self.query": 3}},
    ):
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(config | change), encoding="utf-8")
        seen.add(inspect_folder(folder)["fingerprint"])
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert len(seen) == 1 + len(tensors) + 3
    assert inspect_folder(folder)["fingerprint"] == first


# --- against a base ---


def checks(folder: Path, base: Path) -> list[tuple[str, bool, str]]:
    return [tuple(check.values()) for check in compare(read_adapter(folder), str(base))]


def test_against_says_why(folder, tiny_base, tmp_path):
    fits = [
        ("architecture", True, "both are bert"),
        ("layers", True, "all 4 adapted layers are there"),
        ("shapes", True, "all 10 tensors have a place and its shape"),
        ("weights", True, "same weights as it was trained on"),
    ]
    assert checks(folder, tiny_base("bert")) == fits
    roberta = checks(folder, tiny_base("roberta"))
    assert roberta == [("architecture", False, "the base is a roberta, the adapter was trained on a bert")]
    short = make_tiny("bert", tmp_path / "short", num_hidden_layers=1)
    missing = (
        "2 of its 4 adapted layers are not in the base, such as bert.encoder.layer.1.attention.self.query"
    )
    assert checks(folder, short) == [*fits[:1], ("layers", False, missing)]
    wide = make_tiny("bert", tmp_path / "wide", hidden_size=48)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    assert checks(folder, wide) == [
        *fits[:2],
        ("shapes", False, f"tensor '{name}' has shape (4, 32), this model needs (4, 48)"),
    ]
    other = make_tiny("bert", tmp_path / "other", seed=5)
    *same, (what, ok, said) = checks(folder, other)
    assert (same, what, ok) == (fits[:3], "weights", False)
    assert re.fullmatch(
        r"names and shapes fit, but the weights differ: sha256:\w{12} is not sha256:\w{12}", said
    )
    facts = inspect_folder(folder, str(other))
    assert (facts["fits"], facts["fits_why"]) == (False, said)
    assert summary_lines(facts)[-3:] == [
        f"shapes        yes  {fits[2][2]}",
        f"weights       no   {said}",
        f"does not fit: {said}",
    ]


def test_against_for_architectures_without_a_fast_path(tiny_base, tmp_path):
    folder = peft_folder(tiny_base("modernbert"), tmp_path / "peft", r=2, target_modules=["Wqkv"])
    *_, (what, ok, said) = checks(folder, tiny_base("modernbert"))
    assert (what, ok, said) == (
        "weights",
        True,
        "names and shapes fit; which weights it was trained on is not recorded",
    )
    assert [check[:2] for check in checks(folder, tiny_base("bert"))][-1][1] is False


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_against_counts_the_labels_of_a_folder_that_names_none(tiny_base, tmp_path, family):
    target = "q_lin" if family == "distilbert" else "query"
    folder = peft_folder(tiny_base(family), tmp_path / "peft", r=2, target_modules=[target])
    assert inspect_folder(folder, str(tiny_base(family)))["fits"] is True


# --- damage and words ---


@pytest.mark.parametrize("change", ["missing", "rank", "nan"])
def test_halves_that_do_not_go_together(folder, change):
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_B.weight"
    if change == "missing":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(32, 3) if change == "rank" else torch.full((32, 4), math.nan)
    save_file(tensors, folder / WEIGHTS)
    (folder / SIDE).unlink()
    said = (
        "holds values that are not finite numbers"
        if change == "nan"
        else "lora_A and lora_B of 'bert.encoder.layer.0.attention.self.query' do not"
    )
    with pytest.raises(AdapterError, match=said):
        inspect_folder(folder)


def test_the_page_on_the_terminal(folder, tiny_base, capfd):
    code, out, err = Cli(capfd)("inspect", folder)
    lines = out.splitlines()
    facts = inspect_folder(folder)
    assert (code, err) == (0, "")
    head = next(i for i, line in enumerate(lines) if line.startswith("update s B A by layer"))
    assert lines[head - 1] == f"fingerprint: {facts['fingerprint'][:23]}"
    assert lines[head].split("  ")[0] == "update s B A by layer"
    shown = [line.split() for line in lines[head + 1 :]]
    assert shown == [
        [layer["module"].removeprefix("bert.encoder.layer."), "4", "16", f"{layer['frobenius']:.4f}", f"{layer['top']:.4f}", f"{layer['effective_rank']:.2f}"]
        for layer in facts["layers"]
    ]  # fmt: skip
    assert len({len(line) for line in lines[head:]}) == 1  # columns stand under each other
    code, out, _ = Cli(capfd)("inspect", folder, "--json")
    assert json.loads(out)["layers"] == facts["layers"]


def test_relabel_renames_in_the_card_too(folder):
    card = folder / "README.md"
    assert 'id2label: {"0": "neg", "1": "pos"}' in card.read_text(encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    relabel_folder(folder, ("neg=no, not at all",))
    text = card.read_text(encoding="utf-8")
    assert 'id2label: {"0": "no, not at all", "1": "pos"}' in text
    assert "`no, not at all`, `pos`" in text
    (folder / "notes.txt").unlink()  # a file that is no part of the adapter may come and go
    assert inspect_folder(folder)["edited"] == []


def test_a_trained_dora_with_its_magnitudes(tiny_base, tmp_path):
    """Numbers of our own writing: a random adapter on the packed path, saved and read."""
    from textlora.adapters.folder import AdapterMeta, peft_config, write_weights

    lora = LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=("output.dense",))
    model, _ = open_model(find_base(str(tiny_base("bert"))), lora, 2)
    drawn = random_adapter(model)
    write_weights(
        tmp_path, peft_config(lora, model.target_modules, model.modules_to_save, "first", None, None), drawn
    )
    base = {"id": None, "revision": None, "model_type": "bert", "hash": model.base_hash()}
    write_side_file(
        tmp_path,
        AdapterMeta(
            ("a", "b"), "single_label_classification", False, "first", 32, "head", base, textlora_version="0"
        ),
    )
    facts = inspect_folder(tmp_path, str(tiny_base("bert")))
    assert facts["fits"] is True
    for layer in facts["layers"]:
        A, B = (drawn[f"base_model.model.{layer['module']}.lora_{side}.weight"].double() for side in "AB")
        assert layer["frobenius"] == pytest.approx(float((2 * B @ A).norm()), rel=1e-12)
        assert layer["parameters"] == A.numel() + B.numel() + B.shape[0]


def test_temperatures_are_shown_and_only_what_is_computed_counts(folder):
    """One in the head is noted, one that readers apply is said; neither note changes the fingerprint."""
    meta = dataclasses.replace(read_adapter(folder).meta, temperature=1.0, fitted_temperature=1.0)
    write_side_file(folder, meta)
    before = inspect_folder(folder)
    assert not any(line.startswith("temperature") for line in summary_lines(before))
    write_side_file(folder, dataclasses.replace(meta, fitted_temperature=1.75))
    noted = inspect_folder(folder)
    assert (noted["temperature"], noted["fitted_temperature"]) == (1.0, 1.75)
    assert "temperature: 1.75, divided into the head" in summary_lines(noted)
    write_side_file(folder, dataclasses.replace(meta, temperature=0.5))
    applied = inspect_folder(folder)
    assert "temperature: 0.5, by which whoever reads it divides the logits" in summary_lines(applied)
    assert before["fingerprint"] == noted["fingerprint"] == applied["fingerprint"]

"""Combining adapters: against peft's add_weighted_adapter, against the formulas, and what does not go
together is refused."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from conftest import make_tiny, random_adapter
from safetensors.torch import load_file, save_file
from support import CONFIG, WEIGHTS, Cli, single_rows, write_csv
from test_merge import ALL_DORA, LABELS, TEXTS, close, make_adapter, pefts_merge
from transformers import AutoModelForSequenceClassification

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter, write_side_file
from textlora.core.config import MULTI_LABEL, REGRESSION
from textlora.model.interface import Model
from textlora.model.lora import delta
from textlora.transform.combine import combine, combined_delta
from textlora.transform.transformers_names import named_loras, trained_whole


@pytest.fixture
def base(tiny_base) -> Path:
    return tiny_base("bert")


@pytest.fixture
def refused(tmp_path, cli: Cli) -> Callable[..., str]:
    """`refused("a", "b", *flags)`: combining these must end with code 2 and leave nothing."""

    def run(base: Path, *arguments: object) -> str:
        named = [tmp_path / a if isinstance(a, str) and len(a) == 1 and a.isalpha() else a for a in arguments]
        return cli.fails("combine", *named, "--model", base, "--output", tmp_path / "x", output=tmp_path)

    return run


def differences(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each layer, float64, by our formula."""
    model = TextClassifier.load(folder, base=str(base)).model
    loras = named_loras(model)
    weights = dict(AutoModelForSequenceClassification.from_pretrained(base).named_parameters())
    return {name: delta(weights[f"{name}.weight"].detach().double(), lora) for name, lora in loras.items()}


def by_peft(
    base: Path, folders: list[Path], weights: list[float], kind: str, **options: object
) -> dict[str, torch.Tensor]:
    """What the combination by peft adds to each layer. It combines no adapters with heads, so it gets A and B
    alone."""
    alone = []
    for folder in folders:
        alone.append(folder.parent / f"{folder.name}-alone")
        alone[-1].mkdir()
        tensors = {name: tensor for name, tensor in load_file(folder / WEIGHTS).items() if ".lora_" in name}
        save_file(tensors, alone[-1] / WEIGHTS, {"format": "pt"})
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (alone[-1] / CONFIG).write_text(
            json.dumps(config | {"modules_to_save": None, "task_type": None}), encoding="utf-8"
        )
    net = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    model = peft.PeftModel.from_pretrained(net, alone[0], adapter_name="0")
    for i, folder in enumerate(alone[1:], 1):
        model.load_adapter(folder, adapter_name=str(i))
    model.base_model.add_weighted_adapter(
        [str(i) for i in range(len(folders))], weights, "all", combination_type=kind, **options
    )
    layers = {
        name: module for name, module in net.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return {name: module.get_delta_weight("all").detach().double() for name, module in layers.items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float = 1e-5) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance) for name in theirs)


# --- differences ---


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_linear_is_the_exact_sum_and_pefts_cat(family, tiny_base, tmp_path):
    base = tiny_base(family)
    folders, weights = [tmp_path / "a", tmp_path / "b"], [0.7, 0.5]
    parts = [
        make_adapter(folder, base, seed=i, r=3 + i, use_rslora=bool(i)) for i, folder in enumerate(folders)
    ]
    result = combine(folders, tmp_path / "x", weights, base=str(base))
    assert (result["r"], result["residual"], result["scores"]) == (7, 0.0, None)
    ours = differences(tmp_path / "x", base)
    sums = [differences(folder, base) for folder in folders]
    assert same(ours, {name: 0.7 * sums[0][name] + 0.5 * sums[1][name] for name in ours}, 1e-6)
    assert same(ours, by_peft(base, folders, weights, "cat"))
    whole = [trained_whole(part.model) for part in parts]
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    for name, tensor in trained_whole(again.model).items():
        torch.testing.assert_close(
            tensor, (0.7 * whole[0][name] + 0.5 * whole[1][name]) / 1.2, rtol=1e-6, atol=1e-7
        )
    theirs = pefts_merge(tmp_path / "x", base)
    ids = [torch.from_numpy(e.ids[None]).long() for e in again.tokenizer.encode(TEXTS)]
    assert close(np.stack([theirs(row).logits[0].detach().numpy() for row in ids]), again.logits(TEXTS))


@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.25]])
def test_svd_is_pefts(weights, base, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        make_adapter(folder, base, seed=i, target_modules=("all-linear",))
    result = combine(folders, tmp_path / "x", weights, "svd", r=5, base=str(base))
    ours = differences(tmp_path / "x", base)
    assert same(ours, by_peft(base, folders, weights, "svd", svd_rank=5))
    whole = [differences(folder, base) for folder in folders]
    exact = {name: weights[0] * whole[0][name] + weights[1] * whole[1][name] for name in ours}
    left = sum(float((exact[name] - ours[name]).square().sum()) for name in ours) / sum(
        float(t.square().sum()) for t in exact.values()
    )
    assert result["residual"] == pytest.approx(left**0.5, rel=1e-4)
    assert result["r"] == 5
    full = combine(folders, tmp_path / "y", weights, "svd", r=8, base=str(base))
    assert full["residual"] < 1e-12
    assert same(differences(tmp_path / "y", base), exact, 1e-6)


def test_ties_is_pefts_where_weights_are_equal(base, tmp_path):
    """peft divides by how many agree, so that weights of 1 there are weights of 1/N here."""
    folders = [tmp_path / name for name in "abc"]
    for i, folder in enumerate(folders):
        make_adapter(folder, base, seed=i)
    result = combine(folders, tmp_path / "x", None, "ties", density=0.3, r=6, base=str(base))
    assert same(
        differences(tmp_path / "x", base),
        by_peft(base, folders, [1.0] * 3, "ties_svd", density=0.3, svd_rank=6),
    )
    assert 0 < result["residual"] < 1


def test_ties_by_hand():
    """Trim to the two largest of four, elect signs, mean of those that agree (figure 1 of the paper's
    method)."""
    deltas = [
        torch.tensor([[4.0, -3.0, 1.0, 0.5]]),
        torch.tensor([[-1.0, -5.0, 6.0, 2.0]]),
        torch.tensor([[-2.0, 1.0, -7.0, 0.1]]),
    ]
    made = combined_delta(deltas, [1 / 3] * 3, "ties", 0.5, torch.Generator())
    torch.testing.assert_close(made, torch.tensor([[4.0, -4.0, -7.0, 0.0]]))
    made = combined_delta(deltas, [1.0, 3.0, 1.0], "ties", 0.5, torch.Generator())
    torch.testing.assert_close(made, torch.tensor([[20.0, 5 * -18 / 4, 30.0, 0.0]]))


def test_ties_without_trimming_or_conflict_is_the_sum():
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.rand(5, 7, generator=draw, dtype=torch.float64) + 0.1 for _ in range(3)]
    expected = 0.2 * deltas[0] + 0.5 * deltas[1] + 0.9 * deltas[2]
    torch.testing.assert_close(
        combined_delta(deltas, [0.2, 0.5, 0.9], "ties", 1.0, torch.Generator()), expected
    )


def test_dare_drops_and_rescales():
    delta = torch.arange(1.0, 40001.0, dtype=torch.float64).view(200, 200)
    made = combined_delta([delta], [2.0], "dare", 0.25, torch.Generator().manual_seed(3))
    kept = made != 0
    assert torch.equal(made[kept], 8 * delta[kept])
    assert 0.24 < kept.double().mean() < 0.26
    torch.testing.assert_close(
        combined_delta([delta, -delta], [2.0, 1.0], "dare", 1.0, torch.Generator()), delta
    )


def test_dare_follows_its_seed(base, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        make_adapter(folder, base, seed=i)
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        combine(folders, tmp_path / name, None, "dare", density=0.5, seed=seed, base=str(base))
    first, again, other = (load_file(tmp_path / name / WEIGHTS) for name in "xyz")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_adapters_of_other_layers_and_ranks(base, tmp_path):
    """A layer that one adapter leaves alone gets what the others do to it."""
    folders = [tmp_path / "a", tmp_path / "b"]
    make_adapter(folders[0], base, r=2, target_modules=("query",))
    make_adapter(folders[1], base, r=5, target_modules=("value", "query"), layers="last:1", seed=1)
    whole = [differences(folder, base) for folder in folders]
    names = whole[0].keys() | whole[1].keys()
    expected = {name: sum(0.5 * w[name] for w in whole if name in w) for name in names}
    assert combine(folders, tmp_path / "x", base=str(base))["r"] == 7
    assert same(differences(tmp_path / "x", base), expected, 1e-6)
    combine(folders, tmp_path / "y", None, "svd", r=7, base=str(base))
    assert same(differences(tmp_path / "y", base), expected, 1e-6)


def test_dora_goes_by_svd_only(base, tmp_path, refused):
    make_adapter(tmp_path / "a", base, **ALL_DORA)
    make_adapter(tmp_path / "b", base, seed=1, target_modules=("all-linear",))
    assert "a DoRA adapter's difference has no low rank" in refused(base, "a", "b")
    result = combine(
        [tmp_path / "a", tmp_path / "b"], tmp_path / "x", [0.5, 0.5], "svd", r=32, base=str(base)
    )
    assert result["residual"] < 1e-12
    whole = [differences(tmp_path / name, base) for name in "ab"]
    assert same(
        differences(tmp_path / "x", base), {name: (whole[0][name] + whole[1][name]) / 2 for name in whole[0]}
    )


def test_mean_pooling_and_pairs(base, tmp_path):
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, seed=i, pooling="mean", pairs=True)
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x", base=str(base))
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert (again.meta.pooling, again.meta.pairs) == ("mean", True)


# --- heads and labels ---


def test_one_adapter_with_itself_is_itself(base, tmp_path):
    classifier = make_adapter(tmp_path / "a", base)
    for kind in ("linear", "svd"):
        combine([tmp_path / "a", tmp_path / "a"], tmp_path / kind, [0.25, 0.75], kind, base=str(base))
        assert close(
            TextClassifier.load(tmp_path / kind, base=str(base)).logits(TEXTS), classifier.logits(TEXTS)
        )


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2"])
def test_labels_in_another_order_are_matched_by_name(family, tiny_base, tmp_path):
    """The same adapter with its labels turned round, combined with itself, is itself."""
    base = tiny_base(family)
    classifier = make_adapter(tmp_path / "a", base)

    def turn(model: Model) -> None:
        for tensor in list(model.trainable().values())[-2:]:
            tensor.copy_(tensor.flip(0))

    turned = make_adapter(tmp_path / "b", base, labels=LABELS[::-1], edit=turn)
    assert close(turned.logits(TEXTS), classifier.logits(TEXTS)[:, ::-1])
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x", base=str(base))
    again = TextClassifier.load(tmp_path / "x", base=str(base))
    assert again.meta.labels == LABELS
    assert close(again.logits(TEXTS), classifier.logits(TEXTS))


def test_the_result_is_not_calibrated_and_as_long_as_the_longest(base, tmp_path):
    for i, name in enumerate("ab"):
        make_adapter(
            tmp_path / name,
            base,
            seed=i,
            kind=MULTI_LABEL,
            thresholds=(0.1, 0.2, 0.3),
            max_length=(20, 28)[i],
        )
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x", [3, 1], base=str(base))
    meta = TextClassifier.load(tmp_path / "x", base=str(base)).meta
    assert (meta.thresholds, meta.temperature, meta.max_length, meta.problem_type) == (
        None,
        1.0,
        28,
        MULTI_LABEL,
    )
    told = {
        key: meta.training[key] for key in ("combination_type", "combined_from", "weights", "density", "seed")
    }
    assert told == {
        "combination_type": "linear",
        "combined_from": ["a", "b"],
        "weights": [3, 1],
        "density": None,
        "seed": None,
    }


# --- the command ---


def test_command_scores_each_adapter_and_the_combination(base, tmp_path, cli):
    data = write_csv(tmp_path / "rows.csv", single_rows(30))
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, seed=i, labels=("neg", "pos"))
    arguments = (
        "combine",
        tmp_path / "a",
        tmp_path / "b",
        "--model",
        base,
        "--data",
        data,
        "--combination",
        "ties",
        "--weights",
        "0.5,0.5",
    )
    code, out, err = cli(*arguments, "--output", tmp_path / "x")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("2 adapters to one of rank 4 (ties); ")
    assert lines[1].split() == ["accuracy", "on", "30", "rows"]
    assert [line.split()[0] for line in lines[2:5]] == ["a", "b", "x"]
    for line in lines[2:5]:
        name, value = line.split()
        _, found, _ = cli("evaluate", tmp_path / name, "--model", base, "--data", data, "--json")
        assert json.loads(found)["test"]["accuracy"] == pytest.approx(float(value), abs=5e-5)
    assert lines[5] == f"saved to {tmp_path / 'x'}"
    code, out, _ = cli(*arguments, "--output", tmp_path / "y", "--limit-eval", 12, "--json")
    result = json.loads(out)
    assert set(result) == {"output", "combination_type", "weights", "r", "residual", "metric", "scores"}
    assert [(row["name"], row["rows"]) for row in result["scores"]] == [("a", 12), ("b", 12), ("y", 12)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--weights", "0.5"), "--weights has 1 numbers for 2 adapters; give one per adapter"),
        (("--weights", "0.5,half"), "--weights 0.5,half: not numbers; give one per adapter, such as 0.5,0.5"),
        (("--weights", "0.5,nan"), "--weights 0.5,nan: must be finite numbers with a sum above 0"),
        (("--weights", "1,-1"), "--weights 1,-1: must be finite numbers with a sum above 0"),
        (("--density", "0.5"), "--density goes with ties and dare, --combination linear keeps every entry"),
        (("--combination", "ties", "--density", "0"), "--density 0: must be above 0 and at most 1"),
        (("--combination", "dare", "--density", "1.5"), "--density 1.5: must be above 0 and at most 1"),
        (("--combination", "svd", "--r", "0"), "--r 0: the rank must be at least 1"),
        (
            ("--r", "4"),
            "--combination linear is exact, its rank is the sum of the ranks; leave out --r, or take --combination svd",
        ),
        (
            ("--combination", "mix"),
            "Invalid value for '--combination': 'mix' is not one of 'linear', 'svd', 'ties', 'dare'.",
        ),
    ],
)
def test_wrong_flags(flags, said, base, tmp_path, refused):
    assert refused(base, "a", "b", *flags) == said


def test_one_adapter_is_not_enough(base, refused):
    assert refused(base, "a") == "there is one adapter only; name at least two folders"


def test_adapters_that_do_not_go_together(base, tiny_base, tmp_path, refused):
    make_adapter(tmp_path / "a", base)
    make_adapter(tmp_path / "b", base, labels=("neg", "neutral", "great"))
    assert "have different labels ('great' is in one only), so their heads cannot be averaged" in refused(
        base, "a", "b"
    )
    make_adapter(tmp_path / "c", base, labels=("neg", "pos"))
    assert "have different labels ('neutral' is in one only)" in refused(base, "a", "c")
    make_adapter(tmp_path / "d", base, kind=MULTI_LABEL)
    assert (
        "have different values of problem_type (single_label_classification and multi_label_classification)"
        in refused(base, "a", "d")
    )
    make_adapter(tmp_path / "e", base, pooling="mean")
    assert "have different values of pooling (first and mean)" in refused(base, "a", "e")
    make_adapter(tmp_path / "f", base, truncation="tail")
    assert "have different values of truncation (head and tail)" in refused(base, "a", "f")
    make_adapter(tmp_path / "g", base, pairs=True)
    assert "have different values of pairs (False and True)" in refused(base, "a", "g")
    make_adapter(tmp_path / "h", make_tiny("bert", tmp_path / "other", seed=1))
    assert "another base" in refused(base, "a", "h")
    make_adapter(tmp_path / "i", tiny_base("roberta"))
    assert "was trained on a roberta" in refused(base, "a", "i")
    make_adapter(tmp_path / "j", base, bias="lora_only")
    assert "train different tensors besides A and B" in refused(base, "a", "j")
    make_adapter(tmp_path / "k", base, r=30, seed=1)
    assert (
        "the ranks add up to 34, more than bert.encoder.layer.0.attention.self.query takes (32); take --combination svd"
        in refused(base, "a", "k")
    )
    assert "no such" in refused(base, "a", "z")


def test_bad_rows_and_output_in_use(base, tmp_path, refused):
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, seed=i)
    data = write_csv(tmp_path / "rows.csv", [["fine", "neg"], ["good", "great"]])
    assert "great" in refused(base, "a", "b", "--data", data)
    assert "no such" in refused(base, "a", "b", "--data", tmp_path / "none.csv")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("x")
    assert (
        refused(base, "a", "b")
        == f"{tmp_path / 'x'} exists and is not an empty folder; choose another --output"
    )


# --- temperatures ---


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_heads_are_brought_to_one_scale(family, pooling, tiny_base, tmp_path):
    """Whether a temperature is in the head or for its reader: the heads as they were trained are averaged,
    and so are the logs of the temperatures."""
    base, weights, temperatures = tiny_base(family), [0.5, 1.5], [0.6, 2.4]
    plain = [make_adapter(tmp_path / name, base, seed=i, pooling=pooling) for i, name in enumerate("ab")]
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x", weights, base=str(base))
    expected = TextClassifier.load(tmp_path / "x", base=str(base)).logits(TEXTS)  # nothing was fitted
    wanted = math.exp((0.5 * math.log(0.6) + 1.5 * math.log(2.4)) / 2)
    last = list(plain[0].model.trainable())[-1].rpartition(".")[0]
    for i, name in enumerate("ab"):

        def divide(model: Model, i: int = i) -> None:
            random_adapter(model, i)
            for key, tensor in model.trainable().items():
                if key.startswith(last):
                    tensor.div_(temperatures[i])

        inside = make_adapter(tmp_path / f"{name}-inside", base, seed=i, pooling=pooling, edit=divide)
        assert close(inside.logits(TEXTS), plain[i].logits(TEXTS) / temperatures[i])
        for folder, facts in (
            (tmp_path / f"{name}-inside", {"fitted_temperature": temperatures[i]}),
            (tmp_path / name, {"temperature": temperatures[i]}),
        ):
            write_side_file(folder, replace(read_adapter(folder).meta, **facts))
    for k, (one, two) in enumerate((("a", "b"), ("a-inside", "b-inside"), ("a", "b-inside"))):
        combine([tmp_path / one, tmp_path / two], tmp_path / f"made{k}", weights, base=str(base))
        made = TextClassifier.load(tmp_path / f"made{k}", base=str(base))
        assert (made.meta.temperature, made.meta.fitted_temperature) == (1.0, pytest.approx(wanted))
        assert close(made.logits(TEXTS), expected / wanted)


def test_a_temperature_does_not_touch_regressions(base, tmp_path):
    for i, name in enumerate("ab"):
        make_adapter(tmp_path / name, base, seed=i, kind=REGRESSION, labels=("value",))
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "x", base=str(base))
    write_side_file(tmp_path / "a", replace(read_adapter(tmp_path / "a").meta, temperature=3.0))
    combine([tmp_path / "a", tmp_path / "b"], tmp_path / "y", base=str(base))
    first, again = (TextClassifier.load(tmp_path / name, base=str(base)) for name in "xy")
    assert again.meta.fitted_temperature == 1
    assert np.array_equal(first.logits(TEXTS), again.logits(TEXTS))

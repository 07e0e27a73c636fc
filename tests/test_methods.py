"""The table of methods, and what each row really trains."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support import settings

from textlora.compare.fitted import STRENGTHS, fit
from textlora.compare.methods import DEFAULT_METHODS, METHODS, by_usefulness, find_methods
from textlora.compare.run_one import Bench, Run, pick_rows
from textlora.core.config import TrainConfig
from textlora.core.errors import UsageError
from textlora.training.prepare import Prepared, prepare

HEAD = 2 * 32 + 2  # of the tiny bert with two labels


@pytest.fixture(scope="module")
def prepared(tiny_base, tmp_path_factory) -> Prepared:
    return prepare(settings(tmp_path_factory.mktemp("methods"), tiny_base("bert")))


def run_of(method: str, stage: str = "rates", rows: int = 40, epochs: float = 1.0, seed: int = 42) -> Run:
    row = METHODS[method]
    size = {row.size: 2} if row.size else {}
    rate = row.rates[0] if row.rates else None if row.fitted else 5e-3
    return Run(stage, method, size, rate, seed, rows, epochs)


def test_rows_are_complete():
    for name, row in METHODS.items():
        assert row.name == name
        assert row.what
        assert row.trains
        assert row.saved
        assert len(row.rates) in (0, 3)
        assert list(row.rates) == sorted(row.rates)
        assert (row.size is None) == (not row.sizes)
    assert set(DEFAULT_METHODS) <= set(METHODS)
    assert {"tfidf", "probe", "head", "bitfit", "full", "lora-qv", "lora-all", "dora", "ia3"} <= set(
        DEFAULT_METHODS
    )


def test_settings_of_lora_rows_are_those_of_train():
    for row in METHODS.values():
        if row.way == "lora":
            TrainConfig(**row.settings)


def test_unknown_names_list_what_there_is():
    with pytest.raises(UsageError) as caught:
        find_methods(["lora-qv", "lorra"])
    assert str(caught.value) == f"--methods lorra: no such method; there are: {', '.join(METHODS)}"
    with pytest.raises(UsageError, match="no method"):
        find_methods([])
    assert [row.name for row in find_methods(["full", "head", "full"])] == ["full", "head"]


def test_the_table_imports_nothing_heavy():
    code = "import sys, textlora.compare.methods, textlora.cli.compare; print([m for m in ('torch', 'numpy', 'sklearn', 'matplotlib', 'rich') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("method", "parameters", "head"),
    [
        ("majority", 0, 0),
        ("probe", 0, HEAD),
        ("head", 0, HEAD),
        ("defaults", 4 * 2 * (32 * 2 + 2 * 32), HEAD),  # rank 4 in these settings
        ("lora-qv", 2 * 2 * (32 * 2 + 2 * 32), HEAD),
        ("lora-all", 2 * (4 * 2 * 64 + 2 * 2 * (32 + 48)), HEAD),
        ("rslora", 2 * 2 * 128, HEAD),
        ("lora+", 2 * 2 * 128, HEAD),
        ("pissa", 2 * 2 * 128, HEAD),
        ("dora", 2 * 2 * (128 + 32), HEAD),
        ("ia3", 2 * (3 * 32 + 48), HEAD),  # keys, values, inputs of both output layers
        ("prefix", 2 * 2 * 2 * 32, HEAD),
        ("prompt", 2 * 32, HEAD),
    ],
)
def test_counts_of_parameters(prepared, method, parameters, head):
    record = Bench(prepared).run(METHODS[method], run_of(method))
    assert (record["trainable_parameters"], record["head_parameters"]) == (parameters, head)
    if METHODS[method].rates:
        assert record["saved_bytes"] == 4 * (parameters * (2 if method == "pissa" else 1) + head)
    assert record["test"] is None
    assert record["test_predictions"] is None


def test_counts_of_whole_models(prepared):
    bench = Bench(prepared)
    base = prepared.model.base.tensors
    everything = sum(t.numel() for t in base.values())
    biases = sum(t.numel() for name, t in base.items() if name.endswith("bias"))
    assert bench.run(METHODS["full"], run_of("full"))["trainable_parameters"] == everything
    assert bench.run(METHODS["bitfit"], run_of("bitfit"))["trainable_parameters"] == biases
    assert (
        bench.run(METHODS["few-shot"], run_of("few-shot"))["trainable_parameters"]
        == everything - 32 * 32 - 32
    )  # no pooler


@pytest.mark.parametrize("method", METHODS)
def test_equal_runs_are_equal(prepared, method):
    run = run_of(method, "seeds")
    first, again = (Bench(prepared).run(METHODS[method], run) for _ in range(2))
    timed = (
        "train_seconds",
        "train_cpu_seconds",
        "total_seconds",
        "peak_memory_bytes",
        "memory_before_bytes",
    )
    assert {k: v for k, v in first.items() if k not in timed} == {
        k: v for k, v in again.items() if k not in timed
    }
    right = prepared.sets["test"].labels == first["test_predictions"]
    assert first["test"]["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("method", "rate"),
    [("tfidf", None), ("probe", None), ("full", 3e-3), ("lora-all", 2e-2), ("few-shot", 1e-3)],
)
def test_methods_learn_an_easy_task(prepared, method, rate):
    size = {"r": 4} if METHODS[method].size else {}
    record = Bench(replace(prepared, pooling="mean")).run(
        METHODS[method], Run("seeds", method, size, rate, 42, 40, 10.0)
    )
    assert record["test"]["accuracy"] >= 0.8
    assert record["pooling"] == (None if method == "tfidf" else "mean")


def test_states_below_frozen_blocks_are_computed_once_and_change_nothing(prepared, monkeypatch):
    import textlora.compare.run_one as module

    bench, calls = Bench(prepared), []
    real = module.build_prefix
    monkeypatch.setattr(module, "build_prefix", lambda asked: calls.append(1) or real(asked))
    row = METHODS["lora-last2"]
    shallow = type(row)(**{**row.__dict__, "settings": {**row.settings, "layers": "last:1"}})
    runs = [run_of("lora-last2", seed=seed, epochs=2.0) for seed in (1, 2)] + [
        run_of("lora-last2", rows=16, epochs=2.0)
    ]
    cached = [bench.run(shallow, run)["validation"] for run in runs]
    assert len(calls) == 1
    monkeypatch.setattr(module, "build_prefix", lambda asked: {})
    for run, found in zip(runs, cached, strict=True):
        assert Bench(prepared).run(shallow, run)["validation"] == pytest.approx(found, abs=1e-6)


def test_fewer_rows_are_nested_and_begin_with_every_class():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2]).numpy()
    order = pick_rows(labels, 54, seed=1)
    assert sorted(order.tolist()) == list(range(54))
    for count in (3, 8, 20):
        picked = pick_rows(labels, count, seed=1)
        assert picked.tolist() == order[:count].tolist()
        assert set(labels[picked].tolist()) == {0, 1, 2}
    assert pick_rows(labels, 8, seed=2).tolist() != pick_rows(labels, 8, seed=1).tolist()
    several = torch.tensor([[1, 0, 0]] * 9 + [[0, 1, 1]]).float().numpy()
    assert 9 in pick_rows(several, 2, seed=0)


@pytest.fixture(scope="module")
def crossed(tiny_base, tmp_path_factory) -> Prepared:
    """The same rows without validation rows: cross-validation decides."""
    prepared = prepare(settings(tmp_path_factory.mktemp("crossed"), tiny_base("bert"), validation=None))
    assert prepared.folds is not None
    return prepared


def test_a_probe_is_chosen_on_rows_it_has_not_seen(crossed):
    """Against a loop over folds and strengths; scaling is learned from the rows that are trained on."""
    random, labels, folds = np.random.default_rng(0), crossed.sets["train"].labels, crossed.folds
    features = {
        split: random.normal(size=(len(data.rows), 5)) + data.labels[:, None]
        for split, data in crossed.sets.items()
    }
    scores = {}
    for strength in STRENGTHS:
        right = []
        for fold in (0, 1, 2):
            x, new = features["train"][folds != fold], features["train"][folds == fold]
            mean, spread = x.mean(0), x.std(0) + 1e-6
            model = LogisticRegression(C=strength, max_iter=1000).fit(
                (x - mean) / spread, labels[folds != fold]
            )
            right += (model.predict((new - mean) / spread) == labels[folds == fold]).tolist()
        scores[strength] = np.mean(right)
    fitted = fit("probe", crossed, features)
    best = max(scores, key=scores.get)
    assert fitted.chosen == {"C": best}
    split, places, logits = fitted.held
    assert (split, sorted(places.tolist())) == ("train", list(range(40)))
    assert (logits.argmax(1) == labels[places]).mean() == pytest.approx(scores[best])
    mean, spread = features["train"].mean(0), features["train"].std(0) + 1e-6
    last = LogisticRegression(C=best, max_iter=1000).fit((features["train"] - mean) / spread, labels)
    assert (fitted.logits("test").argmax(1) == last.predict((features["test"] - mean) / spread)).all()


@pytest.mark.parametrize("method", ["tfidf", "probe", "few-shot", "lora-qv"])
def test_what_a_search_decides_is_enough_for_a_seed(crossed, method):
    """With the decisions of the search, a run with its seed is the run that makes them itself."""
    bench, row = Bench(crossed), METHODS[method]
    size = {"r": 2} if row.size else {}
    of = lambda stage: Run(stage, method, size, None if row.fitted else 3e-3, 42, 40, 2.0)
    found = bench.run(row, of("rates"))
    assert found["test"] is None
    whole = bench.run(row, of("seeds"))
    after = bench.run(row, of("seeds"), found["decided"] if not row.fitted else None)
    for record in (whole, after):
        assert record["validation"] == pytest.approx(found["validation"])
        assert record["test_predictions"] == whole["test_predictions"]
        assert record["test"] == pytest.approx(whole["test"])
        assert record["best_epoch"] == found["best_epoch"]


def test_pooling_of_methods_of_peft(crossed):
    """IA3 takes the mean; what prepends has the base's own head where the pooling was not asked for, and is
    refused where it was."""
    mean = replace(crossed, pooling="mean", folds=None)
    record = Bench(mean).run(METHODS["ia3"], run_of("ia3"))
    assert (record["pooling"], record["head_parameters"], record["trainable_parameters"]) == (
        "mean",
        HEAD,
        2 * (3 * 32 + 48),
    )
    auto = replace(mean, config=replace(mean.config, pooling="auto"))
    assert Bench(auto).run(METHODS["prompt"], run_of("prompt"))["pooling"] == "first"
    asked = replace(mean, config=replace(mean.config, pooling="mean"))
    with pytest.raises(UsageError, match="'prefix' has no mean pooling"):
        Bench(asked).run(METHODS["prefix"], run_of("prefix"))


def test_ia3_scales_what_the_mean_is_taken_of(crossed):
    """At its start it changes nothing: the logits are those of the mean of the base's own states."""
    from textlora.compare.peft_methods import PeftMethodModel
    from textlora.inference.classifier import encoded_logits
    from textlora.model.reference_model import ReferenceModel

    encoded = crossed.sets["test"].encoded
    model = PeftMethodModel.open("ia3", 0, crossed.files.folder, 2, pooling="mean", seed=3)
    plain = ReferenceModel.create(crossed.files.folder, crossed.config.lora, 2, pooling="mean", seed=3)
    heads = [[t for name, t in one.trainable().items() if "classifier" in name] for one in (model, plain)]
    with torch.no_grad():
        for mine, theirs in zip(*heads, strict=True):
            mine.copy_(theirs)
    assert np.allclose(encoded_logits(model, encoded), encoded_logits(plain, encoded), atol=1e-5)
    with torch.no_grad():
        for name, tensor in model.trainable().items():
            if "ia3" in name:
                tensor.mul_(1.5)
    assert not np.allclose(encoded_logits(model, encoded), encoded_logits(plain, encoded), atol=1e-3)


def test_order_of_usefulness():
    assert by_usefulness(["dora", "prompt", "full", "ia3", "defaults", "tfidf"]) == [
        "tfidf",
        "defaults",
        "full",
        "dora",
        "prompt",
        "ia3",
    ]

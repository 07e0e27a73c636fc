"""`textlora compare`: the plan, finished runs, what it refuses, a kill and its end, budgets, and what the
command line says."""

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import forked, settings, single_rows, snapshot, write_csv

import textlora.compare.comparison as module
from textlora.compare.comparison import Comparison, compare, read_comparison
from textlora.compare.few_shot import TEMPERATURE, Contrast, draw_steps
from textlora.compare.halving import Budget, middle, rungs, search_cost
from textlora.compare.methods import METHODS
from textlora.compare.run_one import Bench, Run
from textlora.compare.runner import Runner
from textlora.compare.store import best_of
from textlora.core.errors import DataError, StorageError, UsageError
from textlora.training.learning_rate import default_rate
from textlora.training.prepare import prepare
from textlora.training.run import run_training

TIMED = ("train_seconds", "train_cpu_seconds", "total_seconds", "peak_memory_bytes", "memory_before_bytes")
RATES = {"": (1e-3, 1e-2)}


@pytest.fixture
def no_report(monkeypatch):
    """The report is tested elsewhere and takes seconds."""
    monkeypatch.setattr(module, "render", lambda settings, runs, folder: {"runs": len(runs)})


@pytest.fixture
def config(tiny_base, tmp_path):
    return settings(tmp_path, tiny_base("bert"))


def files_of(folder: Path) -> dict[str, dict]:
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "runs").glob("*.json")
    }


def untimed(runs) -> list[dict]:
    return [{key: value for key, value in run.items() if key not in TIMED} for run in runs]


@pytest.mark.usefixtures("no_report")
def test_rates_on_one_seed_then_seeds_at_the_best(config):
    compare(Comparison(config, ("tfidf", "lora-qv"), RATES, sizes=(2, 4), seeds=2))
    found, runs = read_comparison(config.output)
    search = [run for run in runs if run["stage"] == "rates"]
    assert {(run["size"]["r"], run["learning_rate"]) for run in search} == {
        (r, rate) for r in (2, 4) for rate in (1e-3, 1e-2)
    }
    assert {run["seed"] for run in search} == {42}
    assert all(run["test"] is None and run["test_predictions"] is None for run in search)
    repeats = [run for run in runs if run["stage"] == "seeds" and run["method"] == "lora-qv"]
    assert [run["seed"] for run in repeats] == [42, 43]
    best = max(search, key=lambda run: (run["validation"]["accuracy"], -run["validation"]["log_loss"]))
    assert all(
        (run["size"], run["learning_rate"]) == (best["size"], best["learning_rate"]) for run in repeats
    )
    assert repeats[0]["validation"] == best["validation"]
    labels = np.array(found["test_labels"])
    assert all(
        run["test"]["accuracy"] == pytest.approx((labels == run["test_predictions"]).mean())
        for run in runs
        if run["stage"] == "seeds"
    )
    assert found["labels"] == ["neg", "pos"]
    assert (found["train_rows"], found["validation_rows"], found["test_rows"]) == (40, 16, 16)
    assert len(files_of(Path(config.output))) == 4 + 2 + 1


@pytest.mark.parametrize("task", ["single", "multi", "regression", "pairs"])
def test_a_run_is_what_train_makes_of_the_same_settings(tiny_base, tmp_path, task):
    config = settings(tmp_path, tiny_base("bert"), task, r=2)
    prepared = prepare(config)
    record = Bench(prepared).run(
        METHODS["lora-qv"], Run("seeds", "lora-qv", {"r": 2}, config.learning_rate, 42, 40, 2.0)
    )
    result = run_training(config)
    assert record["test"] == pytest.approx(result["test"], nan_ok=True)
    assert record["trainable_parameters"] == result["adapter_parameters"]
    assert record["head_parameters"] == result["head_parameters"]
    assert len(record["test_predictions"]) == 16
    shape = np.asarray(record["test_predictions"])
    assert shape.shape == ((16, 3) if task == "multi" else (16,))
    assert (shape.dtype.kind == "f") == (task == "regression")


@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_cross_validation_is_that_of_train(tiny_base, tmp_path, task):
    """The defaults, and a run whose decisions come from the search, score on the test rows what `train`
    scores there."""
    config = settings(tmp_path, tiny_base("bert"), task, r=2, validation=None)
    result = run_training(config)
    bench = Bench(prepare(config))
    of = lambda stage, method, size: Run(stage, method, size, config.learning_rate, 42, 40, 2.0)
    searched = bench.run(METHODS["lora-qv"], of("rates", "lora-qv", {"r": 2}))
    if task != "multi":  # whose thresholds `train` has fitted by then
        assert searched["validation"][searched["metric"]] == pytest.approx(
            result["validation"][searched["metric"]]
        )
    for record in (
        bench.run(METHODS["lora-qv"], of("seeds", "lora-qv", {"r": 2}), searched["decided"]),
        bench.run(METHODS["defaults"], of("seeds", "defaults", {})),
    ):
        assert record["test"] == pytest.approx(result["test"], nan_ok=True)
        assert record["best_epoch"] == pytest.approx(result["best_step"] / 5)


@pytest.mark.usefixtures("no_report")
def test_few_rows_are_compared_by_cross_validation(config):
    """The search holds every row out once; what it decides goes with its choice to the seeds; the defaults
    have the rate of their own rule."""
    seen, real = [], Bench.run
    config = replace(config, validation=None, learning_rate=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Bench,
            "run",
            lambda self, method, run, decided=None: (
                seen.append((run, decided)) or real(self, method, run, decided)
            ),
        )
        compare(Comparison(config, ("tfidf", "defaults", "lora-qv"), RATES, seeds=2, rows=(12,)))
    found, runs = read_comparison(config.output)
    assert (found["validation_rows"], found["folds"]) == (40, 3)
    assert not [run["error"] for run in runs if "error" in run]
    search = {run["learning_rate"]: run["decided"] for run in runs if run["stage"] == "rates"}
    assert set(search) == {1e-3, 1e-2}
    for run, decided in seen:
        best = search[run.learning_rate] if (run.method, run.stage) == ("lora-qv", "seeds") else None
        assert decided == best
    rates = {
        (run["train_rows"], run["stage"]): run["learning_rate"] for run in runs if run["method"] == "defaults"
    }
    assert rates == {(40, "seeds"): default_rate(10), (12, "rows"): default_rate(4)}
    assert {run["seed"] for run in runs if run["method"] == "defaults" and run["stage"] == "seeds"} == {
        42,
        43,
    }
    assert all(run["test"] for run in runs if run["stage"] != "rates")


@pytest.mark.parametrize("task", ["multi", "regression", "pairs"])
@pytest.mark.usefixtures("no_report")
def test_every_task(tiny_base, tmp_path, task):
    config = settings(tmp_path, tiny_base("bert"), task, epochs=1.0)
    compare(
        Comparison(
            config, ("majority", "tfidf", "probe", "head", "full", "few-shot", "ia3"), {"": (1e-3,)}, seeds=1
        )
    )
    runs = read_comparison(config.output)[1]
    failed = {run["method"]: run["error"] for run in runs if "error" in run}
    assert failed == ({} if task == "pairs" else {"few-shot": "few-shot needs one class per row"})
    assert {run["method"] for run in runs if run["stage"] == "seeds"} == {
        "majority",
        "tfidf",
        "probe",
        "head",
        "full",
        "ia3",
    } | ({"few-shot"} if task == "pairs" else set())


@pytest.mark.usefixtures("no_report")
def test_bases_off_the_fast_path_run_what_they_can_and_say_the_rest(tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("modernbert"), epochs=1.0)
    compare(Comparison(config, ("tfidf", "lora-qv", "full"), {"": (1e-3,)}, seeds=1))
    runs = read_comparison(config.output)[1]
    assert "test" in next(run for run in runs if run["method"] == "lora-qv" and run["stage"] == "seeds")
    assert [run["error"] for run in runs if run["method"] == "full"] == [
        "'full' needs the packed path (model type 'modernbert' is not on the fast path)"
    ]


@pytest.mark.usefixtures("no_report")
def test_finished_runs_are_skipped_and_more_may_be_asked(config):
    seen = []
    ask = lambda **changes: compare(
        Comparison(
            config,
            **({"methods": ("majority", "head"), "learning_rates": {"": (1e-3,)}, "seeds": 1} | changes),
        ),
        on_record=lambda record: seen.append(
            (record["kind"], record["stage"], record["method"], record["learning_rate"], record["seed"])
        ),
    )
    ask()
    assert len(seen) == 2 * 3
    before = snapshot(Path(config.output) / "runs")
    seen.clear()
    ask()
    assert seen == []
    assert snapshot(Path(config.output) / "runs") == before
    ask(learning_rates={"head": (3e-2,)}, seeds=2, methods=("head", "tfidf"))
    begun = [item[1:] for item in seen if item[0] == "begin"]
    assert ("rates", "head", 3e-2, 42) in begun
    assert ("seeds", "tfidf", None, 42) in begun
    assert not any(item[:3] == ("rates", "head", 1e-3) for item in begun)
    found, runs = read_comparison(config.output)
    assert found["methods"] == ["majority", "head", "tfidf"]
    assert found["learning_rates"] == {"head": [1e-3, 3e-2]}
    assert found["seeds"] == [42, 43]
    assert (
        len({run["learning_rate"] for run in runs if run["method"] == "head" and run["stage"] == "seeds"})
        == 1
    )
    assert {item["kind"]: 0 for item in ()} == {}


@pytest.mark.usefixtures("no_report")
def test_other_data_or_settings_are_refused(config, tmp_path):
    compare(Comparison(config, ("majority",), name="films"))
    before = snapshot(Path(config.output))
    rows = {"train": single_rows(40, seed=9)}
    for changes, sources, name, said in (
        ({"epochs": 3.0}, None, "films", "holds a comparison with --epochs 2.0, now 3.0"),
        ({"limit_eval": 8}, None, "films", "holds a comparison with --limit-eval left out, now 8"),
        ({}, None, "reviews", "holds a comparison with --name films, now reviews"),
        ({}, rows, "films", "holds a comparison with other rows"),
    ):
        with pytest.raises(UsageError, match=said):
            compare(Comparison(replace(config, **changes), ("majority",), name=name), sources)
    assert snapshot(Path(config.output)) == before


def test_a_folder_with_something_else_is_left_alone(config):
    folder = Path(config.output)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="is not empty and holds no comparison"):
        compare(Comparison(config, ("majority",)))
    assert list(snapshot(folder)) == ["notes.txt"]


@pytest.mark.usefixtures("no_report")
def test_a_damaged_file_is_named(config):
    compare(Comparison(config, ("majority",)))
    file = next((Path(config.output) / "runs").glob("*.json"))
    file.write_text('{"half')
    with pytest.raises(StorageError, match="not a file of a comparison"):
        compare(Comparison(config, ("majority",)))


def test_killed_twice_and_resumed_gives_the_uninterrupted_table(config):
    """A real report at the end: report.csv is the same but for seconds and memory."""
    asked = lambda output: Comparison(
        replace(config, output=str(output)),
        ("tfidf", "head", "lora-qv"),
        RATES,
        seeds=2,
        rows=(8,),
        name="films",
    )
    whole, killed = Path(config.output).parent / "whole", Path(config.output).parent / "killed"
    compare(asked(whole))

    def until(kills: int) -> int:
        """Dies in the middle of a run, after it was announced."""
        left = [kills]

        def on_record(record: dict) -> None:
            left[0] -= record["kind"] == "begin"
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        compare(asked(killed), on_record=on_record)
        return 0

    for kills in (4, 5):
        code, _, err = forked(lambda kills=kills: until(kills))
        assert code == -signal.SIGKILL, err
        assert not (killed / "report.md").exists()
    assert len(files_of(killed)) == 3 + 4
    compare(asked(killed))
    assert untimed(read_comparison(killed)[1]) == untimed(read_comparison(whole)[1])
    tables = [(folder / "report.csv").read_text(encoding="utf-8").splitlines() for folder in (whole, killed)]
    columns = tables[0][0].split(",")
    kept = [i for i, name in enumerate(columns) if "seconds" not in name and "memory" not in name]
    of = lambda table: [[row[i] for i in kept] for row in csv.reader(table)]
    assert of(tables[0]) == of(tables[1])
    assert len(tables[0]) > 3


def test_a_method_that_diverges_or_fails_is_a_row_that_says_so(config, monkeypatch):
    real = Bench.run

    def run(self, method, run, decided=None):
        if method.name == "probe":
            raise RuntimeError("out of\nmemory")
        return real(self, method, run, decided)

    monkeypatch.setattr(Bench, "run", run)
    rates = {"full": (1e30,), "head": (1e-3, 1e30), "lora-qv": (1e-3,)}
    summary = compare(Comparison(config, ("probe", "full", "head", "lora-qv"), rates, seeds=1))
    runs = read_comparison(config.output)[1]
    errors = {(run["method"], run["learning_rate"]): run["error"] for run in runs if "error" in run}
    assert errors[("probe", None)] == "out of memory"
    assert "the loss is nan" in errors[("full", 1e30)]
    assert not any(key[0] in ("lora-qv",) or key == ("head", 1e-3) for key in errors)
    assert all("validation" not in run and run["metric"] == "accuracy" for run in runs if "error" in run)
    rows = {row["method"]: row for row in summary["methods"]}
    assert set(rows) == {"probe", "full", "head", "lora-qv"}
    assert "out of memory" in rows["probe"]["error"]
    assert "the loss is nan" in rows["full"]["error"]
    assert rows["lora-qv"]["score"] is not None
    text = (Path(config.output) / "report.md").read_text(encoding="utf-8")
    assert "the loss is nan" in text


@pytest.mark.usefixtures("no_report")
def test_curves_take_the_best_rate_and_enough_steps(config):
    compare(Comparison(config, ("majority", "head"), {"": (1e-3, 1e-2)}, seeds=2, rows=(8, 16, 400)))
    runs = read_comparison(config.output)[1]
    curve = [run for run in runs if run["stage"] == "rows"]
    assert {(run["method"], run["train_rows"], run["seed"]) for run in curve} == {
        (method, rows, seed) for method in ("majority", "head") for rows in (8, 16) for seed in (42, 43)
    }
    best = next(run["learning_rate"] for run in runs if run["stage"] == "seeds" and run["method"] == "head")
    heads = [run for run in curve if run["method"] == "head"]
    assert {run["learning_rate"] for run in heads} == {best}
    assert {(run["train_rows"], run["epochs"]) for run in heads} == {
        (8, 10.0),
        (16, 5.0),
    }  # as many steps as the 10 of all rows
    assert all(run["test"] for run in curve)


def test_budgets_are_read():
    assert [Budget.parse(text) for text in ("90s", "30m", "2h", "40runs", "1 run", "0.5h")] == [
        Budget(90, "seconds"), Budget(1800, "seconds"), Budget(7200, "seconds"), Budget(40, "runs"), Budget(1, "runs"), Budget(1800, "seconds")
    ]  # fmt: skip
    for text in ("", " ", "0m", "0runs", "-3m", "soon", "30", "nanm"):
        with pytest.raises(UsageError, match="--budget"):
            Budget.parse(text)


def test_halving():
    assert rungs(1) == []
    assert rungs(3) == [(3, 0.25), (2, 0.5)]
    assert rungs(8) == [(8, 0.125), (4, 0.25), (2, 0.5)]
    assert search_cost(3) == 1.75
    assert [middle(range(n)) for n in (1, 2, 3, 9)] == [0, 0, 1, 4]


@pytest.mark.parametrize("runs", [40, 9, 4, 2, 1])
@pytest.mark.usefixtures("no_report")
def test_a_budget_runs_whole_methods(config, runs):
    """Three rates and three seeds are six runs of full length, and one is TF-IDF's; the more useful methods
    come first."""
    config = replace(config, epochs=4.0)
    compare(
        Comparison(
            config, ("head", "tfidf", "lora-qv"), {"": (1e-3, 3e-3, 1e-2)}, seeds=3, budget=f"{runs}runs"
        )
    )
    settings, made = read_comparison(config.output)
    cost = {
        method: sum(run["epochs"] / 4 for run in made if run["method"] == method)
        for method in ("tfidf", "lora-qv", "head")
    }
    assert sum(cost.values()) <= runs
    not_run = [
        name for line in settings["left_out"] if "not run" in line for name in line.split(":")[0].split(", ")
    ]
    assert (list(cost.values()), not_run) == {
        40: ([1, 6, 6], []),
        9: ([1, 6, 0], ["head"]),
        4: ([1, 2.75, 0], ["head"]),  # no trained method fits whole: one in part
        2: ([1, 1, 0], ["head"]),
        1: ([1, 0, 0], ["lora-qv", "head"]),
    }[runs]
    left = "\n".join(settings["left_out"])
    lengths = sorted(run["epochs"] for run in made if run["method"] == "lora-qv")
    if runs == 4:
        assert lengths == [1.0, 1.0, 1.0, 2.0, 2.0, 4.0]
        assert "lora-qv: rates compared in short runs" in left
        assert "lora-qv: 1 of 3 seeds" in left
    if runs == 2:
        assert "no search, run at rate 0.003 untried" in left


@pytest.mark.usefixtures("no_report")
def test_the_defaults_need_no_search_and_take_the_seeds_that_fit(config):
    compare(Comparison(config, ("defaults", "head"), RATES, seeds=3, budget="2runs"))
    settings, made = read_comparison(config.output)
    assert [(run["method"], run["stage"], run["seed"]) for run in made] == [
        ("defaults", "seeds", 42),
        ("defaults", "seeds", 43),
    ]
    assert settings["left_out"][0] == "defaults: 2 of 3 seeds"


@pytest.mark.usefixtures("no_report")
def test_halving_keeps_what_validation_prefers(config, monkeypatch):
    """Scores that rise with the rate: the largest must come through, the smallest must fall first."""
    real = Bench.run

    def run(self, method, run, decided=None):
        record = real(self, method, run, decided)
        return (
            record | {"validation": record["validation"] | {"accuracy": run.learning_rate}}
            if run.stage == "rates"
            else record
        )

    monkeypatch.setattr(Bench, "run", run)
    config = replace(config, epochs=4.0)
    compare(Comparison(config, ("head",), {"": (1e-3, 3e-3, 1e-2)}, seeds=1, budget="3.5runs"))
    made = [(run["stage"], run["learning_rate"], run["epochs"]) for run in read_comparison(config.output)[1]]
    assert made == [
        ("rates", 1e-3, 1.0),
        ("rates", 3e-3, 1.0),
        ("rates", 1e-2, 1.0),
        ("rates", 1e-2, 2.0),
        ("rates", 3e-3, 2.0),
        ("seeds", 1e-2, 4.0),
    ]


@pytest.mark.usefixtures("no_report")
def test_a_budget_of_time(config, monkeypatch):
    """Every epoch of 40 rows takes ten seconds, so that three rates and three seeds of two epochs are two
    minutes, after a short run of 5 seconds."""
    real = Bench.run
    monkeypatch.setattr(Bench, "run", lambda self, method, run, *more: real(self, method, run, *more) | {"total_seconds": 10 * run.epochs * run.train_rows / 40})  # fmt: skip
    for budget, whole in (("200s", ["lora-qv"]), ("250s", ["lora-qv", "head"])):
        folder = config.output + budget
        asked = Comparison(
            replace(config, output=folder),
            ("head", "lora-qv"),
            {"": (1e-3, 3e-3, 1e-2)},
            seeds=3,
            rows=(8,),
            budget=budget,
        )
        compare(asked)
        settings, made = read_comparison(folder)
        assert sorted({run["method"] for run in made}) == sorted(whole)
        assert sum(run["total_seconds"] for run in made) <= float(budget[:-1])
        for method in whole:
            assert sum(run["stage"] == "seeds" for run in made if run["method"] == method) == 3
        assert any(line.startswith("head: not run") for line in settings["left_out"]) == (len(whole) == 1)
        assert len([run for run in made if run["stage"] == "rows"]) == (3 if len(whole) == 1 else 0)


def test_best_is_by_score_then_loss_then_rate():
    def made(score, loss, rate, **more):
        return {"validation": {"accuracy": score, "log_loss": loss}, "learning_rate": rate, "size": {}} | more

    failed = {"error": "nan", "learning_rate": 1e-5, "size": {}}
    assert (
        best_of([made(0.5, 1, 1e-3), made(0.7, 2, 3e-3), failed], "accuracy", True)["learning_rate"] == 3e-3
    )
    assert best_of([made(0.5, 1, 1e-3), made(0.7, 2, 3e-3)], "accuracy", False)["learning_rate"] == 1e-3
    assert best_of([made(0.7, 2, 1e-3), made(0.7, 1, 3e-3)], "accuracy", True)["learning_rate"] == 3e-3
    assert best_of([made(0.7, 1, 3e-3), made(0.7, 1, 1e-3)], "accuracy", True)["learning_rate"] == 1e-3
    assert best_of([made(None, 1, 1e-3), made(0.1, 1, 3e-3)], "accuracy", True)["learning_rate"] == 3e-3
    assert best_of([failed, failed], "accuracy", True) is None
    assert best_of([], "accuracy", True) is None


def test_contrast_is_the_formula():
    features = torch.nn.functional.normalize(
        torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=1
    )
    labels = torch.tensor([0, 0, 1, 1, 1, 2])
    total, counted = 0.0, 0
    for i in range(6):
        others = [j for j in range(6) if j != i]
        alike = [j for j in others if labels[j] == labels[i]]
        if alike:
            scores = {j: float(features[i] @ features[j]) / TEMPERATURE for j in others}
            log_sum = np.logaddexp.reduce(list(scores.values()))
            total -= sum(scores[j] - log_sum for j in alike) / len(alike)
            counted += 1
    contrast = Contrast()
    assert float(contrast(features, labels).sum()) == pytest.approx(total)
    assert contrast.weight(labels.numpy()) == counted


def test_contrastive_steps_hold_pairs_of_every_class():
    labels = np.array([0] * 30 + [1] * 9 + [2])
    steps = draw_steps(labels, 4.0, seed=1)
    assert len(steps) == 10
    assert steps[-1][0] == 4.0
    for _, rows in steps:
        assert len(rows) == len(set(rows))
        assert np.bincount(labels[rows]).tolist() == [5, 5, 1]
    assert draw_steps(labels, 4.0, seed=1) == steps
    many = draw_steps(np.repeat(np.arange(20), 4), 1.0, seed=1)
    assert all(
        len(rows) == 16
        and sorted(np.unique(np.repeat(np.arange(20), 4)[rows], return_counts=True)[1]) == [2] * 8
        for _, rows in many
    )


def test_time_left_is_by_method(config):
    runner = Runner(
        prepare(config),
        Path(config.output),
        module._settings(Comparison(config, ("head", "full"), RATES, seeds=2), prepare(config)),
        print,
    )
    assert runner.left_seconds() is None
    runner.done = {
        run.key: {"method": "head", "epochs": 2.0, "train_rows": 40, "total_seconds": 3.0}
        for run in runner.searches("head")[:1]
    }
    assert (
        runner.left_seconds() == 3.0 * 7
    )  # one search and two seeds of head, two searches and two seeds of the other at the same guess


def test_refusals(cli, tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"))
    output = tmp_path / "out"
    given = ["compare", "--train", config.train, "--model", config.model, "--output", output, "--quiet"]
    test = ["--test", config.test]
    assert (
        cli.fails(*given, output=output)
        == "no test data; name a file with --test: the methods are compared on it"
    )
    assert cli.fails(*given, *test, "--methods", "lora-qv,lorra", output=output).startswith(
        "--methods lorra: no such method; there are: majority, "
    )
    assert (
        cli.fails(*given, *test, "--budget", "0m", output=output)
        == "--budget 0m: nothing can be run for that; write 30m, 2h or 40runs"
    )
    assert cli.fails(*given, *test, "--budget", "", output=output).startswith(
        "--budget '': not a time or a number of runs"
    )
    assert cli.fails(*given, *test, "--learning-rates", "full=fast", output=output).startswith(
        "--learning-rates full=fast: not a list of numbers"
    )
    assert "must be a finite number above 0" in cli.fails(
        *given, *test, "--learning-rates", "0", output=output
    )
    assert "no learning rate" in cli.fails(*given, *test, "--learning-rates", "tfidf=1", output=output)
    assert "no such method" in cli.fails(*given, *test, "--learning-rates", "ful=1", output=output)
    assert "must be at least 1" in cli.fails(*given, *test, "--seeds", "0", output=output)
    assert "must be at least 1" in cli.fails(*given, *test, "--rows", "8,0", output=output)
    assert "not a list of whole numbers" in cli.fails(*given, *test, "--sizes", "8,x", output=output)
    assert cli.fails("compare", "--train", config.train, *test) == "no output folder; name one with --output"
    one = write_csv(tmp_path / "one.csv", [(text, "pos") for text, _ in single_rows(20)])
    said = cli.fails(
        "compare",
        "--train",
        one,
        *test,
        "--model",
        config.model,
        "--output",
        output,
        "--quiet",
        output=output,
    )
    assert said.endswith("every row has the label 'pos'; give rows of at least two classes")


def test_no_row_for_validation_is_said(config):
    with pytest.raises(DataError, match="no row is left for validation"):
        compare(
            Comparison(replace(config, validation=None), ("majority",)),
            {"train": [("good film", "pos"), ("bad film", "neg")]},
        )


def test_the_command(cli, config):
    given = [
        "compare",
        "--train",
        config.train,
        "--validation",
        config.validation,
        "--test",
        config.test,
        "--model",
        config.model,
    ]
    given += [
        "--output",
        config.output,
        "--methods",
        "majority,head",
        "--learning-rates",
        "head=1e-2",
        "--seeds",
        "2",
        "--epochs",
        "1",
        "--threads",
        "1",
    ]
    code, out, err = cli(*given, "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert {row["method"] for row in summary["methods"]} == {"majority", "head"}
    lines = err.splitlines()
    assert summary["verdict"] == summary["sentences"][: len(summary["verdict"])]
    assert lines[-1 - len(summary["verdict"]) : -1] == summary["verdict"]
    assert lines[1].startswith("[1/4] majority seed 42 on 40 rows: held-out accuracy ")
    assert "[4/4] head rate 0.01 seed 43 on 40 rows: held-out accuracy " in err
    assert lines[-1].endswith("report.html")
    for name in ("report.html", "report.md", "report.csv", "comparison.json"):
        assert (Path(config.output) / name).is_file()
    assert cli(*given, "--quiet") == (0, "", "")

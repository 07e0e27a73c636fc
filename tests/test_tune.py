"""`textlora tune`: one study by several processes, also dying ones; what is searched, pruned, failed and
trained again; the report."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from support import log_of, single_rows, snapshot, task_files, write_csv

import textlora.training.checkpoint_choice
import textlora.training.finalize
import textlora.training.trainer
import textlora.tune.search
from textlora.core.config import TrainConfig, read_config
from textlora.core.errors import StorageError, TrainingError, UsageError
from textlora.inference.classifier import TextClassifier
from textlora.metrics.scores import evaluate
from textlora.report.tuning import last_value, render_study
from textlora.training.learning_rate import default_rate
from textlora.training.prepare import prepare
from textlora.training.run import run_training
from textlora.tune.choice import LUCK, MOST_BYTES, Answers, choose, factor
from textlora.tune.search import fresh
from textlora.tune.shared import MAX_STARTS, Locks, shown
from textlora.tune.space import (
    SEARCHED,
    count_blocks,
    distributions,
    free_settings,
    start_parameters,
    trial_settings,
)
from textlora.tune.study import tune


@pytest.fixture
def config(tmp_path, tiny_base):
    files = task_files(tmp_path, "single")
    return TrainConfig(
        **files,
        model=str(tiny_base("bert")),
        output=str(tmp_path / "out"),
        learning_rate=5e-3,
        epochs=2.0,
        threads=1,
        device="cpu",
    )


def trials_of(config, storage=None, name="textlora"):
    """What the study says of each trial: state, parameters, value and scores by epoch."""
    study = optuna.load_study(study_name=name, storage=storage or journal(config))
    return [(t.state.name, t.params, t.value, t.intermediate_values) for t in study.trials]


def journal(config):
    return optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(Path(config.output) / "study.log"), lock_obj=NoLock())
    )


class NoLock:
    """For looking only."""

    acquire = release = lambda self: True


def run(config, trials=4, given=("epochs",), records=None, **options):
    return tune(
        config, given, trials=trials, on_record=(records if records is not None else []).append, **options
    )


def in_child(job, *arguments):
    """Run a job in another process; its exit code, minus the signal where it was killed."""
    child = multiprocessing.get_context("fork").Process(target=job, args=arguments)
    child.start()
    child.join()
    return child.exitcode


def dying_at(config, number, epoch, trials=4):
    """A job whose process is killed by SIGKILL in a trial's epoch."""

    def on_record(record):
        if record["kind"] == "epoch" and (record["number"], record["epoch"]) == (number, epoch):
            os.kill(os.getpid(), signal.SIGKILL)

    tune(config, ("epochs",), trials=trials, on_record=on_record)


def test_two_processes_share_a_study(config):
    """Every trial is run once, by one of them, and both end with the same result."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()

    def work():
        records = []

        def on_record(record):
            records.append(record)
            if record["kind"] == "study":
                barrier.wait()

        result = tune(config, ("epochs",), trials=9, on_record=on_record)
        queue.put(([r["number"] for r in records if r["kind"] == "trial"], result))

    children = [context.Process(target=work) for _ in range(2)]
    for child in children:
        child.start()
    (mine, first), (other, second) = queue.get(), queue.get()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert mine
    assert other
    assert sorted(mine + other) == list(range(9))
    study = trials_of(config)
    assert len(study) == 9
    assert {state for state, *_ in study} <= {"COMPLETE", "PRUNED"}
    assert len({json.dumps(parameters) for _, parameters, *_ in study}) == 9
    assert {k: v for k, v in first.items() if k != "total_seconds"} == {
        k: v for k, v in second.items() if k != "total_seconds"
    }
    assert first["trials"] == first["complete"] + first["pruned"] == 9


def test_a_killed_process_is_made_good(config, tmp_path):
    """Killed in the middle of a trial, the same command runs that trial again and ends as if it had never
    been killed."""
    assert in_child(dying_at, config, 1, 1.0) == -signal.SIGKILL
    assert [state for state, *_ in trials_of(config)] == ["COMPLETE", "RUNNING"]
    records = []
    result = run(config, records=records)
    assert [r["number"] for r in records if r["kind"] == "trial"] == [1, 2, 3]
    assert (result["trials"], result["failed"]) == (4, 0)
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"))
    run(whole)
    assert trials_of(config) == trials_of(whole)
    weights = [Path(c.output) / "best" / "adapter_model.safetensors" for c in (config, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_process_takes_over_at_once(config):
    """A process that waits for the last trial of another one runs it when that one is killed."""
    context = multiprocessing.get_context("fork")
    busy, seen = context.Event(), context.Queue()

    def hangs():
        def on_record(record):
            if record["kind"] == "trial":
                busy.set()
                signal.pause()

        tune(config, ("epochs",), trials=1, on_record=on_record)

    def waits():
        tune(
            config,
            ("epochs",),
            trials=1,
            on_record=lambda record: seen.put((record["kind"], record.get("number"))),
        )

    first, second = context.Process(target=hangs), context.Process(target=waits)
    first.start()
    assert busy.wait(60)
    second.start()
    while seen.get()[0] != "waiting":
        pass
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert seen.get() == ("trial", 0)
    while seen.get()[0] != "end":
        pass
    second.join()
    assert second.exitcode == 0
    assert [state for state, *_ in trials_of(config)] == ["COMPLETE"]


def test_killed_between_two_parameters(config, monkeypatch):
    """A trial whose parameters were drawn in part gets the rest."""
    suggest = optuna.Trial._suggest

    def dying(trial, name, distribution):
        if trial.number == 1 and name == "target_modules":
            os.kill(os.getpid(), signal.SIGKILL)
        return suggest(trial, name, distribution)

    monkeypatch.setattr(optuna.Trial, "_suggest", dying)
    assert in_child(run, config, 3) == -signal.SIGKILL
    monkeypatch.setattr(optuna.Trial, "_suggest", suggest)
    before = trials_of(config)[1]
    assert set(before[1]) == {"learning_rate", "r"}
    assert run(config, 3)["trials"] == 3
    after = trials_of(config)[1]
    assert set(after[1]) == set(SEARCHED) - {"epochs"}
    assert before[1].items() <= after[1].items()


def test_half_a_line_is_cut_off(config):
    """What a full disk leaves of a write does not spoil the study."""
    run(config, 2)
    whole = trials_of(config)
    with open(Path(config.output) / "study.log", "ab") as file:
        file.write(b'{"op_code":5,"worker_id":"')
    run(config, 3)
    assert trials_of(config)[:2] == whole
    assert len(trials_of(config)) == 3


def test_a_trial_that_kills_its_process_is_given_up(config):
    for _ in range(MAX_STARTS):
        assert in_child(dying_at, config, 1, 1.0, 3) == -signal.SIGKILL
    records = []
    result = run(config, 3, records=records)
    assert (result["trials"], result["failed"]) == (3, 1)
    assert [r["number"] for r in records if r["kind"] == "trial"] == [2]
    failed = optuna.load_study(study_name="textlora", storage=journal(config)).trials[1]
    assert failed.user_attrs["reason"] == f"its process ended {MAX_STARTS} times without a result"
    assert failed.user_attrs["reason"] in (Path(config.output) / "report.html").read_text(encoding="utf-8")


def test_a_stopped_trial_is_not_given_up(config):
    def stop(record):
        if record["kind"] == "epoch" and record["number"] == 1:
            raise KeyboardInterrupt

    for _ in range(MAX_STARTS + 1):
        with pytest.raises(KeyboardInterrupt):
            tune(config, ("epochs",), trials=3, on_record=stop)
    assert run(config, 3)["failed"] == 0


def test_same_seed_same_trials(config, tmp_path):
    found = []
    for name, seed, count in (("a", 1, 12), ("b", 1, 12), ("c", 2, 3)):  # TPE draws 10 without looking
        changed = dataclasses.replace(config, seed=seed, output=str(tmp_path / name))
        run(changed, count, given=("epochs", "target_modules", "layers"))
        found.append(trials_of(changed))
    assert found[0] == found[1]
    assert [parameters for _, parameters, *_ in found[0][1:3]] != [
        parameters for _, parameters, *_ in found[2][1:]
    ]


def test_pruning_stops_what_lags_behind(config, monkeypatch):
    monkeypatch.setattr(textlora.tune.search, "COMPLETE_TRIALS", 1)
    monkeypatch.setattr(
        textlora.tune.search,
        "trial_settings",
        lambda config, given, parameters, blocks: settings(config, parameters),
    )

    def settings(config, parameters):
        return dataclasses.replace(config, learning_rate=1e-2 if parameters["lora_dropout"] == 0 else 1e-9)

    records = []
    config = dataclasses.replace(config, epochs=8.0, learning_rate=1e-2, batch_size=4)
    result = run(config, 3, ("epochs", *(name for name in SEARCHED if name != "lora_dropout")), records)
    study = trials_of(config)
    lagging = [i for i, (_, parameters, *_) in enumerate(study) if parameters["lora_dropout"] != 0]
    assert lagging
    assert [study[i][0] for i in lagging] == ["PRUNED"] * len(lagging)
    assert result["pruned"] == len(lagging)
    done = [r["epoch"] for r in records if r["kind"] == "epoch" and r["number"] == lagging[0]]
    assert done == [1.0, 2.0]  # never in the first epoch, and no step after it
    assert list(study[lagging[0]][3]) == [1, 2]


def test_a_diverging_trial_fails_and_the_study_goes_on(config, monkeypatch):
    plain, wild_ones = textlora.tune.search.trial_settings, []

    def wild(config, given, parameters, blocks):
        found = plain(config, given, parameters, blocks)
        return (
            dataclasses.replace(found, learning_rate=1e30)
            if not wild_ones.append(found) and len(wild_ones) == 1
            else found
        )

    monkeypatch.setattr(textlora.tune.search, "trial_settings", wild)
    records = []
    result = run(config, 3, records=records)
    assert (result["failed"], result["trials"]) == (1, 3)
    end = next(r for r in records if r["kind"] == "trial_end" and r["number"] == 1)
    assert end["state"] == "failed"
    assert re.fullmatch(r"the loss is (nan|inf) at step \d+", end["reason"])
    assert trials_of(config)[1][0] == "FAIL"
    assert end["reason"] in (Path(config.output) / "report.html").read_text(encoding="utf-8")


def test_memory_that_does_not_suffice_fails_a_trial(config, monkeypatch):
    plain = textlora.tune.search.Trainings

    def small(prepared, *given, **named):
        if prepared.config.r == 8:
            raise torch.OutOfMemoryError("no room")
        return plain(prepared, *given, **named)

    monkeypatch.setattr(textlora.tune.search, "Trainings", small)
    records = []
    result = run(config, 2, records=records)
    assert result["failed"] == 1
    assert (result["chosen"]["number"], result["chosen"]["defaults"]) == (1, False)  # the defaults failed
    assert "not enough memory" in result["chosen"]["why"]
    assert next(r for r in records if r["kind"] == "trial_end")["reason"] == "not enough memory"


def test_no_complete_trial_is_an_error(config):
    with pytest.raises(
        TrainingError, match=r"no trial of 2 was completed \(trial 0: the loss is (nan|inf) at step"
    ):
        run(dataclasses.replace(config, learning_rate=1e30), 2, ("epochs", "learning_rate"))
    assert "No trial is complete" in (Path(config.output) / "report.html").read_text(encoding="utf-8")
    assert not (Path(config.output) / "best").exists()


def test_importance_needs_trials_that_differ(config):
    given = ("epochs", "learning_rate", "layers", "target_modules", "batch_size")
    config = dataclasses.replace(config, epochs=1.0)
    assert run(config, 4, given)["importance"] is None  # too few
    assert set(run(config, 5, given)["importance"]) == {"r", "lora_dropout"}
    same = dataclasses.replace(config, learning_rate=1e-12, output=config.output + "2")
    assert run(same, 5, given)["importance"] is None
    assert "too few complete trials to tell, or all scored the same" in (
        Path(same.output) / "report.html"
    ).read_text(encoding="utf-8")


def test_timeout_begins_no_trial(config):
    with pytest.raises(TrainingError, match="no trial of 0 was completed"):
        run(config, 3, timeout=1e-9)
    run(config, 2)
    assert run(config, 9, timeout=1e-9)["trials"] == 2


def test_the_choice_is_trained_as_train_does_it(config, monkeypatch):
    """Its evaluations are the trial's to the last digit, the folder is an adapter, and the test rows are
    scored once."""
    test = write_csv(Path(config.output).parent / "other.csv", single_rows(14, seed=9))
    config = dataclasses.replace(config, test=str(test), layers="last:1")
    sizes, plain = [], textlora.training.finalize.encoded_logits

    def counting(model, encoded, *rest):
        sizes.append(len(encoded))
        return plain(model, encoded, *rest)

    monkeypatch.setattr(textlora.training.finalize, "encoded_logits", counting)
    monkeypatch.setattr(textlora.training.checkpoint_choice, "encoded_logits", counting)
    builds, plain_prefix = [], textlora.tune.search.build_prefix
    monkeypatch.setattr(
        textlora.tune.search, "build_prefix", lambda *given: builds.append(1) or plain_prefix(*given)
    )
    records = []
    result = run(config, 4, ("epochs", "layers"), records)
    assert sizes.count(14) == (1 if result["chosen"]["defaults"] else 2)
    assert len(builds) == 1  # the frozen states are shared
    best = Path(result["adapter"])
    assert best == Path(config.output) / "best"
    (_, parameters, value, scores) = trials_of(config)[result["chosen"]["number"]]
    evaluations = {
        int(r["epoch"]): r["metrics"]["accuracy"] for r in log_of(best) if r["kind"] == "evaluation"
    }
    assert evaluations == scores
    assert result["validation"]["accuracy"] == value == result["chosen"]["value"]
    assert result["best"]["value"] == max(
        value for state, _, value, _ in trials_of(config) if state == "COMPLETE"
    )
    settings = read_config(best / "run" / "config.toml")
    assert (settings["learning_rate"], settings["r"]) == (parameters["learning_rate"], parameters["r"])
    assert (settings["layers"], settings["epochs"], settings["lora_alpha"]) == (
        "last:1",
        2.0,
        2.0 * parameters["r"],
    )
    assert TextClassifier.load(best).predict(["a great film"])[0].label in ("pos", "neg")
    assert [r["kind"] for r in records][:2] == ["study", "trial"]
    found = {p.name for p in Path(config.output).iterdir()} - {"defaults"}
    assert sorted(found) == ["best", "config.toml", "report.html", "study.log", "study.log.locks"]


def test_once_more_changes_nothing_and_more_trials_go_on(config):
    first = run(config, 3)
    before = snapshot(Path(config.output) / "best")
    study = trials_of(config)
    records = []
    again = run(config, 3, records=records)
    assert [r["kind"] for r in records] == ["study", "best"]
    assert {k: v for k, v in first.items() if k != "total_seconds"} == {
        k: v for k, v in again.items() if k != "total_seconds"
    }
    assert snapshot(Path(config.output) / "best") == before
    more = run(config, 6)
    assert trials_of(config)[:3] == study
    assert more["trials"] == 6
    assert more["best"]["value"] == max(
        value for state, _, value, _ in trials_of(config) if state == "COMPLETE"
    )
    assert (
        read_config(Path(config.output) / "best" / "run" / "config.toml")["r"]
        == more["chosen"]["settings"]["r"]
    )


def lead_by(config, right, **parameters):
    """Add a complete trial whose answers are right on so many of the validation rows."""
    labels = prepare(config).sets["validation"].labels
    logits = np.eye(2)[np.where(np.arange(len(labels)) < right, labels, 1 - labels)]
    answers = Answers("single_label_classification", "accuracy", labels, ("neg", "pos")).pack(logits)
    study = optuna.load_study(study_name="textlora", storage=journal(config))
    ranges = distributions(free_settings(config, ("epochs",)), 2, 32)
    given = {name: study.trials[0].params.get(name, 5e-3) for name in ranges} | parameters
    study.add_trial(
        optuna.create_trial(
            params=given, distributions=ranges, value=right / len(labels), user_attrs={"answers": answers}
        )
    )


def test_only_a_clear_lead_takes_the_place_of_the_defaults(config):
    """Both are trained and scored on the test rows then; where the lead is small the defaults stay, and say
    why."""
    files = task_files(Path(config.output).parent, "single")
    config = dataclasses.replace(
        config, learning_rate=1e-7, test=files["test"]
    )  # outside its range, and learns nothing
    first = run(config, 1)
    right = round(16 * first["best"]["value"])
    assert first["chosen"]["defaults"]
    assert first["defaults"]["settings"]["learning_rate"] == 1e-7
    assert "learning_rate" not in first["defaults"]["parameters"]
    old = read_config(Path(config.output) / "best" / "run" / "config.toml")
    assert (old["learning_rate"], old["r"]) == (1e-7, 8)
    lead_by(config, right + 1, r=5)
    close = run(config, 2)
    assert (close["best"]["number"], close["chosen"]["number"]) == (1, 0)
    assert 0 < close["chosen"]["lead"] < close["chosen"]["lead_needed"]
    assert "the defaults are kept" in close["sentences"][0]
    assert not (Path(config.output) / "defaults").exists()
    lead_by(config, 16, r=3)
    records = []
    clear = run(config, 3, records=records)
    assert (clear["best"]["number"], clear["chosen"]["number"], clear["chosen"]["defaults"]) == (2, 2, False)
    assert clear["chosen"]["lead"] > clear["chosen"]["lead_needed"]
    assert [r["kind"] for r in records if r["kind"] in ("best", "defaults")] == ["best", "defaults"]
    assert read_config(Path(config.output) / "best" / "run" / "config.toml")["r"] == 3
    assert read_config(Path(config.output) / "defaults" / "run" / "config.toml")["learning_rate"] == 1e-7
    assert clear["defaults"]["test"] == first["test"]
    page = (Path(config.output) / "report.html").read_text(encoding="utf-8")
    assert f"The defaults have {first['test']['accuracy']:.4f}" in page
    assert f"{clear['test']['accuracy']:.4f}" in clear["sentences"][1]
    assert f"{first['test']['accuracy']:.4f}" in clear["sentences"][1]


def test_the_defaults_are_never_pruned(config, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    result = run(config, 3)
    assert [state for state, *_ in trials_of(config)] == ["COMPLETE", "PRUNED", "PRUNED"]
    assert result["chosen"]["defaults"]
    assert result["chosen"]["why"].startswith("No other trial is complete")


@pytest.fixture
def crossed(config):
    """Without validation rows: cross-validation decides."""
    return dataclasses.replace(config, validation=None, layers="last:1")


def test_few_rows_are_scored_by_cross_validation(crossed, monkeypatch):
    """Trials are scored on every row by a training that did not see it; what is chosen gets the same score
    when it is trained."""
    builds, plain_prefix = [], textlora.tune.search.build_prefix
    monkeypatch.setattr(
        textlora.tune.search, "build_prefix", lambda *given: builds.append(1) or plain_prefix(*given)
    )
    records = []
    result = run(crossed, 3, ("epochs", "layers"), records)
    assert len(builds) == 1  # the frozen states are those of all rows
    assert (result["folds"], result["held_out_rows"]) == (3, 40)
    study = trials_of(crossed)
    for state, _, value, scores in study:
        assert state == "COMPLETE"
        assert list(scores) == [1, 2, 3]
        assert scores[3] == value  # by then all rows are held out
        assert value * 40 == pytest.approx(round(value * 40))
    assert [r["fold"] for r in records if r["kind"] == "fold" and r["number"] == 0] == [1, 2, 3]
    assert result["validation"]["accuracy"] == result["chosen"]["value"]
    config = dataclasses.replace(crossed, output=crossed.output + "-train")
    assert run_training(config)["validation"]["accuracy"] == result["defaults"]["value"]
    page = (Path(crossed.output) / "report.html").read_text(encoding="utf-8")
    assert "40 held-out rows (3-fold cross-validation)" in page


def test_killed_between_folds(crossed, tmp_path):
    def dying():
        def on_record(record):
            if record["kind"] == "fold" and (record["number"], record["fold"]) == (1, 2):
                os.kill(os.getpid(), signal.SIGKILL)

        tune(crossed, ("epochs",), trials=3, on_record=on_record)

    assert in_child(dying) == -signal.SIGKILL
    run(crossed, 3)
    whole = dataclasses.replace(crossed, output=str(tmp_path / "whole"))
    run(whole, 3)
    assert trials_of(crossed) == trials_of(whole)


def test_pruned_after_a_fold(crossed, monkeypatch):
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda trial: True)
    records = []
    run(crossed, 2, records=records)
    assert [(r["number"], r["fold"]) for r in records if r["kind"] == "fold"] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
    ]


@pytest.mark.parametrize(
    ("kind", "metric", "labels"),
    [
        ("single_label_classification", "accuracy", np.arange(60) % 3),
        ("single_label_classification", "macro_f1", np.arange(60) % 3),
        ("single_label_classification", "log_loss", np.arange(60) % 3),
        (
            "multi_label_classification",
            "micro_f1",
            (np.arange(180).reshape(60, 3) % 4 == 0).astype(np.float32),
        ),
        ("regression", "mse", np.linspace(-1, 1, 60).astype(np.float32)),
    ],
)
def test_answers_are_compared_row_by_row(kind, metric, labels):
    random = np.random.default_rng(0)
    truth = (
        labels[:, None]
        if kind == "regression"
        else np.eye(3)[labels] * 2 - 1
        if labels.ndim == 1
        else labels * 2 - 1
    )
    good, bad = (truth + noise * random.normal(size=truth.shape) for noise in (0.5, 1.5))
    answers = Answers(kind, metric, labels, ("a", "b", "c"))
    score = lambda logits: evaluate(kind, labels, logits, ["a", "b", "c"])[metric]
    value, error = answers.lead(answers.pack(good), answers.pack(bad))
    assert value == pytest.approx(abs(score(good) - score(bad)), abs=2e-3)
    assert value > 0
    assert error > 0
    assert answers.lead(answers.pack(bad), answers.pack(good))[0] == pytest.approx(-value)
    if metric == "accuracy":
        right = [(logits.argmax(1) == labels).astype(float) for logits in (good, bad)]
        rows = np.std(right[0] - right[1]) / np.sqrt(60)
        assert error == pytest.approx(np.hypot(rows, LUCK * np.sqrt(2)), rel=0.05)


def test_answers_of_many_rows_stay_small():
    labels = np.zeros(200_000, dtype=np.int64)
    answers = Answers("single_label_classification", "accuracy", labels, ("a", "b"))
    text = answers.pack(np.random.default_rng(0).normal(size=(200_000, 2)))
    assert len(text) < 64_000
    assert len(answers.unpack(text)) == len(answers.picked) == MOST_BYTES


def test_the_best_of_many_that_are_alike_is_seldom_preferred():
    """Trials that are as good as the defaults: luck alone must not choose them in more than about one study
    of twenty."""
    random, labels, chosen = np.random.default_rng(1), np.zeros(150, dtype=np.int64), 0
    answers = Answers("single_label_classification", "accuracy", labels, ("a", "b"), 3)
    for _ in range(100):
        ease = random.normal(1.0, 1.0, size=150)
        right = ease + 0.5 * random.normal(size=(8, 150)) > 0
        trials = [
            {
                "number": i,
                "defaults": i == 0,
                "state": "complete",
                "reason": None,
                "answers": answers.pack(np.eye(2)[1 - ok.astype(int)]),
            }
            for i, ok in enumerate(right)
        ]
        chosen += choose(trials, int(right.mean(1).argmax()), answers).number != 0
    assert chosen <= 10
    assert factor(1) == pytest.approx(1.645, abs=1e-3)
    assert factor(7) < factor(29)


def test_a_trial_that_others_put_in_is_run(config):
    run(config, 1)
    study = optuna.load_study(study_name="textlora", storage=journal(config))
    study.enqueue_trial({"r": 5, "learning_rate": 2e-3})
    run(config, 2)
    assert {"r": 5, "learning_rate": 2e-3}.items() <= trials_of(config)[1][1].items()


def test_database(config):
    """A database in place of the file; a trial of a machine that is out of sight is left alone."""
    url = f"sqlite:///{Path(config.output).parent}/study.db"
    assert run(config, 2, storage=url, study="films")["trials"] == 2
    assert run(config, 3, storage=url, study="films")["trials"] == 3
    study = optuna.load_study(study_name="films", storage=url)
    study.ask().set_user_attr("place", "elsewhere")
    records = []
    result = run(config, 5, storage=url, study="films", records=records)
    assert [r["number"] for r in records if r["kind"] == "trial"] == [4]
    assert [state for state, *_ in trials_of(config, url, "films")] == ["COMPLETE"] * 3 + [
        "RUNNING",
        "COMPLETE",
    ]
    assert (result["trials"], result["complete"]) == (5, 4)
    assert sorted(p.name for p in Path(config.output).iterdir()) == [
        "best",
        "config.toml",
        "report.html",
        "study.locks",
    ]


def test_two_studies_in_one_file(config, tmp_path):
    storage = str(tmp_path / "both.log")
    run(config, 2, storage=storage, study="a")
    other = dataclasses.replace(config, output=str(tmp_path / "b"), seed=7)
    run(other, 2, storage=storage, study="b")
    backend = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(storage, lock_obj=NoLock())
    )
    assert sorted(optuna.get_all_study_names(backend)) == ["a", "b"]


def test_locks_hold_against_other_processes(tmp_path):
    mine = Locks(tmp_path / "locks")
    assert mine.take(3)

    def other():
        locks = Locks(tmp_path / "locks")
        os._exit(10 * locks.take(3, wait=False) + locks.take(4, wait=False))

    assert in_child(other) == 1
    mine.drop(3)
    assert in_child(other) == 11
    with pytest.raises(StorageError, match="cannot write"):
        Locks(tmp_path / "no" / "locks")


def test_passwords_are_not_shown():
    assert shown("postgresql://ann:secret@host/db") == "postgresql://ann:***@host/db"
    assert shown("sqlite:///a.db") == "sqlite:///a.db"


def test_fresh_is_what_prepare_makes(config, tiny_base):
    for family in ("bert", "modernbert"):  # the fast path, and transformers + peft
        config = dataclasses.replace(config, model=str(tiny_base(family)))
        changed = dataclasses.replace(config, r=5, lora_alpha=20.0, layers="last:1", seed=3)
        expected, found = prepare(changed).model, fresh(prepare(config), changed).model
        assert list(expected.trainable()) == list(found.trainable())
        assert all(
            torch.equal(a, b)
            for a, b in zip(expected.trainable().values(), found.trainable().values(), strict=True)
        )
        assert (expected.depth, expected.path) == (found.depth, found.path)


def test_reference_path(config, tiny_base):
    result = run(dataclasses.replace(config, model=str(tiny_base("modernbert"))), 2)
    assert result["complete"] == 2
    assert result["validation"]["accuracy"] == result["chosen"]["value"]


def test_other_problem_types(tmp_path, tiny_base):
    """Lower is better where the metric says so."""
    files = task_files(tmp_path, "regression")
    config = TrainConfig(
        **files,
        model=str(tiny_base("bert")),
        output=str(tmp_path / "out"),
        metric="mse",
        threads=1,
        device="cpu",
    )
    result = run(dataclasses.replace(config, epochs=2.0), 4)
    assert result["best"]["value"] == min(
        value for state, _, value, _ in trials_of(config) if state == "COMPLETE"
    )
    assert "Lower is better" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_searched():
    config = TrainConfig()
    assert free_settings(config, ()) == SEARCHED
    assert free_settings(config, ("epochs", "seed", "r")) == (
        "learning_rate",
        "target_modules",
        "layers",
        "lora_dropout",
        "batch_size",
    )
    assert "batch_size" not in free_settings(TrainConfig(batch_tokens=500), ("batch_tokens",))
    ranges = distributions(SEARCHED, 12, 384)
    assert list(ranges) == list(SEARCHED)
    assert (ranges["layers"].low, ranges["layers"].high, ranges["r"].high) == (1, 12, 32)
    assert distributions(("r",), 12, 20)["r"].high == 20
    assert (
        count_blocks(
            [
                "bert.encoder.layer.0.attention.self.query",
                "bert.encoder.layer.11.attention.self.query",
                "bert.pooler.dense",
            ]
        )
        == 2
    )
    assert count_blocks(["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"]) == 1


def test_the_first_trial_is_what_train_does():
    config = TrainConfig(learning_rate=2e-3, epochs=3.0, layers="last:4", target_modules=("all-linear",), r=8)
    start = start_parameters(config, distributions(SEARCHED, 6, 384), 6, 40)
    assert start == {
        "learning_rate": 2e-3, "r": 8, "target_modules": "all-linear", "layers": 4, "lora_dropout": config.lora_dropout, "epochs": 3,
        "batch_size": config.batch_size,
    }  # fmt: skip
    assert trial_settings(config, (), start, 6) == config
    outside = TrainConfig(
        learning_rate=1.0,
        epochs=2.5,
        layers="0,1",
        target_modules=("query",),
        r=64,
        lora_dropout=0.12,
        batch_size=9,
    )
    assert start_parameters(outside, distributions(SEARCHED, 6, 384), 6, 40) == {}
    unnamed = start_parameters(
        TrainConfig(),
        {"learning_rate": distributions(SEARCHED, 6, 384)["learning_rate"]},
        6,
        default_rate(512),
    )
    assert unnamed == {"learning_rate": default_rate(512)}


def test_parameters_become_settings():
    config = TrainConfig(r=8, lora_alpha=16.0)
    parameters = {"r": 12, "layers": 6, "target_modules": "default", "epochs": 3}
    found = trial_settings(config, (), parameters, 6)
    assert (found.r, found.lora_alpha, found.layers, found.target_modules, found.epochs) == (
        12,
        24.0,
        "all",
        None,
        3.0,
    )
    assert found.lora.scaling == config.lora.scaling
    assert trial_settings(config, ("lora_alpha",), parameters, 6).lora_alpha == 16.0
    assert trial_settings(dataclasses.replace(config, use_rslora=True), (), parameters, 6).lora_alpha == 16.0
    assert trial_settings(config, (), {"layers": 2, "target_modules": "all-linear"}, 6).layers == "last:2"
    assert trial_settings(config, (), {"target_modules": "all-linear"}, 6).target_modules == ("all-linear",)


@pytest.fixture
def flags(config):
    known = [
        "--model",
        config.model,
        "--threads",
        "1",
        "--epochs",
        "1",
        "--max-length",
        "32",
        "--output",
        config.output,
    ]
    return ["tune", "--train", config.train, "--validation", config.validation, *known, "--quiet"]


def test_command(cli, config, flags):
    code, out, err = cli(*flags[:-1], "--trials", "2", "--json")
    assert code == 0, err
    assert out.count("\n") == 1
    result = json.loads(out)
    assert (result["trials"], result["output"], result["adapter"]) == (
        2,
        config.output,
        config.output + "/best",
    )
    assert "test" not in result
    assert "searching learning_rate, r, target_modules, layers, lora_dropout, batch_size in 2 trials" in err
    assert re.search(
        r"^trial 0 \(the defaults\): accuracy 0\.\d{4}  best so far  \(1 of 2 done  \d+:\d\d left\)$",
        err,
        flags=re.MULTILINE,
    )
    assert "optuna" not in err.lower()
    assert err.splitlines()[-2] == result["sentences"][0]
    assert cli(*flags, "--trials", "2")[2] == ""


def test_interrupted(cli, flags, monkeypatch):
    def stop(*given, **named):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(textlora.tune.search, "start_head", stop)
    code, _, err = cli(*flags)
    assert (code, err) == (130, "textlora: interrupted; the same command goes on with the study\n")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--trials", "0"), "--trials 0: must be at least 1"),
        (("--timeout", "0m"), "--timeout 0: must be above 0"),
        (("--timeout", "soon"), "'soon' is not a time such as 90s, 30m, 2h or 1h30m"),
        (("--train", "nowhere.csv"), "nowhere.csv"),
        (("--eval-every", "5"), "No such option '--eval-every'"),
        (("--metric", "f5"), "--metric f5: not a metric of this task"),
        (("--storage", "no/study.log"), "--storage no/study.log: its folder is not there; make it first"),
        (("--storage", "nodb://ann:secret@host/db"), "--storage nodb://ann:***@host/db: cannot be opened"),
        (("--limit-train", "1"), "hold one class only"),
        (
            (
                "--r",
                "4",
                "--learning-rate",
                "0.001",
                "--layers",
                "all",
                "--target-modules",
                "query",
                "--lora-dropout",
                "0",
                "--batch-size",
                "8",
            ),
            "every setting that tune searches was given; leave some out",
        ),
    ],
)
def test_wrong_input(cli, config, flags, extra, message):
    assert message in cli.fails(*flags, *extra, output=Path(config.output))
    assert not Path(config.output).exists()


def test_wrong_folders_and_files(cli, config, flags, tmp_path):
    assert "is not an Optuna journal" in cli.fails(*flags, "--storage", config.train)
    assert "name a file" in cli.fails(*flags, "--storage", tmp_path)
    made = tmp_path / "made"
    made.mkdir()
    (made / "notes.txt").write_text("mine", encoding="utf-8")
    assert "is not empty, and holds no study" in cli.fails(*flags, "--output", made, output=made)
    assert "is a file" in cli.fails(*flags, "--output", config.train)
    assert "no output folder" in cli.fails("tune", "--train", config.train)
    toml = tmp_path / "c.toml"
    toml.write_text("eval_every = 3\n", encoding="utf-8")
    assert "--eval-every has no meaning for tune" in cli.fails(*flags, "--config", toml)
    assert not Path(config.output).exists()


def test_no_validation_rows(cli, tmp_path, config, flags):
    few = write_csv(tmp_path / "few.csv", [("good film", "pos"), ("bad film", "neg")])
    kept = [flag for flag in flags if flag not in ("--validation", config.validation)]
    assert "no row is left for validation" in cli.fails(*kept, "--train", few)


def test_a_study_of_other_settings_is_refused(cli, tmp_path, config, flags):
    assert cli(*flags, "--trials", "1")[0] == 0
    out = Path(config.output)
    message = cli.fails(*flags, "--seed", "7", output=out)
    assert message == (
        "study 'textlora' was begun with other settings (seed); give the same, or choose another --output, or --study in the same --storage"
    )
    assert "other settings (r, searched)" in cli.fails(*flags, "--r", "4", output=out)
    less = write_csv(tmp_path / "less.csv", single_rows(30))
    assert "begun with other rows; give" in cli.fails(*flags, "--train", less, output=out)
    moved = write_csv(tmp_path / "moved.csv", single_rows(40))
    assert cli(*flags, "--train", moved, "--trials", "1")[0] == 0  # the same rows
    foreign = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "theirs.log"), lock_obj=NoLock())
    )
    optuna.create_study(storage=foreign, study_name="textlora").add_trial(optuna.create_trial(value=1.0))
    assert "was not made by `textlora tune`" in cli.fails(
        *flags, "--output", tmp_path / "new", "--storage", tmp_path / "theirs.log"
    )
    assert not (tmp_path / "new").exists()


def test_missing_packages(config, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(
        UsageError, match=r"needs optuna and scikit-learn; install them with pip install \"textlora\[tune\]\""
    ):
        run(config)


def made_up_study(count=30, **changes):
    """A study as `Search.record` gives it, with a trial of every kind."""
    trials = []
    for i in range(count):
        state = ("complete", "pruned", "complete", "failed")[i % 4] if i < count - 1 else "running"
        value = 0.5 + 0.4 * (i * 7 % count) / count
        parameters = {
            "learning_rate": 1e-4 * 1.15**i, "r": 2 + i, "target_modules": ("default", "all-linear")[i % 2], "layers": 1 + i % 6,
            "lora_dropout": 0.05 * (i % 7), "epochs": 1 + i % 8, "batch_size": (4, 8, 16, 32)[i % 4],
        }  # fmt: skip
        settings = parameters | {
            "lora_alpha": 2.0 * parameters["r"],
            "layers": f"last:{parameters['layers']}",
            "target_modules": None if i % 2 == 0 else ("all-linear",),
        }
        trial = {
            "number": i,
            "state": state,
            "value": value if state == "complete" else None,
            "parameters": parameters,
            "settings": settings,
        }
        trial |= {
            "scores": {} if state == "failed" else {"1": value - 0.1, "2": value},
            "best_epoch": 2.0,
            "adapter_parameters": 9216,
        }
        trial |= {
            "reason": "the loss is nan at step 3 <b>&" if state == "failed" else None,
            "seconds": None if state == "running" else 2.5,
        }
        trials.append(trial | {"starts": 2 if i == 5 else None, "defaults": i == 0})
    best = max(
        (t for t in trials if t["state"] == "complete"), key=lambda t: t["value"], default={"number": None}
    )
    return {
        "metric": "accuracy", "higher_is_better": True, "model": "minilm", "problem_type": "single_label_classification",
        "rows": {"train": 200, "validation": 100, "test": 50}, "held": 100, "folds": 0, "searched": list(SEARCHED), "trials": trials, "best": best["number"],
        "importance": {"learning_rate": 0.7, "r": 0.2, "epochs": 0.1}, "settings": {"seed": 42, "pooling": "first"},
        "choice": None if best["number"] is None else {"number": best["number"], "defaults": best["number"] == 0},
        "result": {"test": {"accuracy": 0.8125}}, "defaults_result": {"test": {"accuracy": 0.7890}}, "sentences": ["Chosen: <it>."],
    } | changes  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes and cells of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.cell, self.classes = [], [], False, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.classes += (dict(attributes).get("class") or "").split()
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.cell = self.cell or tag in ("td", "th")

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag):
        self.cell = False if tag in ("td", "th") else self.cell


def test_report_shows_every_trial():
    study = made_up_study()
    text = render_study(study, "films <script>")
    page = Page(text)
    assert "script" not in page.tags
    assert "films &lt;script&gt;" in text
    assert "the loss is nan at step 3 &lt;b&gt;&amp;" in text
    assert not re.search(r"\b(?:nan|inf|undefined)\b", re.sub("the loss is nan", "", text))
    rows = page.rows[1:]
    assert [row[0] for row in rows] == [str(t["number"]) for t in study["trials"]]
    for row, trial in zip(rows, study["trials"], strict=True):
        assert row[1].startswith("chosen" if trial["number"] == study["choice"]["number"] else trial["state"])
        assert ("the defaults" in row[1]) == trial["defaults"]
        value = last_value(trial)
        assert row[2] == ("–" if value is None else f"{value:.4f}")
        assert row[3:10] == [
            f"{trial['parameters']['learning_rate']:.4g}", str(trial["parameters"]["r"]), f"{2 * trial['parameters']['r']:g}",
            trial["parameters"]["target_modules"], f"last:{trial['parameters']['layers']}", f"{trial['parameters']['lora_dropout']:.4g}",
            str(trial["parameters"]["epochs"]),
        ]  # fmt: skip
    assert rows[5][1] == "prunedafter epoch 2; started 2 times"
    shown_at = sum(last_value(t) is not None for t in study["trials"])
    marks = 1 + len(SEARCHED)  # the history and the slices
    assert (
        page.classes.count("m-pruned") == marks * sum(t["state"] == "pruned" for t in study["trials"]) + 1
    )  # and the legend
    assert page.classes.count("m-best") == marks + 1
    assert (
        page.classes.count("m-failed") == sum(t["state"] == "failed" for t in study["trials"]) + 1
    )  # only in the history
    assert shown_at < len(study["trials"])
    assert "0.8125" in text
    assert "test accuracy</b>" in text
    assert "50 test rows" in text
    assert "The defaults have 0.7890" in text
    assert "Chosen: &lt;it&gt;." in text
    assert re.findall(r">(\d+ %)<", text) == ["70 %", "20 %", "10 %"]


@pytest.mark.parametrize(
    "study",
    [
        made_up_study(1),
        made_up_study(2, result=None, importance=None),
        made_up_study(0, best=None, result=None),
    ],
)
def test_report_of_small_studies(study):
    text = render_study(study, "small")
    assert text.startswith("<!doctype html>")
    assert ("No trial is complete" in text) == (study["best"] is None)


def test_without_test_rows_the_page_says_what_its_score_is():
    """A score of the search never stands alone: on how many rows it was, and that trials were compared on
    them."""
    study = made_up_study(9, result={}, defaults_result=None, held=4, folds=3)
    text = render_study(study, "few")
    best = next(trial for trial in study["trials"] if trial["number"] == study["best"])
    head = text[text.index('class="headline"') :][:900]
    assert f"{best['value']:.4f}" in head
    assert "held-out accuracy" in head
    assert "4 held-out rows (3-fold cross-validation)" in head
    assert "trials were compared on" in head


def test_report_of_a_study_that_failed():
    study = made_up_study(3, best=None, result=None, importance=None)
    for trial in study["trials"]:
        trial.update(state="failed", value=None, scores={})
    assert "History" not in render_study(study, "failed")

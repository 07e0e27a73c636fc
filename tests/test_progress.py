"""What a person sees on standard error: lines always, a bar in a terminal, nothing when quiet."""

import io
import re
from contextlib import redirect_stderr
from types import SimpleNamespace

import pytest

from textlora.cli.compare import ComparisonDisplay
from textlora.cli.progress import LINE_SECONDS, Display, TrainingDisplay, clock, report_line, time_left
from textlora.cli.tune import SearchDisplay


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still until `now.value` is changed."""
    now = SimpleNamespace(value=100.0)
    for module in ("textlora.cli.progress", "textlora.cli.compare", "textlora.cli.tune"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=lambda: now.value))
    return now


class Terminal(io.StringIO):
    """Stands for standard error; `seen` is what was written since it was last asked, without colours and
    other codes."""

    def isatty(self):
        return True

    def seen(self):
        text = re.sub(r"\x1b\[[\d;?]*\w", "", self.getvalue())
        self.seek(0)
        self.truncate()
        return text


@pytest.fixture(autouse=True)
def window(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    monkeypatch.setenv("TERM", "xterm")


def step(number):
    return {"kind": "step", "step": number, "loss": 0.5, "tokens_per_second": 1200.0}


def evaluation(number):
    return {
        "kind": "evaluation",
        "step": number,
        "epoch": 1.0,
        "loss": 0.25,
        "metrics": {"accuracy": 0.75},
        "best": True,
        "kept": True,
    }


START = {
    "kind": "start",
    "steps": 10,
    "model": "tiny",
    "device": "cpu",
    "adapter_parameters": 9216,
    "head_parameters": 66,
    "labels": ["a", "b"],
}
TRAINING = [START, step(1), step(2), evaluation(2), step(10), evaluation(10)]
RUN = {"method": "lora-qv", "size": {"r": 8}, "learning_rate": 1e-3, "seed": 7, "train_rows": 500}
ENDED = {
    "kind": "end",
    **RUN,
    "metric": "accuracy",
    "validation": {"accuracy": 0.5},
    "test": {"accuracy": None},
    "total_seconds": 61.0,
}
STUDY = {"kind": "study", "searched": ["r", "epochs"], "trials": 4, "done": 1, "metric": "accuracy"}
TRIAL = {
    "kind": "trial_end",
    "number": 1,
    "state": "complete",
    "reason": None,
    "value": 0.5,
    "best": {"number": 1},
}


def test_time():
    assert [clock(s) for s in (0, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]


def test_time_left_is_the_pace_so_far_times_the_rest(now):
    assert time_left(70.0, 3, 6) == "1:00 left"
    assert [time_left(70.0, done, rest) for done, rest in ((0, 6), (3, 0), (3, -1))] == ["", "", ""]


def test_lines_of_training_elsewhere_are_at_most_one_in_ten_seconds(now, capsys):
    with TrainingDisplay() as display:
        for record in TRAINING[:3]:
            display.show(record)
        now.value += LINE_SECONDS + 1
        for record in TRAINING[3:]:
            display.show(record)
        display.show(step(10))
    assert capsys.readouterr().err.splitlines() == [
        "model: tiny on cpu, 9,216 LoRA and 66 head parameters, 2 labels",
        "epoch 1.00  step 2  validation loss 0.2500  accuracy 0.7500  best so far",
        "step 10/10  training  loss 0.5000  accuracy 0.7500  1,200 tokens/s",
        "epoch 1.00  step 10  validation loss 0.2500  accuracy 0.7500  best so far",
    ]


def test_training_in_a_terminal_has_a_bar_until_the_last_evaluation(now):
    with redirect_stderr(Terminal()) as err, TrainingDisplay() as display:
        display.show(START)
        display.show(step(1))
        now.value += 4
        for record in TRAINING[2:]:
            display.show(record)
        seen = err.seen()
        display.show({"kind": "end", "epochs": 1.0, "train_seconds": 5.0, "tokens_per_second": 1000.0})
    assert "training" in seen
    assert "10/10 loss 0.5000  accuracy 0.7500  1,200 tokens/s" in seen
    assert seen.rstrip().endswith("saving, and checking the saved folder with transformers + peft ...")
    assert "step 2/10" not in seen
    assert err.seen() == "trained 1.00 epochs in 0:05, 1,000 tokens/s\n"


@pytest.mark.parametrize("left", [None, 90.0])
def test_lines_of_a_comparison(now, capsys, left):
    with ComparisonDisplay() as display:
        display.show({"kind": "begin", **RUN, "done": 2, "all": 9, "left_seconds": left})
        now.value += 30
        display.show(ENDED | {"done": 3, "all": 9})
        display.show({"kind": "end", **RUN, "error": "the loss is nan", "done": 4, "all": None})
    ending = "" if left is None else "  about 1:00 left"
    assert capsys.readouterr().err.splitlines() == [
        f"[3/9] lora-qv r 8 rate 0.001 seed 7 on 500 rows: held-out accuracy 0.5000 in 1:01{ending}",
        f"[4] lora-qv r 8 rate 0.001 seed 7 on 500 rows: failed, the loss is nan{ending}",
    ]


def test_a_comparison_in_a_terminal_has_a_bar(now):
    with redirect_stderr(Terminal()) as err, ComparisonDisplay() as display:
        display.show({"kind": "begin", **RUN, "done": 2, "all": 9, "left_seconds": 90.0})
        display.show(ENDED | {"done": 3, "all": 9})
    seen = err.seen()
    assert "comparing" in seen
    assert "2/9 lora-qv r 8 rate 0.001 seed 7 on 500 rows about 1:30 left" in seen
    assert "[3/9] lora-qv r 8" in seen


def test_lines_of_a_search_and_of_its_last_training(now, capsys):
    with SearchDisplay() as display:
        display.show(STUDY)
        display.show({"kind": "trial", "number": 1})
        now.value += 20
        display.show(TRIAL | {"done": 2})
        display.show(
            TRIAL | {"number": 2, "state": "failed", "reason": "the loss is nan", "value": None, "done": 3}
        )
        display.show(TRIAL | {"number": 3, "state": "pruned", "value": None, "done": 4})
        display.show({"kind": "best", "number": 1, "value": 0.5})
        display.show(evaluation(2))
    assert capsys.readouterr().err.splitlines() == [
        "searching r, epochs in 4 trials, 1 are done",
        "trial 1: accuracy 0.5000  best so far  (2 of 4 done  0:40 left)",
        "trial 2: failed: the loss is nan  (3 of 4 done  0:10 left)",
        "trial 3: pruned  (4 of 4 done)",
        "training the settings of trial 1 on all rows (held-out accuracy 0.5000) ...",
        "epoch 1.00  step 2  validation loss 0.2500  accuracy 0.7500  best so far",
    ]


def test_a_search_in_a_terminal_has_a_bar_of_trials_then_one_of_steps(now):
    with redirect_stderr(Terminal()) as err, SearchDisplay() as display:
        display.show(STUDY)
        display.show({"kind": "trial", "number": 1})
        display.show({"kind": "epoch", "number": 1, "epoch": 2.0, "epochs": 8.0, "value": 0.25})
        display.show({"kind": "best", "number": 1, "value": 0.5})
        trials = err.seen()
        for record in TRAINING:
            display.show(record)
        steps = err.seen()
    assert "trials" in trials
    assert "1/4 trial 1  epoch 2 of 8  accuracy 0.2500" in trials
    assert "training" not in trials.partition("training the settings")[0]
    assert "10/10 loss 0.5000" in steps
    assert "trials" not in steps


@pytest.mark.parametrize("kind", [Display, TrainingDisplay, ComparisonDisplay, SearchDisplay])
def test_quiet_says_nothing_even_in_a_terminal(kind):
    with redirect_stderr(Terminal()) as err, kind(quiet=True) as display:
        display.say("hello")
        display.count("things", 1, 2)
    assert err.seen() == ""


def test_the_last_line_says_where_the_rows_cannot_tell():
    record = {
        "kind": "final",
        "split": "test",
        "rows": 4,
        "metrics": {"accuracy": 1.0},
        "intervals": {"accuracy": [0.5101, 1.0]},
    }
    assert "4 rows cannot tell: the true accuracy may be anything between 0.51 and 1.00." in report_line(
        record
    )
    assert "cannot tell" in report_line(record | {"metrics": {"mse": 0.0}, "intervals": {}})
    assert "\n" not in report_line(record | {"rows": 4000, "intervals": {"accuracy": [0.97, 1.0]}})

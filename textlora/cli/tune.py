"""`textlora tune`."""

import re
import signal
import time
from contextlib import contextmanager
from typing import Any

import click

from textlora.cli.base import app, json_option, print_json, quiet_option
from textlora.cli.options import merge_settings, setting_options
from textlora.cli.progress import TrainingDisplay, time_left
from textlora.cli.train import ALL_FLAGS
from textlora.core.config import TrainConfig
from textlora.core.errors import Interrupted, UsageError

_FLAGS = tuple(name for name in ALL_FLAGS if name not in ("eval_every", "init_adapter"))
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Duration(click.ParamType):
    """30m, 2h or 1h30m to seconds; a bare number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        parts = re.fullmatch(r"(?:(\d+(?:\.\d+)?)([smhd]))+|\d+(?:\.\d+)?", value)
        if parts is None:
            self.fail(f"'{value}' is not a time such as 90s, 30m, 2h or 1h30m", param, ctx)
        found = re.findall(r"([\d.]+)([smhd]?)", value)
        return sum(float(number) * _UNITS[unit or "s"] for number, unit in found)


@app.command()
@setting_options(_FLAGS)
@click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; flags override it.")
@click.option(
    "--trials", type=int, default=20, help="Trials of the study in all, over all processes.  [default: 20]"
)
@click.option(
    "--timeout",
    type=Duration(),
    metavar="TIME",
    help="Begin no trial after this long: 90s, 30m, 2h. Default: none.",
)
@click.option(
    "--storage",
    metavar="FILE|URL",
    help="Where the study is kept: a file, or the URL of a database. Default: study.log in --output.",
)
@click.option(
    "--study",
    default="textlora",
    metavar="NAME",
    help="Name of the study in its storage.  [default: textlora]",
)
@json_option
@quiet_option
def tune(
    config_file: str | None,
    trials: int,
    timeout: float | None,
    storage: str | None,
    study: str,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Search settings of `train` on your data, and train the best where it is clearly better than the
    defaults.

    textlora tune --train reviews.csv --test test.csv --output tuned --trials 30

    Searched are --learning-rate, --r, --target-modules, --layers, --lora-dropout, --epochs and --batch-size;
    one that is given is kept. The first trial is the defaults. Trials are compared on rows held out, those of
    --validation or, below 1,000 training rows, all of them by cross-validation, and stopped early where they
    lag behind. The same command started twice works on one study; started again it goes on. DIR/best is the
    adapter, DIR/report.html the report.
    """
    settings = merge_settings(flags, config_file)
    if not settings.get("output"):
        raise UsageError("no output folder", "name one with --output")
    config = TrainConfig(**settings)
    with SearchDisplay(quiet) as display, _stoppable():
        display.say("reading the data and the base model ...")
        from textlora.tune.study import tune as search

        try:
            result = search(
                config,
                frozenset(settings),
                trials=trials,
                timeout=timeout,
                storage=storage,
                study=study,
                on_record=display.show,
            )
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted", "the same command goes on with the study") from error
        for line in result["sentences"]:
            display.say(line)
        display.say(f"saved to {result['adapter']}: open {result['output']}/report.html")
    if as_json:
        print_json(result)


@contextmanager
def _stoppable():
    """SIGTERM ends the command as Ctrl-C does, so that a trial that is stopped so is not taken for one that
    brought its process down."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class SearchDisplay(TrainingDisplay):
    """Its `show` takes the records of a search: a line per trial, and the last run as `train` shows it."""

    def __init__(self, quiet: bool = False):
        super().__init__(quiet)
        self.trials = self.first = self.done = 0
        self.began = time.monotonic()
        self.searched_metric = self.left = ""

    def show(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "study":
            self.trials = record["trials"]
            self.first = record["done"]
            self.searched_metric = record["metric"]
            self.began = time.monotonic()
            self.done = self.first
            again = f", {record['done']} are done" if record["done"] else ""
            for line in record.get("lines", ()):
                self.say(line)
            self.say(f"searching {', '.join(record['searched'])} in {record['trials']} trials{again}")
        elif kind == "trial":
            self._trial(record, "")
        elif kind == "epoch":
            self._trial(
                record,
                f"  epoch {record['epoch']:g} of {record['epochs']:g}  {self.searched_metric} {record['value']:.4f}",
            )
        elif kind == "fold":
            self._trial(
                record,
                f"  fold {record['fold']} of {record['folds']}  {self.searched_metric} {record['value']:.4f}",
            )
        elif kind == "trial_end":
            self._trial_end(record)
        elif kind == "waiting":
            self.say(f"waiting for {record['running']} trials of other processes ...")
        elif kind == "best":
            self._next_run(
                f"training the {name_of(record)} on all rows (held-out {self.searched_metric} {record['value']:.4f}) ..."
            )
        elif kind == "defaults":
            self._next_run("training the defaults, to compare them on the test rows ...")
        else:
            super().show(record)

    def _next_run(self, what: str) -> None:
        self.close_bar()
        self.started = None  # its time left is its own
        self.say(what)

    def _trial(self, record: dict[str, Any], state: str) -> None:
        self.count("trials", self.done, self.trials, f"trial {record['number']}{state}", self.left)

    def _trial_end(self, record: dict[str, Any]) -> None:
        best = record["best"]
        if record["state"] == "complete":
            ending = "  best so far" if best and best["number"] == record["number"] else ""
            text = f"{self.searched_metric} {record['value']:.4f}{ending}"
        else:
            text = record["state"] + (f": {record['reason']}" if record["reason"] else "")
        self.done = record["done"]
        self.left = time_left(self.began, self.done - self.first, self.trials - self.done)
        left = f"  {self.left}" if self.left else ""
        named = " (the defaults)" if record.get("defaults") else ""
        self.say(f"trial {record['number']}{named}: {text}  ({self.done} of {self.trials} done{left})")
        self._trial(record, f"  {record['state']}")


def name_of(record: dict[str, Any]) -> str:
    return "defaults" if record.get("defaults") else f"settings of trial {record['number']}"

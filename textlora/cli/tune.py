"""`textlora tune`."""

import re
import signal
import time
from contextlib import contextmanager
from typing import Any

import click

from textlora.cli.base import app, json_option, print_json, quiet_option
from textlora.cli.train import ALL_FLAGS
from textlora.config import TrainConfig
from textlora.errors import Interrupted, UsageError
from textlora.options import merge_settings, setting_options
from textlora.progress import Display, clock

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
@click.option("--trials", type=int, default=20, help="Trials of the study in all, over all processes.  [default: 20]")
@click.option("--timeout", type=Duration(), metavar="TIME", help="Begin no trial after this long: 90s, 30m, 2h. Default: none.")
@click.option("--storage", metavar="FILE|URL", help="Where the study is kept: a file, or the URL of a database. Default: study.log in --output.")
@click.option("--study", default="textlora", metavar="NAME", help="Name of the study in its storage.  [default: textlora]")
@json_option
@quiet_option
def tune(
    config_file: str | None, trials: int, timeout: float | None, storage: str | None, study: str, as_json: bool, quiet: bool, **flags: Any
) -> None:
    """Search settings of `train` on your data, and train the best.

    textlora tune --train reviews.csv --test test.csv --output tuned --trials 30

    Searched are --learning-rate, --r, --target-modules, --layers, --lora-dropout, --epochs and --batch-size; one that is given is kept. Trials are
    compared on the validation rows, and stopped early where they lag behind. The same command started twice works on one study; started again
    it goes on. DIR/best is the adapter, DIR/report.html the report.
    """
    settings = merge_settings(flags, config_file)
    if not settings.get("output"):
        raise UsageError("no output folder", "name one with --output")
    config = TrainConfig(**settings)
    with Display(quiet) as display, _stoppable():
        display.say("reading the data and the base model ...")
        from textlora.tune import tune as search

        progress = _Progress(display)
        try:
            result = search(config, frozenset(settings), trials=trials, timeout=timeout, storage=storage, study=study, on_record=progress.show)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted", "the same command goes on with the study") from error
        finally:
            progress.close()
        display.say(f"saved to {result['adapter']}: open {result['output']}/report.html")
    if as_json:
        print_json(result)


@contextmanager
def _stoppable():
    """SIGTERM ends the command as Ctrl-C does, so that a trial that is stopped so is not taken for one that brought its process down."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Progress:
    """Trials as lines; in a terminal a bar with the time left below them. The last run is shown as `train` shows it."""

    def __init__(self, display: Display):
        self.display, self.bar, self.task = display, None, None
        self.trials = self.first = 0
        self.began = time.monotonic()
        self.metric = ""

    def show(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "study":
            self.trials, self.first, self.metric, self.began = record["trials"], record["done"], record["metric"], time.monotonic()
            again = f", {record['done']} are done" if record["done"] else ""
            self.display.say(f"searching {', '.join(record['searched'])} in {record['trials']} trials{again}")
            if self.display.live and record["done"] < record["trials"]:
                self._open()
        elif kind == "trial":
            self._note(f"trial {record['number']}")
        elif kind == "epoch":
            self._note(f"trial {record['number']}  epoch {record['epoch']:g} of {record['epochs']:g}  {self.metric} {record['value']:.4f}")
        elif kind == "trial_end":
            self._trial_end(record)
        elif kind == "waiting":
            self.display.say(f"waiting for {record['running']} trials of other processes ...")
        elif kind == "best":
            self.close()
            self.display.say(f"training the settings of trial {record['number']} ({self.metric} {record['value']:.4f}) ...")
        else:
            self.display.show(record)

    def _trial_end(self, record: dict[str, Any]) -> None:
        best = record["best"]
        if record["state"] == "complete":
            ending = "  best so far" if best and best["number"] == record["number"] else ""
            text = f"{self.metric} {record['value']:.4f}{ending}"
        else:
            text = record["state"] + (f": {record['reason']}" if record["reason"] else "")
        new = record["done"] - self.first
        seconds = (time.monotonic() - self.began) / new * (self.trials - record["done"]) if new else 0.0
        left = f"  {clock(seconds)} left" if record["done"] < self.trials else ""
        self._say(f"trial {record['number']}: {text}  ({record['done']} of {self.trials} done{left})")
        if self.bar is not None:
            self.bar.update(self.task, completed=record["done"], left=left.strip())

    def _note(self, text: str) -> None:
        if self.bar is not None:
            self.bar.update(self.task, note=text)

    def _say(self, text: str) -> None:
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self.display.say(text)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("trials"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task("", total=self.trials, completed=self.first, note="", left="")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere, nothing when
quiet."""

import sys
import time
from types import TracebackType
from typing import Any, Self

LINE_SECONDS = 10.0


def report_line(record: dict[str, Any]) -> str | None:
    """One plain line for a record, or None where there is nothing to say."""
    kind = record["kind"]
    if kind == "start":
        note = f" (reference path: {record['reason']})" if record.get("reason") else ""
        counts = f"{record['adapter_parameters']:,} LoRA and {record['head_parameters']:,} head parameters"
        pooling = (
            f"\npooling: {record['pooling']}, {record['pooling_reason']}" if record.get("pooling") else ""
        )
        return f"model: {record['model']} on {record['device']}, {counts}, {len(record['labels'])} labels{note}{pooling}"
    if kind == "evaluation":
        shown = _metric(record["metrics"])
        if "fold" in record:  # its scores are shown together with the other folds'
            return None
        mark = "  best so far" if record["best"] else "  kept" if record["kept"] else ""
        held = "held-out" if record.get("folds") else "validation"
        return f"epoch {record['epoch']:.2f}  step {record['step']}  {held} loss {record['loss'] or 0:.4f}  {shown}{mark}"
    if kind == "final":
        from textlora.metrics.scores import cannot_tell

        name, rows = _first(record["metrics"]), record["rows"]
        bounds = record["intervals"].get(name)
        span = f" (95% {bounds[0]:.4f} to {bounds[1]:.4f})" if bounds else ""
        open_still = cannot_tell(name, record["metrics"].get(name), bounds, rows)
        where = f"held out in {record['folds']} folds" if record.get("folds") else record["split"]
        return f"{where}: {_metric(record['metrics'])}{span} on {rows} rows" + (
            f"\n  {open_still}" if open_still else ""
        )
    if kind == "end":
        folds = (
            f" after {clock(record['cross_validation_seconds'])} of cross-validation"
            if record.get("cross_validation_seconds")
            else ""
        )
        return f"trained {record['epochs']:.2f} epochs in {clock(record['train_seconds'])}{folds}, {record['tokens_per_second']:,.0f} tokens/s"
    return None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_left(began: float, done: int, rest: int) -> str:
    """`m:ss left` for `rest` more of what was done `done` times since `began` (monotonic seconds); "" where
    that cannot be told."""
    return f"{clock((time.monotonic() - began) / done * rest)} left" if done > 0 and rest > 0 else ""


def _first(metrics: dict[str, Any]) -> str:
    return next(iter(metrics), "")


def _metric(metrics: dict[str, Any]) -> str:
    name = _first(metrics)
    value = metrics.get(name)
    return f"{name} {value:.4f}" if value is not None else ""


class Display:
    """Lines and, in a terminal, a bar below them, all on standard error; nothing when quiet. Use as a context
    manager."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close_bar()

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def count(self, what: str, done: int, total: int | None, note: str = "", left: str = "") -> None:
        """Move the bar, which opens with the first call; `what` is its name."""
        if not self.live:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            ends = (TextColumn("{task.fields[note]}"), TextColumn("{task.fields[left]}"))
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), *ends)
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, completed=done, total=total, note=note, left=left)
        self._bar.update(self._task, description=what, completed=done, total=total, note=note, left=left)

    def close_bar(self) -> bool:
        """Remove the bar; whether there was one."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()
        return bar is not None


class TrainingDisplay(Display):
    """Its `show` takes the records of a training run."""

    def __init__(self, quiet: bool = False):
        super().__init__(quiet)
        self.last_line = time.monotonic()
        self.started: float | None = None
        self.steps = self.first_step = self.folds = 0
        self.metric = ""

    def show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "start":
            self.steps = record.get("all_steps", record["steps"])
            self.folds = record.get("folds", 0)
        if record["kind"] == "data":
            for line in record["lines"]:
                self.say(line)
        if record["kind"] == "evaluation":
            self.metric = _metric(record["metrics"])
        if record["kind"] == "step":
            self._step(record)
        line = report_line(record)
        if line:
            self.say(line)
        if (
            record["kind"] == "evaluation"
            and record.get("done", record["step"]) == self.steps
            and self.close_bar()
        ):
            self.say("saving, and checking the saved folder with transformers + peft ...")

    def _step(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record.get("done", record["step"])
        if self.started is None:
            self.started, self.first_step = now, step - 1
        done = step - self.first_step
        left = time_left(self.started, done, self.steps - step) if done > 1 else ""
        what = f"fold {record['fold']} of {self.folds}" if "fold" in record else "training"
        text = f"loss {record['loss']:.4f}  {self.metric}  {record['tokens_per_second']:,.0f} tokens/s"
        self.count(what, step, self.steps or None, text, left)
        if not self.live and now - self.last_line > LINE_SECONDS:
            self.last_line = now
            self.say(f"step {step}/{self.steps}  {what}  {text}  {left}".rstrip())

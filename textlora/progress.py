"""What a person sees while a run goes on: a live bar in a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from types import TracebackType
from typing import Any

LINE_SECONDS = 10.0


def report_line(record: dict[str, Any]) -> str | None:
    """One plain line for a record, or None where there is nothing to say."""
    kind = record["kind"]
    if kind == "start":
        note = f" (reference path: {record['reason']})" if record.get("reason") else ""
        counts = f"{record['adapter_parameters']:,} LoRA and {record['head_parameters']:,} head parameters"
        return f"model: {record['model']} on {record['device']}, {counts}, {len(record['labels'])} labels{note}"
    if kind == "evaluation":
        shown = _metric(record["metrics"])
        mark = "  best so far" if record["best"] else "  kept" if record["kept"] else ""
        return f"epoch {record['epoch']:.2f}  step {record['step']}  validation loss {record['loss'] or 0:.4f}  {shown}{mark}"
    if kind == "final":
        low, high = (record["intervals"].get(_first(record["metrics"])) or (None, None))[:2]
        span = f" (95% {low:.4f} to {high:.4f})" if low is not None else ""
        return f"{record['split']}: {_metric(record['metrics'])}{span} on {record['rows']} rows"
    if kind == "end":
        return f"trained {record['epochs']:.2f} epochs in {clock(record['train_seconds'])}, {record['tokens_per_second']:,.0f} tokens/s"
    return None


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _first(metrics: dict[str, Any]) -> str:
    return next(iter(metrics), "")


def _metric(metrics: dict[str, Any]) -> str:
    name = _first(metrics)
    value = metrics.get(name)
    return f"{name} {value:.4f}" if value is not None else ""


class Display:
    """Context manager whose `show` takes the records of a run. Writes to standard error only."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.live = not quiet and sys.stderr.isatty()
        self.bar: Any = None
        self.task: Any = None
        self.last_line = time.monotonic()
        self.started: float | None = None
        self.steps = self.first_step = 0
        self.metric = ""

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def show(self, record: dict[str, Any]) -> None:
        if self.quiet:
            return
        if record["kind"] == "start":
            self.steps = record["steps"]
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
        if self.bar is not None and record["kind"] == "evaluation" and record["step"] == self.steps:
            self.bar.stop()
            self.bar = None
            self.say("saving, and checking the saved folder with transformers + peft ...")

    def _step(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if self.started is None:
            self.started, self.first_step = now, record["step"] - 1
            if self.live:
                self._open_bar()
        done = record["step"] - self.first_step
        left = (now - self.started) / done * (self.steps - record["step"]) if done > 1 else None
        text = f"loss {record['loss']:.4f}  {self.metric}  {record['tokens_per_second']:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=record["step"], total=self.steps, note=text, left="" if left is None else f"{clock(left)} left")
        elif now - self.last_line > LINE_SECONDS:
            self.last_line = now
            ending = "" if left is None else f"  {clock(left)} left"
            self.say(f"step {record['step']}/{self.steps}  {text}{ending}")

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TextColumn("{task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task("", total=self.steps or None, note="", left="")

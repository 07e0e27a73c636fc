"""`textlora train` and `textlora check`."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import click

from textlora.cli.base import DATA_FLAGS, app, json_option, print_json, quiet_option
from textlora.cli.options import merge_settings, setting_options
from textlora.core.config import TrainConfig
from textlora.core.errors import UsageError

ALL_FLAGS = tuple(item.name for item in dataclasses.fields(TrainConfig))


@app.command()
@setting_options(ALL_FLAGS)
@click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; flags override it.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with the run in --output, to the same bytes as if it had never stopped.",
)
@click.option(
    "--allow-other-kernels",
    is_flag=True,
    help="Resume although other kernels, or none, began the run: its bytes will differ.",
)
@json_option
@quiet_option
def train(
    config_file: str | None, resume: bool, allow_other_kernels: bool, as_json: bool, quiet: bool, **flags: Any
) -> None:
    """Train an adapter on labelled text.

    textlora train --train reviews.csv --test test.csv --output my-adapter
    """
    settings = merge_settings(flags, config_file)
    if not settings.get("output"):
        raise UsageError("no output folder", "name one with --output")
    config = None
    if resume:
        from textlora.training.resume import resume_config

        config = resume_config(Path(settings["output"]), settings)
    config = config or TrainConfig(**settings)
    from textlora.cli.progress import TrainingDisplay
    from textlora.training.prover import Prover

    with (
        TrainingDisplay(quiet) as display,
        _interruptible() as interrupt,
        Prover() as prover,
    ):  # which starts before torch is imported here
        display.say("reading the data and the base model ...")
        from textlora.training.run import run_training

        def on_record(record: dict[str, Any]) -> None:
            interrupt.gentle = record["kind"] in ("start", "data", "step", "evaluation")
            display.show(record)

        result = run_training(
            config,
            resume=resume,
            on_record=on_record,
            stop=lambda: interrupt.asked,
            prover=prover,
            allow_other_kernels=allow_other_kernels,
        )
        display.say(f"saved to {result['output']}: open {Path(result['output']) / 'run' / 'report.html'}")
    if as_json:
        print_json(result)


class _interruptible:
    """While training, the first Ctrl-C or SIGTERM asks for a checkpoint at the end of the step; the second
    stops at once."""

    def __init__(self) -> None:
        self.asked = self.gentle = False

    def __enter__(self) -> "_interruptible":
        self._before = {
            number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.asked or not self.gentle:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@app.command()
@setting_options(
    ("train", "validation", "test", *DATA_FLAGS, "problem_type", "model", "max_length", "truncation")
)
@json_option
def check(as_json: bool, **flags: Any) -> None:
    """Report what is in a data set before training on it."""
    from textlora.training.prepare import check_data

    report = check_data(TrainConfig(**merge_settings(flags, None)))
    if as_json:
        print_json(report.as_dict())
    else:
        click.echo("\n".join(report.lines()))

"""The command group, and the options and helpers that commands share."""

import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from textlora.cli.options import CommaList
from textlora.core.config import PRECISION_HELP, PRECISIONS, PROBLEM_TYPES

DATA_FLAGS = ("text_column", "text_pair_column", "label_column", "label_separator", "encoding")

json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object on one line; everything else goes to standard error.",
)
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


def _show_version(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and not context.resilient_parsing:
        from textlora.kernels.library import instruction_sets, why_not

        missing = why_not()
        click.echo(f"textlora {version('textlora')}")
        click.echo(f"kernels: not in use, {missing}" if missing else f"kernels: {instruction_sets()}")
        context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and the kernels in use, and exit.",
)
def app() -> None:
    """One frozen encoder, thousands of small text classifiers."""


def print_json(record: dict[str, Any]) -> None:
    click.echo(json.dumps(record, ensure_ascii=False))


def folder_options(command: Callable) -> Callable:
    """FOLDER (or a hub id) and the options every command on an adapter folder has."""
    for option in (
        click.argument("folder", type=click.Path(path_type=Path)),
        click.option("--revision", metavar="REV", help="Branch, tag or commit, where FOLDER is a hub id."),
        click.option(
            "--model",
            "base",
            metavar="MODEL",
            help="Base model: folder or hub id. Default: the one the adapter names.",
        ),
        click.option(
            "--labels",
            type=CommaList(),
            metavar="NAMES",
            help="Label names in class order, for a folder without textlora.json.",
        ),
        click.option(
            "--problem-type", type=click.Choice(tuple(PROBLEM_TYPES)), help="Task of such a folder."
        ),
        click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads."),
        click.option("--no-verify", is_flag=True, help="Skip only the recomputing of the golden examples."),
    )[::-1]:
        command = option(command)
    return command


def precision_option(command: Callable) -> Callable:
    """--precision of the commands that only read an adapter."""
    return click.option(
        "--precision",
        type=click.Choice(PRECISIONS),
        default=PRECISIONS[0],
        help=f"{PRECISION_HELP}  [default: float32]",
    )(command)


def load_classifier(
    folder: Path,
    revision: str | None,
    base: str | None,
    labels: tuple[str, ...] | None,
    problem_type: str | None,
    device: str,
    threads: int | None,
    no_verify: bool,
    precision: str = "float32",
):
    from textlora.inference.classifier import TextClassifier

    if threads:
        import torch

        torch.set_num_threads(threads)
    return TextClassifier.load(
        folder,
        revision=revision,
        base=base,
        labels=labels,
        problem_type=problem_type,
        device=device,
        precision=precision,
        verify=not no_verify,
    )

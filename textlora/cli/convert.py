"""`textlora convert`."""

from pathlib import Path
from typing import Any

import click

from textlora.cli.base import app, json_option, print_json
from textlora.cli.options import CommaList
from textlora.core.config import PROBLEM_TYPES


@app.command()
@click.argument("source")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for the adapter; must not exist or be empty.",
)
@click.option(
    "--model", metavar="MODEL", help="Base model: folder or hub id. Default: the one the source names."
)
@click.option(
    "--labels",
    type=CommaList(),
    metavar="NAMES",
    help="Label names in class order. Default: those of its or its base's config.json.",
)
@click.option(
    "--problem-type",
    type=click.Choice(tuple(PROBLEM_TYPES)),
    help="Task. Default: regression for one output, else single-label.",
)
@click.option(
    "--max-length",
    type=int,
    metavar="N",
    help="Tokens kept of a text. Default: what the source says, else at most 512.",
)
@click.option(
    "--lora-alpha",
    type=click.FloatRange(0, min_open=True),
    metavar="A",
    help="Scale of a loralib file, which does not store it.",
)
@json_option
def convert(as_json: bool, **settings: Any) -> None:
    """Make an adapter folder from one of PEFT, the HF Trainer, AutoTrain or loralib.

    SOURCE is a folder, a loralib file, or the hub id of a PEFT adapter.

    textlora convert trainer-output/checkpoint-500 --output my-adapter --labels negative,positive
    """
    from textlora.transform.convert import convert as job

    result = job(**settings)
    if as_json:
        print_json(result)
        return
    labels = ", ".join(result["labels"][:10]) + (
        f", ... ({len(result['labels'])})" if len(result["labels"]) > 10 else ""
    )
    lines = [
        f"made by {result['source']}" + (f": {result['note']}" if result["note"] else ""),
        f"base: {result['model']} ({result['path']} path)",
        f"task: {result['problem_type']}, labels: {labels} (from {result['labels_from']})",
        f"input: single texts or pairs, {result['max_length']} tokens (from {result['max_length_from']})",
        f"parameters: {result['adapter_parameters']:,} adapter, {result['head_parameters']:,} head",
        f"largest difference of a logit from the source's on {result['rows']} texts: {result['difference']:.2g} (largest logit {result['largest_logit']:.3g})",
        f"saved to {result['output']}",
    ]
    click.echo("\n".join(lines))

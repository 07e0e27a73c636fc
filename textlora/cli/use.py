"""`textlora evaluate`, `predict` and `inspect`: commands on a finished adapter folder."""

import sys
from pathlib import Path
from typing import Any

import click

from textlora.cli.base import (
    DATA_FLAGS,
    app,
    folder_options,
    json_option,
    load_classifier,
    precision_option,
    print_json,
)
from textlora.cli.options import CommaList, setting_options
from textlora.core.errors import UsageError


@app.command()
@folder_options
@precision_option
@click.option("--data", required=True, metavar="DATA", help="Labelled rows: file, folder or hub id.")
@setting_options((*DATA_FLAGS, "limit_eval"))
@click.option("--seed", type=int, default=42, help="Seed that picks --limit-eval rows.  [default: 42]")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write every row with its prediction to this file."
)
@json_option
def evaluate(
    data: str, limit_eval: int | None, seed: int, output: Path | None, as_json: bool, **flags: Any
) -> None:
    """Score a saved adapter on labelled rows, with 95% intervals."""
    columns = {name: flags.pop(name) for name in DATA_FLAGS}
    classifier = load_classifier(**flags)
    from textlora.inference.evaluate import evaluate_table, read_rows

    result = evaluate_table(classifier, read_rows(data, columns, classifier, limit_eval, seed), output)
    if as_json:
        print_json(result)
        return
    click.echo(f"{result['rows']} rows")
    for name, value in result["test"].items():
        span = result["intervals"].get(name)
        shown = "not defined here" if value is None else f"{value:.4f}"
        click.echo(f"{name:24} {shown}" + (f"   95% {span[0]:.4f} to {span[1]:.4f}" if span else ""))
    from textlora.metrics.scores import cannot_tell

    name = next(iter(result["test"]))
    open_still = cannot_tell(name, result["test"][name], result["intervals"].get(name), result["rows"])
    if open_still:
        click.echo(open_still)


@app.command()
@folder_options
@precision_option
@click.option(
    "--data",
    required=True,
    metavar="FILE",
    help="CSV, TSV, JSONL, Parquet or text file; - for standard input.",
)
@setting_options(("text_column", "text_pair_column", "encoding"))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File to write; its extension gives the format. Default: standard output.",
)
@click.option("--logits", is_flag=True, help="With --json: add the raw logits in label order.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per row.")
@click.option("--strict", is_flag=True, help="End with exit code 2 if a row was skipped.")
def predict(data: str, output: Path | None, logits: bool, as_json: bool, strict: bool, **flags: Any) -> int:
    """Label rows: same format out as in, with label and scores added.

    Bad rows are reported and left out.
    """
    from textlora.data import open_sink, open_stream

    columns = {name: flags.pop(name) for name in ("text_column", "text_pair_column", "encoding")}
    if output is not None and as_json:
        raise UsageError(
            "--json prints to standard output", "leave out --output, or name a .jsonl file without --json"
        )
    with open_stream(data, **{name: value for name, value in columns.items() if value is not None}) as stream:
        classifier = load_classifier(**flags)
        paired = stream.columns.text_pair is not None
        classifier.require_pairs(paired, paired)
        from textlora.inference.predict import output_columns, output_values, predict_stream

        skipped = []

        def on_problem(record: Any) -> None:
            skipped.append(record.where)
            if len(skipped) <= 20:
                print(
                    f"textlora: {stream.name} line {record.where}: {record.problem}; row skipped",
                    file=sys.stderr,
                )

        rows = predict_stream(classifier, stream, on_problem)
        if as_json:
            for _, prediction in rows:
                print_json(classifier.record(prediction, logits))
        else:
            names = output_columns(classifier)
            with open_sink(
                output,
                stream.format,
                stream.fieldnames,
                names,
                stdout=sys.stdout,
                delimiter=stream.delimiter,
                arrow_schema=stream.arrow_schema,
            ) as sink:
                for record, prediction in rows:
                    sink.write(record.fields, output_values(classifier, prediction))
    if skipped:
        print(f"textlora: {len(skipped)} row{'s' * (len(skipped) > 1)} skipped", file=sys.stderr)
    return 2 if skipped and strict else 0


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--revision", metavar="REV", help="Branch, tag or commit, where FOLDER is a hub id.")
@click.option("--against", metavar="MODEL", help="Say whether the adapter fits this base model, and why not.")
@click.option("--relabel", type=CommaList(), metavar="OLD=NEW,...", help="Rename labels in textlora.json.")
@json_option
def inspect(
    folder: Path, revision: str | None, against: str | None, relabel: tuple[str, ...] | None, as_json: bool
) -> None:
    """Show what is in an adapter folder, or in one on the hub."""
    from textlora.transform.inspect import inspect_folder, relabel_folder, summary_lines

    if relabel:
        relabel_folder(folder, relabel)
    facts = inspect_folder(folder, against, revision)
    if as_json:
        print_json(facts)
    else:
        click.echo("\n".join(summary_lines(facts)))
    if facts.get("fits") is False:
        raise UsageError(f"{folder} does not fit {against}: {facts['fits_why']}")

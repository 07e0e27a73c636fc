"""The `textlora` command: parse, call one job, show progress, print. Heavy modules are imported when a command runs."""

import dataclasses
import json
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from textlora.config import PROBLEM_TYPES, TrainConfig
from textlora.errors import StorageError, TextloraError, UsageError
from textlora.options import CommaList, merge_settings, setting_options

DATA_FLAGS = ("text_column", "text_pair_column", "label_column", "label_separator", "encoding")
ALL_FLAGS = tuple(item.name for item in dataclasses.fields(TrainConfig))

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on one line; everything else goes to standard error.")
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="textlora", message="textlora %(version)s")
def app() -> None:
    """One frozen encoder, thousands of small text classifiers."""


def main() -> None:
    """Entry point: exit code 0 done, 2 wrong usage or bad input, 130 interrupted, 1 anything else."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command; errors become one line on standard error and an exit code."""
    try:
        return app.main(arguments, prog_name="textlora", standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help())
        return 2
    except click.ClickException as error:
        return _fail(" ".join(error.format_message().split()), 2)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except TextloraError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        trouble = StorageError(f"{error.filename or 'a file'}: {error.strerror or error}", "check the path and the free space")
        return _fail(str(trouble), trouble.exit_code)
    except Exception as error:  # a bug: show all of it
        traceback.print_exc()
        return _fail(f"internal error: {error}; please report it with the lines above", 1)


def _fail(message: str, code: int) -> int:
    print(f"textlora: {message}", file=sys.stderr)
    return code


def _print_json(record: dict[str, Any]) -> None:
    click.echo(json.dumps(record, ensure_ascii=False))


@app.command()
@setting_options(ALL_FLAGS)
@click.option("--config", "config_file", metavar="FILE", help="TOML file of settings; flags override it.")
@click.option("--resume", is_flag=True, help="Go on with the run in --output, to the same bytes as if it had never stopped.")
@json_option
@quiet_option
def train(config_file: str | None, resume: bool, as_json: bool, quiet: bool, **flags: Any) -> None:
    """Train an adapter on labelled text.

    textlora train --train reviews.csv --test test.csv --output my-adapter
    """
    settings = merge_settings(flags, config_file)
    if not settings.get("output"):
        raise UsageError("no output folder", "name one with --output")
    config = None
    if resume:
        from textlora.resume import resume_config

        config = resume_config(Path(settings["output"]), settings)
    config = config or TrainConfig(**settings)
    from textlora.progress import Display

    with Display(quiet) as display, _interruptible() as interrupt:
        display.say("reading the data and the base model ...")
        from textlora.run import run_training

        def on_record(record: dict[str, Any]) -> None:
            interrupt.gentle = record["kind"] in ("start", "data", "step", "evaluation")
            display.show(record)

        result = run_training(config, resume=resume, on_record=on_record, stop=lambda: interrupt.asked)
        display.say(f"saved to {result['output']}: open {Path(result['output']) / 'run' / 'report.html'}")
    if as_json:
        _print_json(result)


class _interruptible:
    """While training, the first Ctrl-C or SIGTERM asks for a checkpoint at the end of the step; the second stops at once."""

    def __init__(self) -> None:
        self.asked = self.gentle = False

    def __enter__(self) -> "_interruptible":
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _handle(self, number: int, frame: object) -> None:
        if self.asked or not self.gentle:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@app.command()
@setting_options(("train", "validation", "test", *DATA_FLAGS, "problem_type", "model", "max_length", "truncation"))
@json_option
def check(as_json: bool, **flags: Any) -> None:
    """Report what is in a data set before training on it."""
    from textlora.prepare import check_data

    report = check_data(TrainConfig(**merge_settings(flags, None)))
    if as_json:
        _print_json(report.as_dict())
    else:
        click.echo("\n".join(report.lines()))


def folder_options(command: Callable) -> Callable:
    """FOLDER and the options every command on an adapter folder has."""
    for option in (
        click.argument("folder", type=click.Path(path_type=Path)),
        click.option("--model", "base", metavar="MODEL", help="Base model: folder or hub id. Default: the one the adapter names."),
        click.option("--labels", type=CommaList(), metavar="NAMES", help="Label names in class order, for a folder without textlora.json."),
        click.option("--problem-type", type=click.Choice(tuple(PROBLEM_TYPES)), help="Task of such a folder."),
        click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads."),
        click.option("--no-verify", is_flag=True, help="Skip only the recomputing of the golden examples."),
    )[::-1]:
        command = option(command)
    return command


def _load(
    folder: Path, base: str | None, labels: tuple[str, ...] | None, problem_type: str | None, device: str, threads: int | None, no_verify: bool
):
    from textlora.classifier import TextClassifier

    if threads:
        import torch

        torch.set_num_threads(threads)
    return TextClassifier.load(folder, base=base, labels=labels, problem_type=problem_type, device=device, verify=not no_verify)


@app.command()
@folder_options
@click.option("--data", required=True, metavar="DATA", help="Labelled rows: file, folder or hub id.")
@setting_options((*DATA_FLAGS, "limit_eval"))
@click.option("--seed", type=int, default=42, help="Seed that picks --limit-eval rows.  [default: 42]")
@click.option("--output", type=click.Path(path_type=Path), help="Write every row with its prediction to this file.")
@json_option
def evaluate(data: str, limit_eval: int | None, seed: int, output: Path | None, as_json: bool, **flags: Any) -> None:
    """Score a saved adapter on labelled rows, with 95% intervals."""
    columns = {name: flags.pop(name) for name in DATA_FLAGS}
    classifier = _load(**flags)
    from textlora.evaluate import evaluate_table, read_rows

    result = evaluate_table(classifier, read_rows(data, columns, classifier, limit_eval, seed), output)
    if as_json:
        _print_json(result)
        return
    click.echo(f"{result['rows']} rows")
    for name, value in result["test"].items():
        span = result["intervals"].get(name)
        shown = "not defined here" if value is None else f"{value:.4f}"
        click.echo(f"{name:24} {shown}" + (f"   95% {span[0]:.4f} to {span[1]:.4f}" if span else ""))


@app.command()
@folder_options
@click.option("--data", required=True, metavar="FILE", help="CSV, TSV, JSONL, Parquet or text file; - for standard input.")
@setting_options(("text_column", "text_pair_column", "encoding"))
@click.option("--output", type=click.Path(path_type=Path), help="File to write; its extension gives the format. Default: standard output.")
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
        raise UsageError("--json prints to standard output", "leave out --output, or name a .jsonl file without --json")
    with open_stream(data, **{name: value for name, value in columns.items() if value is not None}) as stream:
        classifier = _load(**flags)
        paired = stream.columns.text_pair is not None
        classifier.require_pairs(paired, paired)
        from textlora.predict import output_columns, output_values, predict_stream

        skipped = []

        def on_problem(record: Any) -> None:
            skipped.append(record.where)
            if len(skipped) <= 20:
                print(f"textlora: {stream.name} line {record.where}: {record.problem}; row skipped", file=sys.stderr)

        rows = predict_stream(classifier, stream, on_problem)
        if as_json:
            for _, prediction in rows:
                _print_json(classifier.record(prediction, logits))
        else:
            names = output_columns(classifier)
            with open_sink(
                output, stream.format, stream.fieldnames, names, stdout=sys.stdout, delimiter=stream.delimiter, arrow_schema=stream.arrow_schema
            ) as sink:
                for record, prediction in rows:
                    sink.write(record.fields, output_values(classifier, prediction))
    if skipped:
        print(f"textlora: {len(skipped)} row{'s' * (len(skipped) > 1)} skipped", file=sys.stderr)
    return 2 if skipped and strict else 0


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--against", metavar="MODEL", help="Say whether the adapter fits this base model.")
@click.option("--relabel", type=CommaList(), metavar="OLD=NEW,...", help="Rename labels in textlora.json.")
@json_option
def inspect(folder: Path, against: str | None, relabel: tuple[str, ...] | None, as_json: bool) -> None:
    """Show what is in an adapter folder."""
    from textlora.inspect import inspect_folder, relabel_folder, summary_lines

    if relabel:
        relabel_folder(folder, relabel)
    facts = inspect_folder(folder, against)
    if as_json:
        _print_json(facts)
    else:
        click.echo("\n".join(summary_lines(facts)))
    if facts.get("fits") is False:
        raise UsageError(f"{folder} does not fit {against}: {facts['fits_why']}")

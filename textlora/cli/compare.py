"""`textlora compare`."""

import time
from typing import Any

import click

from textlora.cli.base import DATA_FLAGS, app, json_option, print_json, quiet_option
from textlora.cli.options import CommaList, merge_settings, setting_options
from textlora.cli.progress import Display, clock
from textlora.compare.methods import DEFAULT_METHODS, METHODS
from textlora.core.config import TrainConfig
from textlora.core.errors import UsageError

_SHARED = (
    "train", "validation", "validation_share", "test", *DATA_FLAGS, "problem_type", "model", "revision", "output", "pooling", "epochs", "scheduler", "warmup",
    "weight_decay", "batch_size", "batch_tokens", "max_grad_norm", "metric", "class_weights", "label_smoothing", "max_length", "truncation",
    "lora_alpha", "lora_dropout", "seed", "limit_train", "limit_eval", "device", "precision", "threads",
)  # fmt: skip


class _Numbers(click.ParamType):
    """Comma-separated whole numbers to a tuple."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        try:
            return value if isinstance(value, tuple) else tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of whole numbers such as 8,32", param, ctx)


@app.command(epilog=f"Methods: {', '.join(METHODS)}.")
@setting_options(_SHARED)
@click.option(
    "--methods",
    type=CommaList(),
    metavar="NAMES",
    help=f"Methods, or all.  [default: {','.join(DEFAULT_METHODS)}]",
)
@click.option(
    "--learning-rates",
    multiple=True,
    metavar="RATES",
    help="Rates to try: 1e-3,3e-3 for all methods, full=1e-5,1e-4 for one. Default: its own three.",
)
@click.option(
    "--sizes",
    type=_Numbers(),
    default=(),
    metavar="NUMBERS",
    help="Ranks or numbers of tokens to try.  [default: 8]",
)
@click.option(
    "--seeds",
    type=int,
    default=3,
    metavar="N",
    help="Repeats at the best rate, seeds counted up from --seed.  [default: 3]",
)
@click.option(
    "--rows",
    type=_Numbers(),
    default=(),
    metavar="NUMBERS",
    help="Train on so many rows too, such as 8,32,128,512.",
)
@click.option(
    "--budget",
    metavar="AMOUNT",
    help="Time or runs for all methods together: 30m, 2h, 40runs. Whole methods are run, the most useful first; the others are left out. Default: no limit.",
)
@click.option("--name", metavar="NAME", help="Name of the data in the report. Default: from --train.")
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="TOML file of the settings shared with `train`; flags override it.",
)
@json_option
@quiet_option
def compare(
    methods: tuple[str, ...] | None,
    learning_rates: tuple[str, ...],
    sizes: tuple[int, ...],
    seeds: int,
    rows: tuple[int, ...],
    budget: str | None,
    name: str | None,
    config_file: str | None,
    as_json: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    """Compare methods on labelled text, each tuned alike: rates on one seed, then several seeds at the best.

    textlora compare --train reviews.csv --test test.csv --output comparison

    Finished runs are kept in DIR/runs and skipped: stop it at any time, run the same command again to go on,
    add methods, rates or seeds later.
    """
    settings = merge_settings(flags, config_file)
    if not settings.get("output"):
        raise UsageError("no output folder", "name one with --output")
    chosen = tuple(METHODS) if methods == ("all",) else methods or DEFAULT_METHODS
    from textlora.compare.comparison import Comparison
    from textlora.compare.comparison import compare as run_comparison

    asked = Comparison(
        TrainConfig(**settings), chosen, _rates(learning_rates), sizes, seeds, rows, budget, name
    )
    with ComparisonDisplay(quiet) as display:
        display.say("reading the data and the base model ...")
        summary = run_comparison(asked, on_record=display.show)
        display.close_bar()
        for line in (*summary["verdict"], *summary["left_out"]):
            display.say(line)
        display.say(f"saved to {settings['output']}: open {settings['output']}/report.html")
    if as_json:
        print_json(summary)


def _rates(given: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    """`1e-3,3e-3` or `full=1e-5,1e-4`, as often as wanted, to rates by method ("" is every method)."""
    rates = {}
    for text in given:
        method, _, numbers = text.rpartition("=")
        try:
            rates[method.strip()] = tuple(float(number) for number in numbers.split(","))
        except ValueError as error:
            raise UsageError(
                f"--learning-rates {text}: not a list of numbers", "write 1e-3,3e-3 or full=1e-5,1e-4"
            ) from error
    return rates


class ComparisonDisplay(Display):
    """Its `show` takes the records of a comparison: a line per finished run."""

    def __init__(self, quiet: bool = False):
        super().__init__(quiet)
        self.left, self.asked_at = None, 0.0

    def show(self, record: dict[str, Any]) -> None:
        if record["kind"] == "begin":
            self.left, self.asked_at = record["left_seconds"], time.monotonic()
            self.count("comparing", record["done"], record["all"], run_name(record), self._left())
            return
        count = record["done"] if record["all"] is None else f"{record['done']}/{record['all']}"
        self.say(f"[{count}] {run_line(record)}  {self._left()}".rstrip())

    def _left(self) -> str:
        return (
            ""
            if self.left is None
            else f"about {clock(max(0.0, self.left - (time.monotonic() - self.asked_at)))} left"
        )


def run_name(record: dict[str, Any]) -> str:
    """A run in a few words."""
    parts = [record["method"], *(f"{name} {value}" for name, value in record["size"].items())]
    parts += [] if record["learning_rate"] is None else [f"rate {record['learning_rate']:g}"]
    return " ".join([*parts, f"seed {record['seed']}", f"on {record['train_rows']} rows"])


def run_line(record: dict[str, Any]) -> str:
    """A finished run and its score."""
    if "error" in record:
        return f"{run_name(record)}: failed, {record['error']}"
    names = {"validation": "held-out", "test": "test"}
    scores = [
        f"{names[split]} {record['metric']} {record[split][record['metric']]:.4f}"
        for split in names
        if _has(record, split)
    ]
    return f"{run_name(record)}: {', '.join(scores)} in {clock(record['total_seconds'])}"


def _has(record: dict[str, Any], split: str) -> bool:
    return bool(record[split]) and record[split][record["metric"]] is not None

"""Seconds until the accuracy that the tutorial's recipe has after its 25 epochs, on the same 1,000 rows.

    python benchmarks/time_to_accuracy.py path/to/data imdb --epochs 1.2 --eval-every 50 \\
        --pooling mean --learning-rate 0.002
    python benchmarks/time_to_accuracy.py path/to/data imdb --recount

The recipe's accuracy comes from results/recipe-SET.json (recipe.py), its time from its own seconds per row,
measured here as it is written, a few rows before and after textlora's run. textlora's time is that of its
training steps until a score after them first reaches that accuracy; scoring is not counted on either side. The
rate above was chosen on 400 rows of the train split beyond the 1,000 (docs/log.md). `--recount`, after
recipe.py, reads the recipe's accuracy again beside the same measurements.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from common import RESULTS, write_result
from recipe import EPOCHS, ROWS, SETS
from systems import measure, read_rows

from textlora.core.config import TrainConfig
from textlora.model.base import find_base
from textlora.training.head_start import start_head
from textlora.training.prepare import prepare
from textlora.training.trainer import Trainer

PRICED_ROWS = 16


def run(data: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """textlora's accuracy against its seconds, and the seconds of the recipe's rows."""
    minilm, path = str(find_base("minilm").folder), str(data / name / "train.parquet")
    price = [measure("recipe", minilm, path, PRICED_ROWS)["seconds"] for _ in range(3)]
    train = [(row["text"], str(row["label"])) for row in read_rows(path, ROWS)]
    held = [
        (row["text"], str(row["label"]))
        for row in read_rows(str(data / name / f"{SETS[name]}.parquet"), ROWS)
    ]
    prepared = prepare(TrainConfig(model="minilm", **settings), {"train": train, "validation": held})
    start_head(prepared)
    trainer, curve = Trainer(prepared), []
    for record in trainer.records():
        if record["kind"] == "evaluation":
            curve.append(
                {
                    "epoch": record["epoch"],
                    "seconds": trainer.seconds,
                    "accuracy": record["metrics"]["accuracy"],
                }
            )
    price += [measure("recipe", minilm, path, PRICED_ROWS)["seconds"] for _ in range(2)]
    seconds = statistics.median(price) / PRICED_ROWS * len(train) * EPOCHS
    return {
        "settings": settings,
        "textlora": curve,
        "recipe_seconds": seconds,
        "priced_rows": PRICED_ROWS,
        "recipe_seconds_per_priced_rows": price,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--epochs", type=float, default=2.0, help="of textlora's run; its rate falls to zero over them"
    )
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--learning-rate", type=float, default=TrainConfig().learning_rate)
    parser.add_argument("--pooling", choices=("first", "mean"), default="first")
    parser.add_argument("--recount", action="store_true")
    options = parser.parse_args()
    file = RESULTS / f"time-to-accuracy-{options.set}.json"
    settings = {name: getattr(options, name) for name in ("epochs", "eval_every", "learning_rate", "pooling")}
    measured = (
        json.loads(file.read_text())["details"]
        if options.recount
        else run(options.data, options.set, settings)
    )
    recipe = RESULTS / f"recipe-{options.set}.json"
    aim = json.loads(recipe.read_text())["details"]["curve"][-1]["accuracy"] if recipe.is_file() else None
    reached = next(
        (point for point in measured["textlora"] if aim is not None and point["accuracy"] >= aim), None
    )
    theirs = measured["recipe_seconds"]
    if aim is None:
        shown = "not known yet: run benchmarks/recipe.py, then this with --recount"
    elif reached is None:
        shown = f"not reached; best {max(point['accuracy'] for point in measured['textlora']):.4f}"
    else:
        shown = f"{reached['seconds']:,.0f} s against {theirs:,.0f} s, 1/{theirs / reached['seconds']:,.0f}"
    what = (
        f"{options.set}, {ROWS:,} rows: training time to the tutorial's accuracy after its {EPOCHS} epochs"
        + (f" ({aim:.4f})" if aim else "")
    )
    write_result(
        f"time-to-accuracy-{options.set}",
        f"time to the tutorial's accuracy on {options.set}",
        [(what, shown)],
        measured | {"aim": aim, "reached": reached},
    )


if __name__ == "__main__":
    main()

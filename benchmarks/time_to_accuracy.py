"""Seconds until the accuracy that the tutorial's recipe has after its 25 epochs, on the same 1,000 rows.

    python benchmarks/time_to_accuracy.py path/to/data imdb

The recipe's accuracy comes from results/recipe-SET.json (recipe.py), its time from its own seconds per row, measured here as it is
written, a few rows before and after textlora's run. textlora's time is that of its training steps until a score after them first reaches
that accuracy; scoring is not counted on either side.
"""

import argparse
import json
import statistics
from pathlib import Path

from common import RESULTS, write_result
from recipe import EPOCHS, ROWS, SETS
from systems import measure, read_rows

from textlora.base import find_base
from textlora.config import TrainConfig
from textlora.prepare import prepare
from textlora.training import Trainer, start_head

PRICED_ROWS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("set", choices=SETS)
    parser.add_argument("--epochs", type=float, default=2.0, help="of textlora's run; its rate falls to zero over them")
    parser.add_argument("--eval-every", type=int, default=25)
    options = parser.parse_args()
    folder = options.data / options.set
    recipe = json.loads((RESULTS / f"recipe-{options.set}.json").read_text())["details"]
    aim = recipe["curve"][-1]["accuracy"]
    minilm, path = str(find_base("minilm").folder), str(folder / "train.parquet")
    price = [measure("recipe", minilm, path, PRICED_ROWS)["seconds"] for _ in range(3)]
    train = [(row["text"], str(row["label"])) for row in read_rows(path, ROWS)]
    held = [(row["text"], str(row["label"])) for row in read_rows(str(folder / f"{SETS[options.set]}.parquet"), ROWS)]
    prepared = prepare(TrainConfig(model="minilm", epochs=options.epochs, eval_every=options.eval_every), {"train": train, "validation": held})
    start_head(prepared)
    trainer, curve = Trainer(prepared), []
    for record in trainer.records():
        if record["kind"] == "evaluation":
            curve.append({"epoch": record["epoch"], "seconds": trainer.seconds, "accuracy": record["metrics"]["accuracy"]})
            if curve[-1]["accuracy"] >= aim:
                break
    price += [measure("recipe", minilm, path, PRICED_ROWS)["seconds"] for _ in range(2)]
    theirs = statistics.median(price) / PRICED_ROWS * len(train) * EPOCHS
    best = max(curve, key=lambda point: point["accuracy"])
    if best["accuracy"] >= aim:
        shown = f"{best['seconds']:,.0f} s against {theirs:,.0f} s ({theirs / best['seconds']:,.0f}x)"
    else:
        shown = f"not reached in {trainer.seconds:,.0f} s (best {best['accuracy']:.4f})"
    rows = [(f"{options.set}, {ROWS:,} rows: time to the tutorial's accuracy after 25 epochs ({aim:.4f})", shown)]
    details = {
        "aim": aim,
        "recipe_seconds": theirs,
        "recipe_seconds_per_priced_rows": price,
        "priced_rows": PRICED_ROWS,
        "textlora": curve,
        "reached": best,
    }
    write_result(f"time-to-accuracy-{options.set}", f"time to the tutorial's accuracy on {options.set}", rows, details)


if __name__ == "__main__":
    main()

"""The frozen-prefix cache: seconds of an epoch with and without it, for `--layers last:K`, and what K costs
in accuracy.

python benchmarks/prefix.py path/to/data            # speed, IMDB rows
python benchmarks/prefix.py path/to/data accuracy   # accuracy against K on four sets, validation rows
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from common import median_ratio, write_result
from systems import read_rows

from textlora.core.config import TrainConfig
from textlora.data import read_table
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import build_prefix
from textlora.training.prepare import Prepared, prepare
from textlora.training.trainer import Trainer

SETS = ("trec6", "sst2", "banking77", "tweet_emotion")
STEPS = 20


def epoch_seconds(prepared: Prepared, states: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Seconds of each epoch and the loss of each step, from a fresh start."""
    start_head(prepared)
    trainer = Trainer(prepared, states)
    begun, seconds, losses = 0.0, [], []
    for record in trainer.records():
        if record["kind"] == "step":
            losses.append(record["loss"])
        else:
            seconds.append(trainer.seconds - begun)
            begun = trainer.seconds
    return seconds, losses


def speed(data: Path, rows: int, pairs: int) -> None:
    texts = [
        (row["text"], str(row["label"])) for row in read_rows(str(data / "imdb" / "train.parquet"), rows)
    ]
    shown, details = [], {}
    for k in (3, 2, 1):
        config = TrainConfig(pooling="first", epochs=2, layers=f"last:{k}")
        states = build_prefix(prepare(config, {"train": texts, "validation": texts[:2]}))
        made: dict[bool, list[float]] = {False: [], True: []}
        losses: dict[bool, list[float]] = {}
        for _ in range(pairs):
            for cached in (False, True):
                prepared = prepare(config, {"train": texts, "validation": texts[:2]})
                seconds, losses[cached] = epoch_seconds(prepared, states if cached else {})
                made[cached].append(seconds[1])
        apart = float(np.abs(np.array(losses[True][:STEPS]) - np.array(losses[False][:STEPS])).max())
        ratio = median_ratio(made[False], made[True])
        shown.append(
            (
                f"prefix cache, last:{k} of 6, IMDB: an epoch after the first, without over with",
                f"{ratio:.1f}x (losses within {apart:.0e})",
            )
        )
        details[f"last:{k}"] = {
            "without": made[False],
            "with": made[True],
            "ratio": ratio,
            "loss_difference": apart,
        }
    write_result("prefix", "epochs with the frozen-prefix cache", shown, {"rows": rows, "blocks": details})


def accuracy(data: Path) -> None:
    """1,000 training rows, 1,000 validation rows of the training file, the defaults otherwise, one seed."""
    found: dict[str, dict[str, Any]] = {}
    for name in SETS:
        rows = read_table(str(data / name / "train.parquet")).rows
        order = np.random.default_rng(42).permutation(len(rows))
        train, held = (
            [dataclasses.replace(rows[i]) for i in order[a:b]] for a, b in ((0, 1000), (1000, 2000))
        )
        found[name] = {}
        for layers in ("last:1", "last:2", "last:3", "all"):
            pairs = {
                split: [(row.text, row.label) for row in part]
                for split, part in (("train", train), ("validation", held))
            }
            prepared = prepare(TrainConfig(pooling="first", layers=layers), pairs)
            start_head(prepared)
            trainer = Trainer(prepared, build_prefix(prepared))
            scores = [
                record["metrics"]["accuracy"]
                for record in trainer.records()
                if record["kind"] == "evaluation"
            ]
            found[name][layers] = {"accuracy": scores, "kept": trainer.kept_score, "seconds": trainer.seconds}
    shown = [
        (
            f"accuracy against adapted blocks, {name} (validation)",
            ", ".join(f"{layers} {run['kept']:.3f} ({run['seconds']:.0f} s)" for layers, run in runs.items()),
        )
        for name, runs in found.items()
    ]
    write_result("prefix-accuracy", "accuracy when only the top is trained", shown, {"sets": found})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("what", nargs="?", choices=("speed", "accuracy"), default="speed")
    parser.add_argument("--rows", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    if options.what == "accuracy":
        accuracy(options.data)
    else:
        speed(options.data, options.rows, options.pairs)


if __name__ == "__main__":
    main()

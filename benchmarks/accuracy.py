"""Scores of `textlora train` at a learning rate of 1e-3, one command per data set; test splits are read once,
at the end of each run.

python benchmarks/accuracy.py path/to/data imdb      # three seeds of 1,000 IMDB rows
python benchmarks/accuracy.py path/to/data sets      # six kinds of task
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import write_result

SETS = {
    "banking77": "--train banking77/train.parquet --test banking77/test.parquet --learning-rate 1e-3 --epochs 3",
    "goemotions": "--train goemotions/train.parquet --test goemotions/test.parquet --learning-rate 1e-3 --limit-train 8000 --epochs 2",
    "glue_stsb": "--train glue_stsb/train.parquet --validation glue_stsb/validation.parquet --test glue_stsb/test.parquet --learning-rate 1e-3 --epochs 2",
    "glue_rte": "--train glue_rte/train.parquet --test glue_rte/validation.parquet --learning-rate 1e-3 --epochs 3",
    "sms_spam": "--train sms_spam/train.parquet --validation sms_spam/validation.parquet --test sms_spam/test.parquet --learning-rate 1e-3 --metric macro_f1 --class-weights balanced --epochs 2",
    "nsmc_small": "--train nsmc_small/train.parquet --validation nsmc_small/validation.parquet --test nsmc_small/test.parquet --learning-rate 1e-3 --limit-train 4000 --epochs 2",
}
SHOWN = ("accuracy", "macro_f1", "micro_f1", "exact_match", "spearman", "pearson", "mcc")


def train(data: Path, flags: str) -> dict:
    """Run one training through the command line; paths in `flags` are below `data`."""
    words = [str(data / word) if word.endswith(".parquet") else word for word in shlex.split(flags)]
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            str(Path(sys.executable).parent / "textlora"),
            "train",
            *words,
            "--pooling",
            "first",
            "--output",
            f"{scratch}/out",
            "--json",
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return {key: value for key, value in json.loads(done.stdout).items() if key not in ("output", "labels")}


def imdb(data: Path) -> None:
    runs = []
    for seed in (42, 43, 44):
        flags = f"--train imdb/train.parquet --test imdb/test.parquet --learning-rate 1e-3 --limit-train 1000 --limit-eval 4000 --model minilm --seed {seed}"
        runs.append({"seed": seed, **train(data, flags)})
    scores = [run["test"]["accuracy"] for run in runs]
    seconds = min(run["train_seconds"] for run in runs)  # the others may have run beside something else
    write_result(
        "imdb",
        "accuracy on IMDB after training on 1,000 rows",
        [
            (
                "IMDB, 1,000 training rows, rate 1e-3: test accuracy, mean of 3 seeds (4,000 test rows)",
                f"{statistics.mean(scores):.4f} ({min(scores):.4f} to {max(scores):.4f})",
            ),
            (
                "... training time on two cores, shortest run",
                f"{seconds:,.0f} s for {runs[0]['epochs']:g} epochs",
            ),
        ],
        {"runs": runs},
    )


def sets(data: Path, names: list[str]) -> None:
    for name in names:
        run = train(data, SETS[name])
        shown = ", ".join(
            f"{metric} {run['test'][metric]:.4f}" for metric in SHOWN if run["test"].get(metric) is not None
        )
        write_result(f"set-{name}", f"score on {name}", [(name, shown)], {"flags": SETS[name], **run})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("imdb", "sets"))
    parser.add_argument("--only", help="comma-separated sets")
    options = parser.parse_args()
    if options.what == "imdb":
        imdb(options.data)
    else:
        sets(options.data, options.only.split(",") if options.only else list(SETS))


if __name__ == "__main__":
    main()

"""Training speed and memory beside the recipe, the tuned stack and full fine-tuning (see systems.py): A B C D
A B C D ...

python benchmarks/training.py path/to/data
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import median_ratio, write_result
from floor import count, floor_seconds, mean_piece
from systems import measure, random_base, read_rows

from textlora.data.tokenize import TextTokenizer, load_tokenizer
from textlora.model.base import find_base
from textlora.model.families import read_spec

SWEEP = [(8, None), (16, None), (32, None), (8, 1)]  # batch size, threads


def lengths_of(folder: str, data: str, rows: int) -> list[int]:
    files = find_base(folder)
    tokenizer = TextTokenizer(load_tokenizer(files.folder, files.config["model_type"]), 512)
    return [len(e.ids) for e in tokenizer.encode([row["text"] for row in read_rows(data, rows)])]


def table(name: str, folder: str, data: str, rows: int, pairs: int, systems: list[str]) -> dict[str, Any]:
    """Medians of `pairs` rounds of every system, ratios of pairs, and the floor's share."""
    tuned_batch, tuned_threads, sweep = 8, None, {}
    if "tuned" in systems:
        for batch, threads in SWEEP:
            sweep[f"batch {batch}, {threads or 'all'} threads"] = measure(
                "tuned", folder, data, rows, batch, threads
            )["seconds"]
        best = min(sweep, key=sweep.__getitem__)
        tuned_batch, tuned_threads = SWEEP[list(sweep).index(best)]
    spec, lengths = read_spec(find_base(folder).config), lengths_of(folder, data, rows)
    work, runs, floors = count(spec, lengths, train="lora"), {system: [] for system in systems}, []
    for _ in range(pairs):
        for system in systems:
            tuned = system == "tuned"
            runs[system].append(
                measure(
                    system, folder, data, rows, tuned_batch if tuned else 8, tuned_threads if tuned else None
                )
            )
            if system == "textlora":  # next to it: a machine's speed changes within a minute
                floors.append(floor_seconds(spec, work, mean_piece(lengths)))
    seconds = {system: [run["seconds"] for run in made] for system, made in runs.items()}
    tokens = int(runs["textlora"][0]["tokens"])
    assert sum(lengths) == tokens
    least = [floor for floor, _ in floors]
    return {
        "set": name,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": {
            system: tokens / statistics.median(values) for system, values in seconds.items()
        },
        "ratio": {system: median_ratio(values, seconds["textlora"]) for system, values in seconds.items()},
        "peak_bytes": {
            system: statistics.median(run["peak_bytes"] for run in made) for system, made in runs.items()
        },
        "tuned_sweep_seconds": sweep,
        "floor_seconds": least,
        "floor_share": median_ratio(least, seconds["textlora"]),
        "floor_rates_gflops": [rates for _, rates in floors],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets imdb and banking77")
    parser.add_argument("--rows", type=int, default=24, help="IMDB rows")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--tables",
        default="imdb,banking77,large",
        help="which to measure; large is a bert-base-sized model on IMDB, half of the time",
    )
    options = parser.parse_args()
    imdb = str(options.data / "imdb" / "train.parquet")
    banking = str(options.data / "banking77" / "train.parquet")
    minilm = str(find_base("minilm").folder)
    wanted, tables = options.tables.split(","), []
    if "imdb" in wanted:
        tables.append(
            (
                table(
                    "imdb", minilm, imdb, options.rows, options.pairs, ["recipe", "tuned", "textlora", "full"]
                ),
                "MiniLM, IMDB",
            )
        )
    if "banking77" in wanted:
        tables.append(
            (
                table("banking77", minilm, banking, 512, options.pairs, ["tuned", "textlora", "full"]),
                "MiniLM, banking77",
            )
        )
    if "large" in wanted:
        with tempfile.TemporaryDirectory() as scratch:
            large = table(
                "imdb",
                str(random_base(Path(scratch), minilm)),
                imdb,
                16,
                3,
                ["recipe", "tuned", "textlora", "full"],
            )
        tables.append((large, "bert-base size, IMDB"))
    rows = []
    for made, what in tables:
        speed, ratio = made["tokens_per_second"], made["ratio"]
        rows.append(
            (
                f"training, {what}: real tokens/s of textlora",
                f"{speed['textlora']:,.0f} ({made['floor_share']:.0%} of the floor's)",
            )
        )
        if "recipe" in ratio:
            rows.append(
                (
                    "... times the tutorial's transformers + peft + Trainer",
                    f"{ratio['recipe']:.1f}x ({speed['recipe']:,.0f})",
                )
            )
        rows.append(
            (
                "... times transformers + peft + Trainer tuned",
                f"{ratio['tuned']:.2f}x ({speed['tuned']:,.0f})",
            )
        )
        rows.append(
            ("... times full fine-tuning in the same engine", f"{ratio['full']:.2f}x ({speed['full']:,.0f})")
        )
        share = made["peak_bytes"]["textlora"] / made["peak_bytes"]["tuned"]
        rows.append(
            (
                "... peak memory, and as a share of the tuned stack's",
                f"{made['peak_bytes']['textlora'] / 2**20:,.0f} MiB, {share:.0%}",
            )
        )
    write_result(
        "training",
        "training speed and memory, one epoch on the same rows",
        rows,
        {"tables": [made for made, _ in tables]},
    )


if __name__ == "__main__":
    main()

"""The methods side by side on six data sets, each tuned alike, and what `textlora train` does by default.

    python benchmarks/comparison.py DATA run trec6 banking77 sst2
    python benchmarks/comparison.py DATA run tweet_emotion mr glue_rte
    python benchmarks/comparison.py DATA report

`run` takes some sets at a time and skips runs that are there. `report` writes the tables and figures of
docs/comparison and the row of results/. Rows to train and validate on come from the train split, rows to test on
from the test split, or the validation split where a set has no test. Two more sets, which no default was chosen
on, meet full fine-tuning and the defaults only.
"""

import argparse
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, write_result

from textlora.compare.comparison import Comparison, compare, read_comparison
from textlora.compare.methods import DEFAULT_METHODS
from textlora.core.config import TrainConfig
from textlora.report.comparison.across import across
from textlora.report.comparison.page import render_many
from textlora.training.learning_rate import default_rate

SETS = ("trec6", "banking77", "sst2", "tweet_emotion", "mr", "glue_rte")
ASIDE = ("ag_news", "sms_spam")
TRAIN, SCORED = 256, 256
KEPT = RESULTS / "comparison"
DEFAULT, RECIPE = default_rate(math.ceil(TRAIN / TrainConfig().batch_size * TrainConfig().epochs)), 5e-5
REPORT = Path(__file__).parent.parent / "docs" / "comparison"


def config(data: Path, name: str, output: Path) -> TrainConfig:
    held = next(
        path for split in ("test", "validation") if (path := data / name / f"{split}.parquet").is_file()
    )
    train = str(data / name / "train.parquet")
    return TrainConfig(
        train=train, test=str(held), limit_train=TRAIN, limit_eval=SCORED, threads=1, output=str(output)
    )


def run(data: Path, names: Sequence[str]) -> None:
    for name in names:
        methods = DEFAULT_METHODS if name in SETS else ("full",)
        jobs = [(name, methods, {})]
        jobs += [
            (f"{name}-{what}", ("lora-qv",), {"lora-qv": (rate,)})
            for what, rate in (("default", DEFAULT), ("recipe", RECIPE))
        ]
        for folder, chosen, rates in jobs:
            asked = Comparison(config(data, name, KEPT / folder), chosen, rates, name=name)
            compare(
                asked,
                on_record=lambda record: print(
                    record["kind"],
                    record["method"],
                    record.get("learning_rate"),
                    record.get("test"),
                    flush=True,
                ),
            )
            for extra in (KEPT / folder).iterdir():  # the page of each set is part of the one below docs
                if extra.name not in ("runs", "comparison.json"):
                    shutil.rmtree(extra) if extra.is_dir() else extra.unlink()


def renamed(folder: str, method: str) -> Any:
    """The runs of one folder under another method's name."""
    settings, runs = read_comparison(KEPT / folder)
    change = lambda names: {method: next(iter(names.values()))} if isinstance(names, dict) else [method]
    settings |= {key: change(settings[key]) for key in ("methods", "learning_rates", "sizes")}
    return settings, [made | {"method": method} for made in runs]


def beside(names: Sequence[str], methods: Sequence[str]) -> Any:
    """Sets with the defaults and the recipe as methods of their own."""
    sets = []
    for name in names:
        settings, runs = read_comparison(KEPT / name)
        runs = [made for made in runs if made["method"] in methods]
        for what in ("default", "recipe"):
            more, extra = renamed(f"{name}-{what}", what)
            runs += extra
            settings |= {key: settings[key] | more[key] for key in ("learning_rates", "sizes")} | {
                "descriptions": settings["descriptions"] | {what: what}
            }
        sets.append((settings | {"methods": [*methods, "default", "recipe"]}, runs))
    return sets


def report() -> None:
    render_many([read_comparison(KEPT / name) for name in SETS], REPORT)
    rows, details = [], {}
    for title, names in (("six sets", SETS), ("two sets kept aside", ASIDE)):
        found = across(beside(names, ("full",)))
        details[title] = {}
        for one, other in (("default", "full"), ("default", "recipe")):
            pair = found.pair(one, other).as_dict()
            low, high = pair["on_these_sets"]
            details[title][f"{one} - {other}"] = pair
            whose = {
                "full": "full fine-tuning's, tuned",
                "recipe": f"the recipe's (rate {RECIPE:g}) at equal epochs",
            }[other]
            rows.append(
                (
                    f"accuracy of `train`'s defaults minus {whose}, mean of {title}",
                    f"{pair['mean']:+.1f} points (95% {low:+.1f} to {high:+.1f})",
                )
            )
    write_result("comparison", "methods side by side, each tuned alike", rows, details)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("sets", nargs="*", default=[*SETS, *ASIDE])
    options = parser.parse_args()
    run(options.data, options.sets) if options.what == "run" else report()


if __name__ == "__main__":
    main()

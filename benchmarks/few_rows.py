"""What `textlora train` learns with all its defaults from few rows of ten sets, and how good its scores are:
accuracy, log loss, calibration error.

    python benchmarks/few_rows.py DATA run --rows 256 150 64 --folder demo/few-rows
    python benchmarks/few_rows.py DATA run --rows 256 --folder demo/few-rows-before
    python benchmarks/few_rows.py DATA report --folder demo/few-rows --before demo/few-rows-before

A run is one JSON file, and finished ones are skipped; the second command is the first with PYTHONPATH at another
version. Every class is drawn first, then other rows, by the seed. Of a test split up to 1,000 rows are read, the
same for all; a set without one lends its validation split. Test rows of a class that was not drawn are left out.
`--develop` scores other training rows in place of test rows.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

SETS = (
    "trec6",
    "banking77",
    "sst2",
    "mr",
    "ag_news",
    "20news",
    "imdb",
    "sms_spam",
    "tweet_emotion",
    "glue_cola",
)
TEST_ROWS = 1000


def rows_of(path: Path) -> list[tuple[str, str]]:
    table = pq.read_table(path).to_pydict()
    return list(zip(table["text"], map(str, table["label"]), strict=True))


def draw(rows: list[tuple[str, str]], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Places of `count` rows, one of each class first, and of the others, in an order drawn from the seed."""
    first, rest, seen = [], [], set()
    for i in np.random.default_rng(seed).permutation(len(rows)).tolist():
        (rest if rows[i][1] in seen else first).append(i)
        seen.add(rows[i][1])
    order = first + rest
    return order[:count], order[count:]


def calibration_error(probs: np.ndarray, labels: np.ndarray) -> float:
    """Mean gap between confidence and accuracy over 15 bins of equal width (Guo et al. 2017)."""
    sure, right = probs.max(1), probs.argmax(1) == labels
    bins = np.clip(np.ceil(sure * 15).astype(int) - 1, 0, 14)
    return float(
        sum(
            abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean()
            for b in range(15)
            if (bins == b).any()
        )
    )


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    return float(
        -(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))[np.arange(len(labels)), labels].mean()
    )


def one(data: Path, name: str, count: int, seed: int, develop: bool) -> dict[str, Any]:
    import textlora

    train = rows_of(data / name / "train.parquet")
    picked, others = draw(train, count, seed)
    if develop:
        test = [train[i] for i in others[:TEST_ROWS]]
    else:
        path = next(
            path for split in ("test", "validation") if (path := data / name / f"{split}.parquet").is_file()
        )
        test = rows_of(path)
        test = [test[i] for i in np.random.default_rng(0).permutation(len(test))[:TEST_ROWS]]
    steps: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        seen = lambda record: (
            steps.append(record["tokens"] / record["tokens_per_second"]) if record["kind"] == "step" else None
        )
        classifier = textlora.train(
            [train[i] for i in picked], output=f"{scratch}/out", seed=seed, callback=seen
        )
        seconds = time.perf_counter() - began
    meta = classifier.meta
    test = [row for row in test if row[1] in meta.labels]  # with fewer rows than classes some are not drawn
    logits = np.asarray(classifier.logits([text for text, _ in test]), dtype=np.float64)
    labels = np.array([meta.labels.index(label) for _, label in test])
    applied = meta.temperature
    fitted = getattr(meta, "fitted_temperature", 1.0)
    shift = getattr(meta, "fitted_shift", None)
    trained = (logits - (0.0 if shift is None else np.array(shift))) * fitted
    scores = logits / applied
    probs = np.exp(scores - scores.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    return {
        "set": name, "rows": count, "seed": seed, "test_rows": len(test), "accuracy": float((logits.argmax(1) == labels).mean()),
        "temperature": applied * fitted, "log_loss": log_loss(scores, labels), "log_loss_at_1": log_loss(trained, labels),
        "ece": calibration_error(probs, labels), "pooling": meta.pooling, "seconds": seconds, "step_seconds": sum(steps),
        "validation": meta.scores.get("validation"),
    }  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for count in arguments.rows:
        for seed in arguments.seeds:
            for name in arguments.sets:
                path = (
                    arguments.folder / f"{name}_{count}_{seed}{'_develop' if arguments.develop else ''}.json"
                )
                if path.is_file():
                    continue
                record = one(arguments.data, name, count, seed, arguments.develop)
                path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
                shown = {key: round(value, 4) for key, value in record.items() if isinstance(value, float)}
                print(name, count, seed, shown, flush=True)


def read(folder: Path) -> dict[tuple[str, int], list[dict[str, Any]]]:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault((record["set"], record["rows"]), []).append(record)
    return found


def report(arguments: argparse.Namespace) -> None:
    from common import write_result

    now, before = read(arguments.folder), read(arguments.before)
    mean = lambda records, key: statistics.mean(record[key] for record in records)
    lines, gains = [], []
    for name in SETS:
        new, seeds = now[name, 256], {record["seed"] for record in now[name, 256]}
        old = [record for record in before[name, 256] if record["seed"] in seeds]
        gains.append(100 * (mean(new, "accuracy") - mean(old, "accuracy")))
        lines.append(
            (
                f"{name}: accuracy with all defaults, 256 rows, mean of {len(new)} seeds (before)",
                f"{mean(new, 'accuracy'):.4f} ({mean(old, 'accuracy'):.4f})",
            )
        )
    excess = [
        (r["log_loss"] - r["log_loss_at_1"]) / max(0.01, 0.02 * r["log_loss_at_1"])
        for records in now.values()
        for r in records
    ]
    head = [
        ("accuracy with all defaults, 256 rows: mean gain over the ten sets; least gain", f"{statistics.mean(gains):+.1f} points; {min(gains):+.1f}"),
        ("expected calibration error (15 bins), 256 rows, mean over the sets (before)",
         f"{statistics.mean(mean(now[name, 256], 'ece') for name in SETS):.3f} ({statistics.mean(mean(before[name, 256], 'ece') for name in SETS):.3f})"),
        ("test log loss over that at temperature 1, in units of 2% or 0.01 nats, the largest of all runs", f"{max(excess):.2f}"),
    ]  # fmt: skip
    details = {
        "runs": [r for records in now.values() for r in records],
        "before": [r for records in before.values() for r in records],
    }
    write_result("few-rows", "all defaults on few rows of ten sets", head + lines, details)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--rows", type=int, nargs="+", default=[256])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--develop", action="store_true")
    arguments = parser.parse_args()
    (run if arguments.what == "run" else report)(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Made-up run records of a comparison, shaped as `textlora compare` writes them, with known qualities."""

import zlib
from typing import Any

import numpy as np

# method: (quality, luck of the seed, rates, loss at the other rates, trainable parameters, saved bytes,
# seconds, memory)
METHODS = {
    "majority": (None, 0.0, (), 0.0, 0, 40, 0.01, 3.1e8),
    "tfidf": (0.45, 0.0, (), 0.0, 0, 310_000, 0.4, 3.2e8),
    "probe": (0.9, 0.0, (), 0.0, 0, 9_300, 2.1, 5.2e8),
    "head": (1.1, 0.04, (3e-3, 1e-2, 3e-2), 0.35, 0, 9_300, 3.4, 5.2e8),
    "bitfit": (1.55, 0.08, (1e-3, 3e-3, 1e-2), 0.3, 41_472, 176_000, 41.0, 9.5e8),
    "full": (1.8, 0.15, (3e-5, 1e-4, 3e-4), 0.8, 22_713_216, 90_900_000, 70.5, 1.7e9),
    "lora-qv": (1.7, 0.08, (3e-4, 1e-3, 3e-3), 0.25, 73_728, 304_000, 38.2, 8.2e8),
    "lora-all": (1.9, 0.08, (3e-4, 1e-3, 3e-3), 0.2, 331_776, 1_340_000, 48.9, 1.1e9),
    "rslora": (1.72, 0.08, (1e-4, 3e-4, 1e-3), 0.25, 73_728, 304_000, 38.4, 8.2e8),
    "lora+": (1.73, 0.08, (1e-4, 3e-4, 1e-3), 0.25, 73_728, 304_000, 38.1, 8.2e8),
    "dora": (1.71, 0.08, (3e-4, 1e-3, 3e-3), 0.25, 78_336, 322_000, 66.0, 9.1e8),
    "ia3": (1.4, 0.1, (1e-3, 1e-2, 3e-2), 0.5, 4_608, 28_000, 44.0, 9.9e8),
    "prefix": (1.05, 0.2, (1e-3, 1e-2, 3e-2), 0.9, 46_080, 194_000, 58.0, 1.0e9),
}
CLASSES = 6


def records(
    data: str = "made-up",
    methods: tuple[str, ...] = tuple(METHODS),
    seeds: int = 3,
    test_rows: int = 300,
    curve: tuple[int, ...] = (),
    **settings: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """`comparison.json` and the run files of a finished single-label comparison."""
    random = np.random.default_rng(zlib.crc32(data.encode()))
    labels = random.choice(CLASSES, size=test_rows, p=[0.3, 0.25, 0.2, 0.15, 0.07, 0.03])
    ease = random.normal(-0.5, 1.3, size=test_rows)
    wrong = (labels + random.integers(1, CLASSES, size=test_rows)) % CLASSES
    given = {
        "data": data,
        "model": "minilm",
        "metric": "accuracy",
        "problem_type": "single_label_classification",
        "methods": list(methods),
    }
    given |= {
        "labels": [f"L{i}" for i in range(CLASSES)],
        "test_labels": labels.tolist(),
        "seeds": seeds,
        "epochs": 4.0,
    }
    runs = []

    def run(
        method: str,
        rate: float | None,
        seed: int,
        stage: str,
        quality: float | None,
        rows: int = 500,
        luck: float = 0.0,
    ) -> None:
        _, _, _, _, trainable, saved, seconds, memory = METHODS[method]
        if quality is None:
            made = np.zeros(test_rows, dtype=int)
        else:
            right = (
                ease
                + 1.0 * quality
                + random.normal(0, luck)
                + (random.normal(0, 0.35, size=test_rows) if luck else 0.0)
                > 0
            )
            made = np.where(right, labels, wrong)
        scores = {
            "accuracy": float((made == labels).mean()),
            "macro_f1": float((made == labels).mean()) - 0.02,
        }
        record = {
            "data": data,
            "method": method,
            "size": {"r": 8} if "ora" in method else {},
            "learning_rate": rate,
            "seed": seed,
        }
        record |= {
            "train_rows": rows,
            "epochs": 4.0,
            "stage": stage,
            "trainable_parameters": trainable,
            "head_parameters": 2310 if trainable else 0,
        }
        record |= {
            "saved_bytes": saved,
            "train_seconds": seconds * rows / 500 * (1 + 0.01 * seed),
            "peak_memory_bytes": int(memory),
        }
        record |= {
            "metric": "accuracy",
            "validation": scores,
            "best_epoch": 3.0,
            "versions": {"torch": "2.13.0"},
            "machine": {"cores": 2},
        }
        tested = stage != "rates"
        runs.append(
            record
            | {"test": scores if tested else None, "test_predictions": made.tolist() if tested else None}
        )

    for method in methods:
        quality, luck, rates, loss, *_ = METHODS[method]
        for i, rate in enumerate(rates):
            run(method, rate, 0, "rates", quality - loss * abs(i - 1), luck=luck)
        best = rates[1] if rates else None
        for seed in range(seeds):
            if rates or seed == 0:  # a fitted method draws nothing at random
                run(method, best, seed, "seeds", quality, luck=luck)
            for count in curve:
                run(
                    method,
                    best,
                    seed,
                    "rows",
                    None if quality is None else quality - 0.35 * np.log2(500 / count),
                    count,
                    luck,
                )
    return given | settings, runs


def failed(run: dict[str, Any], why: str = "the loss is not finite at step 12") -> dict[str, Any]:
    """The same run as a failure: its line in place of the metrics."""
    gone = ("validation", "best_epoch", "test", "test_predictions")
    return {key: value for key, value in run.items() if key not in gone} | {"error": why}

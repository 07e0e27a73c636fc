"""What a training step costs, in time and peak memory, against text length, batch, rank, adapted layers, and
rows of the data set.

    python benchmarks/growth.py            # writes results/growth.json and docs/figures/growth.svg

MiniLM; texts of one repeated word, so that every length is exact. Every point is a process of its own, with
its own peak memory.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import write_result

DEFAULT = {"length": 128, "batch": 8, "r": 8, "layers": "all", "rows": 400, "steps": 12}
SWEEPS = {
    "length": [16, 32, 64, 128, 256, 512],
    "batch": [1, 2, 4, 8, 16, 32, 64],
    "r": [1, 4, 8, 16, 64],
    "layers": ["last:1", "last:2", "last:3", "last:4", "last:5", "all"],
    "rows": [400, 5_000, 25_000],
    "steps": [12, 50, 200],
}
NAMES = {
    "length": "tokens of a text",
    "batch": "texts of a step",
    "r": "rank r",
    "layers": "adapted layers",
    "rows": "rows of the set",
    "steps": "steps taken",
}
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "growth.svg"


def step_cost(length: int, batch: int, r: int, layers: str, rows: int, steps: int) -> dict[str, float]:
    """Median seconds of a step, tokens of one, peak resident bytes; in this process."""
    from textlora.core.config import TrainConfig
    from textlora.training.prepare import prepare
    from textlora.training.trainer import Trainer

    texts = [
        (" ".join(["film"] * (length - 2 - (k % 2 if length > 16 else 0))), "ab"[k % 2])
        for k in range(max(rows, batch * 2))
    ]
    config = TrainConfig(
        model="minilm",
        pooling="first",
        epochs=max(1, -(-steps * batch // len(texts))),
        batch_size=batch,
        r=r,
        layers=layers,
        seed=0,
    )
    trainer = Trainer(prepare(config, {"train": texts, "validation": texts[:2]}))
    seconds, tokens = [], []
    for record in trainer.records():
        if record["kind"] == "step":
            seconds.append(record["tokens"] / record["tokens_per_second"])
            tokens.append(record["tokens"])
        if len(seconds) == steps:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": statistics.median(seconds[2:]),
        "tokens": statistics.median(tokens),
        "peak_bytes": peak,
    }


def measure(point: dict[str, Any]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--one", json.dumps(point)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{point}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def draw(found: dict[str, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "textlora"
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for axis, (name, points) in zip(axes.flat, found.items(), strict=True):
        x = list(range(len(points))) if name == "layers" else [point["at"] for point in points]
        axis.plot(
            x,
            [1e3 * point["seconds"] for point in points],
            "o-",
            color="#1f5fa8",
            label="ms of a step (left)",
        )
        axis.set_xlabel(NAMES[name])
        axis.set_ylim(bottom=0)
        if name == "layers":
            axis.set_xticks(x, [str(point["at"]) for point in points])
        memory = axis.twinx()
        memory.plot(
            x,
            [point["peak_bytes"] / 2**20 for point in points],
            "s--",
            color="#b3541e",
            label="MiB, peak (right)",
        )
        memory.set_ylim(bottom=0, top=max(1000, 1.1 * max(point["peak_bytes"] / 2**20 for point in points)))
    handles = [*axes.flat[0].get_legend_handles_labels()[0], *memory.get_legend_handles_labels()[0]]
    figure.legend(
        handles,
        ["ms of a step (left axis, solid)", "peak memory, MiB (right axis, dashed)"],
        loc="outside upper center",
        ncols=2,
        frameon=False,
    )
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--one", help="one point as JSON; `measure` makes it")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(step_cost(**json.loads(options.one))))
        return
    found = {
        name: [{"at": at, **measure(DEFAULT | {name: at})} for at in values]
        for name, values in SWEEPS.items()
    }
    ms = {name: [f"{1e3 * point['seconds']:.0f}" for point in points] for name, points in found.items()}
    mib = {
        name: [f"{point['peak_bytes'] / 2**20:,.0f}" for point in points] for name, points in found.items()
    }
    rows = [
        (
            f"a step of 8 texts of 128 tokens, growing {NAMES[name]} ({', '.join(map(str, SWEEPS[name]))})",
            f"{', '.join(ms[name])} ms; {', '.join(mib[name])} MiB",
        )
        for name in SWEEPS
    ]
    write_result("growth", "what a training step costs", rows, {"default": DEFAULT, "sweeps": found})
    draw(found)


if __name__ == "__main__":
    main()

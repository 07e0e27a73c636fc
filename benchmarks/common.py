"""What every benchmark shares: machine facts, paired medians, result files."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from textlora.kernels.library import instruction_sets, why_not

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """Processor, cores and versions: what a figure depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    if _as_avx2():
        model += " as one with AVX2 alone (benchmarks/as_avx2.c)"
    packages = ("torch", "transformers", "peft", "tokenizers")
    missing = why_not()
    kernels = f"not in use, {missing}" if missing else instruction_sets()
    return {
        "processor": model,
        "kernels": kernels,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_result(name: str, claim: str, rows: Sequence[tuple[str, str]], details: dict[str, Any]) -> None:
    """Write `results/NAME.json`: `rows` (what, value) go into the README, `details` hold everything measured."""
    command = (
        ("LD_PRELOAD=$PWD/as_avx2.so " if _as_avx2() else "")
        + "python "
        + shlex.join([f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_machine, sys.argv[1:])])
    )
    record = {
        "claim": claim,
        "command": command,
        "machine": machine(),
        "rows": [list(row) for row in rows],
        "details": details,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for what, value in rows:
        print(f"{what}: {value}")


def _as_avx2() -> bool:
    return Path(os.environ.get("LD_PRELOAD", "")).name == "as_avx2.so"


def _without_machine(argument: str) -> str:
    """An argument as a reader would type it: data outside the project become DATA/..."""
    path = Path(argument)
    if not path.exists() or path.resolve().is_relative_to(RESULTS.parent.parent):
        return argument
    return "/".join(["DATA", *path.parts[-2:]]) if path.is_file() else "DATA"


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of a[i] / b[i]: pairs measured side by side, so that a drift of the machine cancels."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))

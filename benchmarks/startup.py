"""How long a person waits: `textlora --help`, one text through `textlora predict`, and memory over 200,000
rows.

python benchmarks/startup.py path/to/an/adapter
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import write_result


def timed(command: list[str], text: str = "") -> float:
    start = time.perf_counter()
    subprocess.run(command, input=text, text=True, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def peak_bytes(command: list[str]) -> int:
    """Largest resident memory of a command."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{command} failed")
    return usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs=2, default=(10_000, 200_000))
    options = parser.parse_args()
    textlora = str(Path(sys.executable).parent / "textlora")
    predict = [textlora, "predict", options.adapter, "--data", "-", "--json"]
    torch = [sys.executable, "-c", "import torch"]
    timed(predict, "a text\n"), timed(torch), timed([textlora, "--help"])
    one, alone, help_ = [], [], []
    for _ in range(options.pairs):
        one.append(timed(predict, "a text\n"))
        alone.append(timed(torch))
        help_.append(timed([textlora, "--help"]))
    extra = statistics.median(a - b for a, b in zip(one, alone, strict=True))
    words = [
        "train",
        "coast",
        "noon",
        "folder",
        "water",
        "book",
        "price",
        "garden",
        "letter",
        "music",
        "river",
        "glass",
    ]
    peaks = []
    with tempfile.TemporaryDirectory() as scratch:
        for count in options.rows:
            path, draw = Path(scratch) / f"{count}.csv", random.Random(0)
            path.write_text(
                "text\n"
                + "".join(" ".join(draw.choices(words, k=draw.randint(1, 6))) + "\n" for _ in range(count))
            )
            peaks.append(
                peak_bytes(
                    [
                        textlora,
                        "predict",
                        options.adapter,
                        "--data",
                        str(path),
                        "--output",
                        str(path.with_suffix(".out.csv")),
                    ]
                )
            )
    write_result(
        "startup",
        "waiting time and memory of the command line",
        [
            ("`textlora --help`", f"{statistics.median(help_):.2f} s"),
            ("`textlora predict` on one text, beyond `python -c 'import torch'`", f"{extra:.2f} s"),
            (
                f"memory of predict at {options.rows[1]:,} rows, beyond that at {options.rows[0]:,}",
                f"{(peaks[1] - peaks[0]) / 2**20:.0f} MiB",
            ),
        ],
        {
            "predict_seconds": one,
            "import_torch_seconds": alone,
            "help_seconds": help_,
            "rows": list(options.rows),
            "peak_bytes": peaks,
        },
    )


if __name__ == "__main__":
    main()

"""The adapters that other benchmarks take, by `textlora train`: banking77 (3,000 rows), sst2 (2,000 rows) and
imdb (500 rows).

python benchmarks/adapters.py path/to/data path/to/folder
"""

import argparse
import subprocess
import sys
from pathlib import Path

FLAGS = {
    "banking77": "--pooling first --limit-train 3000 --epochs 3 --learning-rate 2e-3",
    "sst2": "--pooling first --limit-train 2000 --epochs 2",
    "imdb": "--pooling first --limit-train 500 --epochs 2",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    textlora = str(Path(sys.executable).parent / "textlora")
    for name, flags in FLAGS.items():
        output = options.folder / name
        if not (output / "textlora.json").is_file():
            train = [
                textlora,
                "train",
                "--train",
                str(options.data / name / "train.parquet"),
                *flags.split(),
                "--output",
                str(output),
                "--resume",
            ]
            subprocess.run(train, check=True)


if __name__ == "__main__":
    main()

"""Compiles textlora/kernels while textlora is built or installed, where there is something to gain and a C
compiler; everything works without it."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MADE = "textlora/kernels/_kernels.so"
SOURCES = tuple(
    f"textlora/kernels/{name}.c"
    for name in ("amx", "attention", "crew", "encode", "first", "grouped_lora", "passes", "product", "train")
)
COMMAND = [
    "-O3",
    "-std=gnu11",
    "-fno-math-errno",
    "-Wno-psabi",
    "-shared",
    "-fPIC",
    "-pthread",
]  # psabi: only inlined functions return vectors


class Compile(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        made, new = root / MADE, root / f"{MADE}.{os.getpid()}"
        if sys.platform != "linux" or platform.machine() != "x86_64":
            return
        try:
            compiler = shlex.split(os.environ.get("CC", "cc"))
            subprocess.run(
                [*compiler, *COMMAND, "-o", str(new), *(str(root / source) for source in SOURCES)],
                check=True,
                capture_output=True,
                text=True,
                timeout=300,
            )
            new.replace(made)
        except (OSError, subprocess.SubprocessError) as error:
            new.unlink(missing_ok=True)
            made.unlink(missing_ok=True)  # an older one would be another version's
            why = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[0]
            self.app.display_warning(
                f"textlora/kernels was not compiled, so training and predictions are slower and --precision high is plain float32: {why}"
            )
            return
        build_data["artifacts"].append(MADE)
        build_data["pure_python"], build_data["tag"] = False, "py3-none-linux_x86_64"

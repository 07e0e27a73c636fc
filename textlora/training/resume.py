"""Settings of a run that is taken up again."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from textlora.core.config import TrainConfig, read_config
from textlora.core.errors import UsageError


def resume_config(output: Path, given: Mapping[str, Any]) -> TrainConfig | None:
    """The settings a run was started with, or None where nothing was started.

    Raises:
        UsageError: `given` asks for something else than the run was started with.
    """
    path = output / "run" / "config.toml"
    if not path.is_file():
        return None
    saved = TrainConfig(**read_config(path))
    for name, value in given.items():
        if name not in ("output", "threads") and value != getattr(saved, name):
            flag = name.replace("_", "-")
            raise UsageError(
                f"--{flag} {value}: the run in {output} was started with {getattr(saved, name)}",
                "leave it out to resume, or use another --output",
            )
    return dataclasses.replace(saved, output=str(output))

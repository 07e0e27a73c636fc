"""Checkpoints: one safetensors file holding everything a run needs to go on, replaced in one step.

There is no random state to keep: row order and dropout masks are drawn from the seed and the step number.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from textlora.core.errors import StorageError
from textlora.core.files import atomic_path


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Write tensors and a JSON-able state. Raises StorageError when the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain, metadata={"state": json.dumps(state)})
    with atomic_path(path) as part:
        part.write_bytes(data)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors in fresh memory and the state; None where there is no checkpoint.

    Raises:
        StorageError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  no mapping
            return tensors, json.loads(file.metadata()["state"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{path}: not a whole checkpoint ({error})", "delete the run folder and start again"
        ) from error

"""Find what to convert: a PEFT folder, a checkpoint of the HF Trainer, an output folder of it or of
AutoTrain, a loralib file.

Only JSON and tensors are read. `training_args.bin`, `optimizer.pt` and other pickles that lie beside an
adapter are never opened; the weights themselves, where there is nothing but a pickle, only by torch's reader
for plain tensors (`weights_only=True`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textlora.adapters.folder import (
    CONFIG_FILE,
    SIDE_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    plain_tensors,
    read_adapter,
    read_peft_config,
)
from textlora.adapters.hub import adapter_folder
from textlora.adapters.importers.facts import read_json
from textlora.core.errors import AdapterError, UsageError

PICKLE = "adapter_model.bin"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Source:
    """An adapter as found.

    Attributes:
        kind: what wrote it, in words.
        note: which of several checkpoints was taken, and why.
        folder: config and tensors; for a loralib file the config is {} and names are as in the file.
        raw: tensors before duplicates were dropped, to hand to PEFT as they were; {} where PEFT can read the
            folder itself.
        settings: AutoTrain's `training_params.json`, else {}.
    """

    kind: str
    note: str
    folder: AdapterFolder
    raw: dict[str, Tensor]
    settings: dict[str, Any]

    @property
    def base(self) -> str | None:
        """The base model it names."""
        named = self.folder.config.get("base_model_name_or_path") or self.settings.get("model")
        return named if isinstance(named, str) else None

    @property
    def lengths(self) -> dict[str, Any]:
        """Numbers of tokens that AutoTrain's settings may name, by where they stand."""
        return {
            f"{key} in training_params.json": self.settings.get(key)
            for key in ("max_seq_length", "model_max_length", "block_size")
        }

    @property
    def places(self) -> list[Path]:
        """Folders whose tokenizer and settings belong to it: its own, and the output folder that a checkpoint
        lies in."""
        path = self.folder.path
        return [path, path.parent] if _CHECKPOINT.fullmatch(path.name) else [path]


def read_source(path: str | Path) -> Source:
    """Read a folder, a file, or a PEFT adapter on the hub.

    Raises:
        AdapterError: there is no adapter, or it cannot be read.
        UsageError: it is textlora's own, or one of several must be named.
    """
    folder = adapter_folder(path)
    if folder.is_file():
        if (folder.parent / CONFIG_FILE).is_file():
            raise UsageError(f"{folder} is a part of a PEFT folder", f"name the folder: {folder.parent}")
        return Source(
            "loralib", "", AdapterFolder(folder, {}, plain_tensors(read_pickle(folder), folder), None), {}, {}
        )
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such folder or file")
    note = ""
    if not (folder / CONFIG_FILE).is_file():
        folder, note = _checkpoint(folder)
    if (folder / SIDE_FILE).is_file():
        raise UsageError(f"{folder} is a textlora adapter already", "load it as it is")
    parents = [folder, folder.parent] if _CHECKPOINT.fullmatch(folder.name) else [folder]
    settings = next((found for place in parents if (found := read_json(place / "training_params.json"))), {})
    kind = (
        "AutoTrain" if settings else "the HF Trainer" if (folder / "trainer_state.json").is_file() else "PEFT"
    )
    if (folder / WEIGHTS_FILE).is_file() or not (folder / PICKLE).is_file():
        return Source(kind, note, read_adapter(folder), {}, settings)
    raw = read_pickle(folder / PICKLE)
    return Source(
        kind,
        note,
        AdapterFolder(folder, read_peft_config(folder), plain_tensors(raw, folder / PICKLE), None),
        raw,
        settings,
    )


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors by name out of a file of `torch.save`. Nothing in it is run.

    Raises:
        AdapterError: it is not such a file, or holds anything but tensors.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{path}: not a file of plain tensors, and opening it in another way could run code ({first:.100})"
        ) from error
    plain = isinstance(found, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    )
    if not plain or not found:
        raise AdapterError(f"{path}: holds no tensors by name", "save the state dict of the adapter alone")
    return {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()
    }


def _checkpoint(folder: Path) -> tuple[Path, str]:
    """The checkpoint of an output folder: the best where `trainer_state.json` names one, else the last."""
    found = {
        int(m[1]): p
        for p in folder.iterdir()
        if (m := _CHECKPOINT.fullmatch(p.name)) and (p / CONFIG_FILE).is_file()
    }
    if not found:
        raise _no_adapter(folder)
    last = found[max(found)]
    states = [read_json(place / "trainer_state.json") for place in (last, folder)]
    best = next(
        (name for state in states if isinstance(name := state.get("best_model_checkpoint"), str) and name),
        None,
    )
    if best is None:
        return last, f"{last.name}, the last of {len(found)}; trainer_state.json names no best one"
    chosen = re.split(r"[\\/]", best.rstrip("\\/"))[-1]
    if chosen not in {path.name for path in found.values()}:
        raise AdapterError(
            f"{folder}: its best checkpoint, {chosen:.60}, is not there", "name the checkpoint to convert"
        )
    return folder / chosen, f"{chosen}, the best of {len(found)} by trainer_state.json"


def _no_adapter(folder: Path) -> AdapterError | UsageError:
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    if named:
        return UsageError(
            f"{folder} holds adapters by name: {', '.join(named[:10])}", f"name one: {folder / named[0]}"
        )
    whole = ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json")
    if any((place / name).is_file() for place in (folder, *folder.glob("checkpoint-*")) for name in whole):
        what = (
            f"{folder}: holds a whole fine-tuned model and no adapter (AutoTrain trains text classifiers so)"
        )
        return AdapterError(what, "`textlora extract` makes an adapter of one whose change has low rank")
    return AdapterError(
        f"{folder}: no {CONFIG_FILE}, and no checkpoint with one",
        "an adapter folder needs one; a loralib file is named itself",
    )

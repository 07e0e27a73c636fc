"""The frozen-prefix cache: hidden states below the lowest adapted block, computed once and read in every
epoch.

With `--layers last:K` nothing below block `layers - K` ever changes. The states at its input, (T, H) float32,
lie in a file without a name, which the system removes whatever happens to the process; reading them back
gives the very numbers that computing them gives.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textlora.data.tokenize import Encoded, PackedBatch, pack, token_batches
from textlora.kernels.devices import bounded_memory, side_by_side
from textlora.training.prepare import Prepared

LIMIT_BYTES = 16 * 2**30  # and never more than half of the free space
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class HiddenStates:
    """States of one split: text i is rows `bounds[i]:bounds[i + 1]` of `states` (tokens, H)."""

    states: np.ndarray
    bounds: np.ndarray
    depth: int

    def attach(self, batch: PackedBatch, rows: Sequence[int]) -> PackedBatch:
        """`batch`, packed from the texts `rows` of the split, with their hidden states."""
        texts = np.asarray(rows)[batch.rows.numpy()]
        hidden = torch.from_numpy(
            np.concatenate([self.states[self.bounds[i] : self.bounds[i + 1]] for i in texts])
        )
        return replace(batch, hidden=hidden.to(batch.ids.device), depth=self.depth)


@dataclass(frozen=True)
class PickedStates:
    """States of some rows of a split: row i of them is row `picked[i]` of it."""

    states: HiddenStates
    picked: np.ndarray

    def attach(self, batch: PackedBatch, rows: Sequence[int]) -> PackedBatch:
        """As `HiddenStates.attach`."""
        return self.states.attach(batch, self.picked[np.asarray(rows)])


def build_prefix(prepared: Prepared, folder: Path | None = None) -> dict[str, HiddenStates]:
    """Hidden states of the train and validation rows; empty where nothing is frozen, used once, or there is
    no room for them.

    Args:
        folder: where the nameless file lies; default: the system's temporary folder.
    """
    model, depth = prepared.model, prepared.model.depth
    sets = {split: data for split, data in prepared.sets.items() if split != "test"}
    tokens = {split: int(data.lengths.sum()) for split, data in sets.items()}
    width = model.width
    needed = 4 * width * sum(tokens.values())
    room = min(LIMIT_BYTES, shutil.disk_usage(folder or tempfile.gettempdir()).free // 2)
    if depth == 0 or prepared.config.epochs <= 1 or needed > room:
        return {}
    found = {}
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            start = 0
            for split, data in sets.items():
                bounds = np.concatenate([[0], np.cumsum(data.lengths)])
                _write(model, data.encoded, bounds, file.fileno(), start, 4 * width)
                found[split] = (start, bounds)
                start += 4 * width * tokens[split]
        except OSError:  # the disk filled up meanwhile
            return {}
        return {
            split: HiddenStates(
                np.memmap(file, np.float32, "r", begin, (int(bounds[-1]), width)), bounds, depth
            )
            for split, (begin, bounds) in found.items()
        }


def _write(
    model: Any, encoded: Sequence[Encoded], bounds: np.ndarray, descriptor: int, start: int, row_bytes: int
) -> None:
    lengths = np.diff(bounds)

    def compute(rows: list[int]) -> None:
        with torch.inference_mode():
            batch = pack([encoded[i] for i in rows], device=model.device)
            hidden = model.encoder.prefix(batch, model.depth).float().cpu().numpy()
        cuts = batch.cu_seqlens.tolist()
        for b, k in enumerate(batch.rows.tolist()):
            data = memoryview(hidden[cuts[b] : cuts[b + 1]]).cast("B")
            at = start + row_bytes * int(bounds[rows[k]])
            while data:
                done = os.pwrite(descriptor, data, at)
                data, at = data[done:], at + done

    with bounded_memory(model), side_by_side(model.device) as workers:  # the same GELU as in the steps
        workers.map(compute, list(token_batches(lengths, np.argsort(lengths, kind="stable"), BATCH_TOKENS)))

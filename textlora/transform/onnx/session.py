"""ONNX files in ONNX Runtime: open one, run it on padded batches of mixed lengths, compare."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch

from textlora.core.errors import StorageError, VerificationError
from textlora.data.tokenize import Encoded
from textlora.model.families import EncoderSpec
from textlora.transform.onnx.graph import IDS, LOGITS, MASK, TYPES

TOLERANCE = 1e-4  # of a float32 logit against the packed model, relative to max(1, |logit|)
ONE_FILE = (
    2**31 - 2**20
)  # bytes that protobuf takes, less some room; beyond it the weights get a file of their own
_BATCHES = (1, 4, 16)  # sizes of the batches a file is checked with, in turn


def write_model(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file; weights beyond 2 GB go into `NAME_data` beside it. Raises StorageError when the
    disk is full."""
    size = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    beside = {"save_as_external_data": True, "location": f"{path.name}_data"} if size > ONE_FILE else {}
    try:
        onnx.save_model(model, str(path), **beside)
    except OSError as error:
        raise StorageError(
            f"cannot write {path.name}: {error.strerror or error}", "free some space or choose another folder"
        ) from error


def open_session(path: Path) -> ort.InferenceSession:
    """A CPU session with as many threads as torch has. Errors only: it warns once for every input that has a
    default."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def padded(encoded: Sequence[Encoded], spec: EncoderSpec) -> dict[str, np.ndarray]:
    """Token inputs (B, L) int64 of texts padded on the right to the longest."""
    shape = len(encoded), max(len(row.ids) for row in encoded)
    ids = np.full(shape, max(spec.position_offset - 1, 0), dtype=np.int64)
    mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for i, row in enumerate(encoded):
        ids[i, : len(row.ids)], mask[i, : len(row.ids)], types[i, : len(row.ids)] = row.ids, 1, row.type_ids
    return {IDS: ids, MASK: mask} | ({TYPES: types} if spec.family.uses_type_ids else {})


def session_logits(
    session: ort.InferenceSession,
    encoded: Sequence[Encoded],
    spec: EncoderSpec,
    inputs: Mapping[str, np.ndarray] | None = None,
    run_options: Any = None,
) -> np.ndarray:
    """Logits (N, C) in the order given, from batches of 1, 4 and 16 neighbours in turn, so that a text meets
    every kind of padding.

    Args:
        inputs: an adapter's, from `adapter_inputs`.
        run_options: with an active `LoraAdapter`.
    """
    parts = [
        session.run([LOGITS], padded(rows, spec) | dict(inputs or {}), run_options)[0]
        for rows in _batches(encoded)
    ]
    return np.concatenate(parts)


def _batches(encoded: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    at = turn = 0
    while at < len(encoded):
        size = _BATCHES[turn % len(_BATCHES)]
        yield encoded[at : at + size]
        at, turn = at + size, turn + 1


def require_close(found: np.ndarray, expected: np.ndarray) -> None:
    """Raises VerificationError where a logit of ONNX Runtime's is further from the packed model's than
    float32 explains."""
    apart = np.abs(found - expected) if found.shape == expected.shape else np.array(np.inf)
    if not (apart <= TOLERANCE * np.maximum(1, np.abs(expected))).all():
        raise VerificationError(
            f"ONNX Runtime gives logits up to {apart.max():.2g} away from textlora's, more than rounding explains",
            "nothing was kept; please report this with the versions of onnx and onnxruntime",
        )

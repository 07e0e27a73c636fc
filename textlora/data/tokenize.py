"""Texts to token ids, truncation, and packed batches: one text after another, no padding anywhere."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from textlora.core.errors import ModelError, UsageError

CHUNK = 1024  # texts tokenized at a time


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids (L,) and type ids (L,) of one text or pair, special tokens included, `full` tokens before
    truncation."""

    ids: np.ndarray
    type_ids: np.ndarray
    full: int


Runs = list[tuple[int, int, int, int]]


class Layout:
    """Where the texts of a packed batch lie, as attention needs it.

    Args:
        batch: read for what is not given.
        cu_seqlens: (B+1,) int32 on the batch's device; text b is `cu_seqlens[b]:cu_seqlens[b+1]`.
        longest: no text has more tokens.
    """

    def __init__(self, batch: "PackedBatch", cu_seqlens: Tensor | None = None, longest: int | None = None):
        self._batch = batch
        self.cu_seqlens = (
            batch.cu_seqlens.to(batch.ids.device, torch.int32) if cu_seqlens is None else cu_seqlens
        )
        self.longest = int(batch.cu_seqlens.diff().max()) if longest is None else longest

    @cached_property
    def runs(self) -> Runs:
        """Of `PackedBatch.runs`."""
        return self._batch.runs()


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """B texts of T tokens in all, shortest first, so that texts of one length lie side by side.

    Attributes:
        ids: (T,) int64 token ids.
        positions: (T,) int64, counted from 0 inside each text.
        type_ids: (T,) int64 segment ids.
        cu_seqlens: (B+1,) int64 on the CPU; text b is `cu_seqlens[b]:cu_seqlens[b+1]`.
        rows: (B,) int64 on the CPU; where text b stood in the list that was packed.
        labels: class ids (B,) int64, indicators (B, C) float32, or targets (B,) float32; None when
            predicting.
        hidden: (T, H) hidden states at the input of block `depth`, where somebody has computed them before;
            None from the start.
        given_layout: instead of `cu_seqlens`, where lengths change under a batch that stays (recorded.py).
    """

    ids: Tensor
    positions: Tensor
    type_ids: Tensor
    cu_seqlens: Tensor
    rows: Tensor
    labels: Tensor | None = None
    hidden: Tensor | None = None
    depth: int = 0
    given_layout: Layout | None = None

    @property
    def layout(self) -> Layout:
        return self.given_layout or Layout(self)

    @property
    def tokens(self) -> int:
        return self.ids.numel()

    @property
    def size(self) -> int:
        return self.rows.numel()

    def runs(self) -> Runs:
        """Stretches of texts of one length: (first text, texts, first token, length)."""
        bounds = self.cu_seqlens.tolist()
        found: Runs = []
        for b in range(self.size):
            length = bounds[b + 1] - bounds[b]
            if found and found[-1][3] == length:
                first, count, start, _ = found[-1]
                found[-1] = (first, count + 1, start, length)
            else:
                found.append((b, 1, bounds[b], length))
        return found


def pack(
    encoded: Sequence[Encoded], labels: np.ndarray | None = None, device: torch.device | str = "cpu"
) -> PackedBatch:
    """Pack texts into one batch. `labels[i]` belongs to `encoded[i]`.

    Raises:
        UsageError: there is nothing to pack.
    """
    if not encoded:
        raise UsageError("an empty batch cannot be packed")
    lengths = np.array([len(e.ids) for e in encoded])
    rows = np.argsort(lengths, kind="stable")
    bounds = np.concatenate([[0], np.cumsum(lengths[rows])])
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths[rows])
    ids = np.concatenate([encoded[i].ids for i in rows]).astype(np.int64)
    type_ids = np.concatenate([encoded[i].type_ids for i in rows]).astype(np.int64)
    as_device = lambda array: torch.from_numpy(array).to(device)
    return PackedBatch(
        ids=as_device(ids),
        positions=as_device(positions),
        type_ids=as_device(type_ids),
        cu_seqlens=torch.from_numpy(bounds),
        rows=torch.from_numpy(rows),
        labels=None if labels is None else as_device(np.ascontiguousarray(labels[rows])),
    )


def token_batches(lengths: Sequence[int], order: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut `order` into batches of at most `max_tokens` tokens; a single longer text is a batch of its own."""
    batch: list[int] = []
    total = 0
    for i in order:
        if batch and total + lengths[i] > max_tokens:
            yield batch
            batch, total = [], 0
        batch.append(int(i))
        total += lengths[i]
    if batch:
        yield batch


def even_batches(
    lengths: Sequence[int], order: Sequence[int], max_tokens: int, workers: int, least: int
) -> list[list[int]]:
    """Cut `order` into batches of nearly equal tokens, about `max_tokens` at most: as many for each worker,
    where each gets `least` tokens or more."""
    ends = np.cumsum(np.asarray(lengths)[order])
    total = int(ends[-1])
    workers = min(workers, max(1, total // least))
    count = workers * -(-total // (workers * max_tokens))
    middles = ends - np.asarray(lengths)[order] / 2
    cuts = np.searchsorted(middles, total * np.arange(1, count) / count)
    return [part.tolist() for part in np.split(np.asarray(order), cuts) if len(part)]


class TextTokenizer:
    """A `tokenizers.Tokenizer` with truncation of our own: ids equal AutoTokenizer's for `truncation="head"`.

    Args:
        backend: its own truncation and padding are switched off (all-MiniLM-L6-v2 ships with both on).
        max_length: tokens kept, special tokens included.
        truncation: "head" keeps the start of a text, "tail" the end, "head-tail" the first quarter and the
            last three quarters (Sun et al. 2019, arXiv 1905.05583, keep 128 of 510 in front). Pairs lose
            tokens of the longer text first.
    """

    def __init__(self, backend: Tokenizer, max_length: int, truncation: str = "head"):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.max_length = max_length
        self.truncation = truncation
        self._single = _template(backend, pair=False)
        self._pair = _template(backend, pair=True)
        if max_length <= self._pair.special + 1:
            raise UsageError(f"--max-length {max_length}: too short for the special tokens of a pair")

    def encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> list[Encoded]:
        """Encode texts, each with its pair where that is not None; some at a time, since the library's own
        form of a text takes many times the room."""
        found: list[Encoded] = []
        for at in range(0, len(texts), CHUNK):
            found += self._encode(texts[at : at + CHUNK], None if pairs is None else pairs[at : at + CHUNK])
        return found

    def _encode(self, texts: Sequence[str], pairs: Sequence[str | None] | None) -> list[Encoded]:
        first = [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        if pairs is None or all(p is None for p in pairs):
            return [self._build(self._single, [ids]) for ids in first]
        second = [
            e.ids for e in self.backend.encode_batch_fast([p or "" for p in pairs], add_special_tokens=False)
        ]
        return [
            self._build(self._single, [a]) if p is None else self._build(self._pair, [a, b])
            for a, b, p in zip(first, second, pairs, strict=True)
        ]

    def _build(self, template: "_Template", parts: list[list[int]]) -> Encoded:
        room = self.max_length - template.special
        full = sum(map(len, parts)) + template.special
        if full > self.max_length:
            keep = [room] if len(parts) == 1 else _longest_first(len(parts[0]), len(parts[1]), room)
            parts = [_cut(ids, n, self.truncation) for ids, n in zip(parts, keep, strict=True)]
        ids = list(template.fixed[0])
        types = list(template.fixed_types[0])
        for k, part in enumerate(parts):
            ids += part
            types += [template.part_types[k]] * len(part)
            ids += template.fixed[k + 1]
            types += template.fixed_types[k + 1]
        return Encoded(np.array(ids, dtype=np.int32), np.array(types, dtype=np.int8), full)


@dataclass(frozen=True)
class _Template:
    """Special ids before, between and after the texts, and the type id of each piece."""

    fixed: list[list[int]]
    fixed_types: list[list[int]]
    part_types: list[int]

    @property
    def special(self) -> int:
        return sum(map(len, self.fixed))


def _template(backend: Tokenizer, pair: bool) -> _Template:
    sample = backend.encode("a", "a") if pair else backend.encode("a")
    fixed: list[list[int]] = [[]]
    types: list[list[int]] = [[]]
    part_types: list[int] = []
    for token, kind, part in zip(sample.ids, sample.type_ids, sample.sequence_ids, strict=True):
        if part is None:
            fixed[-1].append(token)
            types[-1].append(kind)
        elif part == len(part_types):
            part_types.append(kind)
            fixed.append([])
            types.append([])
    if len(part_types) != 1 + pair:
        raise ModelError("the tokenizer drops the letter 'a'", "check its normalizer and vocabulary")
    return _Template(fixed, types, part_types)


def _longest_first(a: int, b: int, room: int) -> list[int]:
    """Lengths of two texts after `LongestFirst` truncation, as the tokenizers library defines it."""
    short = min(a, b)
    long_kept = short if short > room else max(short, room - short)
    if short + long_kept > room:
        short = room // 2
        long_kept = short + room % 2
    return [long_kept, short] if a > b else [short, long_kept]


def _cut(ids: list[int], room: int, truncation: str) -> list[int]:
    if len(ids) <= room:
        return ids
    if truncation == "head":
        return ids[:room]
    front = room // 4 if truncation == "head-tail" else 0
    return ids[:front] + ids[len(ids) - (room - front) :]


def load_tokenizer(folder: Path, model_type: str) -> Tokenizer:
    """Read `tokenizer.json`, or build the same from `vocab.txt`, else convert older files with transformers.

    Raises:
        ModelError: no tokenizer file that can be read.
    """
    path = folder / "tokenizer.json"
    try:
        if path.is_file():
            return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"{path}: not a tokenizer file ({error})") from error
    older = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "spm.model")
    if not any((folder / name).is_file() for name in older):
        raise ModelError(
            f"{folder}: no tokenizer.json", f"a base model folder needs one (or one of {', '.join(older)})"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        ).backend_tokenizer
    except Exception as error:  # transformers raises many kinds for a broken folder
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{folder}: the tokenizer cannot be read ({first})", "save it again as tokenizer.json"
        ) from error

"""Thousands of adapters registered, few of them in memory: read when first used, least recently used out,
never one in use.

Registering reads `textlora.json` only. The whole check (hashes, names, shapes, golden examples) comes when an
adapter is made resident, outside the bank's lock, so that running batches go on.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textlora.adapters.folder import SIDE_FILE, AdapterMeta, lora_config, read_adapter, read_meta
from textlora.core.errors import AdapterError, ModelError, UnknownAdapterError, UsageError
from textlora.core.files import sha256_file
from textlora.core.predictions import NAME, Prediction
from textlora.data.tokenize import TextTokenizer, load_tokenizer
from textlora.inference.classifier import TextClassifier
from textlora.kernels.devices import choose_device
from textlora.kernels.packed_linear import require_int8
from textlora.model.adapter_batch import ScaledAdapter
from textlora.model.base import BaseWeights, find_base, read_weights
from textlora.model.encoder import PackedEncoder
from textlora.model.families import read_spec
from textlora.model.packed_model import PackedModel

RESIDENT_BYTES = 2**30


@dataclass(frozen=True)
class Resident:
    """An adapter in memory: its classifier, and its layers ready for mixed batches."""

    classifier: TextClassifier
    folded: ScaledAdapter
    bytes: int

    @property
    def model(self) -> Any:
        return self.classifier.model


class _PlainModel:
    """The base without an adapter, as the engine needs it: hidden states (B, H) for logits."""

    pooling, mixes, pools_as_base = "first", True, False

    def __init__(self, encoder: PackedEncoder, device: str):
        self.encoder, self.depth = encoder, max(0, encoder.spec.layers - 1)
        self.device, self.dtype = torch.device(device), encoder.dtype

    def head(self, x: Tensor) -> Tensor:
        return x.float()


class _PlainClassifier(TextClassifier):
    def require_pairs(self, all_given: bool, any_given: bool) -> None:
        """Both will do."""

    def predictions(self, logits: np.ndarray) -> list[Prediction]:
        return [Prediction("", (), 0.0, {}, tuple(map(float, row))) for row in logits]


@dataclass
class _Entry:
    name: str
    path: Path
    meta: AdapterMeta
    resident: Resident | None = None
    users: int = 0
    removed: bool = False
    loading: threading.Lock = field(default_factory=threading.Lock)


class AdapterBank:
    """Adapters of one base model by name.

    Args:
        base: folder, hub id, or minilm.
        resident_bytes: budget of adapters in memory; those in use count, and are never put out.
        precision: of the base, one of `config.PRECISIONS`; golden examples are recomputed in float32 all the
            same.
        verify: recompute golden examples when an adapter is made resident.

    Raises:
        ModelError: the base cannot be read, or its architecture has no packed path.
        UsageError: int8 is asked for where it cannot be had.
    """

    def __init__(
        self,
        base: str = "minilm",
        *,
        device: str = "auto",
        resident_bytes: int = RESIDENT_BYTES,
        precision: str = "float32",
        verify: bool = True,
    ):
        self.files, self.device = find_base(base), choose_device(device)
        spec = read_spec(self.files.config)
        if isinstance(spec, str):
            raise ModelError(
                f"{base}: {spec}, so its adapters cannot share batches",
                "serve a merged model, or use TextClassifier",
            )
        weights = read_weights(self.files.folder, spec, pooler=True)
        self.weights = BaseWeights(
            spec, {name: t.to(self.device) for name, t in weights.tensors.items()}, weights.hash
        )
        if precision == "int8":
            require_int8(self.device)
        self.encoder = PackedEncoder(self.weights)
        self.running = self.encoder.for_inference(precision)
        # an adapter with mean pooling was trained without the base's pooler, and its hash is without it
        self._hashes = {
            "first": weights.hash,
            "mean": read_weights(self.files.folder, spec, pooler=False).hash,
        }
        self.resident_bytes, self.verify, self.precision = resident_bytes, verify, precision
        self._entries: dict[str, _Entry] = {}
        self._resident: OrderedDict[str, _Entry] = OrderedDict()  # least recently used first
        self._held = 0
        self._put_out: set[str] = set()
        self._changed = threading.Condition()
        self._proved: set[str] = (
            set()
            # hashes of side files, which hash the rest: put out and read again, an adapter is not computed again
        )
        self._tokenizers: dict[tuple[str, int, str], TextTokenizer] = {}

    @cached_property
    def plain(self) -> Resident:
        """The base alone, for rows that name no adapter."""
        meta = AdapterMeta((), "features", False, "first", min(512, self.weights.spec.max_length), "head", {})
        model = _PlainModel(self.running, self.device)
        return Resident(
            _PlainClassifier(
                model, self._tokenizer(self.files.folder, meta, model.encoder.spec.max_length), meta
            ),
            ScaledAdapter({}),
            0,
        )

    def add(self, path: str | Path, name: str, *, replace: bool = False, load: bool = False) -> AdapterMeta:
        """Register a folder under a name. Reads `textlora.json` only, unless `load` asks for the whole check
        first.

        Args:
            replace: take the place of what the name stood for; batches that run with it end with it.

        Raises:
            UsageError: the name is taken or holds other characters than letters, digits, `.`, `_` and `-`.
            AdapterError: there is no adapter, or it belongs to another base.
        """
        path = Path(path)
        if not NAME.fullmatch(name):
            raise UsageError(f"adapter name {name!r:.80}: use letters, digits, '.', '_' and '-', at most 128")
        meta = read_meta(path)
        if meta is None:
            raise AdapterError(
                f"{path}: no textlora.json", "`textlora convert` makes an adapter folder of other formats"
            )
        if meta.base["hash"] != self._hashes[meta.pooling]:
            raise AdapterError(
                f"{path} was trained on another base than {self.files.folder} (weights differ)",
                f"it needs {meta.base['hash'][:19]}",
            )
        entry = _Entry(name, path, meta)
        if load:
            entry.resident = self._read(entry)
        with self._changed:
            old = self._entries.get(name)
            if old is not None:
                if not replace:
                    raise UsageError(f"adapter name '{name}' is taken", "remove it first")
                self._retire(old)
            self._entries[name] = entry
            if entry.resident is not None:
                self._resident[name] = entry
                self._held += entry.resident.bytes
                self._shrink()
        return meta

    def remove(self, name: str) -> None:
        """Forget an adapter; returns when its last user is done. Raises UnknownAdapterError where there is
        none of that name."""
        self.retire(name)(None)

    def retire(self, name: str) -> Callable[[float | None], bool]:
        """Forget an adapter at once: new users are refused, its memory is freed by the last of those it has.

        Returns:
            a function that waits for that one, for at most so many seconds, and says whether it came.

        Raises:
            UnknownAdapterError: there is none of that name.
        """
        with self._changed:
            entry = self._entry(name)
            del self._entries[name]
            self._retire(entry)

        def done(timeout: float | None) -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: entry.users == 0, timeout)

        return done

    def put_out(self) -> list[str]:
        """Adapters whose memory was freed for others since this was last asked."""
        with self._changed:
            found, self._put_out = self._put_out, set()
            return list(found)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> list[str]:
        with self._changed:
            return sorted(self._entries)

    def meta(self, name: str) -> AdapterMeta:
        """Raises UnknownAdapterError where there is no such adapter."""
        with self._changed:
            return self._entry(name).meta

    def state(self) -> dict[str, int]:
        """Numbers for metrics: registered, resident, resident_bytes."""
        with self._changed:
            return {
                "registered": len(self._entries),
                "resident": len(self._resident),
                "resident_bytes": self._held,
            }

    @contextmanager
    def use(self, names: Sequence[str]) -> Iterator[list[Resident]]:
        """Hold adapters in memory while a batch runs.

        Raises:
            UnknownAdapterError: there is no such adapter.
            AdapterError: one is damaged or does not fit the base.
        """
        held: list[_Entry] = []
        try:
            for name in names:
                with self._changed:
                    entry = self._entry(name)
                    entry.users += 1
                held.append(entry)
            yield [self._open(entry) for entry in held]
        finally:
            with self._changed:
                for entry in held:
                    entry.users -= 1
                    if entry.removed:
                        self._retire(entry)
                self._shrink()
                self._changed.notify_all()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            some = ", ".join(sorted(self._entries)[:10]) or "none"
            raise UnknownAdapterError(
                f"no adapter '{name:.80}'", f"there are: {some}{', ...' if len(self._entries) > 10 else ''}"
            ) from None

    def _open(self, entry: _Entry) -> Resident:
        with entry.loading:
            resident = entry.resident
            if resident is None:
                resident = self._read(entry)
                with self._changed:
                    entry.resident = resident
                    self._held += resident.bytes
        with self._changed:
            if not entry.removed:
                self._resident[entry.name] = entry
                self._resident.move_to_end(entry.name)
            self._shrink()
        return resident

    def _shrink(self) -> None:
        if self._held <= self.resident_bytes:
            return
        for entry in [entry for entry in self._resident.values() if entry.users == 0]:
            if self._held <= self.resident_bytes:
                return
            self._drop(entry)
            self._put_out.add(entry.name)

    def _retire(self, entry: _Entry) -> None:
        """Nobody new gets it; the last user's end frees its memory."""
        entry.removed = True
        if self._resident.get(entry.name) is entry:
            del self._resident[entry.name]
        if entry.users == 0:
            self._drop(entry)

    def _drop(self, entry: _Entry) -> None:
        if entry.resident is not None:
            self._held -= entry.resident.bytes
            entry.resident = None
        if self._resident.get(entry.name) is entry:
            del self._resident[entry.name]

    def _read(self, entry: _Entry) -> Resident:
        proof = sha256_file(entry.path / SIDE_FILE) if (entry.path / SIDE_FILE).is_file() else ""
        folder = read_adapter(entry.path)
        if folder.meta is None or folder.meta.base["hash"] != self._hashes[folder.meta.pooling]:
            raise AdapterError(
                f"{entry.path}: was replaced by an adapter of another base since it was registered"
            )
        meta = folder.meta
        try:
            model = PackedModel(
                self.weights,
                lora_config(folder),
                len(meta.labels),
                meta.pooling,
                device=self.device,
                encoder=self.encoder,
            )
            model.load_trainable(folder.tensors)
        except (AdapterError, UsageError) as error:
            raise AdapterError(f"{entry.path}: {error.message}", error.fix) from error
        classifier = TextClassifier(model, self._tokenizer(entry.path, meta, model.max_length), meta)
        if self.verify and meta.golden and proof not in self._proved:
            classifier.verify(entry.name)
            self._proved.add(proof)
        for tensor in model.trainable().values():
            tensor.requires_grad_(False)
        folded = model.folded(self.running.dtype)
        if model.mixes:
            model.encoder = self.running
        elif self.precision != "float32":
            model.encoder = model.encoder.for_inference(self.precision)
        tensors = [
            *model.trainable().values(),
            *(t for place in folded.values() for t in place if t is not None),
            *(one.A for one in folded.joined.values() if len(one.ranks) > 1),
            *{id(B): B for one in folded.joined.values() for _, B, _ in one.uses}.values(),
        ]
        return Resident(classifier, folded, sum(t.numel() * t.element_size() for t in tensors))

    def _tokenizer(self, path: Path, meta: AdapterMeta, model_length: int) -> TextTokenizer:
        """Adapters whose tokenizer files have the same hash share one."""
        key = (meta.files.get("tokenizer.json", "base"), min(meta.max_length, model_length), meta.truncation)
        found = self._tokenizers.get(key)
        if found is None:
            where = path if "tokenizer.json" in meta.files else self.files.folder
            found = self._tokenizers[key] = TextTokenizer(
                load_tokenizer(where, self.files.config["model_type"]), key[1], key[2]
            )
        return found

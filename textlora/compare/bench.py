"""One run of a comparison: rows, tokens, frozen features and states below frozen blocks are computed once and shared by all runs."""

import contextlib
import ctypes
import gc
import math
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textlora.calibration import decide, fit_temperature, fit_thresholds, probabilities
from textlora.compare.few_shot import train_embedder
from textlora.compare.fitted import fit
from textlora.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.errors import UsageError
from textlora.hardware import choose_dtype, peak_memory
from textlora.methods import Method
from textlora.metrics import evaluate
from textlora.model import Model, PackedModel
from textlora.pissa import PissaModel
from textlora.prefix import HiddenStates, PickedStates, build_prefix
from textlora.prepare import Prepared
from textlora.targets import lies_in
from textlora.training import Trainer, encoded_logits, start_head
from textlora.whole import FeatureModel, WholeModel

MOST_EVALUATIONS = 10  # of a run over few rows, which has many short epochs


@dataclass(frozen=True)
class Run:
    """What makes a run what it is, beside the settings that all runs of a comparison share."""

    stage: str  # "rates": search on one seed; "seeds": repeats at the best; "rows": the same on fewer rows
    method: str
    size: Mapping[str, int]
    learning_rate: float | None
    seed: int
    train_rows: int
    epochs: float

    @property
    def key(self) -> str:
        """Name of the run's file."""
        size = [f"{name}{value}" for name, value in self.size.items()]
        rate = [] if self.learning_rate is None else [f"lr{self.learning_rate:g}"]
        return "_".join([self.stage, self.method, *size, *rate, f"seed{self.seed}", f"n{self.train_rows}", f"e{self.epochs:g}"])


@dataclass(frozen=True)
class Seconds:
    """Time on the clock, and of processors: the second one does not count what a busy or stopped machine made a run wait."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)

    def __mul__(self, share: float) -> "Seconds":
        return Seconds(self.wall * share, self.cpu * share)

    def since(self) -> "Seconds":
        return Seconds.now() + self * -1


@dataclass
class Bench:
    """The shared part. `prepared.model` lends its base and encoder to the models of all runs."""

    prepared: Prepared
    _features: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    _states: dict[int, dict[str, HiddenStates]] = field(default_factory=dict)
    _starts: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _cycles: bool = False  # whether the last model was one of transformers', which only the garbage collector frees
    seconds: dict[Any, Seconds] = field(default_factory=dict)  # what computing a shared thing took; every run that uses it is charged in full

    def run(self, method: Method, run: Run) -> dict[str, Any]:
        """Train or fit, choose on validation, and for the stages that report, score the test rows. Raises what goes wrong."""
        prepared = self._subset(run)
        if self._cycles:
            gc.collect()
        self._cycles = method.way == "peft" or not isinstance(self.prepared.model, PackedModel)
        began = _memory_begin(prepared.device)
        start = time.perf_counter()
        if method.way in ("majority", "tfidf", "probe"):
            outcome = self._fitted(method, prepared)
        elif method.way == "contrast":
            outcome = self._contrasted(prepared)
        else:
            outcome = self._trained(method, prepared, run)
        record = {
            "trainable_parameters": outcome.parameters,
            "head_parameters": outcome.head_parameters,
            "saved_bytes": outcome.saved_bytes,
            "train_seconds": round(outcome.seconds.wall, 3),
            "train_cpu_seconds": round(outcome.seconds.cpu, 3),
            "peak_memory_bytes": _memory_peak(prepared.device),
            "memory_before_bytes": began,
            "metric": prepared.metric,
            "validation": outcome.validation,
            "best_epoch": outcome.best_epoch,
            "test": None,
            "test_predictions": None,
            **outcome.chosen,
        }
        if run.stage != "rates" and "test" in prepared.sets:
            record |= _scores(prepared, outcome)
        return record | {"total_seconds": round(time.perf_counter() - start, 3)}

    def _subset(self, run: Run) -> Prepared:
        """The run's settings, and its rows where it takes fewer than all."""
        config = replace(self.prepared.config, seed=run.seed, epochs=run.epochs, learning_rate=run.learning_rate or 1.0)
        sets = dict(self.prepared.sets)
        if run.train_rows < len(sets["train"].rows):
            picked = pick_rows(sets["train"].labels, run.train_rows, run.seed)
            sets["train"] = sets["train"].pick(picked)
            steps = math.ceil(len(picked) / (config.batch_size * config.gradient_accumulation_steps))
            if run.epochs > MOST_EVALUATIONS:
                config = replace(config, eval_every=math.ceil(steps * run.epochs / MOST_EVALUATIONS))
        return replace(self.prepared, config=config, sets=sets)

    def _fitted(self, method: Method, prepared: Prepared) -> "Outcome":
        features, shared = {}, Seconds()
        if method.way == "probe":
            for pooling in ("first", "mean"):
                features[pooling], seconds = self.features(pooling, prepared)
                shared += seconds
        start = Seconds.now()
        fitted = fit(method.way, prepared, features)
        seconds = start.since() + shared
        validation = _metrics(prepared, "validation", fitted.logits("validation"))
        return Outcome(0, fitted.parameters, fitted.saved_bytes, seconds, validation, None, fitted.logits, {"chosen": fitted.chosen})

    def _contrasted(self, prepared: Prepared) -> "Outcome":
        base = self._packed_base("few-shot training")
        start = Seconds.now()
        model = train_embedder(prepared, base.base, base.encoder)
        features = {"train": encoded_logits(model, prepared.sets["train"].encoded)}
        seconds = start.since()
        features |= {split: encoded_logits(model, data.encoded) for split, data in prepared.sets.items() if split != "train"}
        start = Seconds.now()
        fitted = fit("probe", prepared, {"mean": features})
        seconds += start.since()
        encoder = sum(t.numel() for t in model.trainable().values())
        head, validation = fitted.parameters, _metrics(prepared, "validation", fitted.logits("validation"))
        return Outcome(encoder, head, 4 * (encoder + head), seconds, validation, None, fitted.logits, {"chosen": fitted.chosen})

    def features(self, pooling: str, prepared: Prepared) -> tuple[dict[str, np.ndarray], Seconds]:
        """What the frozen encoder gives for each row of a run, (N, H) by split, and the seconds its training rows took."""
        if pooling not in self._features:
            base = self._packed_base("frozen features")
            model, found = FeatureModel(base.base, "head", 1, pooling=pooling, device=self.prepared.device, encoder=base.encoder), {}
            for split, data in self.prepared.sets.items():
                start = Seconds.now()
                found[split] = encoded_logits(model, data.encoded)
                self.seconds["features", pooling, split] = start.since()
            self._features[pooling] = found
        found, seconds = self._features[pooling], self.seconds["features", pooling, "train"]
        picked = _picked(prepared)
        if picked is None:
            return found, seconds
        return {**found, "train": found["train"][picked]}, seconds * (len(picked) / len(found["train"]))

    def _packed_base(self, what: str) -> PackedModel:
        if not isinstance(self.prepared.model, PackedModel):
            raise UsageError(f"{what} needs the packed path ({self.prepared.reason})")
        return self.prepared.model

    def _trained(self, method: Method, prepared: Prepared, run: Run) -> "Outcome":
        prepared, prefix, charged = self._model(method, prepared, run)
        model = prepared.model
        start_head(prepared)
        trainer = Trainer(prepared, prefix)
        kept: dict[str, Any] = {}
        before = time.process_time()
        for record in trainer.records():
            now = time.process_time()
            if record["kind"] == "step":
                charged += Seconds(0.0, now - before)
            elif record["kept"]:
                kept = record["metrics"]
            before = now
        model.load_trainable(trainer.best)
        tensors = model.trainable()
        head = sum(t.numel() for name, t in tensors.items() if _in_head(model, name))
        parameters = sum(t.numel() for t in tensors.values()) - head
        saved = 4 * sum(t.numel() for t in (model.ordinary()[1] if isinstance(model, PissaModel) else tensors).values())
        return Outcome(
            parameters, head, saved, charged + Seconds(trainer.seconds), kept, trainer.best_epoch,
            lambda split: encoded_logits(model, prepared.sets[split].encoded, states=prefix.get(split)), {},
        )  # fmt: skip

    def _model(self, method: Method, prepared: Prepared, run: Run) -> tuple[Prepared, dict[str, HiddenStates], Seconds]:
        """The settings with a fresh model of the method, states its frozen part shares, and the seconds those took."""
        if method.way in ("lora", "pissa"):
            return self._lora(method, prepared, run)
        if method.way == "peft":
            return self._soft(method, prepared, run), {}, Seconds()
        base = self._packed_base(f"'{method.name}'")
        others = {"pooling": prepared.pooling, "seed": run.seed, "device": prepared.device, "encoder": base.encoder}
        model = WholeModel(base.base, method.settings["part"], len(prepared.schema.labels), **others)
        prepared = replace(prepared, model=model)
        if method.settings["part"] != "head":
            return prepared, {}, Seconds()
        found, seconds = self.features(prepared.pooling, prepared)
        return prepared, {split: HiddenStates(values, np.arange(len(values) + 1), model.depth) for split, values in found.items()}, seconds

    def _soft(self, method: Method, prepared: Prepared, run: Run) -> Prepared:
        from textlora.soft import SoftModel

        config, count = prepared.config, len(prepared.schema.labels)
        if prepared.pooling != "first":
            raise UsageError(f"'{method.name}' has no mean pooling", "leave out --pooling")
        dtype = choose_dtype(config.precision, prepared.device)
        model = SoftModel.open(
            method.name, run.size.get("tokens", 0), prepared.files.folder, count, seed=run.seed, device=prepared.device, dtype=dtype
        )
        # IA3's scales start at 1, and decay would pull them to 0
        return replace(prepared, model=model, config=replace(config, weight_decay=0.0) if method.name == "ia3" else config)

    def _lora(self, method: Method, prepared: Prepared, run: Run) -> tuple[Prepared, dict[str, HiddenStates], Seconds]:
        config = replace(prepared.config, **method.settings, **run.size)
        model, count = self.prepared.model, len(prepared.schema.labels)
        if method.way == "pissa":
            self._packed_base("PiSSA")
        others: dict[str, Any] = {"pooling": prepared.pooling, "seed": run.seed, "device": prepared.device}
        if not isinstance(model, PackedModel):
            from textlora.reference import ReferenceModel

            dtype = choose_dtype(config.precision, prepared.device)
            made = ReferenceModel.create(prepared.files.folder, config.lora, count, **others, dtype=dtype)
            return replace(prepared, config=config, model=made), {}, Seconds()
        others["encoder"] = model.encoder
        if method.way == "pissa":
            made = PissaModel(model.base, config.lora, count, self._starts.setdefault(config.r, {}), **others)
        else:
            made = PackedModel(model.base, config.lora, count, **others)
        prepared = replace(prepared, config=config, model=made)
        if made.depth and made.depth not in self._states:
            start = Seconds.now()
            self._states[made.depth] = build_prefix(replace(prepared, sets=self.prepared.sets, config=replace(config, epochs=2.0)))
            self.seconds["states", made.depth] = start.since()
        states = self._states.get(made.depth, {})
        picked, seconds = _picked(prepared), self.seconds.get(("states", made.depth), Seconds())
        if states and picked is not None:
            states, seconds = (
                states | {"train": PickedStates(states["train"], picked)},
                seconds * (len(picked) / len(self.prepared.sets["train"].rows)),
            )
        return prepared, states, seconds


@dataclass(frozen=True)
class Outcome:
    """A fitted or trained classifier with what it cost. `logits(split)` gives (N, C)."""

    parameters: int
    head_parameters: int
    saved_bytes: int
    seconds: Seconds
    validation: dict[str, float | None]
    best_epoch: float | None
    logits: Any
    chosen: dict[str, Any]


def _picked(prepared: Prepared) -> np.ndarray | None:
    return getattr(prepared.sets["train"], "picked", None)


def pick_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of `count` rows in an order drawn from the seed, larger picks beginning with the smaller ones; as far as they reach,
    rows that bring a new class (or label of several) come first."""
    order = np.random.default_rng([seed, 8]).permutation(len(labels))
    if labels.dtype.kind == "f" and labels.ndim == 1:
        return order[:count]
    first, rest, seen = [], [], set()
    for i in order.tolist():
        classes = {int(labels[i])} if labels.ndim == 1 else set(np.flatnonzero(labels[i]).tolist())
        (rest if classes <= seen else first).append(i)
        seen |= classes
    return np.array((first + rest)[:count])


def _in_head(model: Model, name: str) -> bool:
    """Whether a trained tensor belongs to the head: a module that PEFT would save whole."""
    parts = name.split(".")
    return any(lies_in(".".join(parts[i:]), model.modules_to_save) for i in range(len(parts)))


def _metrics(prepared: Prepared, split: str, logits: np.ndarray, **calibration: Any) -> dict[str, float | None]:
    return evaluate(prepared.schema.problem_type, prepared.sets[split].labels, logits, list(prepared.schema.labels), **calibration)


def _scores(prepared: Prepared, outcome: Outcome) -> dict[str, Any]:
    """Test metrics and decisions, with temperature and thresholds fitted on validation as `textlora train` has them."""
    kind, calibration = prepared.schema.problem_type, {}
    if kind != REGRESSION:
        logits, labels = outcome.logits("validation"), prepared.sets["validation"].labels
        calibration["temperature"] = fit_temperature(logits, labels, kind)
        if kind == MULTI_LABEL:
            calibration["thresholds"] = fit_thresholds(probabilities(logits, kind, calibration["temperature"]), labels)
    logits = outcome.logits("test")
    decided = decide(probabilities(logits, kind, calibration.get("temperature", 1.0)), kind, calibration.get("thresholds"))
    as_numbers = decided.astype(np.int64) if kind in (SINGLE_LABEL, MULTI_LABEL) else decided.astype(np.float64)
    return {"test": _metrics(prepared, "test", logits, **calibration), "test_predictions": as_numbers.tolist()}


def _memory_begin(device: str) -> int | None:
    """Forget the largest memory held so far, so that the next reading is this run's; what is held now, bytes. Linux and CUDA only."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if not sys.platform.startswith("linux"):
        return None
    with contextlib.suppress(AttributeError):  # where the C library is not glibc
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return None
    return _status("VmRSS")


def _memory_peak(device: str) -> int | None:
    if device.startswith("cuda"):
        return peak_memory(device)
    return _status("VmHWM") if sys.platform.startswith("linux") else None


def _status(name: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="utf-8") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(name + ":")), None)
    except OSError:
        return None


def machine(device: str) -> dict[str, Any]:
    """Where the runs were made."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    return {"system": platform.system(), "device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "kind": device}

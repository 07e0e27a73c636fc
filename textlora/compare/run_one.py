"""One run of a comparison: rows, tokens, frozen features and states below frozen blocks are computed once and
shared by all runs."""

import gc
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from textlora.compare.few_shot import train_embedder
from textlora.compare.fitted import Inputs, fit, fit_linear, held_out, scaled
from textlora.compare.full_finetuning import FeatureModel, FullFinetuningModel
from textlora.compare.machine import memory_begin, memory_peak
from textlora.compare.methods import Method
from textlora.compare.pissa import PissaModel
from textlora.core.config import MULTI_LABEL, SINGLE_LABEL
from textlora.core.errors import UsageError
from textlora.inference.classifier import encoded_logits
from textlora.kernels.devices import choose_dtype
from textlora.metrics.calibration import Calibration, calibrate, decide, probabilities
from textlora.metrics.scores import evaluate
from textlora.model.interface import Model
from textlora.model.packed_model import PackedModel
from textlora.model.targets import lies_in
from textlora.training.cross_validation import Trainings
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import HiddenStates, PickedStates, build_prefix
from textlora.training.losses import prior_of
from textlora.training.prepare import Prepared, row_folds
from textlora.training.trainer import Trainer

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
        return "_".join(
            [
                self.stage,
                self.method,
                *size,
                *rate,
                f"seed{self.seed}",
                f"n{self.train_rows}",
                f"e{self.epochs:g}",
            ]
        )


@dataclass(frozen=True)
class Seconds:
    """Time on the clock, and of processors: the second one does not count what a busy or stopped machine made
    a run wait."""

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
    _features: dict[str, np.ndarray] = field(default_factory=dict)
    _states: dict[int, dict[str, HiddenStates]] = field(default_factory=dict)
    _starts: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _cycles: bool = (
        False  # whether the last model was one of transformers', which only the garbage collector frees
    )
    seconds: dict[Any, Seconds] = field(
        default_factory=dict
    )  # what computing a shared thing took; every run that uses it is charged in full

    def run(self, method: Method, run: Run, decided: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Train or fit, choose on held-out rows, and for the stages that report, score the test rows. Raises
        what goes wrong.

        Args:
            decided: `decided` of the search's run of the same choice, in whose cross-validation checkpoint,
                temperature, thresholds and strength were found; this run then trains on all rows alone.
        """
        prepared = self._subset(method, run)
        if self._cycles:
            gc.collect()
        self._cycles = method.way == "peft" or not isinstance(self.prepared.model, PackedModel)
        began = memory_begin(prepared.device)
        start = time.perf_counter()
        search = run.stage == "rates"
        if method.fitted:
            outcome = self._fitted(method, prepared)
        elif method.way == "contrast":
            outcome = self._contrasted(prepared, search, decided)
        else:
            outcome = self._trained(method, prepared, run, search, decided)
        calibration, validation = (
            _decisions(prepared, outcome.held)
            if decided is None
            else (_calibration(decided), decided["validation"])
        )
        record = {
            "trainable_parameters": outcome.parameters,
            "head_parameters": outcome.head_parameters,
            "saved_bytes": outcome.saved_bytes,
            "train_seconds": round(outcome.seconds.wall, 3),
            "train_cpu_seconds": round(outcome.seconds.cpu, 3),
            "peak_memory_bytes": memory_peak(prepared.device),
            "memory_before_bytes": began,
            "metric": prepared.metric,
            "pooling": outcome.pooling,
            "validation": validation,
            "best_epoch": outcome.best_epoch,
            "test": None,
            "test_predictions": None,
            **({"chosen": outcome.chosen} if outcome.chosen else {}),
        }
        if search and prepared.folds is not None:
            record["decided"] = {
                "place": outcome.place,
                "temperature": calibration.temperature,
                "shift": None if calibration.shift is None else calibration.shift.tolist(),
                "thresholds": None if calibration.thresholds is None else calibration.thresholds.tolist(),
                "validation": validation,
                **outcome.chosen,
            }
        if not search and "test" in prepared.sets:
            record |= _scores(prepared, outcome, calibration)
        return record | {"total_seconds": round(time.perf_counter() - start, 3)}

    def _subset(self, method: Method, run: Run) -> Prepared:
        """The run's settings, and its rows where it takes fewer than all; folds, where there are any, are
        drawn again among them."""
        config = replace(
            self.prepared.config, seed=run.seed, epochs=run.epochs, learning_rate=run.learning_rate or 1.0
        )
        sets, folds = dict(self.prepared.sets), self.prepared.folds
        if run.train_rows < len(sets["train"].rows):
            picked = pick_rows(sets["train"].labels, run.train_rows, run.seed)
            sets["train"] = sets["train"].pick(picked)
            if folds is not None:
                folds = row_folds(sets["train"].rows, sets["train"].labels, self.prepared.schema, run.seed)
            steps = math.ceil(len(picked) / (config.batch_size * config.gradient_accumulation_steps))
            if run.epochs > MOST_EVALUATIONS:
                config = replace(config, eval_every=math.ceil(steps * run.epochs / MOST_EVALUATIONS))
        return replace(self.prepared, config=config, sets=sets, folds=folds)

    def _fitted(self, method: Method, prepared: Prepared) -> "Outcome":
        features, seconds = self.features(prepared) if method.way == "probe" else (None, Seconds())
        start = Seconds.now()
        fitted = fit(method.way, prepared, features)
        seconds = seconds + start.since()
        pooling = prepared.pooling if method.way == "probe" else None
        return Outcome(
            0,
            fitted.parameters,
            fitted.saved_bytes,
            seconds,
            fitted.held,
            None,
            fitted.logits,
            fitted.chosen,
            pooling,
        )

    def _contrasted(self, prepared: Prepared, search: bool, decided: Mapping[str, Any] | None) -> "Outcome":
        """An encoder trained on rows of one class together, then logistic regression; in a cross-validation
        an encoder for each fold."""
        base = self._packed_base("few-shot training")
        train, trained, seconds = prepared.sets["train"], [], Seconds()

        def learn(rows: np.ndarray) -> Inputs:
            picked = replace(
                prepared, sets={"train": train if len(rows) == len(train.rows) else train.pick(rows)}
            )
            model = train_embedder(picked, base.base, base.encoder)
            trained[:] = [model]
            features = {
                split: encoded_logits(model, data.encoded)
                for split, data in prepared.sets.items()
                if split == "train" or not search
            }
            if "validation" in prepared.sets and search:
                features["validation"] = encoded_logits(model, prepared.sets["validation"].encoded)
            return scaled(features, rows)

        start = Seconds.now()
        if search and prepared.folds is not None:
            strength, held = held_out(prepared, learn)
            seconds = start.since()
            width = prepared.files.config.get("hidden_size") or prepared.files.config["dim"]
            count = len(prepared.schema.labels)
            head, chosen, logits = count * (width + 1), {"C": strength}, None
        else:
            if decided is None and prepared.folds is not None:
                strength, held = held_out(prepared, learn)
                start = Seconds.now()
                fitted = fit_linear(prepared, learn, strength)
            else:
                fitted = fit_linear(prepared, learn, None if decided is None else decided["C"])
                held = fitted.held
            seconds, head, chosen, logits = start.since(), fitted.parameters, fitted.chosen, fitted.logits
        encoder = sum(t.numel() for t in trained[0].trainable().values())
        return Outcome(
            encoder, head, 4 * (encoder + head), seconds, held, None, logits, chosen, prepared.pooling
        )

    def features(self, prepared: Prepared) -> tuple[dict[str, np.ndarray], Seconds]:
        """What the frozen encoder gives for each row of a run, (N, H) by split, and the seconds its training
        rows took."""
        if not self._features:
            base = self._packed_base("frozen features")
            model = FeatureModel(
                base.base,
                "head",
                1,
                pooling=self.prepared.pooling,
                device=self.prepared.device,
                encoder=base.encoder,
            )
            for split, data in self.prepared.sets.items():
                start = Seconds.now()
                self._features[split] = encoded_logits(model, data.encoded)
                self.seconds["features", split] = start.since()
        found, seconds = self._features, self.seconds["features", "train"]
        picked = _picked(prepared)
        if picked is None:
            return found, seconds
        return {**found, "train": found["train"][picked]}, seconds * (len(picked) / len(found["train"]))

    def _packed_base(self, what: str) -> PackedModel:
        if not isinstance(self.prepared.model, PackedModel):
            raise UsageError(f"{what} needs the packed path ({self.prepared.reason})")
        return self.prepared.model

    def _trained(
        self, method: Method, prepared: Prepared, run: Run, search: bool, decided: Mapping[str, Any] | None
    ) -> "Outcome":
        prepared, prefix, charged = self._model(method, prepared, run)
        model = prepared.model
        if decided is None:
            trainings = Trainings(prepared, prefix, start_head, last=not search)
            for number, seconds, _ in _trained_steps(trainings):
                charged += seconds if search or number == len(trainings.folds) else Seconds()
            trainer, held = trainings.trainer, None
            if search and trainings.folds:
                place = trainings.chosen()
                kept = trainings.evaluations()[place]
                charged += Seconds(trainings.fold_seconds)
                held, epoch = ("train", trainings.held_rows(), kept.logits), kept.epoch
            else:
                model.load_trainable(trainer.best)
                charged += Seconds(trainer.seconds)
                place, epoch = None, trainer.best_epoch
                if trainings.folds:
                    found = trainings.held()
                    held = found and (found.split, found.rows, found.logits)
                elif trainer.evaluations:
                    kept = trainer.evaluations[trainer.evaluate_at.index(trainer.best_step)]
                    held = ("validation", np.arange(len(kept.logits)), kept.logits)
        else:
            start_head(prepared)
            trainer, held, place = Trainer(prepared, prefix), None, decided["place"]
            best = epoch = None
            for _, seconds, evaluated in _trained_steps(trainer):
                charged += seconds
                if evaluated and trainer.step == trainer.evaluate_at[place]:
                    best = {name: tensor.clone() for name, tensor in trainer.best.items()}
                    epoch = trainer.epochs_done
            model.load_trainable(best)
            charged += Seconds(trainer.seconds)
        tensors = model.trainable()
        head = sum(t.numel() for name, t in tensors.items() if _in_head(model, name))
        parameters = sum(t.numel() for t in tensors.values()) - head
        saved = 4 * sum(
            t.numel() for t in (model.ordinary()[1] if isinstance(model, PissaModel) else tensors).values()
        )
        return Outcome(
            parameters, head, saved, charged, held, epoch,
            lambda split: encoded_logits(model, prepared.sets[split].encoded, states=prefix.get(split)), {}, model.pooling, place,
        )  # fmt: skip

    def _model(
        self, method: Method, prepared: Prepared, run: Run
    ) -> tuple[Prepared, dict[str, HiddenStates], Seconds]:
        """The settings with a fresh model of the method, states its frozen part shares, and the seconds those
        took."""
        if method.way in ("lora", "pissa"):
            return self._lora(method, prepared, run)
        if method.way == "peft":
            return self._soft(method, prepared, run), {}, Seconds()
        base = self._packed_base(f"'{method.name}'")
        others = {
            "pooling": prepared.pooling,
            "seed": run.seed,
            "device": prepared.device,
            "encoder": base.encoder,
        }
        model = FullFinetuningModel(base.base, method.settings["part"], len(prepared.schema.labels), **others)
        prepared = replace(prepared, model=model)
        if method.settings["part"] != "head":
            return prepared, {}, Seconds()
        found, seconds = self.features(prepared)
        return (
            prepared,
            {
                split: HiddenStates(values, np.arange(len(values) + 1), model.depth)
                for split, values in found.items()
            },
            seconds,
        )

    def _soft(self, method: Method, prepared: Prepared, run: Run) -> Prepared:
        from textlora.compare.peft_methods import PeftMethodModel, poolings

        config, count = prepared.config, len(prepared.schema.labels)
        pooling, dtype = prepared.pooling, choose_dtype(config.precision, prepared.device)
        if config.pooling == "auto" and pooling not in poolings(method.name):
            pooling = poolings(method.name)[0]  # the report says so
        others: dict[str, Any] = {
            "pooling": pooling,
            "seed": run.seed,
            "device": prepared.device,
            "dtype": dtype,
        }
        model = PeftMethodModel.open(
            method.name, run.size.get("tokens", 0), prepared.files.folder, count, **others
        )
        # IA3's scales start at 1, and decay would pull them to 0
        return replace(
            prepared,
            model=model,
            config=replace(config, weight_decay=0.0) if method.name == "ia3" else config,
        )

    def _lora(
        self, method: Method, prepared: Prepared, run: Run
    ) -> tuple[Prepared, dict[str, HiddenStates], Seconds]:
        config = replace(prepared.config, **method.settings, **run.size)
        model, count = self.prepared.model, len(prepared.schema.labels)
        if method.way == "pissa":
            self._packed_base("PiSSA")
        others: dict[str, Any] = {"pooling": prepared.pooling, "seed": run.seed, "device": prepared.device}
        if not isinstance(model, PackedModel):
            from textlora.model.reference_model import ReferenceModel

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
            self._states[made.depth] = build_prefix(
                replace(prepared, sets=self.prepared.sets, config=replace(config, epochs=2.0))
            )
            self.seconds["states", made.depth] = start.since()
        states = self._states.get(made.depth, {})
        picked, seconds = _picked(prepared), self.seconds.get(("states", made.depth), Seconds())
        if states and picked is not None:
            states = states | {"train": PickedStates(states["train"], picked)}
            seconds = seconds * (len(picked) / len(self.prepared.sets["train"].rows))
        return prepared, states, seconds


@dataclass(frozen=True)
class Outcome:
    """A fitted or trained classifier with what it cost. `logits(split)` gives (N, C).

    Attributes:
        held: (split, places of rows, logits (N, C)) that decide temperature and thresholds; None where
            nothing does, or it is known already.
        pooling: what its head sees; None for what reads no encoder.
        place: number of the evaluation whose checkpoint is kept, in a cross-validation.
    """

    parameters: int
    head_parameters: int
    saved_bytes: int
    seconds: Seconds
    held: tuple[str, np.ndarray, np.ndarray] | None
    best_epoch: float | None
    logits: Any
    chosen: dict[str, Any]
    pooling: str | None
    place: int | None = None


def _trained_steps(trainings: Trainings | Trainer) -> Iterator[tuple[int, Seconds, bool]]:
    """Advance to the end: the number of the training, the time of processors that a step took, and whether it
    was an evaluation."""
    before = time.process_time()
    for record in trainings.records():
        now = time.process_time()
        step = record["kind"] == "step"
        yield getattr(trainings, "number", 0), Seconds(0.0, now - before if step else 0.0), not step
        before = now


def _picked(prepared: Prepared) -> np.ndarray | None:
    return getattr(prepared.sets["train"], "picked", None)


def pick_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Places of `count` rows in an order drawn from the seed, larger picks beginning with the smaller ones;
    as far as they reach, rows that bring a new class (or label of several) come first."""
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


def _decisions(
    prepared: Prepared, held: tuple[str, np.ndarray, np.ndarray] | None
) -> tuple[Calibration, dict[str, float | None]]:
    """What `textlora train` fits on held-out rows, and their scores as they are."""
    kind, names = prepared.schema.problem_type, list(prepared.schema.labels)
    if held is None:
        return Calibration(), {}
    split, places, logits = held
    labels = prepared.sets[split].labels[places]
    calibration = calibrate(logits, labels, kind, out_of_fold=split == "train", prior=prior_of(prepared))
    return calibration, evaluate(kind, labels, logits, names)


def _calibration(decided: Mapping[str, Any]) -> Calibration:
    arrays = (None if decided[name] is None else np.array(decided[name]) for name in ("shift", "thresholds"))
    return Calibration(decided["temperature"], *arrays)


def _scores(prepared: Prepared, outcome: Outcome, calibration: Calibration) -> dict[str, Any]:
    """Test metrics and decisions."""
    kind = prepared.schema.problem_type
    thresholds = calibration.thresholds
    labels = prepared.sets["test"].labels
    logits = calibration.of(outcome.logits("test"))
    decided = decide(probabilities(logits, kind), kind, thresholds)
    as_numbers = (
        decided.astype(np.int64) if kind in (SINGLE_LABEL, MULTI_LABEL) else decided.astype(np.float64)
    )
    return {
        "test": evaluate(kind, labels, logits, list(prepared.schema.labels), thresholds=thresholds),
        "test_predictions": as_numbers.tolist(),
    }

"""The part of one process in a study: its trials, the choice, and the report."""

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from textlora.core.config import TrainConfig, read_config
from textlora.core.errors import TrainingError
from textlora.core.files import write_text
from textlora.metrics.scores import METRICS
from textlora.model.adapter_tensors import parameter_counts
from textlora.model.interface import Model
from textlora.model.open import open_model
from textlora.model.packed_model import PackedModel
from textlora.report.tuning import render_study
from textlora.training.checkpoint_choice import Evaluation
from textlora.training.cross_validation import Trainings
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import LIMIT_BYTES, HiddenStates, build_prefix
from textlora.training.learning_rate import peak_rate
from textlora.training.prepare import Prepared
from textlora.training.run import run_training
from textlora.training.steps import plan
from textlora.tune.choice import Answers, choose
from textlora.tune.shared import DEFAULTS, FINISH, SharedStudy
from textlora.tune.space import distributions, start_parameters, trial_settings

if TYPE_CHECKING:
    import optuna

Record = dict[str, Any]
COMPLETE_TRIALS, FIRST_EPOCH, FIRST_FOLD = (
    5,
    2,
    1,
)  # a trial is pruned from there on, where so many complete trials got as far
ENOUGH_FOR_IMPORTANCE = 5
POLL_SECONDS = 0.5


class Search:
    """Runs trials until there are enough, then sees to the one that is chosen. The first trial is the
    defaults: `train` with the settings given."""

    def __init__(
        self,
        shared: SharedStudy,
        prepared: Prepared,
        config: TrainConfig,
        given: Collection[str],
        free: Collection[str],
        blocks: int,
        output: Path,
        emit: Callable[[Record], None],
    ):
        self.shared, self.config, self.given, self.free, self.blocks = shared, config, given, free, blocks
        self.output, self.emit = output, emit
        self.test_rows = len(prepared.sets["test"].rows) if "test" in prepared.sets else 0
        self.prepared = dataclasses.replace(
            prepared, sets={split: data for split, data in prepared.sets.items() if split != "test"}
        )
        self.ranges = distributions(
            free, blocks, prepared.files.config.get("hidden_size") or prepared.files.config.get("dim") or 32
        )
        self.steps = len(plan(config, prepared.sets["train"].lengths))
        self.folds = 0 if prepared.folds is None else len(set(prepared.folds[prepared.folds >= 0].tolist()))
        held = prepared.sets["validation"].labels if prepared.folds is None else self._held_labels()
        self.answers = Answers(
            prepared.schema.problem_type, prepared.metric, held, prepared.schema.labels, max(1, self.folds)
        )
        self._prefixes: dict[int, Mapping[str, HiddenStates]] = {}

    def _held_labels(self) -> np.ndarray:
        """Labels of the rows that folds hold out, in the order of `Trainings.evaluations`."""
        assert self.prepared.folds is not None
        places = [
            np.flatnonzero(self.prepared.folds == fold) for fold in range(int(self.prepared.folds.max()) + 1)
        ]
        return self.prepared.sets["train"].labels[np.concatenate(places)]

    def run(self, trials: int, end: float | None) -> None:
        import optuna

        first = FIRST_FOLD if self.folds else FIRST_EPOCH
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=COMPLETE_TRIALS, n_warmup_steps=first, n_min_trials=COMPLETE_TRIALS
        )
        self.shared.study.pruner = pruner
        self.emit(
            {
                "kind": "study",
                "trials": trials,
                "done": self._done(),
                "metric": self.prepared.metric,
                "searched": list(self.free),
                "lines": self.prepared.split_lines,
            }
        )
        start = start_parameters(self.config, self.ranges, self.blocks, peak_rate(self.prepared, self.steps))
        waiting = False
        while True:
            late = end is not None and time.monotonic() >= end
            trial = None if late else self.shared.claim(trials, self.ranges, start, self.config.seed)
            if trial is not None:
                self._run(trial)
                waiting = False
                continue
            others = self.shared.running()
            if not others:
                return
            if not waiting:
                self.emit({"kind": "waiting", "running": others})
                waiting = True
            time.sleep(POLL_SECONDS)

    def settings(self, trial: "optuna.Trial | optuna.trial.FrozenTrial") -> TrainConfig:
        """Settings of a trial's run; the defaults' own are those that were given, in the ranges or not."""
        if is_defaults(trial):
            return self.config
        return trial_settings(self.config, self.given, trial.params, self.blocks)

    def _run(self, trial: "optuna.Trial") -> None:
        self.emit(
            {
                "kind": "trial",
                "number": trial.number,
                "parameters": trial.params,
                "defaults": is_defaults(trial),
            }
        )
        began = time.perf_counter()
        try:
            value = self._train(trial)
            reason = (
                None
                if value is None or math.isfinite(value)
                else f"{self.prepared.metric} has no value on the held-out rows"
            )
        except TrainingError as error:
            value, reason = math.nan, error.message
        except (MemoryError, torch.OutOfMemoryError):
            value, reason = math.nan, "not enough memory"
        except KeyboardInterrupt:  # was stopped, did not bring its process down
            trial.set_user_attr("starts", trial.user_attrs.get("starts", 1) - 1)
            raise
        trial.set_user_attr("seconds", time.perf_counter() - began)
        if reason is not None:
            self.shared.fail(trial, reason)
        elif value is None:
            self.shared.prune(trial)
        else:
            self.shared.complete(trial, value)
        best = self._best()
        self.emit(
            {
                "kind": "trial_end",
                "number": trial.number,
                "defaults": is_defaults(trial),
                "state": "failed" if reason else "pruned" if value is None else "complete",
                "value": None if reason else value,
                "reason": reason,
                "done": self._done(),
                "best": None if best is None else {"number": best.number, "value": best.value},
            }
        )

    def _train(self, trial: "optuna.Trial") -> float | None:
        """Held-out score of the weights that would be kept; None where the trial was pruned, NaN where no
        score was defined."""
        prepared = fresh(self.prepared, self.settings(trial))
        trial.set_user_attr("adapter_parameters", parameter_counts(prepared.model.trainable())[0])
        known = dict(
            self.shared.trials()[trial.number].intermediate_values
        )  # of a process that died in this trial
        trainings = Trainings(prepared, self._prefix(prepared), start_head, last=False)
        for record in trainings.records():
            found = self._looked_at(trial.number, trainings, record)
            if found is None:
                continue
            step, value = found
            if step not in known:
                trial.report(value, step)
                if not trainings.finished and not is_defaults(trial) and trial.should_prune():
                    return None
        kept = kept_evaluation(trainings)
        trial.set_user_attr("best_epoch", kept.epoch)
        trial.set_user_attr("answers", self.answers.pack(kept.logits))
        value = kept.metrics.get(prepared.metric)
        return math.nan if value is None else value

    def _looked_at(self, number: int, trainings: Trainings, record: Record) -> tuple[int, float] | None:
        """What a trial is compared on while it runs: its score after each epoch; in a cross-validation after
        each fold, of the rows held out so far."""
        if record["kind"] != "evaluation" or (trainings.in_folds and not trainings.trainer.finished):
            return None
        metric, epochs = self.prepared.metric, trainings.prepared.config.epochs
        if trainings.in_folds:
            step, value = record["fold"], trainings.evaluations()[trainings.chosen()].metrics.get(metric)
            place = {"kind": "fold", "fold": step, "folds": self.folds}
        else:
            step, value = math.ceil(record["epoch"] - 1e-6), record["metrics"].get(metric)
            place = {"kind": "epoch", "epoch": record["epoch"], "epochs": epochs}
        if value is None:
            return None
        self.emit(place | {"value": value, "number": number})
        return step, value

    def _prefix(self, prepared: Prepared) -> Mapping[str, HiddenStates]:
        """Hidden states below the lowest adapted block, kept for later trials of the same depth."""
        depth = prepared.model.depth
        if depth not in self._prefixes:
            found = build_prefix(prepared, self.output)
            size = sum(
                states.states.nbytes for kept in (found, *self._prefixes.values()) for states in kept.values()
            )
            if not found or size > LIMIT_BYTES:
                return found
            self._prefixes[depth] = found
        return self._prefixes[depth]

    def _done(self) -> int:
        return sum(trial.state.is_finished() for trial in self.shared.trials())

    def _best(self) -> "optuna.trial.FrozenTrial | None":
        complete = [trial for trial in self.shared.trials() if trial.state.name == "COMPLETE"]
        sign = 1 if METRICS[self.prepared.metric].higher_is_better else -1
        return max(complete, key=lambda trial: sign * trial.value, default=None)

    def finish(self, began: float) -> Record:
        """Choose, train what is chosen as `train` does, the defaults beside it where there are test rows, and
        write the report."""
        best, study = self._best(), self.record()
        if best is None:
            write_text(self.output / "report.html", render_study(study, self.output.resolve().name))
            reasons = [trial["reason"] for trial in study["trials"] if trial["reason"]]
            raise TrainingError(
                f"no trial of {len(study['trials'])} was completed"
                + (f" (trial {study['trials'][0]['number']}: {reasons[0]})" if reasons else ""),
                "look at report.html, and give the same command more --trials or a longer --timeout",
            )
        with self.shared.locks.held(FINISH):
            verdict = choose(
                [trial | {"answers": self._kept_answers(trial["number"])} for trial in study["trials"]],
                best.number,
                self.answers,
            )
            chosen = study["trials"][verdict.number]
            self.emit(
                {
                    "kind": "best",
                    **{key: chosen[key] for key in ("number", "defaults", "value", "parameters")},
                    "why": verdict.why,
                }
            )
            settings = self.settings(self.shared.trials()[verdict.number])
            result = retrain(dataclasses.replace(settings, output=str(self.output / "best")), self.emit)
            if chosen["defaults"]:
                shutil.rmtree(
                    self.output / "defaults", ignore_errors=True
                )  # of a choice that fewer trials led to
            defaults = result if chosen["defaults"] else self._defaults_result()
            kept = ("validation", "test", "output")
            study |= {
                "choice": {
                    "number": verdict.number,
                    "defaults": chosen["defaults"],
                    **dataclasses.asdict(verdict),
                },
                "result": {key: result[key] for key in kept if key in result},
                "defaults_result": None
                if defaults is None
                else {key: defaults[key] for key in kept if key in defaults},
            }
            study["sentences"] = sentences(study)
            write_text(self.output / "report.html", render_study(study, self.output.resolve().name))
        counts = {
            state: sum(trial["state"] == state for trial in study["trials"])
            for state in ("complete", "pruned", "failed")
        }
        told = lambda trial: {key: trial[key] for key in ("number", "value", "parameters", "settings")}
        first = next((trial for trial in study["trials"] if trial["defaults"]), None)
        return {
            "output": str(self.output),
            "study": self.shared.study.study_name,
            "metric": self.prepared.metric,
            "held_out_rows": len(self.answers.labels),
            "folds": self.folds,
            "trials": len(study["trials"]),
            **counts,
            "best": told(study["trials"][best.number]),
            "chosen": told(chosen) | {"defaults": chosen["defaults"], "why": verdict.why, "lead": verdict.difference}
            | {"standard_error": verdict.standard_error, "lead_needed": verdict.needed},
            "defaults": None if first is None else told(first) | (study["defaults_result"] or {}),
            "sentences": study["sentences"],
            "importance": study["importance"],
            "adapter": result["output"],
            **{split: result[split] for split in ("validation", "test") if split in result},
            "total_seconds": time.monotonic() - began,
        }  # fmt: skip

    def _defaults_result(self) -> Record | None:
        """The defaults trained as `train` does it, for their test score; None where there are no test rows,
        or where they fail."""
        output = self.output / "defaults"
        first = next((trial for trial in self.shared.trials() if is_defaults(trial)), None)
        if not self.test_rows or first is None or first.state.name != "COMPLETE":
            return None
        self.emit({"kind": "defaults", "number": first.number, "value": first.value})
        return retrain(dataclasses.replace(self.config, output=str(output)), self.emit)

    def _kept_answers(self, number: int) -> str | None:
        return self.shared.trials()[number].user_attrs.get("answers")

    def record(self) -> Record:
        """The study as plain values: what the report is made from."""
        names = {
            "COMPLETE": "complete",
            "PRUNED": "pruned",
            "FAIL": "failed",
            "RUNNING": "running",
            "WAITING": "waiting",
        }
        trials = []
        for trial in self.shared.trials():
            settings = self.settings(trial)
            if settings.learning_rate is None:
                settings = dataclasses.replace(settings, learning_rate=peak_rate(self.prepared, self.steps))
            kept = ("reason", "seconds", "best_epoch", "adapter_parameters", "starts")
            trials.append(
                {
                    "number": trial.number,
                    "defaults": is_defaults(trial),
                    "state": names[trial.state.name],
                    "value": trial.value if trial.state.name == "COMPLETE" else None,
                    "scores": {str(step): value for step, value in sorted(trial.intermediate_values.items())},
                    "parameters": dict(trial.params),
                    "settings": {name: getattr(settings, name) for name in (*self.free, "lora_alpha")},
                    **{name: trial.user_attrs.get(name) for name in kept},
                }
            )
        best = self._best()
        hidden = (*self.free, "lora_alpha", "blocks", "searched", "base model", "data")
        return {
            "metric": self.prepared.metric,
            "higher_is_better": METRICS[self.prepared.metric].higher_is_better,
            "model": self.prepared.files.id or self.prepared.files.folder.name,
            "problem_type": self.prepared.schema.problem_type,
            "rows": {split: len(data.rows) for split, data in self.prepared.sets.items()}
            | ({"test": self.test_rows} if self.test_rows else {}),
            "held": len(self.answers.labels),
            "folds": self.folds,
            "searched": list(self.free),
            "trials": trials,
            "best": None if best is None else best.number,
            "importance": self._importance(),
            "settings": {
                name: value
                for name, value in self.shared.study.user_attrs["textlora"].items()
                if name not in hidden
            },
            "choice": None,
            "result": None,
            "defaults_result": None,
            "sentences": [],
        }

    def _importance(self) -> dict[str, float] | None:
        """Share of the score's variance that each setting explains (fANOVA, Hutter et al. 2014); None while
        too few trials are complete."""
        import optuna

        names = list(self.ranges)  # the defaults may lie outside some ranges, and then they are left out
        if (
            sum(
                trial.state.name == "COMPLETE" and set(names) <= set(trial.params)
                for trial in self.shared.trials()
            )
            < ENOUGH_FOR_IMPORTANCE
        ):
            return None
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.config.seed)
        try:
            return dict(
                optuna.importance.get_param_importances(self.shared.study, evaluator=evaluator, params=names)
            )
        except RuntimeError:  # all trials scored the same
            return None


def is_defaults(trial: "optuna.Trial | optuna.trial.FrozenTrial") -> bool:
    return bool(trial.user_attrs.get(DEFAULTS))


def kept_evaluation(trainings: Trainings) -> Evaluation:
    """Scores of the held-out rows at the checkpoint that would be kept, of trainings that are finished."""
    if trainings.folds:
        return trainings.evaluations()[trainings.chosen()]
    trainer = trainings.trainer
    return trainer.evaluations[trainer.evaluate_at.index(trainer.best_step)]


def sentences(study: Record) -> list[str]:
    """What was chosen and why; how the choice and the defaults do on the test rows."""
    choice, metric = study["choice"], study["metric"]
    name = "the defaults" if choice["defaults"] else f"trial {choice['number']}"
    found = [f"Chosen: {name}. {choice['why']}"]
    score = lambda result: ((result or {}).get("test") or {}).get(metric)
    mine, theirs = score(study["result"]), score(study["defaults_result"])
    if mine is not None:
        beside = (
            ""
            if choice["defaults"]
            else " (the defaults: " + ("no score)" if theirs is None else f"{theirs:.4f})")
        )
        found.append(f"Test {metric} of {name} on {study['rows']['test']:,} rows: {mine:.4f}{beside}.")
    return found


def fresh(prepared: Prepared, config: TrainConfig) -> Prepared:
    """The same rows and base for another run: new LoRA and head, as `prepare` would make them."""
    old = prepared.model
    if isinstance(old, PackedModel):
        count = len(prepared.schema.labels)
        model: Model = PackedModel(
            old.base, config.lora, count, prepared.pooling, config.seed, prepared.device, old.encoder
        )
    else:
        model, _ = open_model(
            prepared.files,
            config.lora,
            len(prepared.schema.labels),
            pooling=prepared.pooling,
            seed=config.seed,
            device=prepared.device,
            dtype=old.dtype,  # type: ignore[attr-defined]
        )
    model.gradient_checkpointing = config.gradient_checkpointing
    return dataclasses.replace(prepared, config=config, model=model)


def retrain(config: TrainConfig, emit: Callable[[Record], None]) -> Record:
    """Train into `config.output`; a run with these settings that is there already is gone on with, one with
    others makes room."""
    output = Path(str(config.output))
    same = False
    if (output / "run" / "config.toml").is_file():
        kept = TrainConfig(**read_config(output / "run" / "config.toml"))
        same = dataclasses.replace(kept, output=config.output, threads=config.threads) == config
    if not same:
        shutil.rmtree(output, ignore_errors=True)
    return run_training(config, resume=same, on_record=emit)

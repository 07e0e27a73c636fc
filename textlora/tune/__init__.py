"""A search over training settings: one Optuna study in a file or database, which several processes may work on.

out/  config.toml  study.log (the study, unless it lies elsewhere)  report.html
out/best/  the adapter of the best trial, trained again as `train` does it; only there the test rows are scored
"""

import dataclasses
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from textlora.config import TrainConfig, read_config, write_config
from textlora.errors import StorageError, TrainingError, UsageError
from textlora.files import write_text
from textlora.metrics import METRICS
from textlora.model import Model, PackedModel, open_model, parameter_counts
from textlora.prefix import LIMIT_BYTES, HiddenStates, build_prefix
from textlora.prepare import Prepared, prepare
from textlora.report.tuning import render_study
from textlora.run import run_training
from textlora.training import Trainer, plan, start_head
from textlora.tune.shared import FINISH, SharedStudy, check_storage, is_url
from textlora.tune.space import count_blocks, distributions, free_settings, start_parameters, trial_settings

if TYPE_CHECKING:
    import optuna

Record = dict[str, Any]
TRIALS, STUDY = 20, "textlora"
COMPLETE_TRIALS, FIRST_EPOCH = 5, 2  # a trial is pruned from this epoch on, where so many complete trials got as far
ENOUGH_FOR_IMPORTANCE = 5
POLL_SECONDS = 0.5
_UNLIKE = (
    "train",
    "validation",
    "test",
    "model",
    "revision",
    "output",
    "device",
    "threads",
)  # may differ between processes: what was read is compared


def tune(
    config: TrainConfig,
    given: Collection[str] = (),
    *,
    trials: int = TRIALS,
    timeout: float | None = None,
    storage: str | None = None,
    study: str = STUDY,
    on_record: Callable[[Record], None] = lambda record: None,
) -> Record:
    """Search settings, train once more with the best, leave the adapter in `config.output`/best; return the result record.

    Several processes that are given the same work on one study. A process that dies is made good by any other, or by the same call again.

    Args:
        config: what a trial starts from.
        given: names of settings that stay as they are; the rest of `space.SEARCHED` is searched.
        trials: how many the study is to have in all.
        timeout: seconds after which this process begins no further trial.
        storage: journal file or database URL; default: `study.log` in the output folder.
        study: name of the study in the storage.
        on_record: called with records of kind study, trial, epoch, trial_end, waiting and best, and with those of the last training run.

    Raises:
        TextloraError: what is wrong and where; TrainingError where no trial was completed.
    """
    if config.output is None:
        raise UsageError("no output folder", "name one with --output")
    output = Path(config.output)
    storage = storage or str(output / "study.log")
    free = free_settings(config, given)
    _check(config, output, storage, free, trials, timeout)
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.monotonic()
    everything = {name: value for name, value in (("layers", "all"), ("target_modules", None)) if name in free}
    prepared = prepare(dataclasses.replace(config, **everything))
    if "validation" not in prepared.sets:
        raise UsageError("no row is left for validation, which trials are compared on", "name a file with --validation")
    blocks = count_blocks(prepared.model.target_modules)
    new = not output.exists()
    try:
        output.mkdir(parents=True, exist_ok=True)
        higher = METRICS[prepared.metric].higher_is_better
        with _silent_optuna():
            shared = SharedStudy(storage, study, output, higher, _facts(prepared, config, free, blocks))
            try:
                _keep_config(config, output)
                search = Search(shared, prepared, config, given, free, blocks, output, on_record)
                search.run(trials, None if timeout is None else began + timeout)
                return search.finish(began)
            finally:
                shared.close()
    except BaseException:
        if new and not (output / "config.toml").is_file():  # nothing worth keeping was written, unless by another process
            (output / "study.locks").unlink(missing_ok=True)
            with suppress(OSError):
                output.rmdir()
        raise


def _check(config: TrainConfig, output: Path, storage: str, free: Collection[str], trials: int, timeout: float | None) -> None:
    """Refuse what cannot work before anything is read or written."""
    if trials < 1:
        raise UsageError(f"--trials {trials}: must be at least 1")
    if timeout is not None and timeout <= 0:
        raise UsageError(f"--timeout {timeout:g}: must be above 0")
    for name in ("eval_every", "init_adapter"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning for tune", "leave it out")
    if not free:
        raise UsageError("every setting that tune searches was given", "leave some out: the ones left out are searched")
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file", "choose a folder")
    ours = {"study.log", "study.log.locks", "study.locks"}  # another process may be starting
    held = [p for p in output.glob("*") if p.name not in ours and not (p.name.startswith(".") and p.suffix == ".part")]
    if held and not (output / "config.toml").is_file():
        raise StorageError(f"--output {output}: is not empty, and holds no study", "choose another folder")
    check_storage(storage)
    if not is_url(storage) and storage != str(output / "study.log") and not Path(storage).parent.is_dir():
        raise UsageError(f"--storage {storage}: its folder is not there", "make it first")
    try:
        import optuna  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError("textlora tune needs optuna and scikit-learn", 'install them with pip install "textlora[tune]"') from error


def _keep_config(config: TrainConfig, output: Path) -> None:
    if not (output / "config.toml").is_file():
        write_text(output / "config.toml", write_config(config))


@contextmanager
def _silent_optuna() -> Iterator[None]:
    """Optuna says on standard error what it does, and says it again with every worker."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def _facts(prepared: Prepared, config: TrainConfig, free: Collection[str], blocks: int) -> Record:
    """What makes the trials what they are, as JSON knows it."""
    rows = hashlib.sha256()
    for split in ("train", "validation"):
        rows.update(prepared.sets[split].labels.tobytes())
        for encoded in prepared.sets[split].encoded:
            rows.update(encoded.ids.tobytes())
    settings = {item.name: getattr(config, item.name) for item in dataclasses.fields(config) if item.name not in _UNLIKE}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items() if value is not None}
    settings |= {"metric": prepared.metric, "blocks": blocks, "searched": list(free)}
    return settings | {"base model": prepared.model.base_hash(), "data": rows.hexdigest()}


class Search:
    """The part of one process in a study: runs trials until there are enough, then sees to the best one."""

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
        self.prepared = dataclasses.replace(prepared, sets={split: data for split, data in prepared.sets.items() if split != "test"})
        self.ranges = distributions(free, blocks, prepared.files.config.get("hidden_size") or prepared.files.config.get("dim") or 32)
        self._prefixes: dict[int, Mapping[str, HiddenStates]] = {}

    def run(self, trials: int, end: float | None) -> None:
        import optuna

        pruner = optuna.pruners.MedianPruner(n_startup_trials=COMPLETE_TRIALS, n_warmup_steps=FIRST_EPOCH, n_min_trials=COMPLETE_TRIALS)
        self.shared.study.pruner = pruner
        self.emit({"kind": "study", "trials": trials, "done": self._done(), "metric": self.prepared.metric, "searched": list(self.free)})
        steps = len(plan(self.config, self.prepared.sets["train"].lengths))
        start, waiting = start_parameters(self.config, self.ranges, self.blocks, steps), False
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

    def settings(self, parameters: Mapping[str, Any]) -> TrainConfig:
        return trial_settings(self.config, self.given, parameters, self.blocks)

    def _run(self, trial: "optuna.Trial") -> None:
        self.emit({"kind": "trial", "number": trial.number, "parameters": trial.params})
        began = time.perf_counter()
        try:
            value = self._train(trial)
            reason = None if value is None or math.isfinite(value) else f"{self.prepared.metric} has no value on the validation rows"
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
                "state": "failed" if reason else "pruned" if value is None else "complete",
                "value": None if reason else value,
                "reason": reason,
                "done": self._done(),
                "best": None if best is None else {"number": best.number, "value": best.value},
            }
        )

    def _train(self, trial: "optuna.Trial") -> float | None:
        """Score of the weights that would be kept; None where the trial was pruned, NaN where no score was defined."""
        prepared = fresh(self.prepared, self.settings(trial.params))
        trial.set_user_attr("adapter_parameters", parameter_counts(prepared.model.trainable())[0])
        known = dict(self.shared.trials()[trial.number].intermediate_values)  # of a process that died in this trial
        start_head(prepared)
        trainer = Trainer(prepared, self._prefix(prepared))
        for record in trainer.records():
            value = record["metrics"].get(prepared.metric) if record["kind"] == "evaluation" else None
            if value is None:
                continue
            epoch = math.ceil(record["epoch"] - 1e-6)
            self.emit({"kind": "epoch", "number": trial.number, "epoch": record["epoch"], "epochs": prepared.config.epochs, "value": value})
            if epoch not in known:
                trial.report(value, epoch)
                if not trainer.finished and trial.should_prune():
                    return None
        trial.set_user_attr("best_epoch", trainer.best_epoch)
        return math.nan if trainer.kept_score is None else trainer.kept_score

    def _prefix(self, prepared: Prepared) -> Mapping[str, HiddenStates]:
        """Hidden states below the lowest adapted block, kept for later trials of the same depth."""
        depth = prepared.model.depth
        if depth not in self._prefixes:
            found = build_prefix(prepared, self.output)
            size = sum(states.states.nbytes for kept in (found, *self._prefixes.values()) for states in kept.values())
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
        """Train the best settings once more, as `train` does, and write the report."""
        best, study = self._best(), self.record()
        if best is None:
            write_text(self.output / "report.html", render_study(study, self.output.resolve().name))
            reasons = [trial["reason"] for trial in study["trials"] if trial["reason"]]
            raise TrainingError(
                f"no trial of {len(study['trials'])} was completed" + (f" (trial {study['trials'][0]['number']}: {reasons[0]})" if reasons else ""),
                "look at report.html, and give the same command more --trials or a longer --timeout",
            )
        with self.shared.locks.held(FINISH):
            self.emit({"kind": "best", "number": best.number, "value": best.value, "parameters": best.params})
            result = retrain(dataclasses.replace(self.settings(best.params), output=str(self.output / "best")), self.emit)
            study["result"] = result
            write_text(self.output / "report.html", render_study(study, self.output.resolve().name))
        counts = {state: sum(trial["state"] == state for trial in study["trials"]) for state in ("complete", "pruned", "failed")}
        chosen = study["trials"][best.number]
        return {
            "output": str(self.output),
            "study": self.shared.study.study_name,
            "metric": self.prepared.metric,
            "trials": len(study["trials"]),
            **counts,
            "best": {key: chosen[key] for key in ("number", "value", "parameters", "settings")},
            "importance": study["importance"],
            "adapter": result["output"],
            **{split: result[split] for split in ("validation", "test") if split in result},
            "total_seconds": time.monotonic() - began,
        }

    def record(self) -> Record:
        """The study as plain values: what the report is made from."""
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}
        trials = []
        for trial in self.shared.trials():
            settings = self.settings(trial.params)
            kept = ("reason", "seconds", "best_epoch", "adapter_parameters", "starts")
            trials.append(
                {
                    "number": trial.number,
                    "state": names[trial.state.name],
                    "value": trial.value if trial.state.name == "COMPLETE" else None,
                    "epochs": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
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
            "rows": {split: len(data.rows) for split, data in self.prepared.sets.items()},
            "searched": list(self.free),
            "trials": trials,
            "best": None if best is None else best.number,
            "importance": self._importance(),
            "settings": {name: value for name, value in self.shared.study.user_attrs["textlora"].items() if name not in hidden},
            "result": None,
        }

    def _importance(self) -> dict[str, float] | None:
        """Share of the score's variance that each setting explains (fANOVA, Hutter et al. 2014); None while too few trials are complete."""
        import optuna

        if sum(trial.state.name == "COMPLETE" for trial in self.shared.trials()) < ENOUGH_FOR_IMPORTANCE:
            return None
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.config.seed)
        try:
            return dict(optuna.importance.get_param_importances(self.shared.study, evaluator=evaluator))
        except RuntimeError:  # all trials scored the same
            return None


def fresh(prepared: Prepared, config: TrainConfig) -> Prepared:
    """The same rows and base for another run: new LoRA and head, as `prepare` would make them."""
    old = prepared.model
    if isinstance(old, PackedModel):
        count = len(prepared.schema.labels)
        model: Model = PackedModel(old.base, config.lora, count, prepared.pooling, config.seed, prepared.device, old.encoder)
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
    """Train into `config.output`; a run with these settings that is there already is gone on with, one with others makes room."""
    output = Path(str(config.output))
    same = False
    if (output / "run" / "config.toml").is_file():
        kept = TrainConfig(**read_config(output / "run" / "config.toml"))
        same = dataclasses.replace(kept, output=config.output, threads=config.threads) == config
    if not same:
        shutil.rmtree(output, ignore_errors=True)
    return run_training(config, resume=same, on_record=emit)

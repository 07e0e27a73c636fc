"""A search over training settings: one Optuna study in a file or database, which several processes may work
on.

out/  config.toml  study.log (the study, unless it lies elsewhere)  report.html
out/best/  the adapter of the settings that were chosen, trained as `train` does it; only there the test rows
are scored out/defaults/  the same of the defaults, where others were chosen and there are test rows
"""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from textlora.core.config import TrainConfig, write_config
from textlora.core.errors import StorageError, UsageError
from textlora.core.files import write_text
from textlora.metrics.scores import METRICS
from textlora.training.prepare import Prepared, prepare
from textlora.tune.search import Record, Search
from textlora.tune.shared import SharedStudy, check_storage, is_url
from textlora.tune.space import count_blocks, free_settings

TRIALS, STUDY = 20, "textlora"
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
    """Search settings, train once more with what is chosen, leave the adapter in `config.output`/best; return
    the result record.

    The first trial is the defaults, `config` as it is; the best trial is chosen only where it leads them
    clearly (`choice.choose`). Trials are scored on the validation rows, or in a cross-validation where
    `prepare` has folds.

    Several processes that are given the same work on one study. A process that dies is made good by any
    other, or by the same call again.

    Args:
        config: what a trial starts from.
        given: names of settings that stay as they are; the rest of `space.SEARCHED` is searched.
        trials: how many the study is to have in all.
        timeout: seconds after which this process begins no further trial.
        storage: journal file or database URL; default: `study.log` in the output folder.
        study: name of the study in the storage.
        on_record: called with records of kind study, trial, epoch, fold, trial_end, waiting, best and
            defaults, and with those of the last training run.

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
    everything = {
        name: value for name, value in (("layers", "all"), ("target_modules", None)) if name in free
    }
    prepared = prepare(dataclasses.replace(config, **everything))
    if prepared.folds is None and "validation" not in prepared.sets:
        raise UsageError(
            "no row is left for validation, which trials are compared on", "name a file with --validation"
        )
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
        if (
            new and not (output / "config.toml").is_file()
        ):  # nothing worth keeping was written, unless by another process
            (output / "study.locks").unlink(missing_ok=True)
            with suppress(OSError):
                output.rmdir()
        raise


def _check(
    config: TrainConfig, output: Path, storage: str, free: Collection[str], trials: int, timeout: float | None
) -> None:
    """Refuse what cannot work before anything is read or written."""
    if trials < 1:
        raise UsageError(f"--trials {trials}: must be at least 1")
    if timeout is not None and timeout <= 0:
        raise UsageError(f"--timeout {timeout:g}: must be above 0")
    for name in ("eval_every", "init_adapter"):
        if getattr(config, name) is not None:
            raise UsageError(f"--{name.replace('_', '-')} has no meaning for tune", "leave it out")
    if not free:
        raise UsageError(
            "every setting that tune searches was given", "leave some out: the ones left out are searched"
        )
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file", "choose a folder")
    ours = {"study.log", "study.log.locks", "study.locks"}  # another process may be starting
    held = [
        p
        for p in output.glob("*")
        if p.name not in ours and not (p.name.startswith(".") and p.suffix == ".part")
    ]
    if held and not (output / "config.toml").is_file():
        raise StorageError(f"--output {output}: is not empty, and holds no study", "choose another folder")
    check_storage(storage)
    if not is_url(storage) and storage != str(output / "study.log") and not Path(storage).parent.is_dir():
        raise UsageError(f"--storage {storage}: its folder is not there", "make it first")
    try:
        import optuna  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "textlora tune needs optuna and scikit-learn", 'install them with pip install "textlora[tune]"'
        ) from error


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
    for split in sorted({"train", "validation"} & set(prepared.sets)):
        rows.update(prepared.sets[split].labels.tobytes())
        for encoded in prepared.sets[split].encoded:
            rows.update(encoded.ids.tobytes())
    if prepared.folds is not None:
        rows.update(prepared.folds.tobytes())
    settings = {
        item.name: getattr(config, item.name)
        for item in dataclasses.fields(config)
        if item.name not in _UNLIKE
    }
    settings = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in settings.items()
        if value is not None
    }
    settings |= {"metric": prepared.metric, "blocks": blocks, "searched": list(free)}
    settings["scored on"] = "validation rows" if prepared.folds is None else "cross-validation"
    return settings | {"base model": prepared.model.base_hash(), "data": rows.hexdigest()}

"""A study that several processes work on: which trial is whose, by locks that the kernel drops when a process
dies.

A trial is claimed under one lock and held under another for as long as its process runs it. A trial that is
marked as running in the storage but held by nobody belonged to a process that died; whoever claims next takes
it up, with the same number and parameters.
"""

import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textlora.core.errors import StorageError, UsageError

if TYPE_CHECKING:
    import optuna

MAX_STARTS = 3
DEFAULTS = "defaults"  # attribute of the first trial
JOURNAL, CLAIM, FINISH, TRIALS = (
    0,
    1,
    2,
    3,
)  # bytes of the lock file: one each for writes, claims and the end, then one for each trial


class Locks:
    """Locks on single bytes of one file (POSIX `lockf`). They hold against other processes, not inside one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror or error}", "choose another folder"
            ) from error

    def take(self, place: int, wait: bool = True) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, place)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise StorageError(
                f"cannot lock {self.path}: {error.strerror or error}", "choose a file system with locks"
            ) from error
        return True

    def drop(self, place: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)

    @contextmanager
    def held(self, place: int) -> Iterator[None]:
        self.take(place)
        try:
            yield
        finally:
            self.drop(place)

    def name(self) -> str:
        """What tells this lock file from those of other machines: written into it once. Only for who holds
        CLAIM."""
        if not os.pread(self._file, 32, 0):
            os.pwrite(self._file, uuid.uuid4().hex.encode(), 0)
        return os.pread(self._file, 32, 0).decode()

    def close(self) -> None:
        os.close(self._file)


class _JournalLock:
    """What Optuna's journal asks of a lock. Its own ones stay behind when a process is killed, and hold the
    others up for 30 seconds."""

    def __init__(self, locks: Locks):
        self._locks = locks

    def acquire(self) -> bool:
        return self._locks.take(JOURNAL)

    def release(self) -> None:
        self._locks.drop(JOURNAL)


def is_url(storage: str) -> bool:
    return "://" in storage


def shown(storage: str) -> str:
    """A storage as it may be printed: a URL without its password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", storage)


def check_storage(storage: str) -> None:
    """Refuse a file that is not an Optuna journal. Writes nothing. Raises UsageError."""
    path = Path(storage)
    if is_url(storage) or not path.exists():
        return
    try:
        with open(path, "rb") as file:
            first = file.readline()
        known = not first or "op_code" in json.loads(first)
    except (ValueError, TypeError):
        known = False
    except OSError as error:
        raise UsageError(f"--storage {storage}: {error.strerror or error}", "name a file") from error
    if not known:
        raise UsageError(
            f"--storage {storage}: is not an Optuna journal",
            "name a new file, or one that `textlora tune` has made",
        )


class SharedStudy:
    """One Optuna study, opened or made.

    Args:
        storage: a journal file, or the URL of a database.
        name: of the study.
        folder: of this command, for the lock file where the storage is a database.
        maximize: whether higher values are better.
        facts: what makes the trials what they are; a study with other facts is refused.

    Raises:
        UsageError: the storage cannot be opened, or holds a study of that name that is another one.
    """

    def __init__(self, storage: str, name: str, folder: Path, maximize: bool, facts: Mapping[str, Any]):
        import optuna

        check_storage(storage)
        file = folder / "study" if is_url(storage) else Path(storage)
        self.locks = Locks(file.with_name(file.name + ".locks"))
        try:
            with self.locks.held(CLAIM):
                self._place = self.locks.name() if is_url(storage) else None
                self.study: optuna.Study = self._open(storage, name, maximize, dict(facts))
        except BaseException:
            self.locks.close()
            raise

    def _open(self, storage: str, name: str, maximize: bool, facts: dict[str, Any]) -> "optuna.Study":
        import optuna
        from optuna.storages.journal import JournalFileBackend

        try:
            if is_url(storage):
                backend: Any = optuna.storages.RDBStorage(storage)
            else:
                with self.locks.held(JOURNAL):
                    _mend(Path(storage))
                backend = optuna.storages.JournalStorage(
                    JournalFileBackend(storage, lock_obj=_JournalLock(self.locks))
                )  # type: ignore[arg-type]
            names = optuna.get_all_study_names(backend)
        except Exception as error:  # whatever the database's driver raises
            reason = shown((str(error).splitlines() or [""])[0])
            raise UsageError(
                f"--storage {shown(storage)}: cannot be opened ({reason})",
                "name a file, or a URL that Optuna takes",
            ) from error
        if name not in names:
            study = optuna.create_study(
                storage=backend, study_name=name, direction="maximize" if maximize else "minimize"
            )
        else:
            study = optuna.load_study(storage=backend, study_name=name)
        kept = study.user_attrs.get("textlora")
        if kept is None and not study.get_trials(deepcopy=False):  # new, or its process died just now
            study.set_user_attr("textlora", facts)
        elif kept is None:
            raise UsageError(f"study '{name}' was not made by `textlora tune`", "choose another --study")
        elif kept != facts:
            changed = [key for key in {**kept, **facts} if key != "data" and kept.get(key) != facts.get(key)]
            raise UsageError(
                f"study '{name}' was begun with other "
                + (f"settings ({', '.join(changed)})" if changed else "rows"),
                "give the same, or choose another --output, or --study in the same --storage",
            )
        return study

    def trials(self) -> "list[optuna.trial.FrozenTrial]":
        return self.study.get_trials(deepcopy=False)

    def claim(
        self, limit: int, ranges: Mapping[str, Any], start: Mapping[str, Any], seed: int
    ) -> "optuna.Trial | None":
        """A trial for this process to run: one that a dead process left, else a new one while there are fewer
        than `limit`, else None.

        Args:
            ranges: parameter name -> distribution.
            start: parameters of the first trial, the defaults, as far as they lie in their ranges. The others
                are drawn by TPE (Bergstra et al. 2011) from (seed, number) and what is known by then, so one
                process draws the same in one go or in several.
        """
        with self.locks.held(CLAIM):
            trial = self._left_behind(seed) or self._new(limit, start, seed)
            if trial is not None:
                drawn = (
                    start if trial.user_attrs.get(DEFAULTS) else ranges
                )  # the defaults may lie outside some ranges
                for name in drawn:  # its process may have died between two of them
                    trial._suggest(name, ranges[name])
            return trial

    def _left_behind(self, seed: int) -> "optuna.Trial | None":
        import optuna

        for frozen in self.trials():
            if not self._runs(frozen) or not self.locks.take(TRIALS + frozen._trial_id, wait=False):
                continue
            self.study.sampler = _sampler(seed, frozen.number)
            trial, starts = optuna.Trial(self.study, frozen._trial_id), frozen.user_attrs.get("starts", 1) + 1
            if starts <= MAX_STARTS:
                trial.set_user_attr("starts", starts)
                return trial
            self.fail(trial, f"its process ended {MAX_STARTS} times without a result")
        return None

    def _new(self, limit: int, start: Mapping[str, Any], seed: int) -> "optuna.Trial | None":
        trials = self.trials()
        if not trials:
            self.study.enqueue_trial(dict(start), user_attrs={DEFAULTS: True})
            trials = self.trials()
        number = next((trial.number for trial in trials if trial.state.name == "WAITING"), len(trials))
        if number >= limit:
            return None
        self.study.sampler = _sampler(seed, number)
        trial = self.study.ask()
        self.locks.take(TRIALS + trial._trial_id)
        if self._place:
            trial.set_user_attr("place", self._place)
        return trial

    def complete(self, trial: "optuna.Trial", value: float) -> None:
        self.study.tell(trial, value)
        self.locks.drop(TRIALS + trial._trial_id)

    def prune(self, trial: "optuna.Trial") -> None:
        import optuna

        self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        self.locks.drop(TRIALS + trial._trial_id)

    def fail(self, trial: "optuna.Trial", reason: str) -> None:
        import optuna

        trial.set_user_attr("reason", reason)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
        self.locks.drop(TRIALS + trial._trial_id)

    def running(self) -> int:
        """How many trials other processes run now."""
        found = 0
        with self.locks.held(CLAIM):
            for trial in self.trials():
                if self._runs(trial):
                    if self.locks.take(TRIALS + trial._trial_id, wait=False):
                        self.locks.drop(TRIALS + trial._trial_id)
                    else:
                        found += 1
        return found

    def _runs(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Whether a trial is marked as running, by a process whose locks can be seen here."""
        return trial.state.name == "RUNNING" and trial.user_attrs.get("place") == self._place

    def close(self) -> None:
        """Let go of everything this process holds."""
        self.locks.close()


def _sampler(seed: int, number: int) -> "optuna.samplers.BaseSampler":
    import optuna

    return optuna.samplers.TPESampler(seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


def _mend(path: Path) -> None:
    """Cut off a last line that a full disk or a power cut left without its end. Only for who holds JOURNAL."""
    if path.exists() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)

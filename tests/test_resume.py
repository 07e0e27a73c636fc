"""A run that is killed anywhere and taken up again ends with the bytes of one that was never stopped."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from support import SIDE, WEIGHTS, forked, log_of, settings, snapshot

import textlora.training.run
import textlora.training.trainer
from textlora.adapters.folder import read_adapter
from textlora.core.config import TrainConfig
from textlora.core.errors import Interrupted, StorageError
from textlora.core.files import folder_lock
from textlora.training.run import run_training


@dataclass(frozen=True)
class Whole:
    """The run that nothing stopped."""

    config: TrainConfig
    weights: bytes
    log: list[dict[str, Any]]
    seconds: float


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory) -> Whole:
    """Dropout, accumulation, an evaluation every 2 of 40 steps, and an early stop before them all."""
    found = uninterrupted(tmp_path_factory, settings(
        tmp_path_factory.mktemp("whole"), tiny_base("bert"), epochs=16.0, batch_size=8, gradient_accumulation_steps=2, lora_dropout=0.2, eval_every=2,
        early_stopping_patience=3, learning_rate=0.02, metric="log_loss",
    ))  # fmt: skip
    log = found.log
    assert log[0]["steps"] == 48
    best = max(record["step"] for record in log if record["kind"] == "evaluation" and record["best"])
    assert best + 6 == log[-1]["steps"] < 48  # stopped early, after three evaluations without a better one
    return found


@pytest.fixture(scope="module")
def folded(tiny_base, tmp_path_factory) -> Whole:
    """Three folds of 8 steps each, then 10 steps on all rows, an evaluation every 3 of them."""
    changes = {"validation": None, "epochs": 2.0, "eval_every": 3, "lora_dropout": 0.2, "learning_rate": 0.02}
    found = uninterrupted(
        tmp_path_factory, settings(tmp_path_factory.mktemp("folded"), tiny_base("bert"), **changes)
    )
    assert [
        sum(r["kind"] == "step" and r.get("fold") == fold for r in found.log) for fold in (1, 2, 3, None)
    ] == [8, 8, 8, 10]
    assert found.log[0]["all_steps"] == 34
    return found


def uninterrupted(factory: pytest.TempPathFactory, config: TrainConfig) -> Whole:
    run_training(config)
    start = time.perf_counter()
    assert forked(go_on(replace(config, output=str(factory.mktemp("again") / "out"))))[0] == 0
    seconds = time.perf_counter() - start
    log = log_of(Path(config.output))
    assert log[-1]["kind"] == "end"
    return Whole(config, (Path(config.output) / WEIGHTS).read_bytes(), log, seconds)


def once(call: int) -> Callable[[], None]:
    """A function that kills this process, without warning, the `call`-th time it is called."""
    left = [call]

    def maybe() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return maybe


def before(target: object, name: str, hook: Callable[[], None]) -> None:
    function = getattr(target, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        hook()
        return function(*args, **kwargs)

    setattr(target, name, wrapped)


def in_the_log(call: int) -> None:
    """Die with half of a line of metrics.jsonl on the disk."""
    open_log = textlora.training.run._log
    left = [call]

    @contextmanager
    def log(path: Path, keep: int):
        with open_log(path, keep) as file:
            write = file.write

            class Torn:
                flush, fileno = file.flush, file.fileno

                def write(self, line: str) -> None:
                    left[0] -= 1
                    if left[0] == 0:
                        write(line[: len(line) // 2])
                        file.flush()
                        os.kill(os.getpid(), signal.SIGKILL)
                    write(line)

            yield Torn()

    textlora.training.run._log = log


def in_evaluation(call: int) -> None:
    before(textlora.training.trainer, "score", once(call))


def after_evaluation(call: int) -> None:
    before(textlora.training.run, "write_checkpoint", once(call))


def before_replace(call: int) -> None:
    """Die with a file written under its temporary name."""
    before(os, "replace", once(call))


def after_replace(call: int) -> None:
    kill, replace_file = once(call), os.replace

    def wrapped(*args: Any) -> None:
        replace_file(*args)
        kill()

    os.replace = wrapped


def in_a_step(call: int) -> None:
    before(textlora.training.trainer.Trainer, "_train_step", once(call))


def in_the_proof(call: int) -> None:
    before(textlora.training.finalize, "_prove", once(call))


def before_the_report(call: int) -> None:
    before(textlora.training.run, "render", once(call))


def before_the_last_tidying(call: int) -> None:
    """Die after result.json, before the checkpoint is removed."""
    write = textlora.training.run.write_text
    kill = once(call)

    def wrapped(path: Path, text: str) -> None:
        write(path, text)
        if path.name == "result.json":
            kill()

    textlora.training.run.write_text = wrapped


def go_on(
    config: TrainConfig, arm: Callable[[], None] = lambda: None, every: float = 0.0
) -> Callable[[], int]:
    def job() -> int:
        arm()
        run_training(config, resume=True, checkpoint_seconds=every)
        return 0

    return job


def check_finished(config: TrainConfig, whole: Whole) -> None:
    output = Path(config.output)
    assert (output / WEIGHTS).read_bytes() == whole.weights
    assert sorted(p.name for p in output.iterdir()) == sorted(
        p.name for p in Path(whole.config.output).iterdir()
    )
    assert sorted(p.name for p in (output / "run").iterdir()) == sorted(
        p.name for p in (Path(whole.config.output) / "run").iterdir()
    )
    assert stripped(log_of(output)) == stripped(whole.log)


def stripped(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without what differs between equal runs: places, times and memory."""
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    kept = [{key: value for key, value in record.items() if not key.endswith(timed)} for record in log]
    kept[0]["settings"] = {key: value for key, value in kept[0]["settings"].items() if key != "output"}
    return kept


POINTS = [
    *((in_a_step, n) for n in (1, 2, 7)),
    *((in_evaluation, n) for n in (1, 4)),
    *((after_evaluation, n) for n in (1, 3)),
    *((before_replace, n) for n in (1, 2, 5)),
    *((in_the_log, n) for n in (1, 2, 3, 9)),
    (in_the_proof, 1),
    (before_the_report, 1),
    (before_the_last_tidying, 1),
]


@pytest.mark.parametrize(("place", "call"), POINTS, ids=lambda value: getattr(value, "__name__", value))
def test_killed_at(whole, tmp_path, place, call):
    config = replace(whole.config, output=str(tmp_path / "out"))
    code, _, err = forked(go_on(config, lambda: place(call)))
    assert code == -signal.SIGKILL, err
    code, _, err = forked(go_on(config))
    assert code == 0, err
    check_finished(config, whole)


FOLD_POINTS = [
    *((in_a_step, n) for n in (1, 8, 9, 20, 25, 30)),
    *((in_evaluation, n) for n in (2, 5, 9)),
    *((after_evaluation, n) for n in (9, 30)),
    (in_the_log, 12),
    (in_the_proof, 1),
]


@pytest.mark.parametrize(("place", "call"), FOLD_POINTS, ids=lambda value: getattr(value, "__name__", value))
def test_killed_in_a_fold(folded, tmp_path, place, call):
    test_killed_at(folded, tmp_path, place, call)


def final_replaces(whole: Whole) -> int:
    """How many files a run that has only its last part to do moves into place."""
    staged = len([p for p in Path(whole.config.output).iterdir() if p.is_file()])
    return 2 * staged + 2  # written into the staging folder, moved up, then report and result


def test_killed_at_every_file_of_the_final_save(whole, tmp_path):
    """One run, killed just before or just after each file takes its name, goes on from where it was every
    time."""
    config = replace(whole.config, output=str(tmp_path / "out"))
    code, _, err = forked(go_on(config, lambda: in_the_proof(1)))
    assert code == -signal.SIGKILL, err
    kills = 0
    for call in range(1, final_replaces(whole) + 1):
        copy = replace(config, output=str(tmp_path / f"copy{call}"))
        shutil.copytree(config.output, copy.output)
        place = (before_replace, after_replace)[call % 2]
        code, _, err = forked(go_on(copy, lambda place=place, call=call: place(call)))
        assert code == -signal.SIGKILL, f"{place.__name__} {call}: {err}"
        kills += 1
        if (Path(copy.output) / SIDE).exists():  # what names itself an adapter is a whole one
            read_adapter(copy.output)
        assert forked(go_on(copy))[0] == 0
        check_finished(copy, whole)
    assert kills >= 14


def test_twenty_kills_at_random_moments(whole, folded, tmp_path):
    """In turns with and without cross-validation. kill -9 from outside, at any moment of preparing, training,
    evaluating, writing and saving; each run is resumed to its end."""
    draw, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        one = (whole, folded)[runs % 2]
        config = replace(one.config, output=str(tmp_path / f"out{runs}"))
        while True:
            pid = os.fork()
            if pid == 0:
                try:
                    go_on(config)()
                finally:
                    os._exit(0 if (Path(config.output) / "run" / "result.json").is_file() else 70)
            moment = draw.uniform(0, 1.2 * one.seconds) if kills < 20 else None
            if moment is not None:
                time.sleep(moment)
                os.kill(pid, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if code == 0:
                break
            assert code == -signal.SIGKILL
            kills += 1
        check_finished(config, one)
    assert kills == 20


def test_stop_between_steps_and_go_on(whole, tmp_path):
    config = replace(whole.config, output=str(tmp_path / "out"))
    seen: list[dict[str, Any]] = []
    for stop_at in (3, 4, 9):
        with pytest.raises(Interrupted) as caught:
            run_training(
                config,
                resume=True,
                on_record=seen.append,
                stop=lambda stop_at=stop_at: seen[-1].get("step") == stop_at,
            )
        assert (
            str(caught.value)
            == f"stopped at step {stop_at} of 48; `textlora train --resume --output {config.output}` goes on"
        )
        assert caught.value.exit_code == 130
        assert not (Path(config.output) / SIDE).exists()
    run_training(config, resume=True, on_record=seen.append)
    steps = [record["step"] for record in seen if record["kind"] == "step"]
    assert steps == list(range(1, whole.log[-1]["steps"] + 1))  # nothing was computed twice
    check_finished(config, whole)


def test_steps_after_the_last_checkpoint_are_logged_once(whole, tmp_path):
    config = replace(whole.config, output=str(tmp_path / "out"))
    code, _, _ = forked(
        go_on(config, lambda: in_a_step(6), every=1e9)
    )  # checkpoints at evaluations only: after step 4
    assert code == -signal.SIGKILL
    assert [r["step"] for r in log_of(Path(config.output)) if r["kind"] == "step"] == [1, 2, 3, 4, 5]
    seen: list[dict[str, Any]] = []
    run_training(config, resume=True, on_record=seen.append)
    assert seen[0]["kind"] == "step"
    assert seen[0]["step"] == 5
    check_finished(config, whole)


def test_resuming_a_finished_run_changes_nothing(whole, cli):
    output = Path(whole.config.output)
    kept = snapshot(output)
    code, out, err = cli("train", "--resume", "--output", output, "--quiet", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    assert snapshot(output) == kept


def test_a_killed_run_leaves_no_lock(whole, tmp_path):
    config = replace(whole.config, output=str(tmp_path / "out"))
    assert forked(go_on(config, lambda: in_a_step(2)))[0] == -signal.SIGKILL
    with (
        folder_lock(tmp_path / "out" / "run"),
        pytest.raises(StorageError, match="is in use by another run"),
        folder_lock(tmp_path / "out" / "run"),
    ):
        pass


def test_ctrl_c_on_the_real_command(tiny_base, tmp_path, cli):
    config = settings(tmp_path, tiny_base("bert"), epochs=30.0, batch_size=4, lora_dropout=0.1)
    flags = [
        "--train",
        config.train,
        "--validation",
        config.validation,
        "--model",
        config.model,
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    flags += ["--epochs", "30", "--batch-size", "4", "--lora-dropout", "0.1", "--quiet"]
    code = "import sys, textlora.cli; sys.argv[0] = 'textlora'; textlora.cli.main()"
    output = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *flags, "--output", str(output)],
        stderr=subprocess.PIPE,
        text=True,
    )
    log = output / "run" / "metrics.jsonl"
    while process.poll() is None and not (
        log.is_file() and '"kind": "step"' in log.read_text(encoding="utf-8")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert err.startswith("textlora: stopped at step ")
    assert err.endswith(f" of 300; `textlora train --resume --output {output}` goes on\n")
    assert cli("train", "--resume", "--output", output, "--quiet") == (0, "", "")
    assert cli("train", *flags, "--output", tmp_path / "whole") == (0, "", "")
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()

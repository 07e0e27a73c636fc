"""Made-up data, and small helpers to run the command line in this process and to look at what it left behind."""

import csv
import json
import os
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from textlora.cli import run
from textlora.core.config import TrainConfig
from textlora.training.run import run_training

GOOD, BAD = ("good", "great", "fun", "fast"), ("bad", "dull", "boring", "slow")
FILLER = ("the", "film", "story", "plot", "actor", "was", "it", "very", "time", "about")
WEIGHTS, SIDE, CONFIG = "adapter_model.safetensors", "textlora.json", "adapter_config.json"


def text_of(words: Sequence[str], draw: random.Random) -> str:
    """Three to nine filler words with two of `words` among them."""
    picked = draw.choices(FILLER, k=draw.randint(3, 9)) + draw.choices(words, k=2)
    draw.shuffle(picked)
    return " ".join(picked)


def single_rows(count: int = 40, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of good or bad words, labelled pos and neg in turn; no text stands twice."""
    draw, rows = random.Random(seed), {}
    while len(rows) < count:
        label = ("pos", "neg")[len(rows) % 2]
        rows[text_of(GOOD if label == "pos" else BAD, draw)] = label
    return list(rows.items())


def write_csv(path: Path, rows: Sequence[Sequence[Any]], header: Sequence[str] = ("text", "label")) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def task_files(folder: Path, task: str) -> dict[str, str]:
    """Files train, validation and test of 40, 16 and 16 rows for `single`, `multi`, `regression` or `pairs`."""
    files = {}
    for i, (split, count) in enumerate((("train", 40), ("validation", 16), ("test", 16))):
        rows = single_rows(count, seed=i)
        path = folder / f"{split}.{'jsonl' if task == 'multi' else 'csv'}"
        if task == "multi":
            kinds = (["warm"], ["warm", "long"], [], ["long"])
            lines = [
                {"text": text, "labels": kinds[k % 4] + (["praise"] if label == "pos" else [])}
                for k, (text, label) in enumerate(rows)
            ]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        elif task == "regression":
            write_csv(
                path, [(text, 1.5 if label == "pos" else -0.5) for text, label in rows], ("text", "score")
            )
        elif task == "pairs":
            write_csv(
                path,
                [(text, rows[(k * 3) % count][0], label) for k, (text, label) in enumerate(rows)],
                ("sentence1", "sentence2", "label"),
            )
        else:
            write_csv(path, rows)
        files[split] = str(path)
    return files


def settings(folder: Path, base: Path, task: str = "single", **changes: Any) -> TrainConfig:
    """A run of 2 epochs of 5 steps on the task's files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    given = {**task_files(folder, task), "model": str(base), "output": str(folder / "out")}
    given |= {
        "epochs": 2.0,
        "batch_size": 8,
        "learning_rate": 5e-3,
        "r": 4,
        "warmup": 0.06,
        "max_length": 32,
        "threads": 1,
        "device": "cpu",
    }
    return TrainConfig(**(given | changes))


@dataclass(frozen=True)
class Trained:
    """A finished run: its settings, result and adapter folder."""

    config: TrainConfig
    result: dict[str, Any]
    folder: Path


_TRAINED: dict[tuple[str, ...], Trained] = {}


def trained(
    tiny_base: Callable[[str], Path],
    factory: pytest.TempPathFactory,
    family: str = "bert",
    task: str = "single",
    **changes: Any,
) -> Trained:
    """A run on the family's tiny base, made once per session and never to be written to."""
    key = (family, task, *(f"{name}={value}" for name, value in sorted(changes.items())))
    if key not in _TRAINED:
        config = settings(factory.mktemp("trained"), tiny_base(family), task, **changes)
        _TRAINED[key] = Trained(config, run_training(config), Path(config.output))
    return _TRAINED[key]


def snapshot(folder: Path) -> dict[str, bytes | None] | None:
    """Every path under `folder` with the bytes of files; None where there is no such folder."""
    if not folder.exists():
        return None
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))
    }


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The records of `run/metrics.jsonl`."""
    return [
        json.loads(line)
        for line in (folder / "run" / "metrics.jsonl")
        .read_text(encoding="utf-8")
        .removesuffix("\n")
        .split("\n")
    ]


class Cli:
    """Runs commands in this process; `fails` checks how a refusal looks."""

    def __init__(self, capfd: pytest.CaptureFixture[str]):
        self.capfd = capfd

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.capfd.readouterr()
        code = run([str(a) for a in arguments])
        out, err = self.capfd.readouterr()
        return code, out, err

    def fails(self, *arguments: object, code: int = 2, output: Path | None = None) -> str:
        """The message of a command that must end with `code`, say one line and leave `output` as it was."""
        before = snapshot(output) if output else None
        found, out, err = self(*arguments)
        assert found == code, err
        assert out == ""
        assert "Traceback" not in err
        assert err.startswith("textlora: "), err
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        if output:
            assert snapshot(output) == before
        return err.removeprefix("textlora: ").rstrip("\n")


def forked(job: Callable[[], int]) -> tuple[int, str, str]:
    """Run `job` in a fork of this process, so that nothing is imported again and it may die.

    Returns:
        the exit code (minus the signal where it was killed), standard output and standard error.
    """
    pipes = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            for number, (_, writer) in enumerate(pipes, 1):
                os.dup2(writer, number)
            sys.stdout, sys.stderr = (
                os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2)
            )
            code = job()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    said = []
    for reader, writer in pipes:
        os.close(writer)
        with open(reader, encoding="utf-8") as file:
            said.append(file.read())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *said

"""A training run on disk: start or resume, log, checkpoint, score, save, prove, report.

out/  adapter_config.json  adapter_model.safetensors  textlora.json  tokenizer.json  README.md
out/run/  config.toml  metrics.jsonl  report.html  result.json  (checkpoint.safetensors while it runs)
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from textlora.adapters.folder import read_adapter
from textlora.core.config import TrainConfig, read_config, write_config
from textlora.core.errors import AdapterError, Interrupted, StorageError, UsageError
from textlora.core.files import folder_lock, remove_parts, write_text
from textlora.kernels.devices import peak_memory
from textlora.model.adapter_tensors import parameter_counts, scaled_head, shifted_head
from textlora.model.executor import Executor, executor_of
from textlora.report.run_page import render
from textlora.training.checkpoint import read_checkpoint, write_checkpoint
from textlora.training.cross_validation import Trainings
from textlora.training.finalize import finish
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import build_prefix
from textlora.training.prepare import Prepared, prepare
from textlora.training.prover import Prover

CHECKPOINT_SECONDS = 30.0
Record = dict[str, Any]


def check_output(output: Path, resume: bool) -> None:
    """Refuse a folder that another run holds, or that holds something already. Writes nothing."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output}: is a file", "choose a folder")
    if (output / "run" / ".lock").exists():
        with folder_lock(output / "run"):
            pass
    kept = [
        p
        for p in output.rglob("*")
        if p.is_file() and p.name != ".lock" and not (p.name.startswith(".") and p.suffix == ".part")
    ]
    if kept and not resume:
        raise StorageError(
            f"--output {output}: is not empty",
            "choose another folder, or add --resume to go on with the run in it",
        )
    if kept and not (output / "run" / "config.toml").is_file():
        raise StorageError(
            f"--output {output}: holds files but no textlora run to resume", "choose another folder"
        )


def run_training(
    config: TrainConfig,
    sources: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    on_record: Callable[[Record], None] = lambda record: None,
    stop: Callable[[], bool] = lambda: False,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    prover: Prover | None = None,
    allow_other_kernels: bool = False,
) -> Record:
    """Train, or go on with, one adapter; leave it in `config.output`; return the result record.

    Args:
        sources: rows, DataFrames or datasets by split, in place of the settings' paths.
        on_record: called with every line of `run/metrics.jsonl` as it is written.
        stop: asked after each step; True makes a checkpoint and raises Interrupted.
        allow_other_kernels: go on although other kernels, or none, began the run: the adapter is as good, its
            bytes differ.
        prover: one that was started before this module, and torch with it, was imported; default: one of its
            own.

    Raises:
        TextloraError: what is wrong and where; nothing is left behind unless training had begun.
    """
    if config.output is None:
        raise UsageError("no output folder", "name one with --output")
    output, run = Path(config.output), Path(config.output) / "run"
    check_output(output, resume)
    if (run / "result.json").is_file():
        saved = TrainConfig(**read_config(run / "config.toml"))
        if dataclasses.replace(saved, output=config.output, threads=config.threads) != config:
            raise UsageError(f"{output}: holds a finished run with other settings", "choose another --output")
        (run / "checkpoint.safetensors").unlink(missing_ok=True)  # where the run was killed between the two
        return json.loads((run / "result.json").read_text(encoding="utf-8"))
    if config.threads:
        torch.set_num_threads(config.threads)
    began = time.perf_counter()
    with contextlib.nullcontext(prover) if prover is not None else Prover() as prover:
        prepared = prepare(config, sources)
        trainings = Trainings(prepared, start=_start)
        return _locked(
            prepared, trainings, run, on_record, stop, checkpoint_seconds, began, prover, allow_other_kernels
        )


def _locked(prepared: Prepared, trainings: Trainings, run: Path, *rest: Any) -> Record:
    """`_run` under the folder's lock; where nothing worth keeping was written, nothing is left."""
    output, new = run.parent, not run.parent.exists()
    with folder_lock(run):
        try:
            return _run(prepared, trainings, run, *rest)
        except BaseException:
            if not (run / "config.toml").is_file():  # nothing worth keeping was written
                shutil.rmtree(output if new else run, ignore_errors=True)
            raise


def _run(
    prepared: Prepared,
    trainings: Trainings,
    run: Path,
    on_record: Callable[[Record], None],
    stop: Callable[[], bool],
    checkpoint_seconds: float,
    began: float,
    prover: Prover,
    allow_other_kernels: bool,
) -> Record:
    remove_parts(run.parent)
    remove_parts(run)
    checkpoint = run / "checkpoint.safetensors"
    fingerprint, executor = _fingerprint(prepared), executor_of(prepared.model, prepared.reason)
    kept = read_checkpoint(checkpoint)
    if kept is not None:
        tensors, state = kept
        if state.pop("fingerprint") != fingerprint:
            raise UsageError(
                f"{run.parent}: the data, the base model or a library changed since this run began",
                "start again in another --output",
            )
        began_on = Executor(**state.pop("executor"))
        if began_on != executor and not allow_other_kernels:
            raise UsageError(
                f"{run.parent}: this run began on {began_on}, here it would go on with {executor}, to other bytes",
                "resume it on such a machine, or add --allow-other-kernels",
            )
        log_bytes = state.pop("log_bytes")
        trainings.restore(tensors, state)
    else:
        log_bytes = 0
        write_text(run / "config.toml", write_config(prepared.config))
    with _log(run / "metrics.jsonl", log_bytes) as log:

        def emit(record: Record) -> None:
            log.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
            log.flush()
            on_record(record)

        def save_checkpoint() -> None:
            os.fsync(log.fileno())
            tensors, state = trainings.state()
            write_checkpoint(
                checkpoint,
                tensors,
                state
                | {
                    "fingerprint": fingerprint,
                    "executor": executor.as_dict(),
                    "log_bytes": os.fstat(log.fileno()).st_size,
                },
            )

        if not log_bytes:
            emit(start_record(prepared, trainings))
            emit(
                {
                    "kind": "data",
                    **prepared.report.as_dict(),
                    "lines": [*prepared.report.lines(), *prepared.split_lines],
                    "split_lines": prepared.split_lines,
                }
            )
        if not trainings.finished:
            start = time.perf_counter()
            trainings.use(build_prefix(prepared, run), time.perf_counter() - start)
        last = time.monotonic()
        for record in trainings.records():
            emit(record)
            halted = stop()
            if halted or record["kind"] == "evaluation" or time.monotonic() - last > checkpoint_seconds:
                save_checkpoint()
                last = time.monotonic()
            if halted:
                raise Interrupted(
                    f"stopped at step {trainings.step} of {trainings.steps}",
                    f"`textlora train --resume --output {run.parent}` goes on",
                )
        trainer = trainings.trainer
        prepared.model.load_trainable(trainer.best)
        result, finals = finish(prepared, trainings, run, prover)
        for record in finals:
            emit(record)
        end = {
            "kind": "end",
            "train_seconds": trainer.seconds,
            "cross_validation_seconds": trainings.fold_seconds,
            "total_seconds": time.perf_counter() - began,
            "tokens": trainer.tokens,
            "tokens_per_second": trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
            "peak_memory_bytes": peak_memory(prepared.device),
            "prefix_cache_bytes": sum(states.states.nbytes for states in trainings.prefix.values()),
            "epochs": trainer.epochs_done,
            "steps": trainer.step,
            "best_step": trainer.best_step,
            "best_metric": {"name": prepared.metric, "value": trainer.kept_score},
        } | ({"prover": prover.trouble} if prover.trouble else {})
        emit(end)
    lines = (
        (run / "metrics.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    )  # splitlines would cut at U+2028
    write_text(run / "report.html", render([json.loads(line) for line in lines], run.resolve().parent.name))
    result |= {key: value for key, value in end.items() if key != "kind"} | {"output": str(run.parent)}
    write_text(run / "result.json", json.dumps(result, ensure_ascii=False, indent=2) + "\n")
    checkpoint.unlink(missing_ok=True)
    return result


@contextlib.contextmanager
def _log(path: Path, keep_bytes: int) -> Iterator[Any]:
    """Open the log, cut back to what the checkpoint knew."""
    try:
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.truncate(keep_bytes)
            yield file
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}", "free some space, then --resume"
        ) from error


def _start(prepared: Prepared) -> None:
    """What a fresh run starts from: another adapter, or a head that knows the label frequencies."""
    source = prepared.config.init_adapter
    if source is None:
        start_head(prepared)
        return
    folder = read_adapter(source)
    mine = prepared.model.trainable()
    same_labels = folder.meta is not None and folder.meta.labels == prepared.schema.labels
    taken = dict(mine)
    given: Mapping[str, Any] = folder.tensors
    if folder.meta is not None:  # the head as it was trained
        in_order = {name: folder.tensors[name] for name in mine if name in folder.tensors}
        given = folder.tensors | scaled_head(
            shifted_head(in_order, folder.meta.fitted_shift, -1), folder.meta.fitted_temperature
        )
    for name, tensor in given.items():
        if ".lora_" in name or (name in mine and tensor.shape == mine[name].shape and same_labels):
            taken[name] = tensor
    if folder.meta is not None and folder.meta.base["hash"] != prepared.model.base_hash():
        raise UsageError(f"--init-adapter {source}: was trained on another base model")
    lost = [name for name in mine if ".lora_" in name and name not in folder.tensors]
    if lost or set(taken) != set(mine):
        raise UsageError(
            f"--init-adapter {source}: adapts other layers than this run",
            "give the same --target-modules, --layers and --use-dora",
        )
    try:
        prepared.model.load_trainable(taken)
    except AdapterError as error:
        raise UsageError(f"--init-adapter {source}: {error.message}", "give the same --r") from error
    if not same_labels:
        start_head(prepared)


def start_record(prepared: Prepared, trainings: Trainings) -> Record:
    """First line of the log: what is trained on what. `steps` are those of the last training, `all_steps`
    those of the folds too."""
    adapter, head = parameter_counts(prepared.model.trainable())
    settings = {item.name: getattr(prepared.config, item.name) for item in dataclasses.fields(TrainConfig)}
    return {
        "kind": "start",
        "model": prepared.files.id or prepared.files.folder.name,
        "path": prepared.model.path,
        "reason": prepared.reason,
        "executor": executor_of(prepared.model, prepared.reason).as_dict(),
        "problem_type": prepared.schema.problem_type,
        "labels": list(prepared.schema.labels),
        "metric": prepared.metric,
        "pooling": prepared.pooling,
        "pooling_reason": prepared.pooling_reason,
        "steps": trainings.final_steps,
        "folds": len(trainings.folds),
        "all_steps": trainings.steps,
        "device": prepared.device,
        "settings": {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in settings.items()
            if value is not None
        },
        "adapter_parameters": adapter,
        "head_parameters": head,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in ("textlora", "torch", "transformers", "peft", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found


def _fingerprint(prepared: Prepared) -> str:
    """Changes when resuming would no longer give the same adapter."""
    config = dataclasses.replace(prepared.config, output=None)
    rows = hashlib.sha256()
    for data in prepared.sets.values():
        rows.update(data.labels.tobytes())
        for encoded in data.encoded:
            rows.update(encoded.ids.tobytes())
    if prepared.folds is not None:
        rows.update(prepared.folds.tobytes())
    facts = [
        write_config(config),
        prepared.pooling,
        rows.hexdigest(),
        prepared.model.base_hash(),
        versions(),
        torch.get_num_threads(),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

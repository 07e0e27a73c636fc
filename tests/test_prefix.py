"""The frozen-prefix cache: the same losses and the same adapter as without it, bounded, nothing left behind."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support import settings

from textlora.core.config import TrainConfig
from textlora.core.errors import UsageError
from textlora.data.tokenize import pack
from textlora.training import hidden_state_cache
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import build_prefix
from textlora.training.prepare import Prepared, prepare
from textlora.training.run import run_training
from textlora.training.steps import MIN_PIECE, divide
from textlora.training.trainer import Trainer


def prepared_run(folder: Path, base: Path, **changes) -> Prepared:
    return prepare(settings(folder, base, **({"layers": "last:1"} | changes)))


@pytest.mark.parametrize(
    "changes",
    [{}, {"pooling": "mean"}, {"target_modules": ("all-linear",), "lora_dropout": 0.2}, {"use_dora": True}],
)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_losses_and_adapter_do_not_change(family, changes, tiny_base, tmp_path):
    records, tensors = [], []
    for cached in (False, True):
        run = prepared_run(tmp_path, tiny_base(family), **changes)
        states = build_prefix(run, tmp_path) if cached else {}
        assert set(states) == ({"train", "validation"} if cached else set())
        trainer = Trainer(run, states)
        start_head(run)
        records.append([record["loss"] for record in trainer.records()])
        tensors.append(run.model.trainable())
    np.testing.assert_allclose(*records, rtol=1e-6)
    assert all(torch.allclose(t, tensors[1][name], atol=1e-6) for name, t in tensors[0].items())


def test_states_are_those_of_the_text(tiny_base, tmp_path):
    """Each stored row against the encoder on that text alone, on real positions in the file."""
    run = prepared_run(tmp_path, tiny_base("bert"))
    states = build_prefix(run, tmp_path)
    for split, held in states.items():
        for i, encoded in enumerate(run.sets[split].encoded):
            alone = run.model.encoder.prefix(pack([encoded]), 1)
            np.testing.assert_allclose(
                held.states[held.bounds[i] : held.bounds[i + 1]], alone.numpy(), rtol=1e-5, atol=1e-6
            )


def test_nothing_is_kept_where_it_would_not_help(tiny_base, tmp_path, monkeypatch):
    base = tiny_base("bert")
    assert build_prefix(prepared_run(tmp_path, base, layers="all")) == {}
    assert build_prefix(prepared_run(tmp_path, base, epochs=1.0)) == {}
    run = prepared_run(tmp_path, base)
    needed = 4 * 32 * sum(int(run.sets[split].lengths.sum()) for split in ("train", "validation"))
    monkeypatch.setattr(hidden_state_cache, "LIMIT_BYTES", needed - 1)
    assert build_prefix(run) == {}
    monkeypatch.setattr(hidden_state_cache, "LIMIT_BYTES", needed)
    assert sum(held.states.nbytes for held in build_prefix(run).values()) == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * needed - 2))
    assert build_prefix(run) == {}


def test_a_disk_that_fills_up_costs_only_the_cache(tiny_base, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert build_prefix(prepared_run(tmp_path, tiny_base("bert")), tmp_path) == {}


def test_a_run_uses_it_and_leaves_no_file(tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"), layers="last:1")
    result = run_training(config)
    assert result["prefix_cache_bytes"] > 0
    assert sorted(p.name for p in (Path(config.output) / "run").iterdir() if p.name != ".lock") == [
        "config.toml", "metrics.jsonl", "report.html", "result.json",
    ]  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_is_divided_evenly_and_wholly(threads):
    lengths = np.random.default_rng(threads).integers(5, 512, 64)
    for rows in ([*range(8)], [*range(64)], [63, 1, 5]):
        pieces = divide(lengths, rows, threads, 2048)
        assert sorted(i for piece in pieces for i in piece) == sorted(rows)
        tokens = int(lengths[rows].sum())
        wanted = min(threads, tokens // MIN_PIECE)
        assert len(pieces) == min(len(rows), wanted * -(-tokens // (wanted * 2048)))
        work = [sum(lengths[i] * (1 + lengths[i] / 512) for i in piece) for piece in pieces]
        assert work == sorted(work, reverse=True)  # a worker that takes the last piece takes the smallest
        if len(rows) > 2 * len(pieces):
            assert max(work) < 1.5 * min(work)
    assert divide(np.array([5, 6, 7]), [0, 1, 2], threads, 2048) == [[2, 1, 0]]  # too little to share


def test_threads_side_by_side_give_the_gradient_of_one(tiny_base, tmp_path):
    """Two workers on halves of a step against one thread on all of it."""
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            run = prepare(settings(tmp_path, tiny_base("bert"), epochs=1.0, layers="all", batch_size=40))
            run = dataclasses.replace(run, sets={**run.sets, "train": longer(run.sets["train"])})
            trainer = Trainer(run)
            trainer.piece_tokens = 2048
            losses = [record["loss"] for record in trainer.records()]
        finally:
            torch.set_num_threads(1)
        found.append((losses, run.model.trainable()))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-6)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(tensor, found[1][1][name], rtol=1e-3, atol=1e-5)


def longer(data):
    """The same set, each text read four times over: enough tokens for two workers."""
    grow = lambda e: dataclasses.replace(e, ids=np.tile(e.ids, 4)[:48], type_ids=np.tile(e.type_ids, 4)[:48])
    return dataclasses.replace(data, encoded=[grow(e) for e in data.encoded])


def test_checkpointing_is_refused_off_the_packed_path(tiny_base, tmp_path):
    assert prepare(
        settings(tmp_path, tiny_base("bert"), gradient_checkpointing=True)
    ).model.gradient_checkpointing
    with pytest.raises(
        UsageError,
        match=r"^--gradient-checkpointing: only on the packed path; this base takes the reference path: ",
    ):
        prepare(
            TrainConfig(
                **dataclasses.asdict(settings(tmp_path, tiny_base("albert"), gradient_checkpointing=True))
            )
        )

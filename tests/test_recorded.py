"""Batches filled up to a few shapes, for recording on a GPU: the same losses and gradients. The device itself
is tried in test_gpu.py."""

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import settings

import textlora.model.attention
from textlora.data.tokenize import Encoded, pack
from textlora.training.cuda_graphs import Recordings, fill_up, step_of, up_to
from textlora.training.prepare import prepare
from textlora.training.trainer import Trainer


def batch_of(lengths, labels=None):
    return pack(
        [Encoded(np.full(n, 7, dtype=np.int32), np.zeros(n, dtype=np.int8), n) for n in lengths], labels
    )


@given(lengths=st.lists(st.integers(1, 512), min_size=1, max_size=70))
def test_filled_batch_keeps_its_texts(lengths):
    batch = batch_of(lengths, np.ones(len(lengths), dtype=np.int64))
    filled = fill_up(batch_of(lengths, np.ones(len(lengths), dtype=np.int64)))
    tokens, texts, longest, without_hidden = filled.shape
    bounds = filled.batch.layout.cu_seqlens
    assert without_hidden
    assert (bounds[0], bounds[-1], len(bounds)) == (0, tokens, texts + 1)
    assert torch.equal(bounds[: len(lengths) + 1].long(), batch.cu_seqlens)
    assert (bounds.diff() >= 1).all()
    assert bounds.diff().max() <= longest
    assert filled.counted.tolist() == [1.0] * len(lengths) + [0.0] * (texts - len(lengths))
    for name in ("ids", "positions", "type_ids", "labels"):
        mine, theirs = getattr(filled.batch, name), getattr(batch, name)
        assert torch.equal(mine[: len(theirs)], theirs)
        assert not mine[len(theirs) :].any()
    assert tokens - batch.tokens <= 64 + batch.tokens / 8 + 2 * (texts - len(lengths))


@pytest.mark.parametrize("count", [1, 7, 8, 15, 100, 2300, 20000])
def test_shapes_are_few(count):
    assert len({up_to(n, step_of(n, 512)) for n in range(count, 2 * count)}) <= max(17, 1 + count // 512)


def one_call(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
    """What `varlen_attn` computes, text by text."""
    parts = []
    for b in range(len(cu_seq_q) - 1):
        q, k, v = (
            t[cu[b] : cu[b + 1]].transpose(0, 1)
            for t, cu in ((query, cu_seq_q), (key, cu_seq_k), (value, cu_seq_k))
        )
        assert q.shape[1] <= max_q
        assert k.shape[1] <= max_k
        parts.append(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("task", ["single", "multi", "regression"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_filled_batch_gives_the_same_sums(tiny_base, tmp_path, monkeypatch, family, task, pooling):
    """With attention in one call, as on a GPU, against the batch as it is with the CPU's attention."""
    config = settings(
        tmp_path,
        tiny_base(family),
        task,
        pooling=pooling,
        class_weights="balanced" if task != "regression" else None,
    )
    prepared = prepare(config)
    trainer = Trainer(prepared)
    rows = list(range(11))
    plain = trainer._sums(trainer._batch(rows, "cpu"))
    monkeypatch.setattr(textlora.model.attention, "flash", lambda: one_call)
    for module in ("attention", "encoder"):
        monkeypatch.setattr(f"textlora.model.{module}.in_one_call", lambda x: True)
    filled = fill_up(trainer._batch(rows, "cpu"))
    found = trainer._sums(filled.batch, filled.counted)
    for mine, theirs in zip(found, plain, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)


def test_recordings_add_what_they_are_given(tiny_base, tmp_path, monkeypatch):
    """A stand-in for CUDA graphs: what is recorded does not run, a replay runs it on what lies where it was
    recorded."""

    class Graph:
        def replay(self):
            self.job()

    @contextlib.contextmanager
    def recording(graph, pool):
        before, plain = [total.clone() for total in recordings._sums], recordings._add
        monkeypatch.setattr(recordings, "_add", lambda filled: setattr(graph, "job", lambda: plain(filled)))
        yield
        monkeypatch.setattr(recordings, "_add", plain)
        assert all(map(torch.equal, before, recordings._sums))

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    trainer = Trainer(prepare(settings(tmp_path, tiny_base("bert"))))
    parts = [list(range(at, at + 4)) for at in range(0, 36, 4)]
    expected = [trainer._sums(trainer._batch(rows, "cpu")) for rows in parts]
    monkeypatch.setattr(textlora.model.attention, "flash", lambda: one_call)
    for module in ("attention", "encoder"):
        monkeypatch.setattr(f"textlora.model.{module}.in_one_call", lambda x: True)
    recordings = Recordings(
        trainer._sums, [torch.zeros(()), *(torch.zeros_like(t) for t in trainer.parameters.values())]
    )
    fresh = lambda: [
        fill_up(trainer._batch(rows, "cpu")) for rows in parts
    ]  # a recording keeps and overwrites its own
    filled = fresh()
    assert (
        len({one.shape for one in filled}) < len(parts) // 2
    )  # some shapes come three times: run, recorded, replayed
    for one, want in zip(filled, expected, strict=True):
        recordings.clear()
        recordings.add(one)
        for mine, theirs in zip(recordings.sums, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    assert recordings._kept
    recordings.clear()
    for one in fresh():
        recordings.add(one)
    for mine, *theirs in zip(recordings.sums, *expected, strict=True):
        torch.testing.assert_close(mine, sum(theirs), rtol=2e-4, atol=5e-5)

"""What a CUDA device does differently: attention in one call, recorded steps, bfloat16. `pytest -m gpu` runs
it there; what a CPU can do too runs on both, and test_recorded.py has the rest by stand-ins."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import log_of, settings, single_rows, trained

from textlora import AdapterEngine, TextClassifier
from textlora.compare.full_finetuning import FullFinetuningModel
from textlora.data.tokenize import Encoded, pack
from textlora.model.attention import attend, attend_plain, in_one_call
from textlora.training.hidden_state_cache import build_prefix
from textlora.training.prepare import prepare
from textlora.training.run import run_training
from textlora.training.trainer import Trainer

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
on_a_gpu = lambda test: CUDA[0](CUDA[1](test))
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]
LENGTHS = [1, 1, 2, 3, 3, 7, 16, 17, 40, 300]


def batch_of(lengths):
    generator = np.random.default_rng(0)
    return pack(
        [
            Encoded(generator.integers(5, 90, n).astype(np.int32), np.zeros(n, dtype=np.int8), n)
            for n in lengths
        ],
        device="cuda",
    )


def losses_of(config):
    return [record["loss"] for record in log_of(Path(config.output)) if record["kind"] == "step"]


@on_a_gpu
@pytest.mark.parametrize("width", [32, 384, 768])
@pytest.mark.parametrize("first_only", [False, True])
def test_attention_in_one_call_is_plain_attention(width, first_only):
    """Against float32 on the same numbers, rounded to bfloat16 beforehand: outputs and gradients."""
    layout = batch_of(LENGTHS).layout
    generator = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").bfloat16().requires_grad_()
    inputs = [
        draw(sum(LENGTHS), (2 if first_only else 3) * width),
        *([draw(len(LENGTHS), width)] if first_only else []),
    ]
    wide = [x.detach().float().requires_grad_() for x in inputs]
    assert in_one_call(inputs[0])
    assert not in_one_call(wide[0])
    fast, slow = (
        way(x[0], x[1] if first_only else None, layout, 4)
        for way, x in ((attend, inputs), (attend_plain, wide))
    )
    cotangent = torch.randn(slow.shape, generator=generator, device="cuda").bfloat16()
    pairs = [
        (fast, slow),
        *zip(
            torch.autograd.grad(fast, inputs, cotangent),
            torch.autograd.grad(slow, wide, cotangent.float()),
            strict=True,
        ),
    ]
    for mine, theirs in pairs:
        assert (mine.float() - theirs).norm() < 1e-2 * theirs.norm()


@pytest.mark.parametrize("task", ["single", "multi", "regression", "pairs"])
@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("device", DEVICES)
def test_trained_in_bfloat16_and_read_on_a_cpu(tiny_base, tmp_path, task, pooling, device):
    """bfloat16 training learns, and the folder gives the same logits on both devices in float32, nearly so in
    bfloat16."""
    config = settings(
        tmp_path,
        tiny_base("bert"),
        task,
        device=device,
        precision="bfloat16",
        pooling=pooling,
        epochs=6.0,
        lora_dropout=0.1,
    )
    run_training(config)
    losses = losses_of(config)
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    texts = [text for text, _ in single_rows(16)]
    pairs = texts[::-1] if task == "pairs" else None
    here = TextClassifier.load(config.output, device="cpu").logits(texts, pairs)
    for precision, tolerance in (("float32", 1e-4), ("bfloat16", 5e-2)):
        there = TextClassifier.load(config.output, device=device, precision=precision).logits(texts, pairs)
        np.testing.assert_allclose(there, here, rtol=0, atol=tolerance * max(1, np.abs(here).max()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_batch_in_bfloat16_is_each_adapter_alone(tiny_base, tmp_path_factory, precision, device):
    first, second = (trained(tiny_base, tmp_path_factory, **changes) for changes in ({}, {"use_dora": True}))
    engine = AdapterEngine(str(tiny_base("bert")), device=device, precision=precision)
    for name, one in (("first", first), ("second", second)):
        engine.add(one.folder, name)
    texts, names = [text for text, _ in single_rows(24)], ["first", "second"] * 12
    found = engine.predict(texts, names)
    tolerance = 1e-4 if precision == "float32" else 5e-2
    for one, name in ((first, "first"), (second, "second")):
        alone = TextClassifier.load(one.folder, device="cpu").predict(texts)
        for k in range(len(texts)):
            if names[k] == name:
                np.testing.assert_allclose(
                    found[k].logits,
                    alone[k].logits,
                    rtol=0,
                    atol=tolerance * max(1, max(map(abs, alone[k].logits))),
                )


@on_a_gpu
@pytest.mark.parametrize("part", ["all", "biases", "lora", "frozen below"])
def test_recorded_steps_are_steps(tiny_base, tmp_path, part):
    """The same losses as without recordings, for LoRA, the base itself, and hidden states that were computed
    before."""
    changes = {"layers": "last:1"} if part == "frozen below" else {}
    losses = []
    for on in (True, False):
        prepared = prepare(
            settings(tmp_path / str(on), tiny_base("bert"), device="cuda", epochs=6.0, **changes)
        )
        if part in ("all", "biases"):
            prepared = replace(
                prepared, model=FullFinetuningModel(prepared.model.base, part, 2, device="cuda")
            )
        trainer = Trainer(prepared, build_prefix(prepared))
        assert bool(trainer.prefix) == (part == "frozen below")
        if not on:
            trainer.recordings = None
        losses.append([record["loss"] for record in trainer.records() if record["kind"] == "step"])
        assert not on or trainer.recordings._kept
    np.testing.assert_allclose(*losses, rtol=0, atol=3e-2)


@on_a_gpu
def test_gradient_checkpointing_on_a_gpu(tiny_base, tmp_path):
    """The same losses with blocks computed again."""
    runs = [
        settings(
            tmp_path / str(on), tiny_base("bert"), device="cuda", lora_dropout=0.1, gradient_checkpointing=on
        )
        for on in (False, True)
    ]
    for config in runs:
        run_training(config)
    np.testing.assert_allclose(*map(losses_of, runs), rtol=0, atol=2e-2)

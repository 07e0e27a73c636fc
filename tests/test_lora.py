"""The equation: fused against plain, in float64; dropout; DoRA; what `--target-modules` and `--layers` mean."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from textlora.core.config import LoraConfig
from textlora.core.errors import UsageError
from textlora.model.lora import Lora, delta, init_lora, lora_linear, reference_linear, weight_norm
from textlora.model.targets import DEFAULT_TARGETS, resolve_layers, resolve_targets


def draw(*shape, seed=0, grad=True):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_(grad)


def make(parts, inner=6, out=12, dora=(), dropout=0.0):
    """(x, W, b, loras): `parts` are (first row, rows, r, s); `dora` says which parts have a magnitude."""
    x = draw(7, inner, seed=1)
    weight = draw(out, inner, seed=2, grad=False)
    bias = draw(out, seed=3, grad=False)
    loras = []
    for k, (start, rows, r, scaling) in enumerate(parts):
        lora = Lora(draw(r, inner, seed=10 + k), draw(rows, r, seed=20 + k), scaling, dropout=dropout)
        if k in dora:
            lora = replace(lora, magnitude=(draw(rows, seed=30 + k, grad=False).abs() + 0.5).requires_grad_())
        loras.append((start, lora))
    return x, weight, bias, loras


def leaves(x, loras):
    return [x, *(t for _, lora in loras for t in (lora.A, lora.B, lora.magnitude) if t is not None)]


LAYOUTS = {
    "whole": [(0, 12, 2, 0.7)],
    "query-value": [(0, 4, 2, 0.7), (8, 4, 3, 1.9)],
    "middle": [(4, 4, 2, -0.5)],
    "all": [(0, 4, 1, 0.7), (4, 4, 2, 1.1), (8, 4, 4, 2.0)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fused_gradient_check(layout):
    x, weight, bias, loras = make(LAYOUTS[layout])

    def fused(x, *pairs):
        changed = [
            (start, replace(lora, A=pairs[2 * k], B=pairs[2 * k + 1]))
            for k, (start, lora) in enumerate(loras)
        ]
        return lora_linear(x, weight, bias, changed)

    assert torch.autograd.gradcheck(fused, leaves(x, loras))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dora", [(), (0,), (0, 1, 2)], ids=["lora", "mixed", "dora"])
def test_fused_is_the_formula(layout, dora):
    x, weight, bias, loras = make(LAYOUTS[layout], dora=dora)
    results = [lora_linear(x, weight, bias, loras), reference_linear(x, weight, bias, loras)]
    cotangent = draw(7, 12, seed=9, grad=False)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(
        *(torch.autograd.grad((y * cotangent).sum(), leaves(x, loras)) for y in results), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_formula_by_hand():
    """y = x W^T + b + s (x A^T) B^T, and DoRA's c (x W^T + s (x A^T) B^T) + b, written out."""
    x, weight, bias, [(_, lora)] = make(LAYOUTS["whole"], dora=(0,))
    raw = x @ weight.T + 0.7 * (x @ lora.A.T) @ lora.B.T
    lengths = (weight + 0.7 * lora.B @ lora.A).square().sum(1).sqrt()
    plain = replace(lora, magnitude=None)
    torch.testing.assert_close(reference_linear(x, weight, bias, [(0, plain)]), raw + bias)
    torch.testing.assert_close(
        reference_linear(x, weight, bias, [(0, lora)]),
        lora.magnitude / lengths * raw + bias,
        rtol=1e-6,
        atol=1e-6,
    )
    assert torch.equal(lora_linear(x, weight, bias, []), F.linear(x, weight, bias))


def test_dora_gradient_check_in_x_and_magnitude():
    """The norm is held constant, so only x and m have gradients a difference quotient can confirm."""
    x, weight, bias, [(start, lora)] = make(LAYOUTS["middle"], dora=(0,))
    fused = lambda x, m: lora_linear(x, weight, bias, [(start, replace(lora, magnitude=m))])
    assert torch.autograd.gradcheck(fused, [x, lora.magnitude])


def test_no_gradient_for_x_where_none_is_asked():
    x, weight, bias, loras = make(LAYOUTS["query-value"])
    y = lora_linear(x.detach(), weight, bias, loras)
    want = torch.autograd.grad(reference_linear(x, weight, bias, loras).sum(), leaves(x, loras)[1:])
    for mine, theirs in zip(torch.autograd.grad(y.sum(), leaves(x, loras)[1:]), want, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dora", [(), (0,)], ids=["lora", "mixed"])
def test_dropout_is_on_loras_input_only(dora):
    """Replay the generator: each slice has its own mask on its input, scaled by 1 / (1 - p), W's path has
    none; gradients too."""
    x, weight, bias, loras = make(LAYOUTS["query-value"], dora=dora, dropout=0.4)
    replay = torch.Generator().manual_seed(3)
    masks = [(torch.rand(x.shape, generator=replay) >= 0.4).double() / 0.6 for _ in loras]
    y = lora_linear(x, weight, bias, loras, torch.Generator().manual_seed(3))
    expected = x @ weight.T
    for mask, (start, lora) in zip(masks, loras, strict=True):
        change = lora.scaling * ((x * mask) @ lora.A.T) @ lora.B.T
        expected = expected + F.pad(change, (start, 12 - start - lora.B.shape[0]))
    for start, lora in loras:
        if lora.magnitude is not None:
            rows = slice(start, start + lora.B.shape[0])
            scale = torch.ones(12, dtype=torch.float64)
            scale = scale.index_put(
                (torch.arange(start, rows.stop),), lora.magnitude / weight_norm(weight[rows], lora)
            )
            expected = expected * scale
    expected = expected + bias
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    cotangent = draw(7, 12, seed=9, grad=False)
    for mine, theirs in zip(
        *(torch.autograd.grad((r * cotangent).sum(), leaves(x, loras)) for r in (y, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_dropout_keeps_the_mean():
    """Over many masks the output is the one without dropout, and a share p of the inputs is dropped."""
    ones = torch.ones(4000, 16)
    lora = Lora(torch.eye(16), torch.eye(16), 1.0, dropout=0.25)
    y = lora_linear(ones, torch.zeros(16, 16), torch.zeros(16), [(0, lora)], torch.Generator().manual_seed(0))
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.75))
    assert abs((y == 0).float().mean() - 0.25) < 0.01
    assert abs(y.mean() - 1) < 0.01
    assert torch.equal(
        lora_linear(ones, torch.zeros(16, 16), torch.zeros(16), [(0, lora)]), ones
    )  # no generator: no dropout


def test_low_precision_input_gives_float32_gradients():
    x, weight, bias, loras = make(LAYOUTS["query-value"])
    half = [
        (
            s,
            replace(
                lora, A=lora.A.detach().float().requires_grad_(), B=lora.B.detach().float().requires_grad_()
            ),
        )
        for s, lora in loras
    ]
    y = lora_linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16(), half)
    assert y.dtype == torch.bfloat16
    exact = torch.autograd.grad(lora_linear(x, weight, bias, loras).sum(), leaves(x, loras)[1:])
    for (name, mine), theirs in zip(
        enumerate(torch.autograd.grad(y.sum(), leaves(x, half)[1:])), exact, strict=True
    ):
        assert mine.dtype == torch.float32
        assert (mine - theirs).norm() < 0.03 * theirs.norm(), name


@pytest.mark.parametrize("dora", [(), (0,)], ids=["lora", "dora"])
def test_merging_gives_the_same_layer(dora):
    x, weight, bias, loras = make(LAYOUTS["whole"], dora=dora)
    merged = weight + delta(weight, loras[0][1])
    torch.testing.assert_close(
        F.linear(x, merged, bias), reference_linear(x, weight, bias, loras), rtol=1e-6, atol=1e-6
    )
    if dora:
        torch.testing.assert_close(merged.norm(dim=1), loras[0][1].magnitude.detach(), rtol=1e-6, atol=1e-6)


def test_start_values():
    """A uniform within 1 / sqrt(in), B zero: PEFT's kaiming_uniform_(a = sqrt(5))."""
    A, B = init_lora(6, 400, 8, torch.Generator().manual_seed(0))
    assert A.shape == (8, 400)
    assert A.abs().max() <= 1 / 20
    assert abs(A.std() - 1 / 20 / math.sqrt(3)) < 1e-3
    assert not B.any()
    assert B.shape == (6, 8)
    assert torch.equal(A, init_lora(6, 400, 8, torch.Generator().manual_seed(0))[0])


def test_scaling():
    assert LoraConfig(r=16, lora_alpha=8).scaling == 0.5
    assert LoraConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


MODULES = [
    (i, f"bert.encoder.layer.{i}.{name}", shape)
    for i in range(12)
    for name, shape in (
        ("attention.self.query", (8, 8)),
        ("attention.self.value", (8, 8)),
        ("output.dense", (8, 32)),
        ("extra", (4, 32)),
    )
]


def test_layers():
    assert resolve_layers("all", 3) == [0, 1, 2]
    assert resolve_layers("last:2", 12) == [10, 11]
    assert resolve_layers("last:12", 12) == list(range(12))
    assert resolve_layers("5,0,5,11", 12) == [0, 5, 11]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", "--layers first: not all, last:K or a list such as 0,1,5"),
        ("last:x", "--layers last:x: not all, last:K or a list such as 0,1,5"),
        ("1,,2", "--layers 1,,2: not all, last:K or a list such as 0,1,5"),
        ("", "--layers : not all, last:K or a list such as 0,1,5"),
        ("last:0", "--layers last:0: the base model has blocks 0 to 11"),
        ("last:13", "--layers last:13: the base model has blocks 0 to 11"),
        ("3,12", "--layers 3,12: the base model has blocks 0 to 11"),
        ("-1", "--layers -1: the base model has blocks 0 to 11"),
    ],
)
def test_layers_refused(layers, message):
    with pytest.raises(UsageError) as caught:
        resolve_layers(layers, 12)
    assert str(caught.value) == message


def test_targets():
    pick = lambda **settings: resolve_targets(LoraConfig(r=2, **settings), MODULES, 12)
    assert pick() == [name for _, name, _ in MODULES if name.endswith(("query", "value"))]
    assert pick(target_modules=("all-linear",)) == [name for _, name, _ in MODULES]
    assert pick(target_modules=("dense",), layers="1") == [
        "bert.encoder.layer.1.output.dense"
    ]  # block 1, not 10 or 11
    assert pick(target_modules=("value", "self.query"), layers="last:1") == [
        "bert.encoder.layer.11.attention.self.query", "bert.encoder.layer.11.attention.self.value",
    ]  # fmt: skip
    assert pick(target_modules=("bert.encoder.layer.3.extra",)) == ["bert.encoder.layer.3.extra"]
    assert "query" in DEFAULT_TARGETS


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (
            {"target_modules": ("query", "qeury")},
            ["--target-modules qeury: matches no dense layer", "there are: attention.self.query"],
        ),
        ({"target_modules": ("uery",)}, ["--target-modules uery: matches no dense layer"]),
        (
            {"target_modules": ("bert.encoder.layer.3.extra",), "layers": "4"},
            ["--layers 4 leaves no layer to adapt"],
        ),
        (
            {"r": 9},
            ["--r 9: larger than bert.encoder.layer.0.attention.self.query, which is 8 x 8; use at most 8"],
        ),
        (
            {"r": 5, "target_modules": ("all-linear",)},
            ["--r 5: larger than bert.encoder.layer.0.extra, which is 4 x 32; use at most 4"],
        ),
    ],
)
def test_targets_refused(settings, parts):
    with pytest.raises(UsageError) as caught:
        resolve_targets(LoraConfig(**({"r": 2} | settings)), MODULES, 12)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts)


def test_an_architecture_without_default_names_what_there_is():
    with pytest.raises(UsageError, match=r"no known default for --target-modules; name some of: up_proj$"):
        resolve_targets(LoraConfig(r=1), [(0, "net.layers.0.up_proj", (4, 4))], 1)

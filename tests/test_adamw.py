"""The optimizer against torch's own."""

import torch

from textlora.training.adamw import AdamW

SHAPES = ((8, 48), (48, 8), (48,), (6, 48), (5000,))


def test_values_and_moments_are_those_of_torch_to_the_bit():
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in SHAPES]
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in start] for _ in range(2))
    groups = lambda tensors: [
        {"params": tensors[:2], "weight_decay": 0.1, "lr": 0.0},
        {"params": tensors[2:], "weight_decay": 0.0, "lr": 0.0},
    ]
    mine, torchs = AdamW(groups(ours)), torch.optim.AdamW(groups(theirs), fused=True)
    for step in range(5):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            gradient = (
                None
                if number == 4 or (number == 3 and step == 2)
                else torch.randn(a.shape, generator=generator)
            )
            a.grad, b.grad = gradient, None if gradient is None else gradient.clone()
        for optimizer in (mine, torchs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            optimizer.step()
            optimizer.zero_grad()
        assert all(tensor.grad is None for tensor in ours)
    for a, b, first in zip(ours, theirs, start, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, first) == (a is ours[4])
        assert (a in mine.state) == (b in torchs.state)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert a is ours[4] or torch.equal(mine.state[a][key], torchs.state[b][key])
    assert [float(mine.state[tensor]["step"]) for tensor in ours[:4]] == [5, 5, 5, 4]

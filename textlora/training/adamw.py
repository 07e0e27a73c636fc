"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) as torch's fused operation computes it, without
`torch.optim`.

A first step of `torch.optim.AdamW` imports torch's compiler: 800 modules, a second and 66 MiB, none of which
is used.
"""

from typing import Any

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8


class AdamW:
    """Names as in `torch.optim`, values to the bit.

    Attributes:
        param_groups: dicts of `params`, `lr`, `weight_decay` and whatever else a caller keeps there.
        state: of each parameter that had a gradient: `step` (), `exp_avg` and `exp_avg_sq` of its shape,
            float32, on its device.
    """

    def __init__(self, groups: list[dict[str, Any]]):
        self.param_groups = groups
        self.state: dict[Tensor, dict[str, Tensor]] = {}

    def step(self) -> None:
        """Change every parameter that has a gradient."""
        with torch.no_grad():
            for group in self.param_groups:
                tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
                if not tensors:
                    continue
                states = [self.state.get(tensor) or self._start(tensor) for tensor in tensors]
                steps = [state["step"] for state in states]
                torch._foreach_add_(steps, 1)  # type: ignore[attr-defined]
                torch._fused_adamw_(  # type: ignore[attr-defined]
                    tensors, [tensor.grad for tensor in tensors], [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states],
                    [], steps, lr=group["lr"], beta1=BETAS[0], beta2=BETAS[1], weight_decay=group["weight_decay"], eps=EPS, amsgrad=False, maximize=False,
                )  # fmt: skip

    def _start(self, tensor: Tensor) -> dict[str, Tensor]:
        moments = {key: torch.zeros_like(tensor, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
        self.state[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=tensor.device), **moments}
        return self.state[tensor]

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for tensor in group["params"]:
                tensor.grad = None

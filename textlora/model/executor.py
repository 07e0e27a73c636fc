"""What runs a model's forward here, by a name that a run, a server and a benchmark state."""

from dataclasses import asdict, dataclass

import torch

from textlora.kernels.devices import Runs
from textlora.kernels.library import instruction_sets, why_not


@dataclass(frozen=True)
class Executor:
    """Two runs with equal executors do the same arithmetic in the same order.

    Attributes:
        name: "kernels" (all blocks in one call of C), "torch" or "transformers + peft".
        instructions: of the kernels, such as "AVX-512"; empty where none are in use.
        reason: why it is not "kernels"; None where it is.
    """

    name: str
    instructions: str
    reason: str | None

    def __str__(self) -> str:
        about = self.instructions or self.reason
        return f"{self.name} ({about})" if about else self.name

    def as_dict(self) -> dict[str, str | None]:
        return asdict(self)


def executor_of(model: Runs, reason: str | None = None) -> Executor:
    """Of a model, or of an encoder that several share.

    Args:
        reason: why the model is on the reference path, where it is.
    """
    if reason is not None:
        return Executor("transformers + peft", "", reason)
    if torch.device(model.device).type != "cpu":
        return Executor("torch", "", f"kernels are for CPUs, this is {torch.device(model.device).type}")
    if model.fused_stack:
        return Executor("kernels", instruction_sets(), None)
    missing = why_not()
    return Executor(
        "torch",
        "" if missing else instruction_sets(),
        missing or "the kernels have no blocks of this kind in this precision",
    )

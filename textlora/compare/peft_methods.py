"""Methods of peft that scale activations or prepend learned vectors, behind the interface of
`interface.Model`: for `textlora compare`.

IA3 (arXiv 2205.05638) multiplies keys, values and the feed-forward's input by learned vectors; prefix tuning
(arXiv 2101.00190) learns keys and values that every block attends to; prompt tuning (arXiv 2104.08691) learns
embeddings in front of the text.
"""

from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from torch import nn

from textlora.core.config import LoraConfig
from textlora.core.errors import UsageError
from textlora.model.families import FAMILIES
from textlora.model.reference_model import ReferenceModel, load_base, quietly, seeded
from textlora.model.targets import lies_in

KINDS = ("ia3", "prefix", "prompt")


class PeftMethodModel(ReferenceModel):
    """transformers + peft with one of `KINDS`. Make one with `open`."""

    @classmethod
    def open(
        cls, kind: str, tokens: int, folder: Path, num_labels: int, *, pooling: str = "first", seed: int = 0, device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "PeftMethodModel":  # fmt: skip
        """A fresh classifier on the base in `folder`.

        Args:
            tokens: learned positions of a prefix or prompt; without meaning for "ia3".
            pooling: as `ReferenceModel.create` has it; what prepends runs peft's own classifier, and "first"
                is all there is.

        Raises:
            ModelError: as `ReferenceModel.create`.
            UsageError: peft has no such method for this architecture, or mean pooling is asked of a prefix or
                prompt.
        """
        if pooling not in poolings(kind):
            raise UsageError(f"'{kind}' has no mean pooling", "leave out --pooling")
        with seeded(seed), quietly():
            base = load_base(Path(folder), num_labels, pooling)
            about = base.net.config
            if kind == "prompt" and getattr(about, "embedding_size", about.hidden_size) != about.hidden_size:
                raise UsageError(
                    f"peft has no prompt tuning for a {about.model_type} whose embeddings are narrower than its blocks"
                )
            shared = {"task_type": None if pooling == "mean" else "SEQ_CLS", "inference_mode": False}
            config = {
                "ia3": lambda: peft.IA3Config(
                    **shared, **_scaled_layers(about.model_type), modules_to_save=list(base.heads)
                ),
                "prefix": lambda: peft.PrefixTuningConfig(**shared, num_virtual_tokens=tokens),
                "prompt": lambda: peft.PromptTuningConfig(**shared, num_virtual_tokens=tokens),
            }[kind]()
            try:
                net = peft.get_peft_model(base.net, config)
            except (ValueError, KeyError) as error:
                raise UsageError(
                    f"peft has no {kind} for a {about.model_type} ({' '.join(str(error).split())[:200]})"
                ) from error
        if kind != "ia3":
            net = _Whole(net)
        for name, parameter in net.named_parameters():
            short = (
                name.removeprefix("inner.base_model.")
                .removeprefix("base_model.model.")
                .removeprefix(base.prefix + ".")
            )
            if (
                lies_in(short, base.heads) and ".original_module." not in name
            ):  # peft knows `classifier` and `score` only
                parameter.requires_grad_(True)
        model = cls(base, net, LoraConfig(), [], [], pooling, device, dtype)
        if kind != "ia3":
            model.max_length -= tokens
        heads = {
            name: tensor
            for name, tensor in model._trainable.items()
            if any(f".{head}." in name for head in base.heads)
        }
        model._trainable = {
            name: tensor for name, tensor in model._trainable.items() if name not in heads
        } | heads
        return model


def poolings(kind: str) -> tuple[str, ...]:
    """What the head of a method may see."""
    return ("first", "mean") if kind == "ia3" else ("first",)


def _scaled_layers(model_type: str) -> dict[str, list[str]]:
    """Layers that peft scales in BERT, for every architecture of the packed path; peft itself knows few.
    Empty: as peft has it."""
    family = next((f for f in FAMILIES if model_type in f.model_types), None)
    if family is None:
        return {}
    key, value, output = (family.block[slot] for slot in ("key", "value", "output"))
    return {"target_modules": [key, value, output], "feedforward_modules": [output]}


class _Whole(nn.Module):
    """A peft model whose own forward must run, because it prepends, where `ReferenceModel` looks for the
    model inside."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    @property
    def base_model(self) -> SimpleNamespace:
        return SimpleNamespace(model=self.inner)

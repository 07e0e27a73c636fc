"""An adapter's parts under transformers' names, and transformers models in memory to merge them into.

`merge`, `extract`, `combine`, `convert` and `export` share these. Merging makes new weights `W + delta` in
float64 and rounds them once.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from textlora.adapters.folder import AdapterMeta
from textlora.core.config import REGRESSION
from textlora.core.errors import AdapterError, ModelError, StorageError, UsageError
from textlora.model.adapter_tensors import PREFIX, scaled_head
from textlora.model.interface import Model
from textlora.model.lora import Lora, delta
from textlora.model.reference_model import quietly

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# key in config.json for what transformers has no place for; transformers keeps it and reads on
NOTE = "textlora"


def temperature_of(meta: AdapterMeta) -> float:
    """What a reader of the adapter divides its logits by; 1 for regression, whose values are their own
    scores."""
    return 1.0 if meta.problem_type == REGRESSION else meta.temperature


def settled(meta: AdapterMeta) -> AdapterMeta:
    """The same adapter once its temperature is divided into the head: what readers without a place for one
    need."""
    applied = temperature_of(meta)
    shift = None if meta.fitted_shift is None else tuple(value / applied for value in meta.fitted_shift)
    return replace(
        meta, temperature=1.0, fitted_temperature=meta.fitted_temperature * applied, fitted_shift=shift
    )


def named_loras(model: Model) -> dict[str, Lora]:
    """Full transformers module name -> LoRA on it, float64 on the CPU."""
    tensors, made = model.trainable(), {}
    for full in model.target_modules:
        parts = [
            tensors.get(f"{PREFIX}{full}.{part}")
            for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        ]
        A, B, magnitude = (None if part is None else part.detach().to("cpu", torch.float64) for part in parts)
        made[full] = Lora(A, B, model.lora.scaling_of(full), magnitude)
    return made


def trained_whole(model: Model, temperature: float = 1.0) -> dict[str, Tensor]:
    """Transformers tensor name -> tensor the adapter has its own of, float64 on the CPU: head, and biases or
    modules that were trained in full.

    Args:
        temperature: divides the head's last layer, which stands last, and so every logit.
    """
    tensors = {name: tensor for name, tensor in model.trainable().items() if ".lora_" not in name}
    plain = {
        name.removeprefix(PREFIX).replace(".base_layer.", "."): t.detach().to("cpu", torch.float64)
        for name, t in tensors.items()
    }
    return scaled_head(plain, 1 / temperature)


def load_net(folder: Path, num_labels: int, whole: bool = False) -> nn.Module:
    """The transformers classification model of a folder, float32.

    Args:
        whole: every tensor must come from the files, as for a finished classifier; else a missing head is
            drawn at random.

    Raises:
        ModelError: transformers cannot load it, or with `whole` some tensor is missing or of another shape.
    """
    try:
        with quietly(), torch.random.fork_rng([]):
            net, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(folder), num_labels=num_labels, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        AttributeError,
        ImportError,
        SafetensorError,
    ) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(
            f"{folder}: transformers cannot load it as a classifier ({first.rstrip('.:')})"
        ) from error
    lacking = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if whole and lacking:
        raise ModelError(
            f"{folder}: tensor '{lacking[0]}' is missing or of another shape ({len(lacking)} in all)",
            "is this a whole classifier?",
        )
    return net.eval()


def merge_into(net: nn.Module, model: Model, dtype: torch.dtype, temperature: float = 1.0) -> int:
    """Put the head and `W + delta`, computed in float64 and rounded once to `dtype`, into a float32
    transformers model of the base.

    Args:
        temperature: what the logits of `model` are divided by; it goes into the head.

    Returns:
        the number of layers that LoRA changed.

    Raises:
        UsageError: a value does not fit into `dtype`.
        AdapterError: the adapter has a tensor that the transformers model has no place for.
    """
    loras, trained = named_loras(model), trained_whole(model, temperature)
    parameters = dict(net.named_parameters())
    for name in (*trained, *(f"{full}.weight" for full in loras)):
        if name not in parameters:
            raise AdapterError(f"{type(net).__name__} has no tensor '{name}' to merge the adapter into")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = parameter.double()
            full = name.removesuffix(".weight")
            if name in trained:
                value = trained[name]
            elif full != name and full in loras:
                value = value + delta(value, loras[full])
            rounded = value.to(dtype)
            if not torch.isfinite(rounded).all():
                raise UsageError(
                    f"--dtype {str(dtype).removeprefix('torch.')}: tensor '{name}' holds {value.abs().max():.3g}, which does not fit",
                    "choose bfloat16 or float32",
                )
            parameter.copy_(rounded)
    return len(loras)


def save_net(net: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write `model.safetensors` as transformers names its tensors. Raises StorageError when the disk is full."""
    try:
        net.save_pretrained(
            str(folder),
            state_dict={name: tensor.to(dtype) for name, tensor in net.state_dict().items()},
            max_shard_size="100GB",
        )
    except SafetensorError as error:
        raise StorageError(
            f"cannot write {folder}: {error}", "free some space or choose another folder"
        ) from error


def net_logits(net: nn.Module, inputs: Sequence[dict[str, list[int]]]) -> np.ndarray:
    """Logits (N, C) of a transformers model, one row at a time."""
    with torch.inference_mode():
        return np.stack(
            [
                net(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0].float().numpy()
                for row in inputs
            ]
        )

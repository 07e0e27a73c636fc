"""A mean-pooled classifier as one folder for two readers, neither of which needs textlora.

For sentence-transformers it is Transformer, Pooling (mean) and Dense (identity), and `encode` gives the
logits. For transformers it is the same encoder in `model.safetensors` with the dense layer beside it, and a
small modelling file that `trust_remote_code=True` lets it import. Without that, transformers takes the
family's own class: tensors under the names of that class's head, of a shape that no head has, make it refuse
(docs/decisions/mean-folder.md).
"""

import inspect
import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from textlora.adapters.folder import AdapterMeta
from textlora.core.errors import ModelError, StorageError, UsageError
from textlora.core.files import write_text
from textlora.model.base import weight_files
from textlora.model.reference_model import MeanPooled, quietly

# of the dense layer in model.safetensors: readers of bases pass over `classifier.`, and no family has this
# name
HEAD = "classifier.mean"
MODELLING_FILE = "modeling_mean_pooled.py"
_VERSIONS = {
    "sentence_transformers": "2.3.0"
}  # the first that reads safetensors; a newer one here would make older ones warn
_MODULES = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
_MODELLING = string.Template('''\
"""$encoder, the mean of its tokens and one dense layer: what a mean-pooled adapter of textlora computes, merged."""

import torch
from torch import nn
from transformers import $encoder, $parent
from transformers.modeling_outputs import SequenceClassifierOutput


class $name($parent):
    _keys_to_ignore_on_load_unexpected = [r"^(?!$prefix\\.|$head\\.)"]  # empty tensors that make $family refuse these files

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.$prefix = $encoder(config$options)
        self.classifier = nn.ModuleDict({"mean": nn.Linear(config.hidden_size, config.num_labels)})
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **inputs):
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        states = self.$prefix(input_ids, attention_mask=attention_mask, **inputs)[0].float()
        mask = attention_mask.unsqueeze(-1)
        dense = self.classifier["mean"]
        return SequenceClassifierOutput(logits=dense(((states * mask).sum(1) / mask.sum(1)).to(dense.weight.dtype)))
''')


def load_pooled(folder: Path, num_labels: int, whole: bool = False) -> MeanPooled:
    """The encoder of a folder under a dense layer over the mean of its tokens, float32; names as in a
    classification model of transformers.

    The pooler stays where the checkpoint has one and is left out where it has none. No code of the folder is
    run.

    Args:
        whole: take the dense layer from the folder, as `write_pooled` wrote it; else it is drawn at random.

    Raises:
        ModelError: transformers cannot load it, or it lacks a tensor.
    """
    try:
        with quietly(), torch.random.fork_rng([]):
            encoder, info = transformers.AutoModel.from_pretrained(
                str(folder),
                dtype=torch.float32,
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
            net = MeanPooled(encoder, _family(encoder).base_model_prefix, num_labels)
        lacking = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
        if info["missing_keys"] and not lacking:
            encoder.pooler = None
        if whole and not lacking:
            head = _head_of(folder)
            lacking = [
                f"{HEAD}.{name}"
                for name, own in net.classifier.named_parameters()
                if head.get(name, own[:0]).shape != own.shape
            ]
            if not lacking:
                net.classifier.load_state_dict(head)
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
        raise ModelError(f"{folder}: transformers cannot load its encoder ({first.rstrip('.:')})") from error
    if lacking:
        raise ModelError(
            f"{folder}: tensor '{lacking[0]}' is missing or of another shape ({len(lacking)} in all)",
            "is it whole?",
        )
    return net.eval()


def _head_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            names = [name for name in ("weight", "bias") if f"{HEAD}.{name}" in there]
            found |= {name: file.get_tensor(f"{HEAD}.{name}").float() for name in names}
    return found


def _family(encoder: nn.Module) -> nn.Module:
    """The classification model of the encoder's family without its weights; a copy of the config, for it may
    be changed."""
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(
            type(encoder.config).from_dict(encoder.config.to_dict())
        )


def class_name(net: MeanPooled) -> str:
    """Name of the class in the modelling file."""
    return f"MeanPooled{type(_encoder(net)).__name__.removesuffix('Model')}ForSequenceClassification"


def _encoder(net: MeanPooled) -> nn.Module:
    return getattr(net, net.base_model_prefix)


def modelling(net: MeanPooled) -> str:
    """The modelling file for an encoder. Raises UsageError where transformers does not offer its classes by
    name."""
    encoder = _encoder(net)
    kind = type(encoder)
    parent = next((c for c in kind.__mro__[1:] if c.__name__.endswith("PreTrainedModel")), None)
    for needed in (kind, parent):
        if needed is None or getattr(transformers, needed.__name__, None) is not needed:
            raise UsageError(
                f"transformers offers no {kind.__name__} to build a mean-pooled classifier on",
                "keep the adapter unmerged",
            )
    without = (
        getattr(encoder, "pooler", True) is None
        and "add_pooling_layer" in inspect.signature(kind.__init__).parameters
    )
    return _MODELLING.substitute(
        encoder=kind.__name__, parent=parent.__name__, name=class_name(net), prefix=net.base_model_prefix, head=HEAD.replace(".", "\\."),
        family=type(_family(encoder)).__name__, options=", add_pooling_layer=False" if without else "",
    )  # fmt: skip


def write_pooled(net: MeanPooled, folder: Path, dtype: torch.dtype, meta: AdapterMeta) -> dict[str, Any]:
    """Write weights, modelling file and the files of sentence-transformers; config.json, tokenizer and card
    are the caller's.

    Returns:
        what config.json must say besides: "architectures" and "auto_map".

    Raises:
        UsageError: transformers does not offer the encoder's classes.
        StorageError: the disk is full.
    """
    write_text(folder / MODELLING_FILE, modelling(net))
    dense = {name: tensor.to(dtype).contiguous() for name, tensor in net.classifier.state_dict().items()}
    encoder = {
        name: (t.to(dtype) if t.is_floating_point() else t).contiguous()
        for name, t in _encoder(net).state_dict().items()
    }
    tensors = {f"{net.base_model_prefix}.{name}": tensor for name, tensor in encoder.items()}
    outside = [
        name
        for name, _ in _family(_encoder(net)).named_parameters()
        if not name.startswith(f"{net.base_model_prefix}.")
    ]
    tensors |= {name: torch.empty(0, dtype=dtype) for name in outside if name not in encoder}
    tensors |= {f"{HEAD}.{name}": tensor for name, tensor in dense.items()}
    out, inner = net.classifier.weight.shape
    try:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        for place, _ in _MODULES[1:]:
            (folder / place).mkdir()
        save_file(
            {f"linear.{name}": tensor for name, tensor in dense.items()},
            folder / "2_Dense" / "model.safetensors",
            {"format": "pt"},
        )
    except (SafetensorError, OSError) as error:
        raise StorageError(
            f"cannot write {folder}: {error}", "free some space or choose another folder"
        ) from error
    modes = {
        f"pooling_mode_{mode}": mode == "mean_tokens"
        for mode in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    }
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"} for i, (place, kind) in enumerate(_MODULES)
        ],
        "sentence_bert_config.json": {"max_seq_length": meta.max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"__version__": _VERSIONS},
        "1_Pooling/config.json": {"word_embedding_dimension": inner, **modes},
        "2_Dense/config.json": {
            "in_features": inner, "out_features": out, "bias": True, "activation_function": "torch.nn.modules.linear.Identity",
        },
    }  # fmt: skip
    for name, content in files.items():
        write_text(folder / name, json.dumps(content, indent=2) + "\n")
    name = class_name(net)
    return {
        "architectures": [name],
        "auto_map": {"AutoModelForSequenceClassification": f"{MODELLING_FILE.removesuffix('.py')}.{name}"},
    }

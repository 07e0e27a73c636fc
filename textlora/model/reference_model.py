"""transformers + peft behind the interface of `packed_model.PackedModel`: the oracle of the tests, and the
way for architectures that have no packed path (ModernBERT, DeBERTa, MPNet, ALBERT and others with a
`...ForSequenceClassification`).

What PEFT leaves open is settled here: head tensors that the checkpoint lacks are all trained and saved (peft
issue 2171: a random DeBERTa pooler, frozen and not saved, answers differently after each load), and a
checkpoint that does not fit is refused.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from textlora.adapters.folder import lora_config, read_adapter
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, ModelError, UsageError
from textlora.data.tokenize import PackedBatch
from textlora.model.adapter_tensors import PREFIX, copy_strictly, require_heads
from textlora.model.base import all_finite, weight_files, weights_hash
from textlora.model.families import FAMILIES
from textlora.model.targets import block_lists, find_targets, lies_in

# Head modules that are always trained from the start, whatever the checkpoint holds; other head modules only
# where it lacks them.
CLASSIFIERS = ("classifier", "score", "pre_classifier", "sequence_summary", "logits_proj")
# Checked to answer the same with padding behind a mask. All others are run one length at a time: some mix
# padding in
# (FNet, ConvBERT) or read the last token (XLNet).
PADDED = [
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
]


@dataclass(frozen=True)
class _Base:
    """A loaded classifier before LoRA: `heads` are the modules to train, named as PEFT's `modules_to_save`
    wants them."""

    net: nn.Module
    prefix: str
    heads: list[str]
    hash: str


class MeanPooled(nn.Module):
    """Encoder, mean of its tokens, one dense layer; names as in a classification model."""

    def __init__(self, encoder: nn.Module, prefix: str, num_labels: int):
        super().__init__()
        self.config, self.base_model_prefix = encoder.config, prefix
        setattr(self, prefix, encoder)
        self.classifier = nn.Linear(encoder.config.hidden_size, num_labels)
        nn.init.normal_(self.classifier.weight, std=getattr(encoder.config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor
    ) -> SimpleNamespace:
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
        x = getattr(self, self.base_model_prefix)(input_ids=input_ids, **inputs)[0].to(
            self.classifier.weight.dtype
        )
        if attention_mask is None:
            return SimpleNamespace(logits=self.classifier(x.mean(1)))
        real = attention_mask.unsqueeze(-1).to(x.dtype)
        return SimpleNamespace(logits=self.classifier((x * real).sum(1) / real.sum(1)))


class ReferenceModel:
    """The way over transformers + peft. Make one with `create` or `from_adapter`; the interface is
    `interface.Model`."""

    path = "reference"
    depth = width = 0
    gradient_checkpointing = False
    in_steps = one_core = fused_stack = False

    def __init__(
        self,
        base: _Base,
        net: nn.Module,
        lora: LoraConfig,
        targets: list[str],
        own: list[str],
        pooling: str,
        device: str,
        dtype: torch.dtype,
    ):
        self.lora, self.pooling, self.device, self.dtype = lora, pooling, torch.device(device), dtype
        self.target_modules, self.modules_to_save = targets, [*base.heads, *own]
        self._hash = base.hash
        self._net = net.base_model.model
        config, kind = self._net.config, self._net.config.model_type
        self.max_length = _max_length(getattr(self._net, base.prefix), config)
        encoder_takes = inspect.signature(getattr(self._net, base.prefix).forward).parameters
        family = next((f for f in FAMILIES if kind in f.model_types), None)
        uses_types = family.uses_type_ids if family else (getattr(config, "type_vocab_size", 0) or 0) > 1
        self._takes_types = uses_types and "token_type_ids" in encoder_takes
        self._padded = kind in PADDED
        self._pad_id = getattr(config, "pad_token_id", None) or 0
        net.eval()
        for parameter in net.parameters():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
        net.to(self.device)
        leaves = {_file_name(name): p for name, p in net.named_parameters() if p.requires_grad}
        places = [f"{PREFIX}{full}.lora_" for full in targets]  # layers ascending, then the head
        self._trainable = {
            name: p for place in places for name, p in leaves.items() if name.startswith(place)
        }
        self._trainable |= {name: p for name, p in leaves.items() if ".lora_" not in name}
        if len(self._trainable) != len(leaves):
            stray = next(name for name in leaves if name not in self._trainable)
            raise ModelError(f"peft put LoRA on '{stray}', which is no layer of an encoder block")

    @classmethod
    def create(
        cls, folder: Path, lora: LoraConfig, num_labels: int, *, pooling: str = "first", seed: int = 0, device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "ReferenceModel":  # fmt: skip
        """A fresh classifier on the base in `folder`; A, B and head are float32, the base is kept in `dtype`.

        Args:
            num_labels: C; 1 for regression.
            pooling: "first" is the architecture's own head, "mean" the mean of all tokens and one dense
                layer.
            seed: of A and the head; torch's global generator is left as it was.

        Raises:
            ModelError: the base cannot be read, does not fit its config.json, or is no encoder.
            UsageError: the LoRA settings name layers that are not there.
        """
        with seeded(seed), quietly():
            base = load_base(Path(folder), num_labels, pooling)
            targets = find_targets(lora, base.net, base.prefix, base.heads if pooling == "first" else None)
            own = _own_modules(base, lora, targets)
            net = _wrap(base, lora, targets, pooling)
        return cls(base, net, lora, targets, own, pooling, device, dtype)

    @classmethod
    def from_adapter(
        cls,
        adapter_folder: Path,
        base_folder: Path,
        num_labels: int,
        *,
        pooling: str = "first",
        device: str = "cpu",
    ) -> "ReferenceModel":
        """A saved adapter through plain `PeftModel.from_pretrained`; then every saved tensor is compared with
        what PEFT loaded.

        Mean pooling, which PEFT has no class for, is built as in `create` and filled by name.

        Raises:
            AdapterError: the folder is damaged, does not fit, or PEFT left a tensor out.
            ModelError: as in `create`.
        """
        saved = read_adapter(adapter_folder)
        lora = lora_config(saved)
        with seeded(0), quietly():
            base = load_base(Path(base_folder), num_labels, pooling)
            try:
                targets = find_targets(
                    lora, base.net, base.prefix, base.heads if pooling == "first" else None
                )
            except UsageError as error:
                raise AdapterError(f"{adapter_folder}: does not fit the base ({error.message})") from error
            own = _own_modules(base, lora, targets)
            if pooling == "mean":
                net = _wrap(base, lora, targets, pooling)
            else:
                try:
                    net = peft.PeftModel.from_pretrained(
                        base.net, str(adapter_folder), is_trainable=True, torch_device="cpu"
                    )
                except Exception as error:  # a config may hold anything, and peft checks little of it
                    raise AdapterError(
                        f"{adapter_folder}: peft cannot load it ({_first_line(error)})"
                    ) from error
                for name, parameter in net.named_parameters():
                    if ".lora_" in name:  # some starts freeze B
                        parameter.requires_grad_(True)
        model = cls(base, net, lora, targets, own, pooling, device, torch.float32)
        if pooling == "mean":
            model.load_trainable(saved.tensors)
        try:
            require_heads(base.heads, saved.tensors)
        except AdapterError as error:
            raise AdapterError(f"{adapter_folder}: {error.message}", error.fix) from error
        for name in sorted(saved.tensors.keys() | model._trainable.keys()):
            mine, theirs = model._trainable.get(name), saved.tensors.get(name)
            if mine is None or theirs is None or not torch.equal(mine.detach().cpu(), theirs):
                raise AdapterError(f"{adapter_folder}: peft did not load tensor '{name}' as it was saved")
        return model

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        """Logits (B, C) float32 in packed order; equal seeds give equal dropout masks.

        Raises:
            UsageError: a text is longer than the base model takes.
        """
        runs = batch.runs()
        if runs and runs[-1][3] > self.max_length:
            raise UsageError(
                f"a text of {runs[-1][3]} tokens, the base model takes {self.max_length}",
                "lower --max-length",
            )
        with (
            self._dropout(dropout_seed),
            torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32),
        ):
            if self._padded and len(runs) > 1:
                logits = self._net(**self._pad(batch)).logits
            else:
                logits = torch.cat([self._net(**self._run(batch, run)).logits for run in runs])
        return logits.float()

    def _run(self, batch: PackedBatch, run: tuple[int, int, int, int]) -> dict[str, Tensor]:
        _, count, start, length = run
        cut = lambda values: values[start : start + count * length].view(count, length)
        types = {"token_type_ids": cut(batch.type_ids)} if self._takes_types else {}
        return {"input_ids": cut(batch.ids), **types}

    def _pad(self, batch: PackedBatch) -> dict[str, Tensor]:
        lengths = batch.cu_seqlens.diff().to(batch.ids.device)
        rows = torch.arange(batch.size, device=batch.ids.device).repeat_interleave(lengths)
        shape = (batch.size, int(batch.cu_seqlens.diff().max()))

        def spread(values: Tensor, filler: int) -> Tensor:
            return values.new_full(shape, filler).index_put_((rows, batch.positions), values)

        types = {"token_type_ids": spread(batch.type_ids, 0)} if self._takes_types else {}
        return {
            "input_ids": spread(batch.ids, self._pad_id),
            "attention_mask": spread(torch.ones_like(batch.ids), 0),
            **types,
        }

    @contextlib.contextmanager
    def _dropout(self, seed: int | None) -> Iterator[None]:
        """LoRA dropout with masks from `seed`, none for None; other users' random numbers stay as they are."""
        if seed is None or not self.lora.lora_dropout:
            yield
            return
        layers = [module for module in self._net.modules() if isinstance(module, LoraLayer)]
        for layer in layers:  # the layer itself too: DoRA asks it, not its dropout, whether it trains
            layer.train(True)
        try:
            with seeded(seed, self.device):
                yield
        finally:
            for layer in layers:
                layer.train(False)

    def trainable(self) -> dict[str, Tensor]:
        """PEFT file names -> float32 leaves: per layer A, B and magnitude, then the head."""
        return self._trainable

    def for_training(self) -> "ReferenceModel":
        return self

    def for_inference(self, precision: str) -> "ReferenceModel":
        if precision in ("float32", "high"):
            return self
        raise UsageError(f"--precision {precision}: only on the packed path", "leave it out")

    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in place. Raises AdapterError where a name or shape differs, or a head is missing."""
        require_heads(self.modules_to_save, tensors)
        copy_strictly(self._trainable, tensors)

    def base_hash(self) -> str:
        """`base.weights_hash` of the frozen tensors, equal to PackedModel's on the same checkpoint."""
        return self._hash


def load_base(folder: Path, num_labels: int, pooling: str) -> _Base:
    weight_files(folder)  # refuses pickles and missing shards in our words
    unfit = "is config.json of another model?"
    try:
        net, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            str(folder), num_labels=num_labels, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True,
            # a head for another number of labels; everything else is refused below
            ignore_mismatched_sizes=True,
            output_loading_info=True,
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
        raise ModelError(
            f"{folder}: transformers cannot load it as a classifier ({_first_line(error)})"
        ) from error
    prefix, config = net.base_model_prefix, net.config
    if config.is_encoder_decoder or not hasattr(net, prefix) or getattr(config, "pad_token_id", None) is None:
        raise ModelError(
            f"{folder}: model type '{config.model_type}' is not an encoder with a padding token",
            "choose a BERT-like base model",
        )
    lacking = set(info["missing_keys"])
    for name, found, expected in info["mismatched_keys"]:
        if name.startswith(prefix + "."):
            raise ModelError(
                f"{folder}: tensor '{name}' has shape {tuple(found)}, config.json says {tuple(expected)}",
                unfit,
            )
        lacking.add(name)
    inside = sorted(
        name for name in lacking if name.startswith(prefix + ".") and name.split(".")[1] != "pooler"
    )
    if inside:
        raise ModelError(f"{folder}: tensor '{inside[0]}' is missing ({len(inside)} in all)", unfit)
    lists = tuple(root.removeprefix(prefix + ".") for root in block_lists(net, prefix))
    unknown = sorted(
        n
        for n in info["unexpected_keys"]
        if n.endswith(".weight") and n.removeprefix(prefix + ".").startswith(lists)
    )
    if unknown:
        raise ModelError(f"{folder}: unknown tensor '{unknown[0]}' for a {config.model_type} encoder", unfit)

    heads = ["classifier"] if pooling == "mean" else _heads(net, prefix, lacking)
    frozen = {}
    for name, parameter in net.named_parameters():
        short = name.removeprefix(prefix + ".")
        used = (
            (short != name and not short.startswith("pooler."))
            if pooling == "mean"
            else not lies_in(short, heads)
        )
        if used:
            frozen[short] = parameter
            if not all_finite(parameter):
                raise ModelError(f"{folder}: tensor '{short}' holds values that are not finite numbers")
    digest = weights_hash(frozen.items())
    if pooling == "mean":
        return _Base(MeanPooled(getattr(net, prefix), prefix, num_labels), prefix, heads, digest)
    for name, module in net.named_modules():
        if name.removeprefix(prefix + ".") in heads and not all(
            f"{name}.{part}" in lacking for part, _ in module.named_parameters()
        ):
            _start_afresh(net, module)
    return _Base(net, prefix, heads, digest)


def _heads(net: nn.Module, prefix: str, lacking: set[str]) -> list[str]:
    """Modules to train and save, in the model's order: classifiers, and whatever else outside the encoder the
    checkpoint lacks."""
    heads: list[str] = []
    for name, _ in net.named_parameters():
        top = name.split(".")[0]
        if top == prefix:
            head = name.rpartition(".")[0].removeprefix(prefix + ".") if name in lacking else None
        else:
            head = top if top in CLASSIFIERS or any(key.startswith(top + ".") for key in lacking) else None
        if head is not None and head not in heads:
            heads.append(head)
    return heads


def _start_afresh(net: nn.Module, head: nn.Module) -> None:
    """Draw weights for a head that the checkpoint had, for other labels or in part."""
    for parameter in head.parameters():
        if hasattr(parameter, "_is_hf_initialized"):
            del parameter._is_hf_initialized
    with torch.no_grad():
        head.apply(net._init_weights)


def _own_modules(base: _Base, lora: LoraConfig, targets: list[str]) -> list[str]:
    """Modules with weights in the base that the adapter has its own of."""
    ends = {name for name, module in base.net.named_modules() if next(module.children(), None) is None} - set(
        targets
    )
    return [
        name
        for name in lora.modules_to_save
        if name in ends and not lies_in(name.removeprefix(base.prefix + "."), base.heads)
    ]


def _wrap(base: _Base, lora: LoraConfig, targets: list[str], pooling: str) -> nn.Module:
    config = peft.LoraConfig(
        task_type=None if pooling == "mean" else "SEQ_CLS", r=lora.r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora, use_dora=lora.use_dora, target_modules=list(targets), rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern), bias=lora.bias, modules_to_save=[*base.heads, *_own_modules(base, lora, targets)],
    )  # fmt: skip
    return peft.get_peft_model(base.net, config)


def _max_length(encoder: nn.Module, config: Any) -> int:
    """Tokens the position table takes; a table with a padding row (RoBERTa, MPNet) starts behind it."""
    offset = 0
    for name, module in encoder.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and name.endswith("embeddings.position_embeddings")
            and module.padding_idx is not None
        ):
            offset = module.padding_idx + 1
    length = getattr(config, "max_position_embeddings", None) or 0
    return length - offset if length > offset else 512


def _file_name(name: str) -> str:
    """PEFT's name in a file for a parameter's name in the model."""
    name = name.replace(".modules_to_save.default.", ".")
    if ".lora_magnitude_vector." in name:
        return name.removesuffix(".default.weight")
    return name.replace(".default.", ".") if ".lora_" in name else name


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".:")


@contextlib.contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run on random numbers from `seed` and put the generators back."""
    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng([device] if on_gpu else []):
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No warnings and progress bars from transformers and peft while a model is built; settings are put back."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hub_silent = are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_logging.set_verbosity_error()
        if bars:
            hf_logging.disable_progress_bar()
        try:
            yield
        finally:
            hf_logging.set_verbosity(verbosity)
            if bars:
                hf_logging.enable_progress_bar()  # switches the hub's on too
                if hub_silent:
                    disable_progress_bars()

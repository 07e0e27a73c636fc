"""The packed classifier: frozen encoder, LoRA, head. One forward for training, evaluation, checks and
serving.

`reference_model.ReferenceModel` has the same interface over transformers + peft; `open_model` picks between
them.
"""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from textlora.core.config import LoraConfig
from textlora.data.tokenize import PackedBatch
from textlora.kernels.packed_linear import activate, require_int8
from textlora.model.adapter_batch import AdapterBatch, ScaledAdapter, ScaledLora
from textlora.model.adapter_tensors import PREFIX, copy_strictly, require_heads
from textlora.model.base import BaseWeights
from textlora.model.encoder import PackedEncoder
from textlora.model.families import MEAN_HEAD, SLOTS, EncoderSpec, HeadLayer
from textlora.model.lora import Lora, delta, dora_scale, init_lora, lora_linear, weight_norm
from textlora.model.targets import resolve_targets


class PackedModel:
    """The fast path.

    Args:
        base: frozen weights, shared with other models.
        lora: rank, scale, places.
        num_labels: C; 1 for regression.
        pooling: "first" or "mean".
        seed: of A and the head.
        encoder: of this base, shared with other models; default: one of its own.
    """

    path = "packed"

    def __init__(
        self,
        base: BaseWeights,
        lora: LoraConfig,
        num_labels: int,
        pooling: str = "first",
        seed: int = 0,
        device: str = "cpu",
        encoder: PackedEncoder | None = None,
    ):
        self.base, self.lora, self.pooling, self.device = base, lora, pooling, torch.device(device)
        self.encoder = encoder or PackedEncoder(base)
        self.dtype = next(iter(base.tensors.values())).dtype
        self.max_length = base.spec.max_length
        spec, family = base.spec, base.spec.family
        names = {family.module(i, slot): (i, slot) for i in range(spec.layers) for slot in SLOTS}
        modules = [(i, full, spec.width(slot)) for full, (i, slot) in names.items()]
        self._head = MEAN_HEAD if pooling == "mean" else family.head
        poolers = {
            layer.module: (spec.layers, "pooler")
            for layer in self._head
            if layer.module.endswith("pooler.dense")
        }
        others = dict.fromkeys(
            poolers, (spec.hidden, spec.hidden) if "pooler.weight" in base.tensors else None
        )
        self.target_modules = resolve_targets(lora, modules, spec.layers, others)
        self._slots = {full: (names | poolers)[full] for full in self.target_modules}
        self._scalings = {full: lora.scaling_of(full) for full in self.target_modules}
        self._own = self._own_tensors()
        self.depth = 0 if self._own else min(spec.layers - 1, *(layer for layer, _ in self._slots.values()))
        self.width = spec.hidden
        trained = [layer for layer in self._head if not self._frozen(layer)]
        inside = {name.removeprefix(PREFIX).rpartition(".")[0] for name in self._own} & set(
            lora.modules_to_save
        )
        self.modules_to_save = [*_top_modules(trained, family.prefix), *sorted(inside)]
        self.gradient_checkpointing = False
        self._folded: ScaledAdapter | None = None
        self._trainable = self._initial(trained, spec, num_labels, torch.Generator().manual_seed(seed))

    def _frozen(self, layer: HeadLayer) -> bool:
        return (
            layer.module.endswith("pooler.dense")
            and "pooler.weight" in self.base.tensors
            and layer.module not in self.lora.modules_to_save
        )

    def _own_tensors(self) -> dict[str, str]:
        """PEFT file name -> our name of each tensor of the base that the adapter has its own of, besides the
        head."""
        spec, names = self.base.spec, {}
        table = {ours: f"{spec.family.prefix}.{theirs}" for ours, theirs in spec.tensors().items()}
        table |= {
            f"pooler.{part}": f"{layer.module}.{part}"
            for layer in self._head[:1]
            if self._frozen(layer)
            for part in ("weight", "bias")
        }
        for ours, theirs in table.items():
            module, _, part = theirs.rpartition(".")
            adapted = module in self._slots
            trained = self.lora.bias == "all" or (self.lora.bias == "lora_only" and adapted)
            if (trained and part == "bias") or module in self.lora.modules_to_save:
                names[f"{PREFIX}{module}{'.base_layer' if adapted else ''}.{part}"] = ours
        return names

    def _initial(
        self, trained: list[HeadLayer], spec: EncoderSpec, num_labels: int, generator: torch.Generator
    ) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for full, (i, slot) in self._slots.items():
            out, inner = spec.width(slot)
            A, B = init_lora(out, inner, self.lora.rank_of(full), generator)
            tensors[f"{PREFIX}{full}.lora_A.weight"] = A
            tensors[f"{PREFIX}{full}.lora_B.weight"] = B
            if self.lora.use_dora:
                weight = self._weight(i, slot)
                tensors[f"{PREFIX}{full}.lora_magnitude_vector"] = weight_norm(
                    weight, Lora(A.to(weight.device), B.to(weight.device), 0.0)
                ).cpu()
        own = {name: self.base.tensors[ours].float() for name, ours in self._own.items()}
        for k, layer in enumerate(trained):
            last = k == len(trained) - 1
            shape = (num_labels if last else spec.hidden, spec.hidden)
            tensors[f"{PREFIX}{layer.module}.weight"] = torch.empty(shape).normal_(
                0.0, spec.initializer_range, generator=generator
            )
            tensors[f"{PREFIX}{layer.module}.bias"] = torch.zeros(shape[0])
        learned = {name: tensor.to(self.device).requires_grad_() for name, tensor in tensors.items()}
        adapters = {name: tensor for name, tensor in learned.items() if ".lora_" in name}
        return (
            adapters | {name: tensor.to(self.device, copy=True) for name, tensor in own.items()} | learned
        )  # the head's last bias stays last

    def _weight(self, layer: int, slot: str) -> Tensor:
        if slot == "pooler":
            return self.base.tensors["pooler.weight"]
        block, hidden = self.encoder.blocks[layer], self.base.spec.hidden
        if slot in ("query", "key", "value"):
            start = ("query", "key", "value").index(slot) * hidden
            return block["qkv.weight"][start : start + hidden]
        return block[f"{slot}.weight"]

    def loras(self) -> dict[tuple[int, str], Lora]:
        """(layer, slot) -> LoRA over the trainable tensors; a pooler's place is (number of blocks, "pooler")."""
        t, made = self._trainable, {}
        for full, place in self._slots.items():
            name = PREFIX + full
            made[place] = Lora(
                t[f"{name}.lora_A.weight"],
                t[f"{name}.lora_B.weight"],
                self._scalings[full],
                t.get(f"{name}.lora_magnitude_vector"),
                self.lora.lora_dropout,
            )
        return made

    def forward(self, batch: PackedBatch, dropout_seed: int | None = None) -> Tensor:
        if self._folded is not None:
            adapter = (
                AdapterBatch([self._folded], [0] * batch.size, batch.cu_seqlens.diff().tolist())
                if self._folded
                else {}
            )
            return self.head(self.encoder.forward(batch, adapter, pooling=self.pooling))
        seed = dropout_seed if self.lora.lora_dropout else None
        keep_less = self.gradient_checkpointing and torch.is_grad_enabled()
        x = self.encoder.forward(
            batch, self.loras(), pooling=self.pooling, dropout_seed=seed, checkpointing=keep_less
        )
        return self.head(x, seed)

    def head(self, x: Tensor, dropout_seed: int | None = None, pooled: bool = False) -> Tensor:
        """Logits (B, C) float32 from what the encoder gives, (B, H), or `pool` of it where `pooled`."""
        x, rest = (x, self._head[1:]) if pooled else (x.float(), self._head)
        for layer in rest:
            if self._frozen(layer):
                x = self.pool(x, dropout_seed)
            else:
                name = f"{PREFIX}{layer.module}"
                x = activate(
                    F.linear(x, self._trainable[f"{name}.weight"], self._trainable[f"{name}.bias"]),
                    layer.activation,
                )
        return x

    def pool(self, x: Tensor, dropout_seed: int | None = None) -> Tensor:
        """The base's pooler, (B, H) to (B, H) float32."""
        place = (self.base.spec.layers, "pooler")
        weight, bias = (self._base_tensor(f"pooler.{part}").float() for part in ("weight", "bias"))
        generator = (
            None if dropout_seed is None else torch.Generator(x.device).manual_seed(dropout_seed + place[0])
        )
        adapted = [(0, self.loras()[place])] if place in self._slots.values() else []
        return activate(lora_linear(x.float(), weight, bias, adapted, generator), self._head[0].activation)

    @property
    def pools_as_base(self) -> bool:
        """Whether the head starts with the base's own pooler, unadapted: adapters in a batch then share it."""
        return (
            self.mixes
            and self._frozen(self._head[0])
            and (self.base.spec.layers, "pooler") not in self._slots.values()
        )

    @property
    def mixes(self) -> bool:
        """Whether the encoder is the base's own, so that other adapters can share a batch with this one."""
        return not self._own

    def folded(self, dtype: torch.dtype | None = None) -> ScaledAdapter:
        """What `adapter_batch.AdapterBatch` needs of this adapter: (layer, slot) -> A, `s B` and DoRA's
        factor, without gradients, in the base's type or `dtype`."""
        made = {}
        with torch.no_grad():
            for (i, slot), lora in self.loras().items():
                if slot != "pooler":
                    scale = dora_scale(self._weight(i, slot), lora)
                    tensors = (lora.A, lora.scaling * lora.B, scale)
                    made[i, slot] = ScaledLora(
                        *(None if t is None else t.detach().to(dtype or self.dtype) for t in tensors)
                    )
        return ScaledAdapter(made)

    def for_training(self) -> "PackedModel":
        """A copy over the same tensors, with the base's dense layers laid out forward and back."""
        made = copy.copy(self)
        made.encoder = self.encoder.for_training()
        return made

    def for_inference(self, precision: str) -> "PackedModel":
        """A copy that only predicts: with LoRA merged into the weights, in int8 beside them. Raises
        UsageError as `require_int8` does."""
        made = copy.copy(self)
        if precision == "int8":
            require_int8(self.device)
            made.encoder, made._folded = self.encoder.for_inference("int8"), self.folded()
        else:
            made.encoder = PackedEncoder(replace(self.base, tensors=self._merged())).for_inference(precision)
            made._folded = ScaledAdapter({})
            made.dtype = made.encoder.dtype
        return made

    def _merged(self) -> dict[str, Tensor]:
        """The base's tensors with what the adapter changes; `W + delta` is computed in float64 and rounded
        once."""
        tensors = {ours: self._base_tensor(ours).detach().to(self.dtype) for ours in self.base.tensors}
        with torch.no_grad():
            for (i, slot), lora in self.loras().items():
                if slot != "pooler":
                    wide = replace(
                        lora,
                        A=lora.A.double(),
                        B=lora.B.double(),
                        magnitude=None if lora.magnitude is None else lora.magnitude.double(),
                    )
                    weight = tensors[f"{i}.{slot}.weight"].double()
                    tensors[f"{i}.{slot}.weight"] = (weight + delta(weight, wide)).to(self.dtype)
        return tensors

    @property
    def in_steps(self) -> bool:
        return self.encoder.in_steps

    @property
    def one_core(self) -> bool:
        return self.encoder.one_core

    @property
    def fused_stack(self) -> bool:
        return self.encoder.fused_stack

    def _base_tensor(self, ours: str) -> Tensor:
        name = next((name for name, own in self._own.items() if own == ours), None)
        return self.base.tensors[ours] if name is None else self._trainable[name]

    def trainable(self) -> dict[str, Tensor]:
        return self._trainable

    def load_trainable(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors in place. Raises AdapterError where a name or shape differs, or a head is missing."""
        require_heads(self.modules_to_save, tensors)
        copy_strictly(self._trainable, tensors)
        if self._own:  # the base is shared: this model gets an encoder with other tensors in their places
            own = {ours: self._trainable[name].to(self.dtype) for name, ours in self._own.items()}
            self.encoder = PackedEncoder(replace(self.base, tensors=self.base.tensors | own))

    def base_hash(self) -> str:
        return self.base.hash


def _top_modules(trained: list[HeadLayer], prefix: str) -> list[str]:
    """Names for PEFT's `modules_to_save`: `classifier` for `classifier.dense`, and the pooler where it is
    trained."""
    names: list[str] = []
    for layer in trained:
        name = (
            layer.module.removeprefix(prefix + ".")
            if layer.module.startswith(prefix + ".")
            else layer.module.split(".")[0]
        )
        if name not in names:
            names.append(name)
    return names

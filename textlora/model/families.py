"""One row per architecture of the fast path: names, key tables and heads, exactly as transformers has them.

Names on the right are those of the transformers model without its prefix (`bert.`, `roberta.` ...), so a
checkpoint of a bare encoder and one of a model with a head read the same. `read_spec` turns a `config.json`
into an `EncoderSpec`, or says in one sentence why the reference path must be taken.
"""

import re
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
SLOTS = ("query", "key", "value", "attention_output", "intermediate", "output")


@dataclass(frozen=True)
class HeadLayer:
    """One dense layer of a head: full transformers module name, and the activation after it."""

    module: str
    activation: str | None


@dataclass(frozen=True)
class Family:
    """Names of one architecture.

    Attributes:
        prefix: attribute of the encoder in the classification model.
        blocks: module path of the encoder blocks below the prefix.
        embeddings: our tensor name -> transformers tensor name (weight and bias are added for norms and dense
            layers).
        block: our module name in a block -> transformers module name in a block.
        head: layers from the pooled vector to the logits.
        ignored: patterns of tensors that checkpoints carry and the classifier does not need: pretraining
            heads, buffers.
        uses_type_ids: whether its tokenizer hands out segment ids (RoBERTa's does not).
        offset_positions: whether positions start behind the padding id, as RoBERTa's do.
    """

    model_types: tuple[str, ...]
    architecture: str
    prefix: str
    blocks: str
    embeddings: dict[str, str]
    block: dict[str, str]
    head: tuple[HeadLayer, ...]
    ignored: tuple[str, ...]
    uses_type_ids: bool = True
    offset_positions: bool = False

    def module(self, layer: int, slot: str) -> str:
        """Full transformers module name of a dense layer, such as
        `bert.encoder.layer.0.attention.self.query`."""
        return f"{self.prefix}.{self.blocks}.{layer}.{self.block[slot]}"

    def ignores(self, name: str) -> bool:
        return any(re.match(pattern, name) for pattern in self.ignored)


_BERT_EMBEDDINGS = {
    "word": "embeddings.word_embeddings.weight",
    "position": "embeddings.position_embeddings.weight",
    "type": "embeddings.token_type_embeddings.weight",
    "norm.weight": "embeddings.LayerNorm.weight",
    "norm.bias": "embeddings.LayerNorm.bias",
}
_BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
_DISTILBERT_BLOCK = {
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "attention_output": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "intermediate": "ffn.lin1",
    "output": "ffn.lin2",
    "output_norm": "output_layer_norm",
}
_BUFFERS = (r"embeddings\.(position_ids|token_type_ids)$",)
_TASK_HEADS = (r"classifier\.", r"qa_outputs\.")

FAMILIES = (
    Family(
        model_types=("bert",),
        architecture="BertForSequenceClassification",
        prefix="bert",
        blocks="encoder.layer",
        embeddings=_BERT_EMBEDDINGS,
        block=_BERT_BLOCK,
        head=(HeadLayer("bert.pooler.dense", "tanh"), HeadLayer("classifier", None)),
        ignored=(*_BUFFERS, *_TASK_HEADS, r"cls\."),
    ),
    Family(
        model_types=("roberta", "xlm-roberta", "camembert"),
        architecture="RobertaForSequenceClassification",
        prefix="roberta",
        blocks="encoder.layer",
        embeddings=_BERT_EMBEDDINGS,
        block=_BERT_BLOCK,
        head=(HeadLayer("classifier.dense", "tanh"), HeadLayer("classifier.out_proj", None)),
        ignored=(*_BUFFERS, *_TASK_HEADS, r"lm_head\.", r"pooler\.dense\."),
        uses_type_ids=False,
        offset_positions=True,
    ),
    Family(
        model_types=("electra",),
        architecture="ElectraForSequenceClassification",
        prefix="electra",
        blocks="encoder.layer",
        embeddings={
            **_BERT_EMBEDDINGS,
            "project.weight": "embeddings_project.weight",
            "project.bias": "embeddings_project.bias",
        },
        block=_BERT_BLOCK,
        head=(HeadLayer("classifier.dense", "gelu"), HeadLayer("classifier.out_proj", None)),
        ignored=(
            *_BUFFERS,
            *_TASK_HEADS,
            r"discriminator_predictions\.",
            r"generator_predictions\.",
            r"generator_lm_head\.",
        ),
    ),
    Family(
        model_types=("distilbert",),
        architecture="DistilBertForSequenceClassification",
        prefix="distilbert",
        blocks="transformer.layer",
        embeddings={ours: name for ours, name in _BERT_EMBEDDINGS.items() if ours != "type"},
        block=_DISTILBERT_BLOCK,
        head=(HeadLayer("pre_classifier", "relu"), HeadLayer("classifier", None)),
        ignored=(*_BUFFERS, *_TASK_HEADS, r"pre_classifier\.", r"vocab_(transform|layer_norm|projector)\."),
        uses_type_ids=False,
    ),
)
MEAN_HEAD = (HeadLayer("classifier", None),)


@dataclass(frozen=True)
class EncoderSpec:
    """Sizes of one encoder. `max_length` is the number of tokens its position table can take."""

    family: Family
    layers: int
    hidden: int
    heads: int
    intermediate: int
    eps: float
    activation: str
    embedding_size: int
    position_offset: int
    max_length: int
    initializer_range: float

    def tensors(self) -> dict[str, str]:
        """Our tensor name -> transformers name without prefix, for every tensor the encoder needs."""
        family, names = self.family, {}
        for ours, theirs in family.embeddings.items():
            if not ours.startswith("project.") or self.embedding_size != self.hidden:
                names[f"embeddings.{ours}"] = theirs
        for i in range(self.layers):
            for ours, theirs in family.block.items():
                for part in ("weight", "bias"):
                    names[f"{i}.{ours}.{part}"] = f"{family.blocks}.{i}.{theirs}.{part}"
        return names

    def width(self, slot: str) -> tuple[int, int]:
        """(out, in) of a dense layer of a block."""
        if slot == "intermediate":
            return self.intermediate, self.hidden
        return self.hidden, self.intermediate if slot == "output" else self.hidden


def read_spec(config: dict[str, Any]) -> EncoderSpec | str:
    """The encoder a `config.json` describes, or the reason why the fast path does not take it."""
    kind = config.get("model_type")
    family = next((f for f in FAMILIES if kind in f.model_types), None)
    if family is None:
        return f"model type '{kind}' is not on the fast path"
    if config.get("position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type '{config['position_embedding_type']}' is not on the fast path"
    if config.get("is_decoder") or config.get("add_cross_attention") or config.get("quantization_config"):
        return "decoder, cross-attention and quantised variants are not on the fast path"
    distil, electra = kind == "distilbert", kind == "electra"
    get = lambda name, old, default: config.get(old if distil and old in config else name, default)
    activation = get("hidden_act", "activation", "gelu")
    if activation not in ACTIVATIONS:
        return f"activation '{activation}' is not on the fast path"
    hidden = get("hidden_size", "dim", 256 if electra else 768)
    heads = get("num_attention_heads", "n_heads", 4 if electra else 12)
    if hidden % heads:
        return f"hidden size {hidden} is not a multiple of {heads} heads"
    offset = (config.get("pad_token_id", 1) or 0) + 1 if family.offset_positions else 0
    return EncoderSpec(
        family=family,
        layers=get("num_hidden_layers", "n_layers", 6 if distil else 12),
        hidden=hidden,
        heads=heads,
        intermediate=get("intermediate_size", "hidden_dim", 1024 if electra else 3072),
        eps=1e-12 if distil else config.get("layer_norm_eps", 1e-12),
        activation=activation,
        embedding_size=config.get("embedding_size", 128) if electra else hidden,
        position_offset=offset,
        max_length=config.get("max_position_embeddings", 512) - offset,
        initializer_range=config.get("initializer_range", 0.02),
    )

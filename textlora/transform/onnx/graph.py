"""The padded forward as an ONNX graph: the packed encoder's tables and tensors, the same numbers, for
runtimes that want rectangles.

Plain ONNX operators only. Tokens lie as (N, H) with N = batch x length, so that every dense layer is one
`Gemm` on a weight as transformers stores it. B texts of padded length L, h heads, d = H / h.
"""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from textlora.model.families import MEAN_HEAD, EncoderSpec, HeadLayer

OPSET, IR_VERSION = (
    17,
    8,
)  # ONNX 1.12 of 2022: old enough for every runtime in use, the first with LayerNormalization
LOWEST = float(np.finfo(np.float32).min)
IDS, MASK, TYPES, LOGITS = "input_ids", "attention_mask", "token_type_ids", "logits"


def head_layers(spec: EncoderSpec, pooling: str) -> tuple[HeadLayer, ...]:
    """The dense layers from the pooled vector to the logits."""
    return MEAN_HEAD if pooling == "mean" else spec.family.head


def input_names(spec: EncoderSpec) -> tuple[str, ...]:
    """The token inputs, named as transformers names them; segment ids only where the family's tokenizer hands
    them out."""
    return (IDS, MASK, TYPES) if spec.family.uses_type_ids else (IDS, MASK)


class Graph:
    """An ONNX graph that grows. Values are named by strings, as in the file."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.initializers: dict[str, np.ndarray] = {}
        self.inputs: list[Any] = []

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Add a node; its one output, named as the node."""
        name = name or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def tensor(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = value
        return name

    def scalar(self, value: float) -> str:
        return self.tensor(f"float_{value:.9g}", np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        return self.tensor("_".join(["int", *map(str, values)]), np.array(values, dtype=np.int64))

    def optional(self, name: str, shape: tuple[str | int, ...], default: np.ndarray) -> str:
        """A float input that a run may leave out: a graph input that is an initializer too.

        Names of dynamic sizes must differ where sizes may: ONNX Runtime plans one buffer for sizes of one
        name.
        """
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return self.tensor(name, default)

    def model(self, metadata: Mapping[str, Any]) -> ModelProto:
        """The finished model, output `logits` (batch, labels); `metadata` goes into its properties under
        `textlora`, as JSON."""
        output = helper.make_tensor_value_info(LOGITS, TensorProto.FLOAT, ["batch", "labels"])
        initializers = [numpy_helper.from_array(value, name) for name, value in self.initializers.items()]
        graph = helper.make_graph(self.nodes, "textlora", self.inputs, [output], initializers)
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="textlora",
        )
        helper.set_model_props(model, {"textlora": json.dumps(metadata, ensure_ascii=False)})
        return model


class EncoderGraph(Graph):
    """The classifier on padded texts.

    Args:
        weights: full transformers name -> float32 array: the encoder and what there is of the head.
        pooling: "first" or "mean".
        adapted: full names of the dense layers that take `NAME.lora_A` (r, in), `NAME.lora_B` (out, r) with
            the scale s in it, and `NAME.dora_scale` (out,) as optional inputs. Where any does, the head's
            tensors are optional inputs too.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        weights: Mapping[str, np.ndarray],
        pooling: str,
        adapted: Collection[str] = (),
    ):
        super().__init__()
        self.spec, self.weights, self.pooling, self.adapted = spec, weights, pooling, frozenset(adapted)
        self.table = {ours: f"{spec.family.prefix}.{theirs}" for ours, theirs in spec.tensors().items()}
        for name in input_names(spec):
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "length"]))
        shape = self.op("Shape", IDS)
        self.batch = self.op("Slice", shape, self.integers(0), self.integers(1))
        self.length = self.op("Slice", shape, self.integers(1), self.integers(2))
        self.rows = self.op("Concat", self.batch, self.length, self.integers(spec.hidden), axis=0)
        self.heads = self.op(
            "Concat", self.batch, self.length, self.integers(spec.heads, spec.hidden // spec.heads), axis=0
        )
        self.real = self.op("Cast", MASK, to=TensorProto.FLOAT)
        absent = self.op("Mul", self.op("Sub", self.scalar(1.0), self.real), self.scalar(LOWEST))
        self.bias = self.op("Unsqueeze", absent, self.integers(1, 2))
        self.logits = self._head(self._encode())

    def _constant(self, name: str) -> str:
        return self.tensor(name, self.weights[name])

    def _encode(self) -> str:
        """The pooled vectors (B, H)."""
        x = self._embed()
        for i in range(self.spec.layers):
            x = self._block(i, x, only_first=i == self.spec.layers - 1 and self.pooling == "first")
        if self.pooling == "first":
            return x if self.spec.layers else self._firsts(x)
        mask = self.op("Unsqueeze", self.real, self.integers(2))
        total = self.op(
            "ReduceSum", self.op("Mul", self.op("Reshape", x, self.rows), mask), self.integers(1), keepdims=0
        )
        return self.op("Div", total, self.op("ReduceSum", mask, self.integers(1), keepdims=0))

    def _embed(self) -> str:
        table = {
            name.removeprefix("embeddings."): full
            for name, full in self.table.items()
            if name.startswith("embeddings.")
        }
        x = self.op("Gather", self._constant(table["word"]), IDS)
        if "type" in table and self.spec.family.uses_type_ids:
            x = self.op("Add", x, self.op("Gather", self._constant(table["type"]), TYPES))
        elif "type" in table:
            x = self.op("Add", x, self.tensor(f"{table['type']}[0]", self.weights[table["type"]][0]))
        x = self.op("Add", x, self._positions(self._constant(table["position"])))
        x = self._norm(x, table["norm.weight"].removesuffix(".weight"))
        x = self.op("Reshape", x, self.integers(-1, self.spec.embedding_size))
        return (
            self._dense(x, table["project.weight"].removesuffix(".weight"))
            if "project.weight" in table
            else x
        )

    def _positions(self, rows: str) -> str:
        """Rows of the position table: the first L, or with RoBERTa's offset counted over the ids that are not
        padding."""
        padding = self.spec.position_offset - 1
        if padding < 0:
            return self.op("Slice", rows, self.integers(0), self.length)
        padding_id = self.tensor("padding", np.array(padding, dtype=np.int64))
        real = self.op("Cast", self.op("Not", self.op("Equal", IDS, padding_id)), to=TensorProto.INT64)
        counted = self.op("CumSum", real, self.tensor("axis", np.array(1, dtype=np.int64)))
        return self.op("Gather", rows, self.op("Add", self.op("Mul", counted, real), padding_id))

    def _block(self, i: int, x: str, only_first: bool) -> str:
        """One encoder block: (N, H) to (N, H), or to (B, H) where only the first tokens are asked for."""
        module, d = lambda slot: self.spec.family.module(i, slot), self.spec.hidden // self.spec.heads
        asking = self._firsts(x) if only_first else x
        shape = self.integers(0, 1, self.spec.heads, d) if only_first else self.heads
        split = lambda value, shape, order: self.op("Transpose", self.op("Reshape", value, shape), perm=order)
        query = split(self._dense(asking, module("query")), shape, (0, 2, 1, 3))
        key = split(self._dense(x, module("key")), self.heads, (0, 2, 3, 1))
        value = split(self._dense(x, module("value")), self.heads, (0, 2, 1, 3))
        scores = self.op("Mul", self.op("MatMul", query, key), self.scalar(d**-0.5))
        shares = self.op("Softmax", self.op("Add", scores, self.bias), axis=-1)
        context = self.op("Transpose", self.op("MatMul", shares, value), perm=(0, 2, 1, 3))
        context = self.op("Reshape", context, self.integers(-1, self.spec.hidden))
        x = self._norm(
            self.op("Add", asking, self._dense(context, module("attention_output"))), module("attention_norm")
        )
        inner = self._activate(self._dense(x, module("intermediate")), self.spec.activation)
        return self._norm(self.op("Add", x, self._dense(inner, module("output"))), module("output_norm"))

    def _firsts(self, x: str) -> str:
        return self.op(
            "Gather",
            self.op("Reshape", x, self.rows),
            self.tensor("first", np.array(0, dtype=np.int64)),
            axis=1,
        )

    def _norm(self, x: str, module: str) -> str:
        weight, bias = self._constant(f"{module}.weight"), self._constant(f"{module}.bias")
        return self.op("LayerNormalization", x, weight, bias, name=module, axis=-1, epsilon=self.spec.eps)

    def _dense(self, x: str, module: str) -> str:
        """x W^T + b; where the layer is adapted `c (x W^T + (x A^T) (s B)^T) + b`, c = 1 but for DoRA."""
        weight, bias = self._constant(f"{module}.weight"), self._constant(f"{module}.bias")
        return self._product(x, module, weight, bias, *self.weights[weight].shape)

    def _product(self, x: str, module: str, weight: str, bias: str, out: int, inner: int) -> str:
        if module not in self.adapted:
            return self.op("Gemm", x, weight, bias, name=module, transB=1)
        r, none = (
            f"{module}.r",
            np.zeros((0, inner), dtype=np.float32),
        )  # r = 0: a layer that the active adapter leaves alone
        A = self.optional(f"{module}.lora_A", (r, inner), none)
        B = self.optional(f"{module}.lora_B", (out, r), np.zeros((out, 0), dtype=np.float32))
        scale = self.optional(f"{module}.dora_scale", (out,), np.ones(out, dtype=np.float32))
        y = self.op("Gemm", x, weight, name=module, transB=1)
        y = self.op("Gemm", self.op("Gemm", x, A, transB=1), B, y, transB=1)
        return self.op("Add", self.op("Mul", y, scale), bias)

    def _head(self, x: str) -> str:
        layers, width = head_layers(self.spec, self.pooling), self.spec.hidden
        fan_in: str | int = width
        for layer in layers:
            weight, bias, last = f"{layer.module}.weight", f"{layer.module}.bias", layer is layers[-1]
            if self.adapted:
                known = weight in self.weights
                fan_out: str | int = "labels" if last else (width if known else "dense")
                none = (
                    0,
                    0 if isinstance(fan_in, str) else fan_in,
                )  # a head that is not given yields no logits, never wrong ones
                self.optional(
                    weight,
                    (fan_out, fan_in),
                    self.weights[weight] if known else np.zeros(none, dtype=np.float32),
                )
                self.optional(
                    bias, (fan_out,), self.weights[bias] if known else np.zeros(0, dtype=np.float32)
                )
                fan_in = fan_out
            else:
                self._constant(weight), self._constant(bias)
            x = self._activate(self._product(x, layer.module, weight, bias, width, width), layer.activation)
        return x

    def _activate(self, x: str, name: str | None) -> str:
        if name in (None, "relu", "tanh"):
            return self.op({"relu": "Relu", "tanh": "Tanh"}[name], x) if name else x
        half = self.op("Mul", x, self.scalar(0.5))
        if name == "gelu":
            inner = self.op("Erf", self.op("Mul", x, self.scalar(0.5**0.5)))
        else:  # gelu_new, gelu_pytorch_tanh
            cube = self.op("Mul", self.op("Mul", self.op("Mul", x, x), x), self.scalar(0.044715))
            inner = self.op(
                "Tanh", self.op("Mul", self.op("Add", x, cube), self.scalar(math.sqrt(2 / math.pi)))
            )
        return self.op("Mul", half, self.op("Add", inner, self.scalar(1.0)))


def classifier_model(
    spec: EncoderSpec, weights: Mapping[str, np.ndarray], pooling: str, metadata: Mapping[str, Any]
) -> ModelProto:
    """A merged classifier: token inputs (batch, length) to `logits` (batch, labels).

    Args:
        weights: full transformers name -> float32 array, head included.
        metadata: facts to store in the file.
    """
    graph = EncoderGraph(spec, weights, pooling)
    graph.op("Identity", graph.logits, name=LOGITS)
    return graph.model(metadata)


def base_model(
    spec: EncoderSpec,
    weights: Mapping[str, np.ndarray],
    pooling: str,
    adapted: Collection[str],
    guard: str,
    metadata: Mapping[str, Any],
) -> ModelProto:
    """A base whose adapters are inputs, for any rank and number of labels.

    Args:
        adapted: full names of the dense layers that take LoRA; at least one.
        guard: name of an input (1,) that every adapter of this base gives, zero. A runtime refuses inputs
            that a graph does not have, and so an adapter of another base.
    """
    graph = EncoderGraph(spec, weights, pooling, adapted)
    zero = graph.optional(guard, (1,), np.zeros(1, dtype=np.float32))
    graph.op("Add", graph.logits, zero, name=LOGITS)
    return graph.model(metadata)

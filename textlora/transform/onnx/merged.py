"""The merged classifier as an ONNX folder, and its int8 version with what that costs."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from textlora.adapters.folder import AdapterMeta
from textlora.adapters.golden_texts import golden_rows
from textlora.core.config import REGRESSION
from textlora.core.errors import UsageError
from textlora.core.files import write_text
from textlora.data import LabelSchema, Table, require_texts
from textlora.data.tokenize import Encoded
from textlora.inference.classifier import TextClassifier, exact_float32
from textlora.metrics.calibration import decide, probabilities
from textlora.metrics.scores import evaluate
from textlora.model.base import BaseFiles
from textlora.model.families import EncoderSpec, read_spec
from textlora.model.lora import delta
from textlora.model.packed_model import PackedModel
from textlora.transform.onnx.graph import OPSET, classifier_model
from textlora.transform.onnx.session import open_session, require_close, session_logits, write_model
from textlora.transform.output_folder import new_folder, require_free, write_tokenizer
from textlora.transform.transformers_names import NOTE, named_loras, settled, temperature_of, trained_whole

MODEL_FILE, INT8_FILE = "model.onnx", "model_quantized.onnx"
_FACTS = (
    "pairs",
    "pooling",
    "max_length",
    "truncation",
    "temperature",
    "fitted_temperature",
    "fitted_shift",
    "thresholds",
    "label_separator",
    "base",
)
LEFT_OUT = ("_name_or_path", "auto_map", "torch_dtype", "dtype")


def export_classifier(
    classifier: TextClassifier,
    files: BaseFiles,
    output: Path,
    *,
    int8: bool = False,
    table: Table | None = None,
) -> dict[str, Any]:
    """Write the merged classifier as a folder with model.onnx, config.json and the tokenizer.

    Args:
        classifier: the adapter on its base.
        files: that base.
        output: new or empty folder.
        int8: write model_quantized.onnx too: weights in int8, activations quantised as they come.
        table: labelled rows to compare on besides the golden examples.

    Returns:
        {"output", "opset", "bytes", "rows", "golden", "score_difference"}: bytes by file name, and the
        largest difference of a logit from the packed model's over its temperature on the golden examples, of
        a score on all rows. With a table "difference" on its rows, "test" metrics and "changed" decisions
        too. "int8" has the same of that file.

    Raises:
        UsageError: there is no graph for this architecture, or `output` is in use.
        DataError: an empty text, or a label the adapter does not know.
        VerificationError: ONNX Runtime does not give the packed model's logits; nothing is left.
    """
    spec, meta = require_spec(files), classifier.meta
    require_free(output)
    trial = _Trial.of(classifier, table)
    with new_folder(output) as folder:
        path, config = folder / MODEL_FILE, _config(files, meta)
        write_model(
            classifier_model(
                spec, merged_weights(classifier.model, temperature_of(meta)), meta.pooling, config
            ),
            path,
        )
        write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_tokenizer(classifier.tokenizer, (files.folder,), files.config, folder, truncate=True)
        found = session_logits(open_session(path), trial.encoded, spec)
        require_close(found, trial.packed)
        result = {
            "output": str(output),
            "opset": OPSET,
            "rows": len(trial.encoded) - trial.golden,
            **trial.record(found),
        }
        if int8:
            _quantise(path, folder / INT8_FILE)
            result["int8"] = trial.record(
                session_logits(open_session(folder / INT8_FILE), trial.encoded, spec)
            )
        result["bytes"] = file_sizes(folder)
    return result


@dataclass(frozen=True)
class _Trial:
    """Texts to compare on, the golden examples first: encoded, with the packed model's logits (N, C) over the
    temperature, and the labels of the rows behind them."""

    meta: AdapterMeta
    encoded: list[Encoded]
    packed: np.ndarray
    golden: int
    labels: np.ndarray | None

    @classmethod
    def of(cls, classifier: TextClassifier, table: Table | None) -> "_Trial":
        meta, labels, rows = classifier.meta, None, golden_rows(classifier.meta.pairs)
        golden = len(rows)
        if table is not None:
            require_texts(table)
            paired = table.columns.text_pair is not None
            classifier.require_pairs(paired, paired)
            schema = LabelSchema(meta.problem_type, meta.labels, meta.label_separator)
            labels = schema.encode_all(table.rows, table.columns.label or "label")
            rows += [(row.text, row.text_pair) for row in table.rows]
        texts, pairs = [text for text, _ in rows], [pair for _, pair in rows]
        with exact_float32():
            packed = classifier.plain_logits(texts, pairs) / temperature_of(meta)
            return cls(settled(meta), classifier.tokenizer.encode(texts, pairs), packed, golden, labels)

    def record(self, found: np.ndarray) -> dict[str, Any]:
        """What a file's logits are worth: the largest difference of one on the golden examples and on the
        rows, of a score on all, metrics, decisions changed."""
        apart, meta = np.abs(found - self.packed), self.meta
        scores = [probabilities(logits, meta.problem_type) for logits in (found, self.packed)]
        record: dict[str, Any] = {
            "golden": float(apart[: self.golden].max()),
            "score_difference": float(np.abs(scores[0] - scores[1]).max()),
        }
        if self.labels is None:
            return record
        rows = found[self.golden :]
        thresholds = None if meta.thresholds is None else np.array(meta.thresholds)
        record |= {"difference": float(apart[self.golden :].max())}
        record["test"] = evaluate(
            meta.problem_type, self.labels, rows, list(meta.labels), thresholds=thresholds
        )
        if meta.problem_type != REGRESSION:
            after, before = (
                decide(p[self.golden :], meta.problem_type, thresholds).reshape(len(rows), -1) for p in scores
            )
            record["changed"] = int((before != after).any(axis=1).sum())
        return record


def require_spec(files: BaseFiles) -> EncoderSpec:
    """The sizes of a base that has a graph. Raises UsageError for one that runs through transformers."""
    spec = read_spec(files.config)
    if isinstance(spec, str):
        raise UsageError(
            f"no ONNX graph for this base: {spec}, and the graph is made from its tables",
            "`textlora merge` it and export that folder with optimum",
        )
    return spec


def named_base(spec: EncoderSpec, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full transformers name -> tensor of a base, its pooler included where it has one."""
    prefix = spec.family.prefix
    table = spec.tensors() | {
        f"pooler.{part}": f"pooler.dense.{part}" for part in ("weight", "bias") if f"pooler.{part}" in tensors
    }
    return {f"{prefix}.{theirs}": tensors[ours] for ours, theirs in table.items()}


def merged_weights(model: PackedModel, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """Full transformers name -> float32 array of the merged classifier; `W + delta` is computed in float64
    and rounded once.

    Args:
        temperature: what the adapter's logits are divided by; it goes into the head.
    """
    tensors = named_base(model.base.spec, model.base.tensors) | trained_whole(model, temperature)
    for module, lora in named_loras(model).items():
        weight = tensors[f"{module}.weight"].to("cpu", torch.float64)
        tensors[f"{module}.weight"] = weight + delta(weight, lora)
    return as_arrays(tensors)


def as_arrays(tensors: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """The same in float32 on the host."""
    return {name: tensor.to("cpu", torch.float32).contiguous().numpy() for name, tensor in tensors.items()}


def adapter_facts(meta: AdapterMeta) -> dict[str, Any]:
    """What an answer depends on and neither a graph nor transformers' config.json has a place for; the
    temperature is in the head."""
    return {name: getattr(settled(meta), name) for name in _FACTS}


def _config(files: BaseFiles, meta: AdapterMeta) -> dict[str, Any]:
    architectures = [MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[files.config["model_type"]]]
    return {key: value for key, value in files.config.items() if key not in LEFT_OUT} | {
        "architectures": architectures,
        "id2label": {str(i): label for i, label in enumerate(meta.labels)},
        "label2id": {label: i for i, label in enumerate(meta.labels)},
        "num_labels": len(meta.labels),
        "problem_type": meta.problem_type,
        NOTE: adapter_facts(meta),
    }


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of the ONNX files of a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx*"))}


def _quantise(source: Path, target: Path) -> None:
    """Dynamic int8: dense layers with one scale per output, embedding tables with one each; the rest stays
    float32."""
    from onnxruntime.quantization import quantize_dynamic  # takes a second to import

    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it asks for a preparation that a graph like ours has no use for
    try:
        large = source.with_name(f"{source.name}_data").exists()
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            use_external_data_format=large,
        )
    finally:
        logging.disable(disabled)

"""One ONNX graph of a base for all its adapters, and adapters in ONNX Runtime's own file format.

A graph takes A, B and DoRA's scale of every dense layer, and the head, as optional inputs. An adapter feeds
its own tensors; a layer that it leaves alone keeps its default of rank 0. Both ways work: a dictionary of
arrays, or an `.onnx_adapter` file as an active `LoraAdapter` of the run.
"""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from textlora.adapters.golden_texts import golden_rows
from textlora.core.config import LoraConfig
from textlora.core.errors import UsageError
from textlora.core.files import atomic_path, write_text
from textlora.data.tokenize import TextTokenizer, load_tokenizer
from textlora.inference.classifier import TextClassifier, encoded_logits, exact_float32
from textlora.model.base import BaseFiles, read_weights
from textlora.model.lora import dora_scale
from textlora.model.packed_model import PackedModel
from textlora.transform.onnx.graph import OPSET, base_model, head_layers
from textlora.transform.onnx.merged import (
    LEFT_OUT,
    MODEL_FILE,
    adapter_facts,
    as_arrays,
    file_sizes,
    named_base,
    require_spec,
)
from textlora.transform.onnx.session import open_session, require_close, session_logits, write_model
from textlora.transform.output_folder import new_folder, require_free, write_tokenizer
from textlora.transform.transformers_names import NOTE, named_loras, temperature_of, trained_whole

SUFFIX = ".onnx_adapter"
_TRIALS = (
    (1, 1, False, 1),
    (4, 5, False, 2),
    (2, 3, True, 1),
)  # rank, labels, DoRA, step from one adapted layer to the next


def guard_name(base_hash: str, pooling: str) -> str:
    """Name of the input that ties adapters to their base: a graph of another base has no such input, and ONNX
    Runtime then refuses to run."""
    return f"base.{base_hash.removeprefix('sha256:')[:16]}.{pooling}"


def adapter_inputs(model: PackedModel, temperature: float = 1.0) -> dict[str, np.ndarray]:
    """An adapter as inputs of its base's graph, float32.

    Args:
        temperature: what the adapter's logits are divided by (`meta.temperature`, 1 unless an older textlora
            saved it); it goes into the head.

    Returns:
        per adapted layer `NAME.lora_A` (r, in), `NAME.lora_B` (out, r) times the scale s and, with DoRA,
        `NAME.dora_scale` (out,); the head's weights and biases under transformers' names; the guard, zero.

    Raises:
        UsageError: the adapter has its own weights for more than LoRA and the head.
    """
    spec, trained = model.base.spec, trained_whole(model, temperature)
    heads = {
        f"{layer.module}.{part}" for layer in head_layers(spec, model.pooling) for part in ("weight", "bias")
    }
    if others := sorted(set(trained) - heads):
        raise UsageError(
            f"this adapter has its own '{others[0]}' of the base, which is no input of the graph",
            "export it merged",
        )
    base = named_base(spec, model.base.tensors)
    inputs = {guard_name(model.base_hash(), model.pooling): torch.zeros(1)} | trained
    for module, lora in named_loras(model).items():
        inputs |= {f"{module}.lora_A": lora.A, f"{module}.lora_B": lora.scaling * lora.B}
        scale = dora_scale(base[f"{module}.weight"].to("cpu", torch.float64), lora)
        if scale is not None:
            inputs[f"{module}.dora_scale"] = scale
    return as_arrays(inputs)


def export_base(
    files: BaseFiles, output: Path, *, pooling: str = "first", target_modules: Sequence[str] | None = None
) -> dict[str, Any]:
    """Write a base as a folder with model.onnx, whose adapters are inputs, config.json and the tokenizer.

    Args:
        pooling: of the adapters it is for.
        target_modules: the layers that can take LoRA; default: every dense layer of the blocks, and BERT's
            pooler.

    Returns:
        {"output", "opset", "bytes", "golden", "adapters", "adapted"}: "golden" is the largest difference of a
        logit from the packed model's on the golden texts, over "adapters" random ones; "adapted" counts the
        layers that can take LoRA.

    Raises:
        UsageError: no graph for this architecture, a target that matches nothing, or `output` is in use.
        VerificationError: ONNX Runtime does not give the packed model's logits; nothing is left.
    """
    spec = require_spec(files)
    require_free(output)
    base = read_weights(files.folder, spec, pooler=pooling == "first")
    weights = named_base(spec, base.tensors)
    adapted = PackedModel(
        base, LoraConfig(r=1, target_modules=tuple(target_modules or ("all-linear",))), 1, pooling
    ).target_modules
    if target_modules is None:
        adapted += [
            layer.module for layer in head_layers(spec, pooling) if f"{layer.module}.weight" in weights
        ]
    facts = {
        "pooling": pooling,
        "base_hash": base.hash,
        "guard": guard_name(base.hash, pooling),
        "adapted": adapted,
    }
    tokenizer = TextTokenizer(
        load_tokenizer(files.folder, files.config["model_type"]), min(512, spec.max_length)
    )
    texts, pairs = zip(*golden_rows(False), *golden_rows(True), strict=True)
    encoded = tokenizer.encode(texts, pairs)
    with new_folder(output) as folder:
        path = folder / MODEL_FILE
        write_model(base_model(spec, as_arrays(weights), pooling, adapted, facts["guard"], facts), path)
        config = {key: value for key, value in files.config.items() if key not in LEFT_OUT} | {NOTE: facts}
        write_text(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        write_tokenizer(tokenizer, (files.folder,), files.config, folder, truncate=True)
        session, worst = open_session(path), 0.0
        for r, labels, dora, step in _TRIALS:
            lora = LoraConfig(r=r, lora_alpha=2 * r, use_dora=dora, target_modules=tuple(adapted[::step]))
            model = PackedModel(base, lora, labels, pooling)
            _randomise(model)
            found = session_logits(session, encoded, spec, adapter_inputs(model))
            expected = encoded_logits(model, encoded)
            require_close(found, expected)
            worst = max(worst, float(np.abs(found - expected).max()))
        size = file_sizes(folder)
    return {
        "output": str(output),
        "opset": OPSET,
        "adapted": len(adapted),
        "adapters": len(_TRIALS),
        "golden": worst,
        "bytes": size,
    }


def _randomise(model: PackedModel) -> None:
    """Draw every trainable tensor, so that no part of an adapter is at zero; magnitudes are scaled by 0.7 to
    1.3."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.trainable().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(
                tensor * (1 + 0.3 * noise.tanh())
                if name.endswith("magnitude_vector")
                else noise / tensor.shape[-1] ** 0.5
            )


def export_adapter(classifier: TextClassifier, files: BaseFiles, output: Path) -> dict[str, Any]:
    """Write an adapter as an `.onnx_adapter` file, and what else an answer depends on (labels, length,
    thresholds) as a `.json` beside it.

    Args:
        classifier: the adapter on its base.
        files: that base.
        output: file to write; it and the `.json` must not exist.

    Returns:
        {"output", "facts", "bytes", "golden"}: "golden" is the largest difference of a logit from the packed
        model's over its temperature on the golden examples, with the file active on its base's graph.

    Raises:
        UsageError: another extension, a file is in the way, or something that the graph has no input for.
        VerificationError: ONNX Runtime does not give the packed model's logits; nothing is left.
    """
    spec = require_spec(files)
    model = classifier.model
    meta = classifier.meta
    facts = output.with_suffix(".json")
    if output.suffix != SUFFIX:
        raise UsageError(f"--output {output}: an adapter's file ends with {SUFFIX}")
    for path in (output, facts):
        if path.exists():
            raise UsageError(f"{path} exists", "choose another --output")
    inputs = adapter_inputs(model, temperature_of(meta))
    texts, pairs = zip(*golden_rows(meta.pairs), strict=True)
    with exact_float32():
        encoded = classifier.tokenizer.encode(texts, pairs)
        packed = classifier.plain_logits(texts, pairs) / temperature_of(meta)
    with tempfile.TemporaryDirectory() as scratch:
        graph, file = Path(scratch) / MODEL_FILE, Path(scratch) / f"adapter{SUFFIX}"
        weights = as_arrays(named_base(spec, model.base.tensors))
        guard = guard_name(model.base_hash(), model.pooling)
        write_model(base_model(spec, weights, model.pooling, model.target_modules, guard, {}), graph)
        _write_adapter(inputs, file)
        adapter, options = ort.LoraAdapter(), ort.RunOptions()
        adapter.Load(str(file))
        options.add_active_adapter(adapter)
        found = session_logits(open_session(graph), encoded, spec, run_options=options)
        require_close(found, packed)
        del adapter, options  # the file is mapped into memory
        content = {"labels": list(meta.labels), "problem_type": meta.problem_type, **adapter_facts(meta)}
        with atomic_path(output) as part, atomic_path(facts) as note:
            shutil.copyfile(file, part)
            note.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    distance = float(np.abs(found - packed).max())
    return {
        "output": str(output),
        "facts": str(facts),
        "golden": distance,
        "bytes": {output.name: output.stat().st_size},
    }


def _write_adapter(inputs: dict[str, np.ndarray], path: Path) -> None:
    file = ort.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters({name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in inputs.items()})
    file.export_adapter(str(path))

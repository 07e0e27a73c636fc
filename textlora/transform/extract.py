"""A merged classifier minus its base, back to an adapter: the low-rank part of each dense layer's difference,
by SVD in float64.

What rounding leaves in a difference is known: half a unit in the last place of the file's dtype per weight,
at random. Singular values above that noise are the adapter, and nothing else may be left over.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from textlora.adapters.card import model_card
from textlora.adapters.folder import AdapterMeta, peft_config, write_side_file, write_weights
from textlora.adapters.golden_texts import golden_rows
from textlora.core.config import PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, TRUNCATIONS, LoraConfig
from textlora.core.errors import AdapterError, UsageError, VerificationError
from textlora.core.files import write_text
from textlora.data.tokenize import Encoded, TextTokenizer, load_tokenizer
from textlora.inference.classifier import TextClassifier, encoded_logits
from textlora.model.adapter_tensors import PREFIX, parameter_counts
from textlora.model.base import BaseFiles, find_base
from textlora.model.interface import Model
from textlora.model.open import open_model
from textlora.model.reference_model import ReferenceModel
from textlora.transform.fresh_process import ask_fresh, same_tokens
from textlora.transform.merge import TOLERANCE
from textlora.transform.output_folder import new_folder, require_free, write_tokenizer
from textlora.transform.sentence_transformers import load_pooled
from textlora.transform.transformers_names import NOTE, load_net, merge_into, net_logits, trained_whole

MAX_RESIDUAL = 0.05  # of the Frobenius norm of the difference
EDGE = 2.0  # singular values of rounding noise end at about 1 x its root mean square x (sqrt(out) + sqrt(in))


@dataclass(frozen=True)
class Layer:
    """The difference of one dense layer: rank taken, rank above the noise, its size, the part left over, the
    part that rounding explains (Frobenius norms), and A, B."""

    name: str
    rank: int
    shown: int
    size: float
    left: float
    rounding: float
    A: Tensor
    B: Tensor


def extract(merged: str, base: str, output: Path, r: int | None = None) -> dict[str, Any]:
    """Write the adapter that turns `base` into `merged`.

    Args:
        merged: a transformers classification folder or hub id, or a folder that `merge` wrote of a
            mean-pooled adapter.
        base: what it was merged into; folder, hub id or minilm.
        output: new or empty folder.
        r: largest rank; default: what the spectrum shows, as long as A and B hold fewer numbers than the
            layer.

    Returns:
        {"output", "dtype", "r", "residual", "rounding", "layers": {name: {"rank", "residual", "rounding"}},
        "difference", "rounding_difference"}: residuals are relative Frobenius norms, "difference" is the
        largest of a golden logit between adapter and merged model, "rounding_difference" what rounding the
        extracted adapter's merge to "dtype" does to them.

    Raises:
        ModelError: one of the two cannot be read, or they are of different types.
        AdapterError: the difference is no adapter: not of low rank, drowned by rounding, or elsewhere than in
            dense layers and head.
        VerificationError: the adapter does not answer as the merged model does, up to rounding and what `r`
            cut off.
    """
    require_free(output)
    if r is not None and r < 1:
        raise UsageError(f"--r {r}: the rank must be at least 1")
    files, whole = find_base(base), find_base(merged)
    kinds = files.config["model_type"], whole.config["model_type"]
    if kinds[0] != kinds[1]:
        raise AdapterError(
            f"{merged} is a {kinds[1]}, {base} is a {kinds[0]}", "pass the base it was merged into as --base"
        )
    labels, problem_type = _labels(whole)
    note = whole.config.get(NOTE)
    note = note if isinstance(note, dict) else {}
    pooling = "mean" if note.get("pooling") == "mean" else "first"
    places, _ = open_model(
        files, LoraConfig(r=1, target_modules=("all-linear",)), len(labels), pooling=pooling
    )
    load = load_pooled if pooling == "mean" else load_net
    old, new = load(files.folder, len(labels)), load(whole.folder, len(labels), whole=True)
    layers, poolers, dtype = _compare(old, new, places, merged, r)
    rank = max(layer.rank for layer in layers)
    lora = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=tuple(layer.name for layer in layers if layer.rank),
        modules_to_save=poolers,
    )
    model, _ = open_model(files, lora, len(labels), pooling=pooling)
    model.load_trainable(_tensors(layers, rank, model, new))
    tokenizer = _tokenizer(whole, note, model.max_length)
    meta = AdapterMeta(
        labels=labels, problem_type=problem_type, pairs=note.get("pairs") is True, pooling=pooling, max_length=tokenizer.max_length,
        truncation=tokenizer.truncation, base=base_facts(files, model), label_separator=note.get("label_separator"),
        thresholds=note.get("thresholds"), temperature=note.get("temperature", 1.0), fitted_temperature=note.get("fitted_temperature", 1.0),
        fitted_shift=note.get("fitted_shift"),
        training={"extracted_from": whole.id or whole.folder.name, "rounded_to": str(dtype).removeprefix("torch.")},
        # without a version the folder says nothing on pairs, and takes both
        textlora_version=version("textlora") if note else "",
    )  # fmt: skip
    with new_folder(output) as folder:
        classifier = write_adapter(
            folder,
            output.name,
            model,
            files,
            meta,
            tokenizer,
            whole.folder,
            "Taken out of a merged model by SVD.",
        )
        rows = golden_rows(meta.pairs)
        fresh = ask_fresh(whole.folder, rows, "mean by hand" if pooling == "mean" else "first")
        same_tokens(classifier, rows, fresh)
        mine = encoded_logits(model, [_encoded(given) for given in fresh.inputs])
        merge_into(old, model, dtype)
        rounding = np.abs(net_logits(old, fresh.inputs) - mine)
        difference = np.abs(fresh.logits - mine)
        allowed = TOLERANCE * np.maximum(1, np.abs(mine)) + (
            2 * rounding.max() if dtype != torch.float32 else 0
        )
        cut = any(
            layer.rank < layer.shown for layer in layers
        )  # at r, and what that left out is within MAX_RESIDUAL
        if not cut and not (difference <= allowed).all():
            raise VerificationError(
                f"the extracted adapter gives logits up to {difference.max():.2g} away from {merged}"
            )
    size, left, noise = (
        math.hypot(*(getattr(layer, name) for layer in layers)) for name in ("size", "left", "rounding")
    )
    return {
        "output": str(output),
        "dtype": str(dtype).removeprefix("torch."),
        "r": rank,
        "residual": left / size,
        "rounding": noise / size,
        "layers": {
            la.name: {"rank": la.rank, "residual": la.left / la.size, "rounding": la.rounding / la.size}
            for la in layers
        },
        "difference": float(difference.max()),
        "rounding_difference": float(rounding.max()),
    }


def _compare(
    old: nn.Module, new: nn.Module, places: Model, merged: str, r: int | None
) -> tuple[list[Layer], tuple[str, ...], torch.dtype]:
    """Layers that differ, poolers that differ, and the dtype that `new` was rounded to."""
    before, after = dict(old.named_parameters()), dict(new.named_parameters())
    heads = set(trained_whole(places))
    names = [name for name in after if name not in heads]
    for name in names:
        if after[name].shape != before[name].shape:
            raise AdapterError(
                f"{merged}: tensor '{name}' has shape {tuple(after[name].shape)}, the base {tuple(before[name].shape)}"
            )
        if not torch.isfinite(after[name]).all():
            raise AdapterError(f"{merged}: tensor '{name}' holds values that are not finite numbers")
    dtype = _rounded_to([after[name] for name in names])
    changed = [name for name in names if not torch.equal(after[name].to(dtype), before[name].to(dtype))]
    dense = {f"{full}.weight": full for full in places.target_modules}
    poolers = tuple(dict.fromkeys(name.rpartition(".")[0] for name in changed if ".pooler." in name))
    others = [name for name in changed if name not in dense and name.rpartition(".")[0] not in poolers]
    if others:
        raise AdapterError(
            f"{merged}: tensor '{others[0]}' differs from the base ({len(others)} such outside dense layers and head), LoRA did not do that",
            "is --base the model it was merged into?",
        )
    layers = [
        _split(dense[name], before[name], after[name], dtype, r, merged) for name in changed if name in dense
    ]
    if not layers:
        raise AdapterError(f"{merged}: no dense layer differs from the base, so there is no adapter in it")
    size, left = (math.hypot(*(getattr(layer, name) for layer in layers)) for name in ("size", "left"))
    if left > MAX_RESIDUAL * size or not any(layer.rank for layer in layers):
        raise AdapterError(
            f"{merged}: rounding to {str(dtype).removeprefix('torch.')} drowned the adapter, {left / size:.1%} of the difference is rounding "
            f"(at most {MAX_RESIDUAL:.0%} may be)",
            "merge it again with --dtype float32",
        )
    return layers, poolers, dtype


def _rounded_to(tensors: list[Tensor]) -> torch.dtype:
    """The coarsest dtype that holds all values: a bfloat16 merge saved in float32 is still rounded to
    bfloat16."""
    fits = lambda dtype: all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in tensors)
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if fits(dtype)), torch.float32)


def _split(name: str, before: Tensor, after: Tensor, dtype: torch.dtype, r: int | None, merged: str) -> Layer:
    """SVD of one layer's difference. Raises AdapterError where more is left over than rounding explains."""
    with torch.no_grad():
        change = after.double() - before.double()
        out, inner = change.shape
        unit = torch.finfo(dtype).eps * torch.exp2(torch.frexp(after.double())[1].double() - 1) * (after != 0)
        rounding = float(unit.square().sum().div(12).sqrt())
        U, values, V = torch.linalg.svd(change, full_matrices=False)
        edge = EDGE * rounding * (math.sqrt(out) + math.sqrt(inner)) / math.sqrt(out * inner)
        shown = int((values > edge).sum())
        rank = min(shown, r or shown, (out * inner - 1) // (out + inner))
        size, left = float(values.norm()), float(values[rank:].norm())
        if left > max(MAX_RESIDUAL * size, 3 * rounding):
            raise AdapterError(
                f"{merged}: at rank {rank} {left / size:.1%} of the difference of {name} is left over (at most {MAX_RESIDUAL:.0%} may be)",
                f"the spectrum shows rank {shown}, raise --r"
                if rank == r
                else "it has no low rank: fine-tuned whole, or merged from DoRA",
            )
        root = values[:rank].sqrt()
        return Layer(
            name, rank, shown, size, left, rounding, root.unsqueeze(1) * V[:rank], U[:, :rank] * root
        )


def _tensors(layers: list[Layer], rank: int, model: Model, net: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors: A and B filled up to one rank with zeros, all else from the merged model."""
    after, found = dict(net.named_parameters()), {}
    for layer in layers:
        if layer.rank:
            found[f"{PREFIX}{layer.name}.lora_A.weight"] = nn.functional.pad(
                layer.A, (0, 0, 0, rank - layer.rank)
            ).float()
            found[f"{PREFIX}{layer.name}.lora_B.weight"] = nn.functional.pad(
                layer.B, (0, rank - layer.rank)
            ).float()
    own = {
        name: after[name.removeprefix(PREFIX)].detach() for name in model.trainable() if ".lora_" not in name
    }
    return {name: (found | own)[name] for name in model.trainable()}


def _encoded(given: dict[str, list[int]]) -> Encoded:
    ids = np.array(given["input_ids"])
    return Encoded(ids, np.array(given.get("token_type_ids", np.zeros_like(ids))), len(ids))


def _labels(files: BaseFiles) -> tuple[tuple[str, ...], str]:
    """Label names in class order and the problem type of a transformers config. Raises AdapterError where
    they cannot be."""
    config = files.config
    named = config.get("id2label", {"0": "LABEL_0", "1": "LABEL_1"})  # transformers leaves its default out
    if not isinstance(named, dict) or sorted(named, key=str) != sorted(map(str, range(len(named)))):
        raise AdapterError(
            f"{files.folder}: config.json has no id2label for every class", "is this a classifier?"
        )
    labels = tuple(str(named[str(i)]) for i in range(len(named)))
    if len(set(labels)) != len(labels):
        raise AdapterError(f"{files.folder}: config.json gives two classes one name")
    kind = config.get("problem_type") or (REGRESSION if len(labels) == 1 else SINGLE_LABEL)
    if kind not in PROBLEM_TYPES.values():
        raise AdapterError(f"{files.folder}: problem_type {kind!r} is not one that transformers knows")
    return labels, kind


def _tokenizer(files: BaseFiles, note: dict[str, Any], longest: int) -> TextTokenizer:
    """The merged folder's tokenizer; length and side of truncation as it says, else what the model takes, at
    most 512."""
    try:
        settings = json.loads((files.folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    length = settings.get("model_max_length")
    length = length if isinstance(length, int) and 8 <= length <= longest else min(512, longest)
    side = "tail" if settings.get("truncation_side") == "left" else "head"
    truncation = note.get("truncation") if note.get("truncation") in TRUNCATIONS else side
    return TextTokenizer(load_tokenizer(files.folder, files.config["model_type"]), length, truncation)


def base_facts(files: BaseFiles, model: Model) -> dict[str, Any]:
    """The `base` of `textlora.json`."""
    return {
        "id": files.id,
        "revision": files.revision,
        "model_type": files.config["model_type"],
        "hash": model.base_hash(),
    }


def write_adapter(
    folder: Path,
    name: str,
    model: Model,
    files: BaseFiles,
    meta: AdapterMeta,
    tokenizer: TextTokenizer,
    tokenizer_from: Path,
    summary: str,
) -> TextClassifier:
    """Write a whole adapter folder, golden examples by transformers + peft, and load it as anybody would.

    Args:
        folder: where to; `name` is what the card calls it.
        tokenizer_from: folder whose tokenizer_config.json gives the tokenizer's other settings.
        summary: what the card says on where it comes from.

    Raises:
        AdapterError: what was written does not answer as transformers + peft do.
    """
    config = peft_config(
        model.lora, model.target_modules, model.modules_to_save, meta.pooling, files.id, files.revision
    )
    write_weights(folder, config, model.trainable())
    write_tokenizer(tokenizer, (tokenizer_from, files.folder), files.config, folder, truncate=False)
    rows = golden_rows(meta.pairs)
    reference = ReferenceModel.from_adapter(folder, files.folder, len(meta.labels), pooling=meta.pooling)
    logits = encoded_logits(
        reference, tokenizer.encode([text for text, _ in rows], [pair for _, pair in rows])
    )
    golden = tuple(
        {"text": a, "text_pair": b, "logits": [float(x) for x in row]}
        for (a, b), row in zip(rows, logits, strict=True)
    )
    adapter, head = parameter_counts(model.trainable())
    counts = {"path": model.path, "adapter_parameters": adapter, "head_parameters": head}
    meta = dataclasses.replace(meta, golden=golden, training=meta.training | counts)
    card = model_card(meta, model.lora, "AutoModelForSequenceClassification", summary, meta.training, name)
    write_text(folder / "README.md", card.replace(f", trained with textlora {meta.textlora_version}", "", 1))
    write_side_file(folder, meta)
    return TextClassifier.load(folder, base=str(files.folder), device="cpu")

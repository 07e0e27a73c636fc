"""What is in an adapter folder, in plain facts; whether it fits a base; and the one legitimate edit, renaming
labels."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textlora.adapters.card import relabelled
from textlora.adapters.folder import (
    CARD_FILE,
    WEIGHTS_FILE,
    AdapterFolder,
    changed_files,
    lora_config,
    read_adapter,
    write_side_file,
)
from textlora.adapters.hub import adapter_folder
from textlora.adapters.importers.facts import class_count
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, TextloraError, UsageError
from textlora.core.files import write_text
from textlora.model.adapter_tensors import PREFIX, parameter_counts
from textlora.model.base import BaseFiles, find_base, weights_hash
from textlora.model.families import SLOTS, read_spec
from textlora.model.open import open_model


def inspect_folder(
    path: Path | str, against: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Facts about an adapter folder, or about one on the hub.

    Args:
        against: a base model; adds "fits" (bool), "fits_why", and "fits_checks" with one record per thing
            compared.
        revision: branch, tag or commit of an adapter on the hub.

    Raises:
        AdapterError: the folder is damaged.
    """
    folder = read_adapter(adapter_folder(path, revision))
    lora, meta = lora_config(folder), folder.meta
    adapter, rest = parameter_counts(folder.tensors)
    head = sum(
        tensor.numel()
        for name, tensor in folder.tensors.items()
        if name.removeprefix(PREFIX).rpartition(".")[0] in lora.modules_to_save
    )
    layers = layer_facts(folder, lora)
    facts: dict[str, Any] = {
        "folder": str(path),
        "method": " + ".join(
            name for name, on in (("DoRA", lora.use_dora), ("rsLoRA", lora.use_rslora)) if on
        )
        or "LoRA",
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": [layer["module"] for layer in layers],
        "adapter_parameters": adapter,
        "head_parameters": head,
        "bias_parameters": rest - head,
        "head": sorted(lora.modules_to_save),
        "layers": layers,
        "bytes": sum(p.stat().st_size for p in folder.path.iterdir() if p.is_file()),
        "weights_bytes": (folder.path / WEIGHTS_FILE).stat().st_size,
        "fingerprint": fingerprint(folder, lora),
        "base": folder.config.get("base_model_name_or_path"),
    }
    if meta is None:
        facts["note"] = "no textlora.json: labels, task, length and base weights are not recorded"
    else:
        keys = (
            "labels",
            "problem_type",
            "pairs",
            "pooling",
            "max_length",
            "truncation",
            "base",
            "temperature",
            "fitted_temperature",
            "fitted_shift",
        )
        facts |= {
            key: getattr(meta, key) for key in (*keys, "thresholds", "scores", "training", "textlora_version")
        }
        facts["edited"] = changed_files(folder.path, meta)
    if against is not None:
        facts["fits_checks"] = compare(folder, against)
        wrong = [check["said"] for check in facts["fits_checks"] if not check["ok"]]
        facts["fits"], facts["fits_why"] = not wrong, wrong[0] if wrong else facts["fits_checks"][-1]["said"]
    return facts


def layer_facts(folder: AdapterFolder, lora: LoraConfig) -> list[dict[str, Any]]:
    """One record per adapted layer, in the order of the blocks: module, shape [out, in], r, lora_alpha,
    scaling, parameters, and what its update `s B A` is like: singular_values (largest first), frobenius, top,
    effective_rank.

    Raises:
        AdapterError: an A without its B, shapes that do not go together, or values that are not finite.
    """
    made = []
    for module in sorted(lora.target_modules or (), key=_natural):
        A, B = (folder.tensors.get(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
        if A is None or B is None or A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(
                f"{folder.path / WEIGHTS_FILE}: lora_A and lora_B of '{module}' do not go together",
                "copy the adapter again",
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise AdapterError(
                f"{folder.path / WEIGHTS_FILE}: LoRA of '{module}' holds values that are not finite numbers",
                "copy it again",
            )
        r, scaling = A.shape[0], lora.scaling_of(module)
        values = spectrum(A, B, scaling)
        alpha = scaling * (math.sqrt(r) if lora.use_rslora else r)
        record = {
            "module": module,
            "shape": [B.shape[0], A.shape[1]],
            "r": r,
            "lora_alpha": round(alpha, 6),
            "scaling": scaling,
        }
        own = [
            tensor for name, tensor in folder.tensors.items() if name.startswith(f"{PREFIX}{module}.lora_")
        ]
        record |= {
            "parameters": sum(tensor.numel() for tensor in own),
            "frobenius": math.hypot(*values),
            "top": values[0],
        }
        made.append(record | {"effective_rank": effective_rank(values), "singular_values": values})
    return made


def spectrum(A: Tensor, B: Tensor, scaling: float) -> list[float]:
    """The min(r, in, out) singular values of `s B A` that can differ from zero, largest first; A (r, in), B
    (out, r).

    Taken in float64 from the r x r product of the triangles of two QR decompositions: no (out, in) matrix is
    made.
    """
    b, a = (torch.linalg.qr(tensor.double(), mode="r").R for tensor in (B, A.T))
    return (scaling * torch.linalg.svdvals(b @ a.T)).tolist()


def effective_rank(values: Sequence[float]) -> float:
    """exp of the entropy of the singular values taken as shares of their sum (Roy and Vetterli 2007): 1 to
    their number, 0 where all are zero."""
    total = sum(values)
    return (
        math.exp(-sum(value / total * math.log(value / total) for value in values if value > 0))
        if total
        else 0.0
    )


def fingerprint(folder: AdapterFolder, lora: LoraConfig) -> str:
    """SHA-256 over what the adapter computes: method, pooling, scale of each adapted layer, and every tensor
    in float32.

    Equal for folders that give the same logits on the same base, whoever wrote the files, in whichever order
    and under whatever labels. A temperature in the head counts, one that is only noted or that the reader
    applies does not.
    """
    facts = {"dora": lora.use_dora, "pooling": folder.meta.pooling if folder.meta else "first"}
    facts["scaling"] = {module: lora.scaling_of(module) for module in lora.target_modules or ()}
    facts["tensors"] = weights_hash(folder.tensors.items())
    return "sha256:" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def compare(folder: AdapterFolder, base: str) -> list[dict[str, Any]]:
    """What an adapter asks of a base, in order: architecture, layers, shapes, weights; each a record of what,
    ok and said. It ends with the first that does not hold.

    Raises:
        ModelError: the base cannot be found or read.
    """
    checks: list[dict[str, Any]] = []

    def add(what: str, ok: bool, said: str) -> bool:
        checks.append({"what": what, "ok": ok, "said": said})
        return ok

    meta, files, lora = folder.meta, find_base(base), lora_config(folder)
    kind = files.config["model_type"]
    if meta is not None:
        same = kind == meta.base["model_type"]
        if not add(
            "architecture",
            same,
            f"both are {kind}"
            if same
            else f"the base is a {kind}, the adapter was trained on a {meta.base['model_type']}",
        ):
            return checks
    modules = lora.target_modules or ()
    there = _layers_of(files)
    missing = [module for module in modules if there is not None and module not in there]
    said = (
        f"{len(missing)} of its {len(modules)} adapted layers are not in the base, such as {missing[0]}"
        if missing
        else ""
    )
    if not add("layers", not missing, said or f"all {len(modules)} adapted layers are there"):
        return checks
    try:
        model, _ = open_model(
            files,
            lora,
            len(meta.labels) if meta else class_count(folder.tensors, folder.path),
            pooling=meta.pooling if meta else "first",
        )
        model.load_trainable(folder.tensors)
    except TextloraError as error:
        add("shapes", False, error.message)
        return checks
    add("shapes", True, f"all {len(folder.tensors)} tensors have a place and its shape")
    if meta is None:
        add("weights", True, "names and shapes fit; which weights it was trained on is not recorded")
    elif model.base_hash() != meta.base["hash"]:
        add(
            "weights",
            False,
            f"names and shapes fit, but the weights differ: {model.base_hash()[:19]} is not {meta.base['hash'][:19]}",
        )
    else:
        add("weights", True, "same weights as it was trained on")
    return checks


def _layers_of(files: BaseFiles) -> set[str] | None:
    """Dense layers of a base of the fast path, the head's among them; None for others, whose model must be
    built to know."""
    spec = read_spec(files.config)
    if isinstance(spec, str):
        return None
    return {spec.family.module(i, slot) for i in range(spec.layers) for slot in SLOTS} | {
        layer.module for layer in spec.family.head
    }


def relabel_folder(path: Path, changes: Sequence[str]) -> None:
    """Rename labels, `old=new` each; order and weights stay. Raises UsageError for an unknown, empty or
    doubled name."""
    folder = read_adapter(path)
    if folder.meta is None:
        raise UsageError(f"{path} has no textlora.json to relabel")
    known, renamed = folder.meta.labels, {}
    for change in changes:
        old, separator, new = change.partition("=")
        if not separator or old not in known or not new:
            raise UsageError(
                f"--relabel {change}: not old=new with a known label", f"labels are: {', '.join(known[:10])}"
            )
        renamed[old] = new
    names = [renamed.get(label, label) for label in known]  # all at once, so that two names can be swapped
    if len(set(names)) != len(names):
        raise UsageError("--relabel: two labels would have one name")
    card = path / CARD_FILE
    if card.is_file():
        write_text(card, relabelled(card.read_text(encoding="utf-8"), known, names))
    write_side_file(path, dataclasses.replace(folder.meta, labels=tuple(names)))


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a terminal."""
    layers = facts["layers"]
    sizes = sorted({(layer["r"], layer["lora_alpha"]) for layer in layers})
    shown = f"r {facts['r']}, alpha {facts['lora_alpha']:g}"
    if len(sizes) > 1:
        shown = "r and alpha by layer: " + ", ".join(f"{r} and {alpha:g}" for r, alpha in sizes)
    sides = "A, B and magnitudes" if facts["use_dora"] else "A and B"
    counts = f"{facts['adapter_parameters']:,} {sides}, {facts['head_parameters']:,} head ({', '.join(facts['head'])})"
    counts += f", {facts['bias_parameters']:,} biases of the base" if facts["bias_parameters"] else ""
    lines = [
        f"{facts['folder']}: {facts['method']} {shown}, {len(layers)} adapted layers",
        f"parameters: {counts}; {facts['weights_bytes']:,} bytes, with all files {facts['bytes']:,}",
    ]
    if "note" in facts:
        lines.append(facts["note"])
    else:
        labels = facts["labels"]
        named = ", ".join(labels[:10]) + (f", ... ({len(labels)})" if len(labels) > 10 else "")
        lines.append(f"task: {facts['problem_type']}, labels: {named}")
        base = facts["base"]
        lines.append(
            f"base: {base['id'] or 'a local folder'} ({base['model_type']}), weights {base['hash'][:19]}"
        )
        lines.append(
            f"input: {'text pairs' if facts['pairs'] else 'single texts'}, {facts['max_length']} tokens, cut at the {facts['truncation']}, {facts['pooling']} pooling"
        )
        if (applied := facts["temperature"]) != 1:
            lines.append(f"temperature: {applied:.4g}, by which whoever reads it divides the logits")
        if (fitted := facts["fitted_temperature"]) != 1:
            moved = (
                f", and the classes' frequencies added by {1 - 1 / fitted:.2g}"
                if facts["fitted_shift"]
                else ""
            )
            lines.append(f"temperature: {fitted:.4g}, divided into the head{moved}")
        for split, metrics in facts["scores"].items():
            lines.append(
                f"{split}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None)
            )
    lines += [f"fingerprint: {facts['fingerprint'][:23]}", *_spectrum_lines(layers)]
    if facts.get("edited"):
        lines.append(f"changed since it was saved: {', '.join(facts['edited'])}")
    if "fits" in facts:
        lines += [
            f"{check['what']:12}  {'yes' if check['ok'] else 'no':3}  {check['said']}"
            for check in facts["fits_checks"]
        ]
        lines.append(("fits: " if facts["fits"] else "does not fit: ") + facts["fits_why"])
    return lines


def _spectrum_lines(layers: Sequence[dict[str, Any]]) -> list[str]:
    """One line per adapted layer; what all names share in front is left out."""
    parts = [layer["module"].split(".") for layer in layers]
    shared = next((i for i, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), 0)
    short = [".".join(name[shared:]) for name in parts]
    width = max(map(len, short), default=0)
    lines = [
        f"{'update s B A by layer':{width}}  {'r':>3}  {'alpha':>6}  {'Frobenius norm':>14}  {'largest value':>13}  {'effective rank':>14}"
    ]
    for name, layer in zip(short, layers, strict=True):
        lines.append(
            f"{name:{width}}  {layer['r']:3}  {layer['lora_alpha']:6g}  {layer['frobenius']:14.4f}  {layer['top']:13.4f}  {layer['effective_rank']:14.2f}"
        )
    return lines


def _natural(name: str) -> list[Any]:
    """Block 10 after block 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]

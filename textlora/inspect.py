"""What is in an adapter folder, in plain facts; whether it fits a base; and the one legitimate edit, renaming labels."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from textlora.adapter import AdapterFolder, changed_files, lora_config, read_adapter, write_side_file
from textlora.base import find_base
from textlora.errors import TextloraError, UsageError
from textlora.files import write_text
from textlora.model import open_model, parameter_counts


def inspect_folder(path: Path, against: str | None = None) -> dict[str, Any]:
    """Facts about an adapter folder.

    Args:
        against: a base model; adds "fits" (bool) and "fits_why".

    Raises:
        AdapterError: the folder is damaged.
    """
    folder = read_adapter(path)
    lora, meta = lora_config(folder), folder.meta
    adapter, head = parameter_counts(folder.tensors)
    facts: dict[str, Any] = {
        "folder": str(path),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
        "target_modules": list(lora.target_modules or ()),
        "adapter_parameters": adapter,
        "head_parameters": head,
        "head": sorted({name.removeprefix("base_model.model.").rpartition(".")[0] for name in folder.tensors if ".lora_" not in name}),
        "bytes": sum(p.stat().st_size for p in path.iterdir() if p.is_file()),
        "base": folder.config.get("base_model_name_or_path"),
    }
    if meta is None:
        facts["note"] = "no textlora.json: labels, task, length and base weights are not recorded"
    else:
        keys = ("labels", "problem_type", "pairs", "pooling", "max_length", "truncation", "base", "temperature", "thresholds", "scores", "training")
        facts |= {key: getattr(meta, key) for key in (*keys, "textlora_version")}
        facts["edited"] = changed_files(path, meta)
    if against is not None:
        facts["fits"], facts["fits_why"] = fits(folder, against)
    return facts


def fits(folder: AdapterFolder, base: str) -> tuple[bool, str]:
    """Whether an adapter fits a base, and why or why not. Raises ModelError where the base cannot be read."""
    meta = folder.meta
    files = find_base(base)
    if meta is not None and files.config["model_type"] != meta.base["model_type"]:
        return False, f"the base is a {files.config['model_type']}, the adapter was trained on a {meta.base['model_type']}"
    head_bias = [tensor for name, tensor in folder.tensors.items() if ".lora_" not in name and name.endswith(".bias")]
    labels = len(meta.labels) if meta else (len(head_bias[-1]) if head_bias else 2)
    try:
        model, _ = open_model(files, lora_config(folder), labels, pooling=meta.pooling if meta else "first")
        model.load_trainable(folder.tensors)
    except TextloraError as error:
        return False, error.message
    if meta is None:
        return True, "names and shapes fit; which weights it was trained on is not recorded"
    if model.base_hash() != meta.base["hash"]:
        return False, f"names and shapes fit, but the weights differ: {model.base_hash()[:19]} is not {meta.base['hash'][:19]}"
    return True, "same weights as it was trained on"


def relabel_folder(path: Path, changes: Sequence[str]) -> None:
    """Rename labels, `old=new` each; order and weights stay. Raises UsageError for an unknown, empty or doubled name."""
    folder = read_adapter(path)
    if folder.meta is None:
        raise UsageError(f"{path} has no textlora.json to relabel")
    known, renamed = folder.meta.labels, {}
    for change in changes:
        old, separator, new = change.partition("=")
        if not separator or old not in known or not new:
            raise UsageError(f"--relabel {change}: not old=new with a known label", f"labels are: {', '.join(known[:10])}")
        renamed[old] = new
    names = [renamed.get(label, label) for label in known]  # all at once, so that two names can be swapped
    if len(set(names)) != len(names):
        raise UsageError("--relabel: two labels would have one name")
    card = path / "README.md"
    if card.is_file():
        line = ", ".join(f"`{label}`" for label in folder.meta.labels)
        write_text(card, card.read_text(encoding="utf-8").replace(line, ", ".join(f"`{label}`" for label in names)))
    write_side_file(path, dataclasses.replace(folder.meta, labels=tuple(names)))


def summary_lines(facts: dict[str, Any]) -> list[str]:
    """The facts as lines for a terminal."""
    kind = [name for name, on in (("DoRA", facts["use_dora"]), ("rsLoRA", facts["use_rslora"])) if on]
    lines = [
        f"{facts['folder']}: {' + '.join(kind) or 'LoRA'} r {facts['r']}, alpha {facts['lora_alpha']:g}, {len(facts['target_modules'])} adapted layers",
        f"parameters: {facts['adapter_parameters']:,} A and B, {facts['head_parameters']:,} head ({', '.join(facts['head'])}); {facts['bytes']:,} bytes",
    ]
    if "note" in facts:
        lines.append(facts["note"])
    else:
        labels = facts["labels"]
        shown = ", ".join(labels[:10]) + (f", ... ({len(labels)})" if len(labels) > 10 else "")
        lines.append(f"task: {facts['problem_type']}, labels: {shown}")
        base = facts["base"]
        lines.append(f"base: {base['id'] or 'a local folder'} ({base['model_type']}), weights {base['hash'][:19]}")
        lines.append(
            f"input: {'text pairs' if facts['pairs'] else 'single texts'}, {facts['max_length']} tokens, cut at the {facts['truncation']}, {facts['pooling']} pooling"
        )
        for split, metrics in facts["scores"].items():
            lines.append(f"{split}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if value is not None))
        if facts["edited"]:
            lines.append(f"changed since it was saved: {', '.join(facts['edited'])}")
    if "fits" in facts:
        lines.append(("fits: " if facts["fits"] else "does not fit: ") + facts["fits_why"])
    return lines

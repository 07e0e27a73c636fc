"""The adapter's model card: README.md with the hub's metadata."""

import json
from collections.abc import Mapping
from typing import Any

from textlora.adapter import AdapterMeta
from textlora.config import LoraConfig


def model_card(meta: AdapterMeta, lora: LoraConfig, architecture: str, summary: str, settings: Mapping[str, Any], name: str) -> str:
    """Markdown with YAML front matter (JSON values are YAML values)."""
    base = meta.base.get("id")
    metrics = meta.scores.get("test") or meta.scores.get("validation") or {}
    front: dict[str, Any] = {
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["lora", "peft", "text-classification", "textlora", *([f"base_model:adapter:{base}"] if base else [])],
        "metrics": [metric for metric in ("accuracy", "f1", "spearmanr", "pearsonr") if _has(metrics, metric)],
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    results = [{"type": metric, "value": round(value, 6)} for metric, value in metrics.items() if isinstance(value, int | float)]
    front["model-index"] = [
        {
            "name": name,
            "results": [
                {"task": {"type": "text-classification"}, "dataset": {"name": "training file's owner", "type": "private"}, "metrics": results}
            ],
        }
    ]
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", "", f"# {name}", ""]
    lines += [f"A LoRA adapter for text classification on `{base or meta.base['model_type']}`, trained with textlora {meta.textlora_version}.", ""]
    lines += [summary, "", "## Labels", "", ", ".join(f"`{_inline(label)}`" for label in meta.labels), "", "## Use", "", "```python"]
    call = "" if base else ', base="path/to/the/base/model"'
    lines += ["from textlora import TextClassifier", "", f'classifier = TextClassifier.load("path/to/this/folder"{call})']
    lines += ['print(classifier.predict(["a text"]))', "```", ""]
    if meta.pooling == "mean":
        lines += ["It pools the mean of all tokens, which no transformers class does: plain PEFT refuses this folder.", ""]
    else:
        lines += ["Plain PEFT reads it too; label names and thresholds are in `textlora.json`:", "", "```python"]
        lines += [f"from transformers import {architecture}", "from peft import PeftModel", ""]
        lines += [f'base = {architecture}.from_pretrained("{base or "path/to/the/base/model"}", num_labels={len(meta.labels)})']
        lines += ['model = PeftModel.from_pretrained(base, "path/to/this/folder").eval()', "```", ""]
    lines += ["## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_inline(str(value))} |" for key, value in settings.items()]
    lines += ["", f"LoRA: r {lora.r}, alpha {lora.lora_alpha:g}, {len(lora.target_modules or ())} adapted layers.", ""]
    return "\n".join(lines)


def _has(metrics: Mapping[str, Any], name: str) -> bool:
    return any(key.endswith({"f1": "_f1", "spearmanr": "spearman", "pearsonr": "pearson"}.get(name, name)) for key in metrics)


def _inline(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|").replace("\n", " ")

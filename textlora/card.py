"""The adapter's model card: README.md with the hub's metadata."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textlora.adapter import AdapterMeta
from textlora.config import LoraConfig
from textlora.errors import AdapterError

_FOLDER = "path/to/this/folder"
_FRONT = re.compile(r"\A\s*---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def model_card(meta: AdapterMeta, lora: LoraConfig, architecture: str, summary: str, settings: Mapping[str, Any], name: str) -> str:
    """Markdown with YAML front matter."""
    base = meta.base.get("id")
    lines = [*_front_lines(_front(meta, name)), "", f"# {name}", ""]
    lines += [f"A LoRA adapter for text classification on `{base or meta.base['model_type']}`, trained with textlora {meta.textlora_version}.", ""]
    lines += [summary, "", "## Labels", "", _label_line(meta.labels), "", "## Use", "", "```python"]
    call = "" if base else ', base="path/to/the/base/model"'
    lines += ["from textlora import TextClassifier", "", f'classifier = TextClassifier.load("{_FOLDER}"{call})']
    lines += ['print(classifier.predict(["a text"]))', "```", ""]
    if meta.pooling == "mean":
        lines += ["It pools the mean of all tokens, which no transformers class does: plain PEFT refuses this folder.", ""]
    else:
        lines += ["Plain PEFT reads it too; label names and thresholds are in `textlora.json`:", "", "```python"]
        lines += [f"from transformers import {architecture}", "from peft import PeftModel", ""]
        lines += [f'base = {architecture}.from_pretrained("{base or "path/to/the/base/model"}", num_labels={len(meta.labels)})']
        lines += [f'model = PeftModel.from_pretrained(base, "{_FOLDER}").eval()', "```", ""]
    lines += ["## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_inline(str(value))} |" for key, value in settings.items()]
    lines += ["", f"LoRA: r {lora.r}, alpha {lora.lora_alpha:g}, {len(lora.target_modules or ())} adapted layers.", ""]
    return "\n".join(lines)


def pushed_card(card: Path, meta: AdapterMeta, lora: LoraConfig, repo_id: str) -> str:
    """The folder's own card, edited or not, fit for the hub: facts of the adapter in its metadata, and calls that name the repository.

    What its owner added to the metadata (license, language, datasets, scores) is kept.

    Raises:
        AdapterError: the metadata of the card cannot be read.
    """
    name = repo_id.rpartition("/")[2]
    if not card.is_file():
        text = model_card(meta, lora, "AutoModelForSequenceClassification", "", meta.training.get("settings", {}), name)
        return text.replace(_FOLDER, repo_id)
    from huggingface_hub import metadata_load

    try:
        given = metadata_load(card) or {}
        text = card.read_text(encoding="utf-8")
    except Exception as error:  # its YAML parser has errors of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{card}: the lines between --- and --- are not YAML ({first})", "mend them, or delete the card to get a new one"
        ) from error
    facts = _front(meta, name)
    tags = given.get("tags") if isinstance(given.get("tags"), list) else []
    kept = {key: value for key, value in given.items() if key not in facts or key in ("metrics", "model-index")}
    front = facts | kept | {"tags": [*facts["tags"], *(tag for tag in tags if tag not in facts["tags"])]}
    return "\n".join(_front_lines(front)) + "\n" + _FRONT.sub("", text, count=1).replace(_FOLDER, repo_id)


def relabelled(text: str, old: Sequence[str], new: Sequence[str]) -> str:
    """A card with its labels renamed where `model_card` wrote them; what people wrote stays."""
    for write in (_label_line, lambda labels: json.dumps(_id2label(labels), ensure_ascii=False)):
        text = text.replace(write(old), write(new))
    return text


def _label_line(labels: Sequence[str]) -> str:
    return ", ".join(f"`{_inline(label)}`" for label in labels)


def _id2label(labels: Sequence[str]) -> dict[str, str]:
    return {str(i): label for i, label in enumerate(labels)}


def _front(meta: AdapterMeta, name: str) -> dict[str, Any]:
    """The hub's metadata: what the adapter is, on which base, its labels and, where there are any, its scores."""
    base = meta.base.get("id")
    split = next((split for split in ("test", "validation") if meta.scores.get(split)), None)
    metrics = meta.scores[split] if split else {}
    library = "textlora" if meta.pooling == "mean" else "peft"  # PEFT has no class for mean pooling
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": [*dict.fromkeys(("lora", library, "text-classification", "textlora")), *([f"base_model:adapter:{base}"] if base else [])],
        "id2label": _id2label(meta.labels),
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    results = [{"type": metric, "value": round(value, 6)} for metric, value in metrics.items() if isinstance(value, int | float)]
    if results:
        front["metrics"] = [metric for metric in ("accuracy", "f1", "spearmanr", "pearsonr") if _has(metrics, metric)]
        dataset = {"name": "not published", "type": "private", "split": split}
        front["model-index"] = [{"name": name, "results": [{"task": {"type": "text-classification"}, "dataset": dataset, "metrics": results}]}]
    return front


def _front_lines(front: Mapping[str, Any]) -> list[str]:
    return ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in front.items()), "---"]  # JSON is YAML


def _has(metrics: Mapping[str, Any], name: str) -> bool:
    return any(key.endswith({"f1": "_f1", "spearmanr": "spearman", "pearsonr": "pearson"}.get(name, name)) for key in metrics)


def _inline(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|").replace("\n", " ")

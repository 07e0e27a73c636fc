"""Model cards, README.md with the hub's metadata: of an adapter folder, and of the classifier it is merged
into."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from textlora.adapters.folder import AdapterMeta
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LoraConfig
from textlora.core.errors import AdapterError

_FOLDER, _BASE = "path/to/this/folder", "path/to/the/base/model"
_FOLDER_LINE = f'folder = "{_FOLDER}"'
_FRONT = re.compile(r"\A\s*---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def model_card(
    meta: AdapterMeta,
    lora: LoraConfig,
    architecture: str,
    summary: str,
    settings: Mapping[str, Any],
    name: str,
) -> str:
    """Markdown with YAML front matter."""
    base = meta.base.get("id")
    lines = [*_front_lines(_front(meta, name)), "", f"# {name}", ""]
    lines += [
        f"A LoRA adapter for text classification on `{base or meta.base['model_type']}`, trained with textlora {meta.textlora_version}.",
        "",
    ]
    lines += [summary, "", "## Labels", "", _label_line(meta.labels), "", "## Use", "", "```python"]
    call = "" if base else ', base="path/to/the/base/model"'
    lines += [
        "from textlora import TextClassifier",
        "",
        f'classifier = TextClassifier.load("{_FOLDER}"{call})',
    ]
    lines += ['print(classifier.predict(["a text"]))', "```", ""]
    if meta.pooling == "mean":
        lines += _mean_loader(meta, base)
    else:
        lines += [
            "Plain PEFT reads it too; label names and thresholds are in `textlora.json`:",
            "",
            "```python",
        ]
        lines += [f"from transformers import {architecture}", "from peft import PeftModel", ""]
        lines += [f'base = {architecture}.from_pretrained("{base or _BASE}", num_labels={len(meta.labels)})']
        lines += [f'model = PeftModel.from_pretrained(base, "{_FOLDER}").eval()', "```", ""]
    lines += ["## Training", "", "| setting | value |", "|---|---|"]
    lines += [f"| {key} | {_inline(str(value))} |" for key, value in settings.items()]
    lines += [
        "",
        f"LoRA: r {lora.r}, alpha {lora.lora_alpha:g}, {len(lora.target_modules or ())} adapted layers.",
        "",
    ]
    return "\n".join(lines)


def _mean_loader(meta: AdapterMeta, base: str | None) -> list[str]:
    """How to load a mean-pooled adapter with peft and what it brings, and what of its answers that leaves
    out."""
    side = ', truncation_side="left"' if meta.truncation == "tail" else ""
    scores = {SINGLE_LABEL: ".softmax(1)", MULTI_LABEL: ".sigmoid()", REGRESSION: ""}[meta.problem_type]
    divided = "" if meta.temperature == 1 or not scores else f" / {meta.temperature!r}"
    texts = '["a text"], ["its pair"]' if meta.pairs else '["a text"]'
    return [
        "It pools the mean of all tokens, which no class of PEFT does. With PEFT and torch alone:", "", "```python",
        "import json", "from pathlib import Path", "", "import torch", "from peft import LoraConfig, PeftModel", "from transformers import AutoModel, AutoTokenizer", "",
        _FOLDER_LINE, 'labels = json.loads(Path(folder, "textlora.json").read_text(encoding="utf-8"))["labels"]',
        'settings = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8")) | {"peft_type": "LORA", "task_type": None}',
        f'encoder = AutoModel.from_pretrained("{base or _BASE}").float()',
        "head = torch.nn.Linear(encoder.config.hidden_size, len(labels))",
        'net = torch.nn.ModuleDict({encoder.base_model_prefix: encoder, "classifier": head})  # named as in the file of the weights',
        "PeftModel.from_pretrained(net, folder, config=LoraConfig(**settings)).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{side})", "",
        "with torch.inference_mode():",
        f'    batch = tokenizer({texts}, padding=True, truncation=True, return_tensors="pt")',
        '    states, mask = encoder(**batch)[0], batch["attention_mask"].unsqueeze(-1)',
        f'    logits = net["classifier"]((states * mask).sum(1) / mask.sum(1)){divided}',
        f"print(labels, logits{scores}.tolist())", "```", "",
        *(["Texts that are too long lose their end there: transformers has no head-tail truncation.", ""] if meta.truncation == "head-tail" else []),
    ]  # fmt: skip


def pushed_card(card: Path, meta: AdapterMeta, lora: LoraConfig, repo_id: str) -> str:
    """The folder's own card, edited or not, fit for the hub: facts of the adapter in its metadata, and calls
    that name the repository.

    What its owner added to the metadata (license, language, datasets, scores) is kept.

    Raises:
        AdapterError: the metadata of the card cannot be read.
    """
    name = repo_id.rpartition("/")[2]
    if not card.is_file():
        text = model_card(
            meta, lora, "AutoModelForSequenceClassification", "", meta.training.get("settings", {}), name
        )
        return _for_hub(text, repo_id)
    from huggingface_hub import metadata_load

    try:
        given = metadata_load(card) or {}
        text = card.read_text(encoding="utf-8")
    except Exception as error:  # its YAML parser has errors of its own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise AdapterError(
            f"{card}: the lines between --- and --- are not YAML ({first})",
            "mend them, or delete the card to get a new one",
        ) from error
    facts = _front(meta, name)
    tags = given.get("tags") if isinstance(given.get("tags"), list) else []
    kept = {
        key: value for key, value in given.items() if key not in facts or key in ("metrics", "model-index")
    }
    front = facts | kept | {"tags": [*facts["tags"], *(tag for tag in tags if tag not in facts["tags"])]}
    return "\n".join(_front_lines(front)) + "\n" + _for_hub(_FRONT.sub("", text, count=1), repo_id)


def _for_hub(text: str, repo_id: str) -> str:
    """A card whose calls name the repository; what opens files by itself gets them first."""
    fetch = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo_id}")'
    return text.replace(_FOLDER_LINE, fetch).replace(_FOLDER, repo_id)


def merged_card(meta: AdapterMeta, dtype: str, name: str) -> str:
    """The card of the classifier that an adapter is merged into: how each of its readers loads it, and what
    they leave out."""
    base, mean = meta.base.get("id"), meta.pooling == "mean"
    library = "sentence-transformers" if mean else "transformers"
    tags = ["text-classification", "textlora", *(["sentence-transformers", "custom_code"] if mean else [])]
    front = {"library_name": library, "pipeline_tag": "text-classification", "tags": tags}
    front |= {"base_model": base, "base_model_relation": "finetune"} if base else {}
    lines = [*_front_lines(front), "", f"# {name}", ""]
    lines += [f"A LoRA adapter merged into `{base or meta.base['model_type']}` by textlora, in {dtype}.", ""]
    call = "dict(text=..., text_pair=...)" if meta.pairs else repr("a text")
    trust = ", trust_remote_code=True" if mean else ""
    if mean:
        lines += _encode_lines(meta)
        lines += ["With transformers, which must be allowed to run the modelling file in this folder:", ""]
    lines += ["```python", "from transformers import pipeline", ""]
    lines += [
        f'classify = pipeline("text-classification", model="{_FOLDER}", truncation=True{trust})',
        f"print(classify({call}))",
        "```",
        "",
    ]
    lines += [
        f"Give `truncation=True`: it was trained on texts of at most {meta.max_length} tokens, and a pipeline does not cut by itself."
    ]
    if mean:
        lines += ["The pipeline says in its log that it does not know the class of the model, and goes on."]
    if meta.truncation == "head-tail":
        missing = "neither library has" if mean else "transformers does not have"
        lines += [
            f"It was trained with head-tail truncation, which {missing}: longer texts lose their end here."
        ]
    if meta.problem_type == MULTI_LABEL and meta.thresholds is not None:
        shown = ", ".join(
            f"{label} {value:.3f}" for label, value in zip(meta.labels, meta.thresholds, strict=True)
        )
        lines += ["", f"A label is given where its probability reaches its threshold: {shown}."]
    return "\n".join([*lines, ""])


def _encode_lines(meta: AdapterMeta) -> list[str]:
    """How to get scores with sentence-transformers."""
    scores = {SINGLE_LABEL: ".softmax(1)", MULTI_LABEL: ".sigmoid()", REGRESSION: ""}[meta.problem_type]
    lines = [
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        f'classifier = SentenceTransformer("{_FOLDER}")',
    ]
    given = '[("a text", "its pair")]' if meta.pairs else '["a text"]'
    lines += [f"logits = classifier.encode({given}, convert_to_tensor=True)"]
    lines += [
        f"print(logits{scores}.tolist())",
        "```",
        "",
        f"The columns are: {_label_line(meta.labels)}.",
        "",
    ]
    return lines


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
    """The hub's metadata: what the adapter is, on which base, its labels and, where there are any, its
    scores."""
    base = meta.base.get("id")
    split = next((split for split in ("test", "validation") if meta.scores.get(split)), None)
    metrics = meta.scores[split] if split else {}
    library = "textlora" if meta.pooling == "mean" else "peft"  # PEFT by itself has no class for mean pooling
    front: dict[str, Any] = {
        "library_name": library,
        "pipeline_tag": "text-classification",
        "tags": [
            *dict.fromkeys(("lora", library, "text-classification", "textlora")),
            *([f"base_model:adapter:{base}"] if base else []),
        ],
        "id2label": _id2label(meta.labels),
    }
    if base:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    results = [
        {"type": metric, "value": round(value, 6)}
        for metric, value in metrics.items()
        if isinstance(value, int | float)
    ]
    if results:
        front["metrics"] = [
            metric for metric in ("accuracy", "f1", "spearmanr", "pearsonr") if _has(metrics, metric)
        ]
        dataset = {"name": "not published", "type": "private", "split": split}
        front["model-index"] = [
            {
                "name": name,
                "results": [
                    {"task": {"type": "text-classification"}, "dataset": dataset, "metrics": results}
                ],
            }
        ]
    return front


def _front_lines(front: Mapping[str, Any]) -> list[str]:
    return [
        "---",
        *(f"{key}: {json.dumps(value, ensure_ascii=False, default=str)}" for key, value in front.items()),
        "---",
    ]  # JSON is YAML


def _has(metrics: Mapping[str, Any], name: str) -> bool:
    return any(
        key.endswith({"f1": "_f1", "spearmanr": "spearman", "pearsonr": "pearson"}.get(name, name))
        for key in metrics
    )


def _inline(text: str) -> str:
    return text.replace("`", "'").replace("|", "\\|").replace("\n", " ")

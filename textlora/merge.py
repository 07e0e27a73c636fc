"""A base and an adapter to one plain transformers folder, compared from its files by a process that imports no textlora.

Merging makes new weights `W + delta` in float64 and rounds them once; the base is never edited. `extract` and `combine` share the
parts: places of LoRA by name, a transformers model of a folder, a folder that appears whole or not at all, the fresh process.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from textlora.adapter import AdapterMeta
from textlora.base import BaseFiles
from textlora.classifier import TextClassifier, exact_float32
from textlora.config import MULTI_LABEL
from textlora.errors import AdapterError, ModelError, StorageError, UsageError, VerificationError
from textlora.families import FAMILIES
from textlora.files import write_text
from textlora.lora import Lora, delta
from textlora.model import PREFIX, Model
from textlora.reference import quietly
from textlora.tokens import TextTokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # of a logit from the written files, relative to max(1, |logit|)
NOTE = "textlora"  # key in config.json for what transformers has no place for; transformers keeps it and reads on
_LEFT_OUT = ("_name_or_path", "auto_map", "torch_dtype")
_FRESH = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
folder, rows = sys.argv[1], json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
said = {"logits": {}}
for name, how in (("as_loaded", {}), ("float32", {"dtype": torch.float32})):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **how)
    said["strange"] = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=-1, truncation=True, top_k=None, function_to_apply="none")
    answers = [{a["label"]: a["score"] for a in classify(row)} for row in rows]
    said["logits"][name] = [[answer[label] for label in labels] for answer in answers]
    if model.dtype == torch.float32:
        break
said["inputs"] = [dict(tokenizer(row["text"], row.get("text_pair"), truncation=True)) for row in rows]
said["labels"] = labels
said["imported"] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(said))
"""


@dataclass(frozen=True)
class Fresh:
    """What a fresh process answered: token inputs per row, logits (N, C) in float32 and in the dtype of the file."""

    inputs: list[dict[str, list[int]]]
    logits: np.ndarray
    as_loaded: np.ndarray
    labels: tuple[str, ...]


def merge(
    classifier: TextClassifier,
    files: BaseFiles,
    tokenizer_from: Path,
    output: Path,
    dtype: str = "float32",
    rows: Sequence[tuple[str, str | None]] = (),
) -> dict[str, Any]:
    """Write base plus adapter as a folder that transformers loads without textlora, and prove it before it gets its name.

    Args:
        classifier: the adapter on its base.
        files: that base.
        tokenizer_from: folder of the tokenizer's settings (the adapter's, or the base's where it has none).
        output: new or empty folder.
        dtype: float32, bfloat16 or float16; the merge itself is in float64.
        rows: (text, text_pair) to compare logits on besides the golden examples.

    Returns:
        {"output", "dtype", "layers", "rows", "left_out", "largest_logit", "difference", "rounding", "as_loaded"}: differences are the largest
        of a logit from the unmerged float32 one; "difference" is that of the written weights in float32 arithmetic, "rounding" that of the
        exact merge rounded once in memory (0 for float32), "as_loaded" that of the written folder in its own dtype. "left_out" counts rows
        that transformers cuts elsewhere (head-tail truncation).

    Raises:
        UsageError: the adapter pools the mean, or `output` is in use.
        VerificationError: the written folder does not answer as the adapter does.
    """
    meta = classifier.meta
    require_free(output)
    if meta.pooling == "mean":
        raise UsageError(
            f"{tokenizer_from} pools the mean of all tokens, which no transformers classification class does, so there is no plain folder for it",
            "train with --pooling first to merge, or keep it unmerged",
        )
    golden = [(row["text"], row["text_pair"]) for row in meta.golden]
    rows = [*golden, *rows]
    if not rows:
        raise UsageError("this adapter carries no golden examples, so there is nothing to compare on", "give rows with --data")
    net = load_net(files.folder, len(meta.labels))
    layers = merge_into(net, classifier.model, DTYPES[dtype])
    with new_folder(output) as folder:
        with quietly():
            save_net(net, folder, DTYPES[dtype])
        write_text(folder / "config.json", json.dumps(_config(files, net, meta, dtype), indent=2, ensure_ascii=False) + "\n")
        write_tokenizer(classifier.tokenizer, (tokenizer_from, files.folder), files.config, folder, truncate=True)
        write_text(folder / "README.md", _card(meta, dtype, output.name))
        fresh = ask_fresh(folder, rows)
        if fresh.labels != meta.labels:
            raise VerificationError(f"the merged folder names other labels than the adapter: {', '.join(fresh.labels)}")
        kept = same_tokens(classifier, rows, fresh)
        with exact_float32():
            unmerged = classifier.plain_logits(*zip(*rows, strict=True))
            expected = unmerged if dtype == "float32" else net_logits(net, fresh.inputs)
        wrong = ~(np.abs(fresh.logits - expected)[kept] <= TOLERANCE * np.maximum(1, np.abs(expected[kept])))
        if wrong.any():
            worst = float(np.abs(fresh.logits - unmerged)[kept].max())
            raise VerificationError(
                f"the merged files give logits up to {worst:.2g} away from the adapter's on {int(wrong.any(1).sum())} of {int(kept.sum())} rows, "
                "more than rounding explains",
                "please report this with the versions of torch and transformers",
            )
    distance = lambda logits: float(np.abs(logits - unmerged)[kept].max())
    return {
        "output": str(output),
        "dtype": dtype,
        "layers": layers,
        "rows": int(kept.sum()),
        "left_out": int((~kept).sum()),
        "largest_logit": float(np.abs(unmerged[kept]).max()),
        "difference": distance(fresh.logits),
        "rounding": distance(expected),
        "as_loaded": distance(fresh.as_loaded),
    }


def named_loras(model: Model) -> dict[str, Lora]:
    """Full transformers module name -> LoRA on it, float64 on the CPU."""
    tensors, made = model.trainable(), {}
    for full in model.target_modules:
        parts = [tensors.get(f"{PREFIX}{full}.{part}") for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")]
        A, B, magnitude = (None if part is None else part.detach().to("cpu", torch.float64) for part in parts)
        made[full] = Lora(A, B, model.lora.scaling_of(full), magnitude)
    return made


def trained_whole(model: Model) -> dict[str, Tensor]:
    """Transformers tensor name -> tensor the adapter has its own of: head, and biases or modules that were trained in full."""
    tensors = {name: tensor for name, tensor in model.trainable().items() if ".lora_" not in name}
    return {name.removeprefix(PREFIX).replace(".base_layer.", "."): tensor.detach().to("cpu", torch.float64) for name, tensor in tensors.items()}


def load_net(folder: Path, num_labels: int, whole: bool = False) -> nn.Module:
    """The transformers classification model of a folder, float32.

    Args:
        whole: every tensor must come from the files, as for a finished classifier; else a missing head is drawn at random.

    Raises:
        ModelError: transformers cannot load it, or with `whole` some tensor is missing or of another shape.
    """
    try:
        with quietly(), torch.random.fork_rng([]):
            net, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                str(folder), num_labels=num_labels, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True,
                ignore_mismatched_sizes=True, output_loading_info=True,
            )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError, SafetensorError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{folder}: transformers cannot load it as a classifier ({first.rstrip('.:')})") from error
    lacking = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if whole and lacking:
        raise ModelError(f"{folder}: tensor '{lacking[0]}' is missing or of another shape ({len(lacking)} in all)", "is this a whole classifier?")
    return net.eval()


def merge_into(net: nn.Module, model: Model, dtype: torch.dtype) -> int:
    """Put the head and `W + delta`, computed in float64 and rounded once to `dtype`, into a float32 transformers model of the base.

    Returns:
        the number of layers that LoRA changed.

    Raises:
        UsageError: a value does not fit into `dtype`.
        AdapterError: the adapter has a tensor that the transformers model has no place for.
    """
    loras, trained = named_loras(model), trained_whole(model)
    parameters = dict(net.named_parameters())
    for name in (*trained, *(f"{full}.weight" for full in loras)):
        if name not in parameters:
            raise AdapterError(f"{type(net).__name__} has no tensor '{name}' to merge the adapter into")
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = parameter.double()
            full = name.removesuffix(".weight")
            if name in trained:
                value = trained[name]
            elif full != name and full in loras:
                value = value + delta(value, loras[full])
            rounded = value.to(dtype)
            if not torch.isfinite(rounded).all():
                raise UsageError(
                    f"--dtype {str(dtype).removeprefix('torch.')}: tensor '{name}' holds {value.abs().max():.3g}, which does not fit",
                    "choose bfloat16 or float32",
                )
            parameter.copy_(rounded)
    return len(loras)


def save_net(net: nn.Module, folder: Path, dtype: torch.dtype) -> None:
    """Write `model.safetensors` as transformers names its tensors. Raises StorageError when the disk is full."""
    try:
        net.save_pretrained(str(folder), state_dict={name: tensor.to(dtype) for name, tensor in net.state_dict().items()}, max_shard_size="100GB")
    except SafetensorError as error:
        raise StorageError(f"cannot write {folder}: {error}", "free some space or choose another folder") from error


def net_logits(net: nn.Module, inputs: Sequence[dict[str, list[int]]]) -> np.ndarray:
    """Logits (N, C) of a transformers model, one row at a time."""
    with torch.inference_mode():
        return np.stack([net(**{name: torch.tensor([ids]) for name, ids in row.items()}).logits[0].float().numpy() for row in inputs])


def ask_fresh(folder: Path, rows: Sequence[tuple[str, str | None]]) -> Fresh:
    """Load a folder in a new process that imports transformers only, and take its pipeline's logits.

    Raises:
        VerificationError: it does not load, makes up or leaves out a tensor, or needed textlora.
    """
    asked = [{"text": text} | ({} if pair is None else {"text_pair": pair}) for text, pair in rows]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-P", "-c", _FRESH, str(folder)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, encoding="utf-8", env=os.environ | offline)
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(f"{folder.name} does not load in transformers ({reason})") from error
    if said["strange"]:
        raise VerificationError(f"{folder.name}: transformers makes up, drops or cannot fit tensor '{said['strange'][0]}'")
    if "textlora" in said["imported"]:
        raise VerificationError(f"{folder.name} was loaded with textlora's help")
    logits = {name: np.array(values, dtype=np.float32) for name, values in said["logits"].items()}
    return Fresh(said["inputs"], logits.get("float32", logits["as_loaded"]), logits["as_loaded"], tuple(said["labels"]))


def same_tokens(classifier: TextClassifier, rows: Sequence[tuple[str, str | None]], fresh: Fresh) -> np.ndarray:
    """Which rows (N,) have the adapter's own tokens in transformers; only head-tail truncation, which it lacks, excuses others.

    Raises:
        VerificationError: a row has other tokens without that excuse.
    """
    encoded = classifier.tokenizer.encode(*zip(*rows, strict=True))
    same = np.zeros(len(rows), dtype=bool)
    for i, (mine, given) in enumerate(zip(encoded, fresh.inputs, strict=True)):
        same[i] = mine.ids.tolist() == given["input_ids"] and mine.type_ids.tolist() == given.get("token_type_ids", mine.type_ids.tolist())
        if not same[i] and not (classifier.meta.truncation == "head-tail" and mine.full > classifier.tokenizer.max_length):
            raise VerificationError(f"transformers' tokenizer gives other tokens than the adapter's for row {i + 1}: {rows[i][0][:60]!r}")
    return same


def require_free(output: Path) -> None:
    """Refuse a path that holds something. Raises UsageError."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UsageError(f"{output} exists and is not an empty folder", "choose another --output")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Give a temporary folder beside `output`; on success it takes that name in one step, else it is removed.

    Raises:
        UsageError: `output` holds something.
        StorageError: the folder cannot be made.
    """
    require_free(output)
    output = output.absolute()
    missing = [parent for parent in output.parents if not parent.exists()]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".part", dir=output.parent))
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error.strerror or error}", "choose another folder") from error
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        for path in part.iterdir():
            path.chmod(0o666 & ~mask)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        part.chmod(0o777 & ~mask)
        os.replace(part, output)  # over an empty folder too
    finally:
        shutil.rmtree(part, ignore_errors=True)
        for parent in missing:
            with contextlib.suppress(OSError):  # it holds the output
                parent.rmdir()


def write_tokenizer(tokenizer: TextTokenizer, sources: Sequence[Path], config: dict[str, Any], folder: Path, truncate: bool) -> None:
    """Write tokenizer.json and tokenizer_config.json so that transformers cuts as the adapter does, as far as it can.

    Args:
        sources: folders, the first with a tokenizer_config.json gives the other settings.
        config: the base's, for whether there are segment ids.
        truncate: switch truncation on in tokenizer.json too, for readers that know no other place.
    """
    content = json.loads(tokenizer.backend.to_str())
    left = tokenizer.truncation == "tail"
    content["padding"] = None
    content["truncation"] = None
    if truncate:
        content["truncation"] = {
            "direction": "Left" if left else "Right",
            "max_length": tokenizer.max_length,
            "strategy": "LongestFirst",
            "stride": 0,
        }
    write_text(folder / "tokenizer.json", json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    path = next((path for source in sources if (path := source / "tokenizer_config.json").is_file()), None)
    try:
        settings = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError:
        settings = {}
    dropped = ("name_or_path", "auto_map", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of")
    settings = {key: value for key, value in settings.items() if key not in dropped}
    family = next((family for family in FAMILIES if config["model_type"] in family.model_types), None)
    types = family.uses_type_ids if family else (config.get("type_vocab_size") or 0) > 1
    # The general class reads tokenizer.json as it stands; a family's own class builds another one from the vocabulary.
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenizer.max_length,
        "truncation_side": "left" if left else "right",
        "model_input_names": ["input_ids", *(["token_type_ids"] if types else []), "attention_mask"],
    }
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _config(files: BaseFiles, net: nn.Module, meta: AdapterMeta, dtype: str) -> dict[str, Any]:
    kept = {key: value for key, value in files.config.items() if key not in _LEFT_OUT}
    return kept | {
        "architectures": [type(net).__name__],
        "id2label": {str(i): label for i, label in enumerate(meta.labels)},
        "label2id": {label: i for i, label in enumerate(meta.labels)},
        "num_labels": len(meta.labels),
        "problem_type": meta.problem_type,
        "dtype": dtype,
        NOTE: {name: getattr(meta, name) for name in ("pairs", "truncation", "temperature", "thresholds", "label_separator")},
    }


def _card(meta: AdapterMeta, dtype: str, name: str) -> str:
    base = meta.base.get("id")
    front = {"library_name": "transformers", "pipeline_tag": "text-classification", "tags": ["text-classification", "textlora"]}
    front |= {"base_model": base, "base_model_relation": "finetune"} if base else {}
    lines = ["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()), "---", "", f"# {name}", ""]
    lines += [f"A LoRA adapter merged into `{base or meta.base['model_type']}` by textlora, in {dtype}.", "", "```python"]
    lines += ["from transformers import pipeline", "", 'classify = pipeline("text-classification", model="path/to/this/folder", truncation=True)']
    lines += [f"print(classify({'dict(text=..., text_pair=...)' if meta.pairs else repr('a text')}))", "```", ""]
    lines += [f"Give `truncation=True`: it was trained on texts of at most {meta.max_length} tokens, and a pipeline does not cut by itself."]
    if meta.truncation == "head-tail":
        lines += ["It was trained with head-tail truncation, which transformers does not have: longer texts lose their end here."]
    if meta.temperature != 1:
        lines += ["", f"Its probabilities are calibrated at temperature {meta.temperature:.4f}: divide the logits by that. A pipeline does not."]
    if meta.problem_type == MULTI_LABEL and meta.thresholds is not None:
        shown = ", ".join(f"{label} {value:.3f}" for label, value in zip(meta.labels, meta.thresholds, strict=True))
        lines += ["", f"A label is given where its probability reaches its threshold: {shown}."]
    return "\n".join([*lines, ""])

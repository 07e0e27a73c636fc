"""A written folder asked in a process of its own that imports no textlora: what anybody else gets from it."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from textlora.core.errors import VerificationError
from textlora.inference.classifier import TextClassifier

_START = """
import json, sys
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging
logging.disable_progress_bar()
logging.set_verbosity(logging.CRITICAL)
folder, code, rows = sys.argv[1], sys.argv[2] == "code", json.load(sys.stdin)
tokenizer = AutoTokenizer.from_pretrained(folder)
texts = [(row["text"], row.get("text_pair")) for row in rows]
said = {"logits": {}, "scores": [], "strange": [], "inputs": [dict(tokenizer(*text, truncation=True)) for text in texts]}
"""
_END = """
said["imported"] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(said))
"""
# A classifier by its pipeline: logits in the dtype of the file and in float32, and in float32 the scores that
# the pipeline makes of them.
_PIPELINE = """
for name, how in (("as_loaded", {}), ("float32", {"dtype": torch.float32})):
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, trust_remote_code=code, **how)
    said["strange"] = sorted(str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind])
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device=-1, truncation=True, top_k=None)
    seen = []
    model.register_forward_hook(lambda module, given, output: seen.append(output.logits[0].float().tolist()))
    answers = [{a["label"]: a["score"] for a in classify(row)} for row in rows]
    said["logits"][name] = seen
    said["scores"] = [[answer[label] for label in labels] for answer in answers]
    if model.dtype == torch.float32:
        break
said["labels"] = labels
"""
# Mean pooling without sentence-transformers: its three steps, with the dense layer out of one file or the
# other.
_BY_HAND = """
def by_hand(file, prefix):
    from safetensors.torch import load_file
    encoder, info = AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
    said["strange"] += [str(key) for kind in ("missing_keys", "mismatched_keys") for key in info[kind] if not str(key).startswith("pooler.")]
    weight, bias = (load_file(folder + file)[prefix + part].float() for part in ("weight", "bias"))
    with torch.inference_mode():
        inputs = [{name: torch.tensor([ids]) for name, ids in row.items()} for row in said["inputs"]]
        return torch.cat([torch.nn.functional.linear(encoder(**row)[0].mean(1), weight, bias) for row in inputs]).tolist()
"""
# The family's own class must refuse the files, and sentence-transformers, where it is installed, must give
# the same logits.
_ENCODE = """
try:
    AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=False)
    said["strange"].append("of the classifier that it takes without trust_remote_code")
except RuntimeError:
    pass
try:
    from sentence_transformers import SentenceTransformer
except Exception:  # not there, or not fit for the libraries that are
    said["encoded"] = by_hand("/2_Dense/model.safetensors", "linear.")
else:
    classifier = SentenceTransformer(folder, device="cpu")
    asked = [text if pair is None else (text, pair) for text, pair in texts]
    classifier.encode(asked[:1])  # in the dtype of the file, which must do too
    said["encoded"] = classifier.float().encode(asked, batch_size=8, show_progress_bar=False).tolist()
"""
_HAND = 'said["logits"]["as_loaded"], said["labels"] = by_hand("/model.safetensors", "classifier.mean."), []'
_KINDS = {"first": _PIPELINE, "mean": _PIPELINE + _BY_HAND + _ENCODE, "mean by hand": _BY_HAND + _HAND}


@dataclass(frozen=True)
class Fresh:
    """What a fresh process answered: token inputs per row; logits (N, C) in float32 and in the dtype of the
    file; scores (N, C) in float32 as the pipeline makes them; logits (N, C) of sentence-transformers where
    the folder is one of its own. None for what was not asked."""

    inputs: list[dict[str, list[int]]]
    logits: np.ndarray
    as_loaded: np.ndarray
    scores: np.ndarray
    labels: tuple[str, ...]
    encoded: np.ndarray | None = None


def ask_fresh(folder: Path, rows: Sequence[tuple[str, str | None]], kind: str = "first") -> Fresh:
    """Load a folder in a new process that imports no textlora, and take its logits and scores.

    Args:
        kind: "first" asks the pipeline of a transformers classifier. "mean" lets transformers run the
            folder's modelling file, which we wrote, and asks sentence-transformers too. "mean by hand" takes
            the logits alone, from the encoder and the dense layer beside it, and runs no code.

    Raises:
        VerificationError: it does not load, makes up or leaves out a tensor, or needed textlora.
    """
    asked = [{"text": text} | ({} if pair is None else {"text_pair": pair}) for text, pair in rows]
    with (
        tempfile.TemporaryDirectory() as modules
    ):  # where transformers copies a modelling file before it imports it
        offline = {
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        offline |= {"HF_MODULES_CACHE": modules}
        command = [
            sys.executable,
            "-P",
            "-c",
            _START + _KINDS[kind] + _END,
            str(folder),
            "code" if kind == "mean" else "none",
        ]
        done = subprocess.run(
            command,
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=os.environ | offline,
        )
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise VerificationError(f"{folder.name} does not load in transformers ({reason})") from error
    if said["strange"]:
        raise VerificationError(
            f"{folder.name}: transformers makes up, drops or cannot fit tensor '{said['strange'][0]}'"
        )
    if "textlora" in said["imported"]:
        raise VerificationError(f"{folder.name} was loaded with textlora's help")
    logits = {name: np.array(values, dtype=np.float32) for name, values in said["logits"].items()}
    encoded = np.array(said["encoded"], dtype=np.float32) if "encoded" in said else None
    as_loaded = logits["as_loaded"]
    return Fresh(
        said["inputs"],
        logits.get("float32", as_loaded),
        as_loaded,
        np.array(said["scores"]),
        tuple(said["labels"]),
        encoded,
    )


def same_tokens(
    classifier: TextClassifier, rows: Sequence[tuple[str, str | None]], fresh: Fresh
) -> np.ndarray:
    """Which rows (N,) have the adapter's own tokens in transformers; only head-tail truncation, which it
    lacks, excuses others.

    Raises:
        VerificationError: a row has other tokens without that excuse.
    """
    encoded = classifier.tokenizer.encode(*zip(*rows, strict=True))
    same = np.zeros(len(rows), dtype=bool)
    for i, (mine, given) in enumerate(zip(encoded, fresh.inputs, strict=True)):
        same[i] = mine.ids.tolist() == given["input_ids"] and mine.type_ids.tolist() == given.get(
            "token_type_ids", mine.type_ids.tolist()
        )
        if not same[i] and not (
            classifier.meta.truncation == "head-tail" and mine.full > classifier.tokenizer.max_length
        ):
            raise VerificationError(
                f"transformers' tokenizer gives other tokens than the adapter's for row {i + 1}: {rows[i][0][:60]!r}"
            )
    return same

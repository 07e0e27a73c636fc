"""A base and an adapter to one folder that needs no textlora, compared from its files by a process that
imports none.

The folder of an adapter with the architecture's own head is a plain transformers classifier; that of a
mean-pooled one is for sentence-transformers and, with a modelling file, for transformers (`pooled`). The base
is never edited.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from textlora.adapters.card import merged_card
from textlora.adapters.folder import AdapterMeta
from textlora.core.config import REGRESSION
from textlora.core.errors import UsageError, VerificationError
from textlora.core.files import write_text
from textlora.inference.classifier import TextClassifier, exact_float32
from textlora.metrics.calibration import probabilities
from textlora.model.base import BaseFiles
from textlora.model.reference_model import quietly
from textlora.transform.fresh_process import Fresh, ask_fresh, same_tokens
from textlora.transform.output_folder import new_folder, require_free, write_tokenizer
from textlora.transform.sentence_transformers import load_pooled, write_pooled
from textlora.transform.transformers_names import (
    DTYPES,
    NOTE,
    load_net,
    merge_into,
    net_logits,
    save_net,
    settled,
    temperature_of,
)

TOLERANCE = 1e-4  # of a logit from the written files, relative to max(1, |logit|)
SCORE_TOLERANCE = 1e-5  # of a score in float32; of a regression's value, relative to max(1, |value|)
_LEFT_OUT = ("_name_or_path", "auto_map", "torch_dtype")
_KEPT = (
    "pairs",
    "pooling",
    "truncation",
    "temperature",
    "fitted_temperature",
    "fitted_shift",
    "thresholds",
    "label_separator",
)


def merge(
    classifier: TextClassifier,
    files: BaseFiles,
    tokenizer_from: Path,
    output: Path,
    dtype: str = "float32",
    rows: Sequence[tuple[str, str | None]] = (),
) -> dict[str, Any]:
    """Write base plus adapter as a folder that others load without textlora, and prove it before it gets its
    name.

    A temperature that the adapter applies goes into the head, so that scores are `predict`'s.

    Args:
        classifier: the adapter on its base.
        files: that base.
        tokenizer_from: folder of the tokenizer's settings (the adapter's, or the base's where it has none).
        output: new or empty folder.
        dtype: float32, bfloat16 or float16; the merge itself is in float64.
        rows: (text, text_pair) to compare logits and scores on besides the golden examples.

    Returns:
        {"output", "dtype", "pooling", "layers", "rows", "left_out", "largest_logit", "difference",
        "rounding", "as_loaded", "score_difference"}: the first three differences are the largest of a logit
        from the unmerged float32 one over the temperature; "difference" is that of the written weights in
        float32 arithmetic, "rounding" that of the exact merge rounded once in memory (0 for float32),
        "as_loaded" that of the written folder in its own dtype. "score_difference" is the largest of a score
        (softmax, sigmoid, or the value of a regression) from `predict`'s, by every way the folder is for.
        "left_out" counts rows that transformers cuts elsewhere (head-tail truncation).

    Raises:
        UsageError: `output` is in use, or transformers has no class to build a mean-pooled classifier on.
        VerificationError: the written folder does not answer as the adapter does.
    """
    meta = classifier.meta
    require_free(output)
    golden = [(row["text"], row["text_pair"]) for row in meta.golden]
    rows = [*golden, *rows]
    if not rows:
        raise UsageError(
            "this adapter carries no golden examples, so there is nothing to compare on",
            "give rows with --data",
        )
    net = (load_pooled if meta.pooling == "mean" else load_net)(files.folder, len(meta.labels))
    layers = merge_into(net, classifier.model, DTYPES[dtype], temperature_of(meta))
    with new_folder(output) as folder:
        named = {"architectures": [type(net).__name__]}
        if meta.pooling == "mean":
            named = write_pooled(net, folder, DTYPES[dtype], meta)
        else:
            with quietly():
                save_net(net, folder, DTYPES[dtype])
        write_text(
            folder / "config.json",
            json.dumps(_config(files, meta, dtype) | named, indent=2, ensure_ascii=False) + "\n",
        )
        write_tokenizer(
            classifier.tokenizer, (tokenizer_from, files.folder), files.config, folder, truncate=True
        )
        write_text(folder / "README.md", merged_card(meta, dtype, output.name))
        fresh = ask_fresh(folder, rows, meta.pooling)
        if fresh.labels != meta.labels:
            raise VerificationError(
                f"the merged folder names other labels than the adapter: {', '.join(fresh.labels)}"
            )
        kept = same_tokens(classifier, rows, fresh)
        with exact_float32():
            unmerged = classifier.plain_logits(*zip(*rows, strict=True)) / temperature_of(meta)
            predicted = probabilities(
                classifier.logits(*zip(*rows, strict=True)), meta.problem_type, meta.temperature
            )
            expected = unmerged if dtype == "float32" else net_logits(net, fresh.inputs)
        _require_logits(fresh, expected, unmerged, kept)
        scores = _score_difference(fresh, predicted, kept, meta, dtype)
    distance = lambda logits: float(np.abs(logits - unmerged)[kept].max())
    return {
        "output": str(output),
        "dtype": dtype,
        "pooling": meta.pooling,
        "layers": layers,
        "rows": int(kept.sum()),
        "left_out": int((~kept).sum()),
        "largest_logit": float(np.abs(unmerged[kept]).max()),
        "difference": distance(fresh.logits),
        "rounding": distance(expected),
        "as_loaded": distance(fresh.as_loaded),
        "score_difference": scores,
    }


def _require_logits(fresh: Fresh, expected: np.ndarray, unmerged: np.ndarray, kept: np.ndarray) -> None:
    """Raises VerificationError where logits (N, C) from the files are further from the expected ones than
    float32 explains."""
    for found in (fresh.logits, fresh.encoded):
        if found is None:
            continue
        wrong = ~(np.abs(found - expected)[kept] <= TOLERANCE * np.maximum(1, np.abs(expected[kept])))
        if wrong.any():
            worst = float(np.abs(found - unmerged)[kept].max())
            raise VerificationError(
                f"the merged files give logits up to {worst:.2g} away from the adapter's on {int(wrong.any(1).sum())} of {int(kept.sum())} rows, "
                "more than rounding explains",
                "please report this with the versions of torch and transformers",
            )


def _score_difference(
    fresh: Fresh, predicted: np.ndarray, kept: np.ndarray, meta: AdapterMeta, dtype: str
) -> float:
    """The largest difference of a score from `predict`'s. Raises VerificationError where float32 is beyond
    the tolerance."""
    found = [fresh.scores] + (
        [] if fresh.encoded is None else [probabilities(fresh.encoded, meta.problem_type)]
    )
    worst = max(float(np.abs(scores - predicted)[kept].max()) for scores in found)
    scale = max(1.0, float(np.abs(predicted[kept]).max())) if meta.problem_type == REGRESSION else 1.0
    if dtype == "float32" and not worst <= SCORE_TOLERANCE * scale:
        raise VerificationError(
            f"the merged files give scores up to {worst:.2g} away from predict's, more than {SCORE_TOLERANCE:g}"
        )
    return worst


def _config(files: BaseFiles, meta: AdapterMeta, dtype: str) -> dict[str, Any]:
    kept = {key: value for key, value in files.config.items() if key not in _LEFT_OUT}
    return kept | {
        "id2label": {str(i): label for i, label in enumerate(meta.labels)},
        "label2id": {label: i for i, label in enumerate(meta.labels)},
        "num_labels": len(meta.labels),
        "problem_type": meta.problem_type,
        "dtype": dtype,
        NOTE: {name: getattr(settled(meta), name) for name in _KEPT},
    }

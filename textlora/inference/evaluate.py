"""Score a saved adapter on labelled rows."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from textlora.core.config import REGRESSION
from textlora.data import LabelSchema, Table, open_sink, read_table, require_texts
from textlora.inference.classifier import TextClassifier
from textlora.metrics.calibration import decide, probabilities
from textlora.metrics.scores import evaluate, intervals


def read_rows(
    data: str, columns: dict[str, str | None], classifier: TextClassifier, limit: int | None, seed: int
) -> Table:
    """Labelled rows for `evaluate`, cut to `limit` rows picked by the seed. Raises DataError as `read_table`
    does."""
    named = {name: value for name, value in columns.items() if value is not None}
    named.setdefault("label_separator", classifier.meta.label_separator)
    table = read_table(data, split="test", **named)
    if limit is None:
        return table
    picked = np.random.default_rng(seed).permutation(len(table.rows))[:limit]
    return replace(table, rows=[table.rows[i] for i in picked])


def evaluate_table(
    classifier: TextClassifier, table: Table, rows_output: Path | None = None
) -> dict[str, Any]:
    """Metrics with 95% intervals, thresholds and temperature as stored.

    Args:
        rows_output: where to write each row with its prediction (CSV, TSV, JSONL or Parquet by its
            extension).

    Returns:
        {"rows", "tokens", "test": metrics, "intervals", and the training facts stored with the adapter}.

    Raises:
        DataError: an empty text, or a label the adapter does not know.
    """
    meta = classifier.meta
    require_texts(table)
    classifier.require_pairs(table.columns.text_pair is not None, table.columns.text_pair is not None)
    schema = LabelSchema(meta.problem_type, meta.labels, meta.label_separator)
    labels = schema.encode_all(table.rows, table.columns.label or "label")
    pairs = [row.text_pair for row in table.rows]
    texts = [row.text for row in table.rows]
    # in float32 by the forward of training, so that a score is the one that training reported, to the last
    # digit
    logits = (classifier.plain_logits if classifier.precision == "float32" else classifier.logits)(
        texts, pairs
    )
    thresholds = None if meta.thresholds is None else np.array(meta.thresholds)
    calibration: dict[str, Any] = {"temperature": meta.temperature, "thresholds": thresholds}
    metrics = evaluate(meta.problem_type, labels, logits, meta.labels, **calibration)
    ranges = intervals(meta.problem_type, labels, logits, **calibration)
    if rows_output is not None:
        _write_rows(classifier, table, logits, thresholds, rows_output)
    stored = (
        "train_seconds",
        "tokens",
        "tokens_per_second",
        "peak_memory_bytes",
        "epochs",
        "adapter_parameters",
        "head_parameters",
    )
    facts = {name: meta.training.get(name) for name in stored}
    return {
        "rows": len(table.rows),
        "test": metrics,
        "intervals": {k: None if v is None else list(v) for k, v in ranges.items()},
        **facts,
    }


def _write_rows(
    classifier: TextClassifier,
    table: Table,
    logits: np.ndarray,
    thresholds: Sequence[float] | None,
    path: Path,
) -> None:
    meta = classifier.meta
    probs = probabilities(logits, meta.problem_type, meta.temperature)
    decided = decide(probs, meta.problem_type, thresholds)
    columns = table.columns
    names = [columns.text, *([columns.text_pair] if columns.text_pair else []), columns.label or "label"]
    extra = [] if meta.problem_type == REGRESSION else [f"score_{label}" for label in meta.labels]
    with open_sink(path, "csv", names, ["predicted", *extra]) as sink:
        for row, p, d in zip(table.rows, probs, decided, strict=True):
            fields: dict[str, Any] = {columns.text: row.text, columns.label or "label": row.label}
            if columns.text_pair:
                fields[columns.text_pair] = row.text_pair
            if meta.problem_type == REGRESSION:
                sink.write(fields, {"predicted": float(p[0])})
                continue
            chosen = (
                [name for name, yes in zip(meta.labels, d, strict=True) if yes]
                if meta.thresholds is not None or np.ndim(d)
                else [meta.labels[int(d)]]
            )
            sink.write(
                fields,
                {
                    "predicted": (meta.label_separator or ",").join(chosen),
                    **dict(zip(extra, map(float, p), strict=True)),
                },
            )

"""From settings to everything a run needs: rows, label schema, splits, token ids, data report and a fresh model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from textlora.base import BaseFiles, find_base
from textlora.config import SINGLE_LABEL, TrainConfig
from textlora.data import DataReport, LabelSchema, Row, Table, check_tables, infer_schema, read_table, require_texts
from textlora.errors import DataError, UsageError
from textlora.families import read_spec
from textlora.hardware import choose_device, choose_dtype
from textlora.metrics import DEFAULT_METRIC, METRICS
from textlora.model import Model, open_model
from textlora.tokens import Encoded, TextTokenizer, load_tokenizer

SPLITS = ("train", "validation", "test")
DEFAULT_MAX_LENGTH = 512
MAX_OWN_VALIDATION = 2000


@dataclass(frozen=True)
class EncodedSet:
    """Rows of one split with their token ids and label array: (N,) int64, (N, C) float32 or (N,) float32."""

    rows: list[Row]
    encoded: list[Encoded]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e.ids) for e in self.encoded])


@dataclass(frozen=True)
class Prepared:
    """All a run needs. `reason` says why the reference path was taken, None on the fast path."""

    config: TrainConfig
    files: BaseFiles
    model: Model
    reason: str | None
    tokenizer: TextTokenizer
    schema: LabelSchema
    sets: dict[str, EncodedSet]
    report: DataReport
    metric: str
    data_sha256: str
    device: str

    @property
    def pairs(self) -> bool:
        return any(row.text_pair is not None for row in self.sets["train"].rows[:1])


def read_tables(config: TrainConfig, sources: Mapping[str, Any] | None = None) -> dict[str, Table]:
    """The tables of a run by split; `sources` may hold rows or DataFrames in place of the settings' paths.

    Raises:
        UsageError: there is no training data.
        DataError: a file, row or column is wrong.
    """
    given = {split: getattr(config, split) for split in SPLITS} | dict(sources or {})
    if given["train"] is None:
        raise UsageError("no training data", "name a file with --train")
    columns = {
        "text_column": config.text_column,
        "text_pair_column": config.text_pair_column,
        "label_column": config.label_column,
        "label_separator": config.label_separator,
        "encoding": config.encoding,
    }
    tables = {split: read_table(source, split=split, **columns) for split, source in given.items() if source is not None}
    pair = [table.columns.text_pair is not None for table in tables.values()]
    if len(set(pair)) > 1:
        raise DataError("some splits hold text pairs and others single texts", "name --text-pair-column, or leave it out in all files")
    return tables


def split_rows(tables: Mapping[str, Table], schema: LabelSchema, config: TrainConfig) -> dict[str, list[Row]]:
    """Pick the rows of each split.

    `--limit-train N` takes the first N of `default_rng(seed).permutation(n)`. Without validation data, rows beyond the limit are used
    (half as many as train, at least 100 and at most 2,000), else a tenth of each class is split off; rows that repeat a training text are left out.
    """
    rng = lambda: np.random.default_rng(config.seed)
    everything = tables["train"].rows
    order = rng().permutation(len(everything))
    limit = config.limit_train or len(everything)
    rows = {"train": [everything[i] for i in order[:limit]]}
    for split in ("validation", "test"):
        if split in tables:
            found = tables[split].rows
            picked = range(len(found)) if config.limit_eval is None else rng().permutation(len(found))[: config.limit_eval]
            rows[split] = [found[i] for i in picked]
    if "validation" not in rows:
        beyond = [everything[i] for i in order[limit:]]
        if not beyond:
            rows["train"], beyond = _split_off(rows["train"], schema)
        seen = {(row.text, row.text_pair) for row in rows["train"]}
        cap = min(max(len(rows["train"]) // 2, 100), MAX_OWN_VALIDATION, config.limit_eval or MAX_OWN_VALIDATION)
        rows["validation"] = [row for row in beyond if (row.text, row.text_pair) not in seen][:cap]
    return rows


def _split_off(rows: list[Row], schema: LabelSchema) -> tuple[list[Row], list[Row]]:
    """A tenth of each class (at least one row where it has two or more); rows are already shuffled."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        key = schema.encode(row) if schema.problem_type == SINGLE_LABEL else None
        groups.setdefault(key, []).append(i)
    held = {i for members in groups.values() if len(members) > 1 for i in members[: max(1, round(len(members) / 10))]}
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def open_tokenizer(files: BaseFiles, model_length: int, config: TrainConfig) -> TextTokenizer:
    """The base's tokenizer with the run's length and truncation. Raises UsageError where the length is more than the model takes."""
    length = config.max_length or min(DEFAULT_MAX_LENGTH, model_length)
    if length > model_length:
        raise UsageError(f"--max-length {length}: the base model takes {model_length} tokens")
    return TextTokenizer(load_tokenizer(files.folder, files.config["model_type"]), length, config.truncation)


def encode_rows(tokenizer: TextTokenizer, rows: Sequence[Row]) -> list[Encoded]:
    pairs = [row.text_pair for row in rows]
    return tokenizer.encode([row.text for row in rows], None if all(p is None for p in pairs) else pairs)


def check_data(config: TrainConfig) -> DataReport:
    """The data report of `textlora check`: every row of every split, token lengths by the base's tokenizer."""
    tables = read_tables(config)
    schema = infer_schema(tables["train"].rows, config.problem_type, config.label_separator, tables["train"].columns.label or "label")
    files = find_base(config.model, config.revision)
    limit = read_spec(files.config)
    length = files.config.get("max_position_embeddings", DEFAULT_MAX_LENGTH) if isinstance(limit, str) else limit.max_length
    tokenizer = open_tokenizer(files, length, config)
    lengths = np.array([e.full for e in encode_rows(tokenizer, tables["train"].rows)])
    evaluations = {split: table for split, table in tables.items() if split != "train"}
    return check_tables(tables["train"], evaluations, schema, lengths, tokenizer.max_length)


def prepare(config: TrainConfig, sources: Mapping[str, Any] | None = None) -> Prepared:
    """Read, check and encode everything, and open a fresh model. Writes nothing.

    Raises:
        UsageError, DataError, ModelError: what is wrong and where.
    """
    device = choose_device(config.device)
    files = find_base(config.model, config.revision)
    tables = read_tables(config, sources)
    for table in tables.values():
        require_texts(table)
    schema = infer_schema(tables["train"].rows, config.problem_type, config.label_separator, tables["train"].columns.label or "label")
    metric = config.metric or DEFAULT_METRIC[schema.problem_type]
    if metric not in METRICS or schema.problem_type not in METRICS[metric].problem_types:
        fitting = ", ".join(name for name, info in METRICS.items() if schema.problem_type in info.problem_types)
        raise UsageError(f"--metric {metric}: not a metric of this task", f"there are: {fitting}")
    rows = split_rows(tables, schema, config)
    columns = {split: tables.get(split, tables["train"]).columns.label or "label" for split in rows}
    labels = {split: schema.encode_all(picked, columns[split]) for split, picked in rows.items() if picked}
    if schema.problem_type == SINGLE_LABEL and len(set(labels["train"].tolist())) < 2:
        raise DataError("the training rows picked hold one class only", "raise --limit-train")
    model, reason = open_model(
        files,
        config.lora,
        len(schema.labels),
        pooling=config.pooling,
        seed=config.seed,
        device=device,
        dtype=choose_dtype(config.precision, device),
    )
    if config.gradient_checkpointing and reason:
        raise UsageError("--gradient-checkpointing: only on the packed path", f"this base takes the reference path: {reason}")
    model = model.for_training()
    model.gradient_checkpointing = config.gradient_checkpointing
    tokenizer = open_tokenizer(files, model.max_length, config)
    sets = {split: EncodedSet(rows[split], encode_rows(tokenizer, rows[split]), labels[split]) for split in labels}
    picked = {split: Table(rows[split], tables.get(split, tables["train"]).columns, split, "") for split in sets}
    lengths = np.array([e.full for e in sets["train"].encoded])
    report = check_tables(picked["train"], {s: t for s, t in picked.items() if s != "train"}, schema, lengths, tokenizer.max_length)
    if "validation" not in sets:
        warning = "no row is left for validation, so the last step is kept and nothing is calibrated"
        report = replace(report, warnings=[*report.warnings, warning])
    return Prepared(config, files, model, reason, tokenizer, schema, sets, report, metric, tables["train"].sha256, device)

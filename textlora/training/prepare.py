"""From settings to everything a run needs: rows, label schema, splits, token ids, data report and a fresh
model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TrainConfig
from textlora.core.errors import DataError, UsageError
from textlora.data import (
    DataReport,
    LabelSchema,
    Row,
    Table,
    check_tables,
    infer_schema,
    read_table,
    require_texts,
)
from textlora.data.tokenize import Encoded, TextTokenizer, load_tokenizer
from textlora.kernels.devices import choose_device, choose_dtype
from textlora.metrics.scores import DEFAULT_METRIC, METRICS
from textlora.model.base import BaseFiles, base_pooling, find_base
from textlora.model.families import read_spec
from textlora.model.interface import Model
from textlora.model.open import open_model
from textlora.training.folds import FOLDS, MOST_ROWS, make_folds

SPLITS = ("train", "validation", "test")
DEFAULT_MAX_LENGTH = 512
OWN_SHARE = 0.1  # of the training rows, for validation
LEAST_BEYOND, MAX_OWN_VALIDATION = 100, 2000


@dataclass(frozen=True)
class EncodedSet:
    """Rows of one split with their token ids and label array: (N,) int64, (N, C) float32 or (N,) float32."""

    rows: list[Row]
    encoded: list[Encoded]
    labels: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(e.ids) for e in self.encoded])

    def pick(self, rows: np.ndarray) -> "PickedSet":
        """Some of the rows, by place."""
        return PickedSet(
            [self.rows[i] for i in rows], [self.encoded[i] for i in rows], self.labels[rows], rows
        )


@dataclass(frozen=True)
class PickedSet(EncodedSet):
    """Some rows of a split; `picked` says where they stood in it."""

    picked: np.ndarray


@dataclass(frozen=True)
class Split:
    """Rows of each split, and what became of the others.

    Attributes:
        left_out: (how many, of which split, why) for rows that were read and are in no split.
        cross_validated: whether folds of the training rows take the place of validation rows.
    """

    rows: dict[str, list[Row]]
    left_out: list[tuple[int, str, str]]
    cross_validated: bool

    def lines(self) -> list[str]:
        """Each group of rows that was left out, as a sentence."""
        return [
            f"Left out: {count:,} {split} row{'s' * (count > 1)}, {why}."
            for count, split, why in self.left_out
        ]


@dataclass(frozen=True)
class Prepared:
    """All a run needs.

    Attributes:
        reason: why the reference path was taken, None on the fast path.
        pooling: "first" or "mean", and `pooling_reason` why.
        folds: (N,) fold that holds each training row out, -1 for rows that every training has; None where
            validation rows decide, or nothing.
        split_lines: sentences about rows that were left out, and about what decides.
        left_out: as in `Split`.
    """

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
    pooling: str = "first"
    pooling_reason: str = ""
    folds: np.ndarray | None = None
    split_lines: list[str] = field(default_factory=list)
    left_out: list[tuple[int, str, str]] = field(default_factory=list)

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
    tables = {
        split: read_table(source, split=split, **columns)
        for split, source in given.items()
        if source is not None
    }
    pair = [table.columns.text_pair is not None for table in tables.values()]
    if len(set(pair)) > 1:
        raise DataError(
            "some splits hold text pairs and others single texts",
            "name --text-pair-column, or leave it out in all files",
        )
    return tables


def split_rows(tables: Mapping[str, Table], schema: LabelSchema, config: TrainConfig) -> Split:
    """Pick the rows of each split.

    `--limit-train N` takes the first N of `default_rng(seed).permutation(n)`. Without validation data and
    `--validation-share`, rows beyond the limit are used for it (half as many as train, at least 100 and at
    most 2,000); where there are none, cross-validation takes its place below 1,000 rows, and else a tenth of
    each class is split off. Rows that repeat a training text are left out of validation rows of our own.
    """
    rng = lambda: np.random.default_rng(config.seed)
    everything = tables["train"].rows
    order = rng().permutation(len(everything))
    limit = config.limit_train or len(everything)
    rows, left_out = {"train": [everything[i] for i in order[:limit]]}, []
    for split in ("validation", "test"):
        if split in tables:
            found = tables[split].rows
            picked = (
                range(len(found))
                if config.limit_eval is None
                else rng().permutation(len(found))[: config.limit_eval]
            )
            rows[split] = [found[i] for i in picked]
            left_out.append((len(found) - len(rows[split]), split, "beyond --limit-eval"))
    beyond, cross_validated = [everything[i] for i in order[limit:]], False
    if "validation" in rows:
        left_out.append((len(beyond), "training", "beyond --limit-train"))
    elif config.validation_share is None and not beyond and len(rows["train"]) < MOST_ROWS:
        cross_validated = True
    else:
        held = beyond
        if config.validation_share is not None or not beyond:
            left_out.append((len(beyond), "training", "beyond --limit-train"))
            share = config.validation_share or min(OWN_SHARE, MAX_OWN_VALIDATION / len(rows["train"]))
            rows["train"], held = _split_off(rows["train"], schema, share)
        seen = {(row.text, row.text_pair) for row in rows["train"]}
        new = [row for row in held if (row.text, row.text_pair) not in seen]
        most = (
            len(new)
            if held is not beyond
            else min(max(len(rows["train"]) // 2, LEAST_BEYOND), MAX_OWN_VALIDATION)
        )
        rows["validation"] = new[: min(most, config.limit_eval or most)]
        left_out.append((len(held) - len(new), "validation", "whose text stands among the training rows too"))
        why = (
            "beyond --limit-train and more than validation needs" if held is beyond else "beyond --limit-eval"
        )
        left_out.append((len(new) - len(rows["validation"]), "training", why))
    return Split(rows, [one for one in left_out if one[0]], cross_validated)


def _split_off(rows: list[Row], schema: LabelSchema, share: float) -> tuple[list[Row], list[Row]]:
    """A share of each class (at least one row where it has two or more); rows are already shuffled."""
    groups: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        key = schema.encode(row) if schema.problem_type == SINGLE_LABEL else None
        groups.setdefault(key, []).append(i)
    held = {
        i
        for members in groups.values()
        if len(members) > 1
        for i in members[: min(len(members) - 1, max(1, round(len(members) * share)))]
    }
    return [row for i, row in enumerate(rows) if i not in held], [
        row for i, row in enumerate(rows) if i in held
    ]


def row_folds(rows: Sequence[Row], labels: np.ndarray, schema: LabelSchema, seed: int) -> np.ndarray | None:
    """The fold of each training row, by `folds.make_folds`."""
    if schema.problem_type == REGRESSION:
        marks = np.ones((len(rows), 1), dtype=bool)
    elif schema.problem_type == MULTI_LABEL:
        marks = labels > 0.5
    else:
        marks = np.eye(len(schema.labels), dtype=bool)[labels]
    return make_folds(marks, [(row.text, row.text_pair) for row in rows], seed)


def _deciders(split: Split, folds: np.ndarray | None, given: bool) -> list[str]:
    """Sentences on what decides checkpoint, temperature and thresholds; `given` says whether validation rows
    were."""
    count = len(split.rows["train"])
    if folds is not None:
        held = int((folds >= 0).sum())
        rest = (
            f"; the other {count - held:,} are alone in a class and in every training" if held < count else ""
        )
        return [
            f"{FOLDS}-fold cross-validation decides, on {held:,} of {count:,} rows{rest}. Then all {count:,} are trained on."
        ]
    held = len(split.rows.get("validation", ()))
    if not held:
        return ["Warning: no row can be held out, so the last step is kept and nothing is calibrated."]
    if not given:
        return [f"{held:,} rows are held out for validation and decide; the other {count:,} are trained on."]
    few = (
        " These are few: without --validation, cross-validation would decide on all training rows."
        if held < LEAST_BEYOND and count < MOST_ROWS
        else ""
    )
    return [f"{held:,} validation rows decide.{few}"]


def open_tokenizer(files: BaseFiles, model_length: int, config: TrainConfig) -> TextTokenizer:
    """The base's tokenizer with the run's length and truncation. Raises UsageError where the length is more
    than the model takes."""
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
    schema = infer_schema(
        tables["train"].rows,
        config.problem_type,
        config.label_separator,
        tables["train"].columns.label or "label",
    )
    files = find_base(config.model, config.revision)
    limit = read_spec(files.config)
    length = (
        files.config.get("max_position_embeddings", DEFAULT_MAX_LENGTH)
        if isinstance(limit, str)
        else limit.max_length
    )
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
    schema = infer_schema(
        tables["train"].rows,
        config.problem_type,
        config.label_separator,
        tables["train"].columns.label or "label",
    )
    metric = config.metric or DEFAULT_METRIC[schema.problem_type]
    if metric not in METRICS or schema.problem_type not in METRICS[metric].problem_types:
        fitting = ", ".join(
            name for name, info in METRICS.items() if schema.problem_type in info.problem_types
        )
        raise UsageError(f"--metric {metric}: not a metric of this task", f"there are: {fitting}")
    split = split_rows(tables, schema, config)
    rows = split.rows
    columns = {name: tables.get(name, tables["train"]).columns.label or "label" for name in rows}
    labels = {name: schema.encode_all(picked, columns[name]) for name, picked in rows.items() if picked}
    if schema.problem_type == SINGLE_LABEL and len(set(labels["train"].tolist())) < 2:
        raise DataError("the training rows picked hold one class only", "raise --limit-train")
    pooling, pooling_reason = (
        base_pooling(files) if config.pooling == "auto" else (config.pooling, "--pooling")
    )
    model, reason = open_model(
        files,
        config.lora,
        len(schema.labels),
        pooling=pooling,
        seed=config.seed,
        device=device,
        dtype=choose_dtype(config.precision, device),
    )
    if config.gradient_checkpointing and reason:
        raise UsageError(
            "--gradient-checkpointing: only on the packed path",
            f"this base takes the reference path: {reason}",
        )
    model = model.for_training()
    model.gradient_checkpointing = config.gradient_checkpointing
    tokenizer = open_tokenizer(files, model.max_length, config)
    sets = {name: EncodedSet(rows[name], encode_rows(tokenizer, rows[name]), labels[name]) for name in labels}
    picked = {name: Table(rows[name], tables.get(name, tables["train"]).columns, name, "") for name in sets}
    lengths = np.array([e.full for e in sets["train"].encoded])
    report = check_tables(
        picked["train"],
        {s: t for s, t in picked.items() if s != "train"},
        schema,
        lengths,
        tokenizer.max_length,
    )
    folds = row_folds(rows["train"], labels["train"], schema, config.seed) if split.cross_validated else None
    lines = [*split.lines(), *_deciders(split, folds, "validation" in tables)]
    return Prepared(
        config, files, model, reason, tokenizer, schema, sets, report, metric, tables["train"].sha256, device,
        pooling, pooling_reason, folds, lines, split.left_out,
    )  # fmt: skip

"""Every setting of a training run: name, type, default, check and help, once.

The command line, `--config` files, `run/config.toml` and the reference page in docs/ are all made from
the fields below. A setting's help is the `help` of its field; unknown names fail.
"""

import dataclasses
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from textlora.core.errors import UsageError

SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"
PROBLEM_TYPES = {
    "single-label": SINGLE_LABEL,
    "multi-label": MULTI_LABEL,
    "regression": REGRESSION,
}  # ours -> transformers'
PRECISIONS = ("float32", "high", "bfloat16", "int8")  # of inference
PRECISION_HELP = "Arithmetic of the base. high is float32 with faster, slightly less exact products on CPUs that have AMX; bfloat16 is for GPUs; int8, for CPUs, is 1.3 to 1.8 times as fast and the least exact."
POOLINGS = ("auto", "first", "mean")
TRUNCATIONS = ("head", "tail", "head-tail")


def _option(default: Any, help: str, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True)
class LoraConfig:
    """Where LoRA goes and how large it is; PEFT's names and meanings (arXiv 2106.09685).

    The last four are of adapters made elsewhere: ranks and alphas of single layers, base biases that were
    trained too ("lora_only": of the adapted layers, "all"), and full names of modules that the adapter has
    its own weights for.
    """

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | None = None
    layers: str = "all"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()

    @property
    def scaling(self) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA (arXiv 2312.03732); of a layer that no
        pattern names."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def rank_of(self, module: str) -> int:
        """Rank of one layer, by its full name."""
        return _first_match(self.rank_pattern, module, self.r)

    def scaling_of(self, module: str) -> float:
        """Scale of one layer, by its full name."""
        alpha = _first_match(self.alpha_pattern, module, self.lora_alpha)
        return replace(self, r=self.rank_of(module), lora_alpha=alpha).scaling


def _first_match(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's rule (`get_pattern_key`): the first key that, as a regular expression, matches the name or what
    follows a dot in it."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. Raises UsageError where a value makes no sense."""

    train: str | None = _option(
        None, "Training rows: a CSV, TSV, JSONL or Parquet file, a folder, or a hub id.", metavar="DATA"
    )
    validation: str | None = _option(
        None,
        "Rows that decide checkpoint, temperature and thresholds. Default: rows beyond --limit-train, else 3-fold cross-validation "
        "below 1,000 training rows, else a tenth of them.",
        metavar="DATA",
    )
    validation_share: float | None = _option(
        None,
        "Share of the training rows of each class that is split off for validation, in place of cross-validation.",
        metavar="SHARE",
    )
    test: str | None = _option(None, "Rows for the final score, read once at the end.", metavar="DATA")
    text_column: str | None = _option(None, "Column of the text. Default: found by its name.", metavar="NAME")
    text_pair_column: str | None = _option(
        None, "Column of the second text of a pair. Default: found by its name.", metavar="NAME"
    )
    label_column: str | None = _option(
        None, "Column of the label. Default: found by its name.", metavar="NAME"
    )
    label_separator: str | None = _option(
        None, "Splits a label cell into several labels (makes the task multi-label).", metavar="TEXT"
    )
    problem_type: str | None = _option(
        None,
        "Task. Default: lists are multi-label, numbers with a fraction are regression, all else is single-label.",
        tuple(PROBLEM_TYPES),
    )
    encoding: str = _option(
        "utf-8", "Encoding of CSV, TSV and JSONL files, such as cp1252 or cp949.", metavar="NAME"
    )
    model: str = _option(
        "minilm", "Base model: a folder, a hub id, or minilm (all-MiniLM-L6-v2).", metavar="MODEL"
    )
    revision: str | None = _option(
        None, "Revision of a base model on the hub: branch, tag or commit.", metavar="REV"
    )
    output: str | None = _option(None, "Folder for the adapter; must not exist or be empty.", metavar="DIR")
    method: str = _option("lora", "What is trained besides the head.", ("lora",))
    pooling: str = _option(
        "auto",
        "What the head sees: the first token, with the head that transformers has for the base, or the mean of all tokens. auto takes what the "
        "base's own sentence-transformers files say, else first.",
        POOLINGS,
    )
    epochs: float = _option(4.0, "Passes over the training rows.")
    learning_rate: float | None = _option(
        None,
        "Peak learning rate of A, B and head. Default: by the number of steps, 4e-3 for 128 or fewer, falling to 1e-3 for 2,048 or more; with mean "
        "pooling half of that for 2 classes, rising to all of it for 10, and never below 1e-3.",
    )
    scheduler: str = _option(
        "linear", "Course of the learning rate after the warm-up.", ("linear", "cosine", "constant")
    )
    warmup: float = _option(0.2, "Warm-up: a share of all steps if below 1, else a number of steps.")
    weight_decay: float = _option(0.01, "AdamW weight decay; never on biases and norms.")
    batch_size: int = _option(8, "Rows per optimizer step and accumulation part.")
    batch_tokens: int | None = _option(None, "Token budget per step in place of --batch-size.")
    gradient_accumulation_steps: int = _option(1, "Batches summed into one optimizer step.")
    gradient_checkpointing: bool = _option(
        False, "Keep less for the backward pass and compute it again: less memory, a third more time."
    )
    max_grad_norm: float = _option(1.0, "Gradients are clipped to this norm; 0 switches clipping off.")
    eval_every: int | None = _option(None, "Evaluate every N steps. Default: after each epoch.", metavar="N")
    early_stopping_patience: int | None = _option(
        None, "Stop after N evaluations without a better score.", metavar="N"
    )
    metric: str | None = _option(
        None,
        "Metric that picks the best checkpoint. Default: accuracy, micro_f1 or spearman by task.",
        metavar="NAME",
    )
    class_weights: str | None = _option(
        None, "Loss weights of the classes: balanced, or label=weight,label=weight.", metavar="SPEC"
    )
    label_smoothing: float = _option(0.0, "Label smoothing of the cross-entropy loss, 0 to 1.")
    max_length: int | None = _option(
        None, "Tokens kept of a text or pair. Default: what the base model can take, at most 512."
    )
    truncation: str = _option("head", "Which part of a long text is kept.", TRUNCATIONS)
    r: int = _option(8, "Rank of LoRA's A and B.")
    lora_alpha: float = _option(16.0, "LoRA scale: the update is multiplied by lora_alpha / r.")
    lora_dropout: float = _option(0.0, "Dropout on LoRA's input, 0 to 1.")
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(r) instead.")
    use_dora: bool = _option(False, "DoRA: learn each output's magnitude too.")
    loraplus_ratio: float = _option(1.0, "LoRA+: learning rate of B divided by that of A.")
    target_modules: tuple[str, ...] | None = _option(
        None, "Dense layers that get LoRA: names, or all-linear. Default: query and value.", metavar="NAMES"
    )
    layers: str = _option(
        "all", "Encoder blocks that get LoRA: all, last:K, or a list such as 0,1,5.", metavar="SPEC"
    )
    init_adapter: str | None = _option(
        None, "Start from this adapter folder (its A, B and, where labels agree, its head).", metavar="DIR"
    )
    seed: int = _option(42, "Seed of the head, A, row order, splits and dropout.")
    limit_train: int | None = _option(None, "Train on N rows picked by the seed.", metavar="N")
    limit_eval: int | None = _option(
        None,
        "Evaluate on at most N rows of the validation and of the test split, picked by the seed.",
        metavar="N",
    )
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto.")
    precision: str = _option(
        "auto", "float32 or bfloat16 arithmetic; auto follows the hardware.", ("auto", "float32", "bfloat16")
    )
    threads: int | None = _option(None, "CPU threads. Default: what torch chooses.", metavar="N")

    def __post_init__(self):
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: {rule}")

        for item in dataclasses.fields(self):
            value, choices = getattr(self, item.name), item.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise UsageError(f"--{item.name.replace('_', '-')} {value}: not one of {', '.join(choices)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{item.name.replace('_', '-')} {value}: not a finite number")
        need(self.r >= 1, "r", "the rank must be at least 1")
        need(self.lora_alpha > 0, "lora_alpha", "must be above 0")
        need(0 <= self.lora_dropout < 1, "lora_dropout", "must be at least 0 and below 1")
        need(0 <= self.label_smoothing < 1, "label_smoothing", "must be at least 0 and below 1")
        for name in ("epochs", "learning_rate", "loraplus_ratio"):
            need(getattr(self, name) is None or getattr(self, name) > 0, name, "must be above 0")
        for name in ("warmup", "weight_decay", "max_grad_norm", "seed"):
            need(getattr(self, name) >= 0, name, "must not be negative")
        positive = (
            "batch_tokens",
            "eval_every",
            "early_stopping_patience",
            "limit_train",
            "limit_eval",
            "threads",
        )
        for name in ("batch_size", "gradient_accumulation_steps", *positive):
            need(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1")
        need(
            self.validation_share is None or 0 < self.validation_share < 1,
            "validation_share",
            "must be above 0 and below 1",
        )
        need(self.max_length is None or self.max_length >= 8, "max_length", "must be at least 8")

    @property
    def lora(self) -> LoraConfig:
        return LoraConfig(
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig) if hasattr(self, f.name)}
        )


def field_type(item: dataclasses.Field) -> type:
    """The plain type of a field: int for `int | None`, tuple for `tuple[str, ...] | None`."""
    kind = item.type
    if isinstance(kind, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    return typing.get_origin(kind) or kind


def read_config(path: Path, config: type | None = None, command: str = "train") -> dict[str, Any]:
    """Read settings from a TOML file whose keys are the long flags' names, with `_` or `-`.

    Args:
        config: dataclass whose fields are the settings; default: `TrainConfig`.

    Raises:
        UsageError: the file is missing, is not TOML, or has an unknown key or a value of another type.
    """
    try:
        with open(path, "rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", "give the path of a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file ({error})") from error
    known = {item.name: item for item in dataclasses.fields(config or TrainConfig)}
    settings = {}
    for key, value in raw.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(
                f"{path}: unknown setting '{key}'", f"`textlora {command} --help` lists the settings"
            )
        kind = field_type(known[name])
        if kind is float and type(value) is int:
            value = float(value)
        if kind is tuple and isinstance(value, list | str):
            value = tuple(value.split(",") if isinstance(value, str) else map(str, value))
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            raise UsageError(f"{path}: '{key}' should be {kind.__name__}, not {value!r}")
        settings[name] = value
    return settings


def write_config(config: TrainConfig) -> str:
    """`config` as TOML, settings at None left out; `read_config` gives it back."""
    lines = []
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is not None:
            lines.append(f"{item.name} = {_toml(value)}")
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return repr(value)

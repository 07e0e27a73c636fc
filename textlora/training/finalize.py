"""After the last step: calibrate, score, save, and prove with transformers + peft that the saved folder is
what was trained."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from textlora.adapters.card import model_card
from textlora.adapters.folder import (
    WEIGHTS_FILE,
    AdapterMeta,
    copy_folder,
    peft_config,
    write_side_file,
    write_weights,
)
from textlora.adapters.golden_texts import golden_rows
from textlora.core.errors import VerificationError
from textlora.core.files import write_text
from textlora.inference.classifier import TextClassifier, encoded_logits
from textlora.kernels.devices import peak_memory, torch_threads
from textlora.metrics.calibration import Calibration, calibrate
from textlora.metrics.scores import details, intervals
from textlora.model.adapter_tensors import parameter_counts, scaled_head, shifted_head
from textlora.model.families import read_spec
from textlora.report.run_page import markdown_summary
from textlora.training.checkpoint_choice import score_logits
from textlora.training.cross_validation import Trainings
from textlora.training.losses import prior_of
from textlora.training.prepare import EncodedSet, Prepared
from textlora.training.prover import Prover

TOLERANCE = 1e-4  # of a saved float32 adapter against transformers + peft, relative to max(1, |logit|)
_CARD_SETTINGS = (
    "epochs",
    "learning_rate",
    "scheduler",
    "warmup",
    "batch_size",
    "r",
    "lora_alpha",
    "lora_dropout",
    "layers",
    "max_length",
    "seed",
)


def finish(
    prepared: Prepared, trainings: Trainings, run: Path, prover: Prover
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Score the model as it stands (the best checkpoint), save it into `run/..`, and check the saved files.

    Returns:
        the result record, and the `final` records of the log.

    Raises:
        VerificationError: the saved folder does not give what the trained model gives.
        StorageError: the disk is full.
    """
    kind, held = prepared.schema.problem_type, trainings.held()
    calibration, finals = Calibration(), []
    if held is not None:
        data = prepared.sets[held.split].pick(held.rows)
        has_bias = (
            list(prepared.model.trainable().values())[-1].ndim == 1
        )  # which holds what the class frequencies add
        prior = prior_of(prepared) if has_bias else None
        calibration = calibrate(held.logits, data.labels, kind, out_of_fold=bool(held.folds), prior=prior)
        finals.append(_final(prepared, trainings, "validation", held.logits, data, calibration))
        finals[-1]["folds"] = held.folds
    if "test" in prepared.sets:
        data = prepared.sets["test"]
        finals.append(
            _final(
                prepared, trainings, "test", encoded_logits(prepared.model, data.encoded), data, calibration
            )
        )
    scores = {final["split"]: final["metrics"] for final in finals}
    difference = _save(prepared, trainings, run, calibration, scores, finals, prover)
    adapter, head = parameter_counts(prepared.model.trainable())
    result = {
        "problem_type": kind,
        "labels": list(prepared.schema.labels),
        "model": prepared.files.id or prepared.files.folder.name,
        "path": prepared.model.path,
        "pooling": prepared.pooling,
        "adapter_parameters": adapter,
        "head_parameters": head,
        "golden_difference": difference,
        "train_rows": len(prepared.sets["train"].rows),
        "temperature": calibration.temperature,
        **_rows(prepared, trainings),
        **scores,
    }
    return result, finals


def _rows(prepared: Prepared, trainings: Trainings) -> dict[str, Any]:
    """Where every row that was read went: splits, rows that folds held out, rows that were left out and why."""
    held = len(trainings.held_rows()) if trainings.folds else 0
    left_out = [{"rows": count, "of": split, "why": why} for count, split, why in prepared.left_out]
    return {
        "rows": {split: len(data.rows) for split, data in prepared.sets.items()},
        "folds": len(trainings.folds),
        "held_out": held,
        "left_out": left_out,
    }


def _final(
    prepared: Prepared,
    trainings: Trainings,
    split: str,
    logits: np.ndarray,
    data: EncodedSet,
    calibration: Calibration,
) -> dict[str, Any]:
    kind, names = prepared.schema.problem_type, prepared.schema.labels
    logits, thresholds = calibration.of(logits), calibration.thresholds
    loss, metrics = score_logits(prepared, data.labels, logits, trainings.trainer.loss, thresholds=thresholds)
    ranges = intervals(kind, data.labels, logits, thresholds=thresholds)
    texts = [row.text if row.text_pair is None else f"{row.text} || {row.text_pair}" for row in data.rows]
    wheres = [f"{row.source}:{row.where}" for row in data.rows]
    return {
        "kind": "final",
        "split": split,
        "rows": len(data.rows),
        "loss": loss,
        "metrics": metrics,
        "intervals": {name: list(bounds) if bounds is not None else None for name, bounds in ranges.items()},
        "details": details(kind, data.labels, logits, names, texts, wheres, thresholds=thresholds),
    }


def _save(
    prepared: Prepared,
    trainings: Trainings,
    run: Path,
    calibration: Calibration,
    scores: dict[str, Any],
    finals: list[dict[str, Any]],
    prover: Prover,
) -> float:
    """Write into a staging folder, check it there, then move it up, `textlora.json` last."""
    config, files, model, trainer = prepared.config, prepared.files, prepared.model, trainings.trainer
    temperature, shift, thresholds = calibration.temperature, calibration.shift, calibration.thresholds
    # on a copy, so that every reader has calibrated scores and the model stays as it was trained
    tensors = shifted_head(scaled_head(model.trainable(), 1 / temperature), shift)
    adapter, head = parameter_counts(model.trainable())
    staging = run / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        lora = dataclasses.replace(config.lora, target_modules=tuple(model.target_modules))
        write_weights(
            staging,
            peft_config(
                config.lora,
                model.target_modules,
                model.modules_to_save,
                prepared.pooling,
                files.id,
                files.revision,
            ),
            tensors,
        )
        _write_tokenizer(prepared, staging)
        meta = AdapterMeta(
            labels=prepared.schema.labels,
            problem_type=prepared.schema.problem_type,
            pairs=prepared.pairs,
            pooling=prepared.pooling,
            max_length=prepared.tokenizer.max_length,
            truncation=config.truncation,
            base={
                "id": files.id,
                "revision": files.revision,
                "model_type": files.config["model_type"],
                "hash": model.base_hash(),
            },
            label_separator=prepared.schema.label_separator,
            thresholds=None if thresholds is None else tuple(map(float, thresholds)),
            fitted_temperature=float(temperature),
            fitted_shift=None if shift is None else tuple(map(float, shift)),
            golden=tuple(_golden(prepared, staging, prover)),
            scores=scores,
            training={
                "data_sha256": prepared.data_sha256,
                **_rows(prepared, trainings),
                "settings": {name: getattr(config, name) for name in _CARD_SETTINGS}
                | {"learning_rate": trainer.peak_rate},
                "best_step": trainer.best_step,
                "path": model.path,
                "train_seconds": trainer.seconds,
                "tokens": trainer.tokens,
                "tokens_per_second": trainer.tokens / trainer.seconds if trainer.seconds else 0.0,
                "peak_memory_bytes": peak_memory(prepared.device),
                "epochs": trainer.epochs_done,
                "adapter_parameters": adapter,
                "head_parameters": head,
            },
            textlora_version=_version(),
        )
        architecture = "AutoModelForSequenceClassification"
        settings = meta.training["settings"] | {"rows": meta.training["rows"]["train"]}
        card = model_card(
            meta, lora, architecture, markdown_summary(finals), settings, run.resolve().parent.name
        )
        write_text(staging / "README.md", card)
        write_side_file(staging, meta)
        with torch_threads(1):  # a dozen short texts: a team of threads would wait for a busy core
            difference = _prove(prepared, staging, tensors, calibration)
        copy_folder(staging, run.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return difference


def _write_tokenizer(prepared: Prepared, folder: Path) -> None:
    """tokenizer.json as used here, and the base's tokenizer settings with our length, so that AutoTokenizer
    agrees."""
    write_text(folder / "tokenizer.json", prepared.tokenizer.backend.to_str(pretty=True))
    source = prepared.files.folder / "tokenizer_config.json"
    try:
        settings = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        settings = {}
    settings = {key: value for key, value in settings.items() if key not in ("name_or_path", "auto_map")}
    settings |= {"model_max_length": prepared.tokenizer.max_length}
    spec = read_spec(prepared.files.config)
    if not isinstance(spec, str):  # else AutoTokenizer may leave out the segment ids of pairs
        inputs = ["input_ids", *(["token_type_ids"] if spec.family.uses_type_ids else []), "attention_mask"]
        settings.setdefault("model_input_names", inputs)
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _golden(prepared: Prepared, folder: Path, prover: Prover) -> list[dict[str, Any]]:
    """Golden texts with the logits that transformers + peft give for the saved files, float32 on the CPU."""
    rows = golden_rows(prepared.pairs)
    encoded = prepared.tokenizer.encode([a for a, _ in rows], [b for _, b in rows])
    logits = prover.golden(
        folder, prepared.files.folder, len(prepared.schema.labels), prepared.pooling, encoded
    )
    return [
        {"text": a, "text_pair": b, "logits": [float(x) for x in row]}
        for (a, b), row in zip(rows, logits, strict=True)
    ]


def _prove(
    prepared: Prepared, folder: Path, tensors: Mapping[str, Tensor], calibration: Calibration
) -> float:
    """Load the folder afresh; its tensors must be those given, its logits those of transformers + peft, and
    those of the trained model, calibrated.

    Returns:
        the largest difference of a golden logit.
    """
    saved = load_file(folder / WEIGHTS_FILE)
    for name, tensor in tensors.items():
        if not np.array_equal(saved[name].numpy(), tensor.detach().cpu().float().numpy()):
            raise VerificationError(f"tensor '{name}' was not saved as it was trained")
    classifier = TextClassifier.load(folder, base=str(prepared.files.folder), device="cpu", verify=False)
    stored = np.array([row["logits"] for row in classifier.meta.golden])
    now = classifier.plain_logits(
        [row["text"] for row in classifier.meta.golden], [row["text_pair"] for row in classifier.meta.golden]
    )
    difference = np.abs(stored - now)
    if not (difference <= TOLERANCE * np.maximum(1, np.abs(stored))).all():
        raise VerificationError(
            f"the saved adapter gives logits {difference.max():.2g} away from transformers + peft",
            "please report this with run/config.toml",
        )
    golden = prepared.tokenizer.encode(
        *zip(*((row["text"], row["text_pair"]) for row in classifier.meta.golden), strict=True)
    )
    trained = calibration.of(encoded_logits(prepared.model, golden))
    if (
        prepared.model.dtype == torch.float32
        and not (np.abs(trained - now) <= TOLERANCE * np.maximum(1, np.abs(trained))).all()
    ):
        raise VerificationError(
            f"the saved adapter gives logits {np.abs(trained - now).max():.2g} away from the trained model",
            "please report this with run/config.toml",
        )
    return float(difference.max())


def _version() -> str:
    from importlib.metadata import version

    return version("textlora")

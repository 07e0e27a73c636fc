"""`TextClassifier`: base, adapter, head, tokenizer and labels as one thing that loads and predicts."""

import contextlib
import tomllib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from textlora.adapters.folder import AdapterFolder, AdapterMeta, lora_config, read_adapter
from textlora.adapters.hub import adapter_folder
from textlora.adapters.importers.facts import find_facts, find_length
from textlora.core.config import MULTI_LABEL, REGRESSION
from textlora.core.errors import AdapterError, UsageError
from textlora.core.predictions import Prediction
from textlora.data.tokenize import Encoded, TextTokenizer, even_batches, load_tokenizer, pack
from textlora.kernels.devices import Runs, Workers, bounded_memory, choose_device, side_by_side, torch_threads
from textlora.metrics.calibration import decide, probabilities
from textlora.model.base import BaseFiles, find_base
from textlora.model.interface import Model
from textlora.model.open import open_model

EVAL_TOKENS = {
    "cpu": 1024,
    "cuda": 65536,
}  # of a forward when predicting: more is slower on a CPU, and holds more memory (docs/log.md)
EVAL_TOKENS_AT_ONCE = 1024  # where a forward is one call: threads without a batch help with it
MIN_SHARE, MIN_SHARE_ONE_CORE = (
    192,
    32,
)  # tokens of a thread below which one batch on all cores is faster (docs/log.md)
GOLDEN_TOLERANCE = 1e-3
GOLDEN_FLOOR = 0.01  # a smaller scale of logits counts as this


class TextClassifier:
    """A loaded classifier. Make one with `TextClassifier.load`."""

    def __init__(self, model: Model, tokenizer: TextTokenizer, meta: AdapterMeta, precision: str = "float32"):
        self.model, self.tokenizer, self.meta, self.precision = model, tokenizer, meta, precision

    @cached_property
    def running(self) -> Model:
        """`model` as it predicts fastest. Made at the first prediction."""
        return self.model.for_inference(self.precision)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        base: str | None = None,
        labels: Sequence[str] | None = None,
        problem_type: str | None = None,
        device: str = "auto",
        precision: str = "float32",
        verify: bool = True,
    ) -> "TextClassifier":
        """Load an adapter onto its base and check that it answers as it did when it was saved.

        Args:
            path: folder written by textlora, or by PEFT (then `labels` must be given where its base does not
                name them), or the hub id of one.
            revision: branch, tag or commit of an adapter on the hub.
            base: folder or hub id of the base model; default: the one the adapter names.
            labels: label names in class order, only for a folder without `textlora.json`.
            problem_type: task of such a folder; default single-label, or regression for one label.
            precision: of predictions, after the check. "high" has faster products on CPUs with AMX, logits
                within 1e-4, and is float32 on others (docs/decisions/native.md); "bfloat16" is for GPUs;
                "int8" runs the base's dense layers in 8 bits (docs/decisions/int8.md): on CPUs only, 1.3 to
                1.8 times as fast. Logits differ in the second digit.
            verify: recompute the golden examples in float32; a logit may differ by 1e-3 x max(|logit|, s), s
                the largest of them, at most 1.

        Raises:
            AdapterError: the adapter is not there, damaged, incomplete, or does not fit the base.
            ModelError: the base cannot be found or read.
            UsageError: int8 is asked for where it cannot be had.
        """
        folder = read_adapter(adapter_folder(path, revision))
        files = find_adapter_base(folder, base)
        meta = folder.meta or _foreign_meta(folder, files, labels, problem_type)
        if folder.meta is not None and labels is not None and tuple(labels) != meta.labels:
            raise UsageError(
                f"{path} has its own labels", "`textlora inspect --relabel old=new` renames them"
            )
        device = choose_device(device)
        kind = files.config["model_type"]
        if kind != meta.base.get("model_type"):
            raise AdapterError(
                f"{path} was trained on a {meta.base.get('model_type')}, {files.folder} is a {kind}",
                "pass its own base as --model",
            )
        try:
            model, _ = open_model(
                files, lora_config(folder), len(meta.labels), pooling=meta.pooling, device=device
            )
        except UsageError as error:  # layers that this base does not have
            raise AdapterError(
                f"{path} does not fit {files.folder}: {error.message}",
                "pass the base it was trained on as --model",
            ) from error
        if meta.base.get("hash") and model.base_hash() != meta.base["hash"]:
            named = meta.base.get("id") or meta.base.get("model_type")
            raise AdapterError(
                f"{path} was trained on another base than {files.folder} (weights differ)",
                f"it needs {named}, {meta.base['hash'][:19]}",
            )
        try:
            model.load_trainable(folder.tensors)
        except AdapterError as error:
            raise AdapterError(f"{path}: {error.message}", error.fix) from error
        where = folder.path if (folder.path / "tokenizer.json").is_file() else files.folder
        length = min(meta.max_length, model.max_length)
        tokenizer = TextTokenizer(load_tokenizer(where, files.config["model_type"]), length, meta.truncation)
        classifier = cls(model, tokenizer, meta, precision)
        if verify and meta.golden:
            classifier.verify(str(path))
        if precision != "float32":
            _ = classifier.running  # says now where it cannot be had
        return classifier

    def verify(self, name: str = "this adapter") -> float:
        """Recompute the golden examples in plain float32; the largest difference of a logit. Raises
        AdapterError beyond the tolerance."""
        stored = np.array([row["logits"] for row in self.meta.golden], dtype=np.float64)
        with exact_float32(), torch_threads(1):  # little work
            now = self.plain_logits(
                [row["text"] for row in self.meta.golden], [row["text_pair"] for row in self.meta.golden]
            )
        if stored.shape != now.shape:
            raise AdapterError(
                f"{name}: golden examples have {stored.shape[-1]} logits, the model gives {now.shape[-1]}"
            )
        difference = np.abs(stored - now)
        # Rounding grows with the logits: an adapter whose logits are all small is held to their size, or
        # damage would pass (docs/adapter-format.md).
        scale = np.maximum(np.abs(stored), np.clip(np.abs(stored).max(), GOLDEN_FLOOR, 1))
        if not (difference <= GOLDEN_TOLERANCE * scale).all():
            worst = int(difference.max(axis=1).argmax())
            raise AdapterError(
                f"{name}: golden example {worst + 1} gives logits that differ by {difference.max():.2g} from those stored with the adapter",
                "the base, the tokenizer or the adapter is not what it was when this was saved",
            )
        return float(difference.max())

    def require_pairs(self, all_given: bool, any_given: bool) -> None:
        """Refuse single texts for a pair task and pairs for any other. Raises UsageError; a folder of PEFT's
        own does not say, and takes both."""
        if self.meta.pairs and not all_given:
            raise UsageError(
                "this adapter was trained on text pairs and got single texts",
                "give the second texts (--text-pair-column)",
            )
        if any_given and not self.meta.pairs and self.meta.textlora_version:
            raise UsageError(
                "this adapter was trained on single texts and got pairs",
                "name the one column of the text with --text-column",
            )

    def logits(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> np.ndarray:
        """Logits (N, C) float32, rows in the order given."""
        return encoded_logits(self.running, self.tokenizer.encode(texts, pairs))

    def plain_logits(self, texts: Sequence[str], pairs: Sequence[str | None] | None = None) -> np.ndarray:
        """The same by the model as it was trained, the adapter beside the base, in float32: what proofs
        compare with."""
        return encoded_logits(self.model, self.tokenizer.encode(texts, pairs))

    def predict(
        self, texts: Sequence[str] | str, pairs: Sequence[str | None] | None = None
    ) -> list[Prediction]:
        """Predict texts, or text pairs.

        Raises:
            UsageError: an empty text, something that is not a string, or pairs that do not fit the task.
        """
        if isinstance(texts, str):
            texts = [texts]
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise UsageError(f"text {i + 1}: {'empty' if isinstance(text, str) else 'not a string'}")
        if pairs is not None and len(pairs) != len(texts):
            raise UsageError(f"{len(texts)} texts and {len(pairs)} pairs", "give one pair per text")
        if not texts:
            return []
        given = [pair is not None for pair in pairs or ()]
        self.require_pairs(all(given) and bool(given), any(given))
        return self.predictions(self.logits(texts, pairs))

    def predictions(self, logits: np.ndarray) -> list[Prediction]:
        """What logits (N, C) say, with the adapter's labels, temperature and thresholds."""
        probs = probabilities(logits, self.meta.problem_type, self.meta.temperature)
        decided = decide(
            probs,
            self.meta.problem_type,
            None if self.meta.thresholds is None else np.array(self.meta.thresholds),
        )
        return [self._prediction(*row) for row in zip(logits, probs, decided, strict=True)]

    def _prediction(self, logits: np.ndarray, probs: np.ndarray, decided: Any) -> Prediction:
        names, kind = self.meta.labels, self.meta.problem_type
        raw = tuple(map(float, logits))
        if kind == REGRESSION:
            return Prediction(f"{raw[0]:.6g}", (), raw[0], {"value": raw[0]}, raw)
        scores = dict(zip(names, map(float, probs), strict=True))
        if kind == MULTI_LABEL:
            chosen = tuple(name for name, yes in zip(names, decided, strict=True) if yes)
            return Prediction(", ".join(chosen), chosen, float(probs.max()), scores, raw)
        label = names[int(decided)]
        return Prediction(label, (label,), scores[label], scores, raw)

    def record(self, prediction: Prediction, with_logits: bool = False) -> dict[str, Any]:
        """The JSON form of a prediction, as `predict --json` prints it."""
        if self.meta.problem_type == REGRESSION:
            row: dict[str, Any] = {"value": prediction.score}
        elif self.meta.problem_type == MULTI_LABEL:
            row = {"labels": list(prediction.labels), "score": prediction.score, "scores": prediction.scores}
        else:
            row = {"label": prediction.label, "score": prediction.score, "scores": prediction.scores}
        return row | {"logits": list(prediction.logits)} if with_logits else row


def encoded_logits(
    model: Model, encoded: Sequence[Encoded], workers: Workers | None = None, states: Any = None
) -> np.ndarray:
    """Logits (N, C) of encoded texts in the order given; computed by length in batches of about `eval_tokens`
    tokens.

    Args:
        workers: who computes the batches; default: `side_by_side`.
        states: `hidden_state_cache.HiddenStates` of these texts, where they are known.

    Raises:
        UsageError: there are no texts.
    """
    if not encoded:
        raise UsageError("there are no texts")
    lengths = [len(e.ids) for e in encoded]
    order = np.argsort(lengths, kind="stable")
    device = model.device

    def compute(rows: list[int]) -> tuple[np.ndarray, torch.Tensor]:
        with torch.inference_mode():
            batch = pack([encoded[i] for i in rows], device=device)
            batch = batch if states is None else states.attach(batch, rows)
            return np.asarray(rows)[batch.rows.numpy()], model.forward(batch).float()

    with (
        bounded_memory(model),
        contextlib.nullcontext(workers)
        if workers
        else side_by_side(device, model.path == "packed") as workers,
    ):
        parts = workers.map(
            compute, even_batches(lengths, order, eval_tokens(model), workers.count, min_share(model))
        )
    result = np.empty((len(encoded), parts[0][1].shape[1]), dtype=np.float32)
    for rows, logits in parts:  # only now are they waited for: a GPU works while the next batch is packed
        result[rows] = logits.cpu().numpy()
    return result


def min_share(model: Runs) -> int:
    """Tokens that a thread should get at least when predicting with a model or an encoder."""
    return MIN_SHARE_ONE_CORE if model.one_core else MIN_SHARE


def eval_tokens(model: Runs) -> int:
    """Tokens of one forward when predicting with a model or an encoder."""
    return EVAL_TOKENS_AT_ONCE if model.fused_stack else EVAL_TOKENS[torch.device(model.device).type]


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Matrix products in full float32, no TF32 or bfloat16 inside and no autocast; torch's settings, old
    style and new, are put back."""
    backends = [
        b for b in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if hasattr(b, "fp32_precision")
    ]  # torch >= 2.9
    found = [backend.fp32_precision for backend in backends]
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the new style was used: torch says so by an error
        before = "highest"
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        for backend, value in zip(backends, found, strict=True):
            backend.fp32_precision = value


def find_adapter_base(folder: AdapterFolder, base: str | None = None) -> BaseFiles:
    """The base of an adapter: the one given, else the one it names, else the local folder its own run used.

    Raises:
        AdapterError: it names none.
        ModelError: it cannot be found.
    """
    if base is not None:
        return find_base(base)
    named = folder.meta.base.get("id") if folder.meta else folder.config.get("base_model_name_or_path")
    revision = folder.meta.base.get("revision") if folder.meta else folder.config.get("revision")
    if named:
        return find_base(named, revision)
    try:
        used = tomllib.loads((folder.path / "run" / "config.toml").read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError):
        used = None
    if isinstance(used, str) and Path(used).is_dir():  # its weights are still compared by hash
        return find_base(used)
    raise AdapterError(
        f"{folder.path} names no base model (it was trained on a local folder)", "pass that folder as --model"
    )


def _foreign_meta(
    folder: AdapterFolder, files: BaseFiles, labels: Sequence[str] | None, problem_type: str | None
) -> AdapterMeta:
    facts = find_facts(folder, files.config, labels, problem_type)
    length = find_length([folder.path], files.config.get("max_position_embeddings", 512))
    return AdapterMeta(
        labels=facts.labels, problem_type=facts.problem_type, pairs=False, pooling="first", max_length=length.tokens, truncation=length.truncation,
        base={"id": files.id, "revision": files.revision, "model_type": files.config["model_type"], "hash": None},
    )  # fmt: skip

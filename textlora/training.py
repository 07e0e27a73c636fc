"""The training loop: a generator of step and evaluation records over any `Model`. Knows no files and prints nothing.

Only A, B, DoRA's magnitudes and the head carry gradients. A step takes `batch_size x gradient_accumulation_steps` rows, computed in
pieces of at most 384 tokens or so (32,768 on a GPU), on a CPU side by side; memory does not grow with the batch. Every random draw comes
from (seed, epoch) or (seed, step, piece), and the pieces' gradients are summed in order.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textlora.adamw import AdamW
from textlora.classifier import MIN_SHARE_ONE_CORE, encoded_logits
from textlora.config import MULTI_LABEL, REGRESSION, TrainConfig, default_rate
from textlora.errors import TrainingError
from textlora.hardware import Workers, bounded_memory, peak_memory, side_by_side
from textlora.losses import Loss
from textlora.metrics import METRICS, evaluate, standard_error
from textlora.prefix import HiddenStates
from textlora.prepare import EncodedSet, Prepared
from textlora.recorded import Filled, Recordings, fill_up
from textlora.tokens import PackedBatch, pack, token_batches

PIECE_TOKENS = {"cpu": 384, "cuda": 32768}  # on a CPU faster than 768 and less memory (docs/log.md); what fills a GPU, where it fits
MIN_PIECE = 96  # tokens of a thread below which one piece on all cores is faster; `classifier.MIN_SHARE_ONE_CORE` where a product takes one core
KEPT_BYTES = 20  # of a token per layer and width for the backward pass in half precision, as measured (docs/log.md)


def plan_epoch(config: TrainConfig, lengths: np.ndarray, epoch: int) -> list[list[int]]:
    """Rows of each optimizer step of an epoch, in an order drawn from (seed, epoch)."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(lengths))
    if config.batch_tokens:
        batches = list(token_batches(lengths, order, config.batch_tokens))
    else:
        batches = [order[i : i + config.batch_size].tolist() for i in range(0, len(order), config.batch_size)]
    k = config.gradient_accumulation_steps
    return [[row for batch in batches[i : i + k] for row in batch] for i in range(0, len(batches), k)]


def plan(config: TrainConfig, lengths: np.ndarray) -> list[tuple[float, list[int]]]:
    """All steps of a run: (epochs done after the step, rows). The last epoch may be a part of one."""
    steps: list[tuple[float, list[int]]] = []
    for epoch in range(math.ceil(config.epochs)):
        rows = plan_epoch(config, lengths, epoch)
        steps += [(epoch + (i + 1) / len(rows), step) for i, step in enumerate(rows)]
    return [step for step in steps if step[0] <= config.epochs + 1e-9] or steps[:1]


def evaluation_steps(config: TrainConfig, done: Sequence[float], epochs: Sequence[float] | None = None) -> list[int]:
    """Numbers of steps, counted from 1, after which the model is evaluated.

    Args:
        done: epochs done after each step.
        epochs: those to evaluate after; default: every one, or every `config.eval_every` steps. The last step is always among them.
    """
    if epochs is not None:
        due = {1 + next((i for i, epoch in enumerate(done) if epoch >= wanted - 1e-9), len(done) - 1) for wanted in epochs}
    elif config.eval_every:
        due = set(range(config.eval_every, len(done), config.eval_every))
    else:
        due = {i for i in range(1, len(done)) if math.floor(done[i] - 1e-9) > math.floor(done[i - 1] - 1e-9)}
    return sorted(due | {len(done)})


def divide(lengths: np.ndarray, rows: Sequence[int], workers: int, piece_tokens: int, least: int = MIN_PIECE) -> list[list[int]]:
    """Rows of a step as pieces of nearly equal work, one per worker, or more where a piece would pass `piece_tokens`, fewer where
    one would have less than `least`; the longest work first, so that workers end together.

    A text's work is taken as `L (1 + L / 512)`: attention costs about as much as the rest at 512 tokens (384 wide).
    """
    tokens = int(lengths[rows].sum())
    wanted = min(workers, max(1, tokens // least))
    count = min(len(rows), wanted * math.ceil(tokens / (wanted * piece_tokens)))
    pieces: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for i in sorted(rows, key=lambda i: (-lengths[i], i)):
        lightest = loads.index(min(loads))
        pieces[lightest].append(i)
        loads[lightest] += lengths[i] * (1 + lengths[i] / 512)
    return [pieces[k] for k in sorted(range(count), key=lambda k: -loads[k])]


def piece_tokens(prepared: Prepared) -> int:
    """Tokens of a piece; on a GPU so many that a piece keeps no more than a third of its free memory."""
    most, model = PIECE_TOKENS[torch.device(prepared.device).type], prepared.model
    if torch.device(prepared.device).type == "cpu" or model.path != "packed":
        return most
    free, _ = torch.cuda.mem_get_info(prepared.device)
    spec = model.base.spec
    kept = KEPT_BYTES * (2 if model.dtype == torch.float32 else 1) * spec.layers * spec.hidden
    return min(most, max(512, free // (3 * kept)))


def rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Share of the peak learning rate at a step counted from 0: linear warm-up, then linear, cosine or constant."""
    warmup = int(config.warmup * total) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.scheduler]


@dataclass(frozen=True)
class Evaluation:
    """Scores of held-out rows after `epoch` epochs: mean loss, metrics, logits (N, C)."""

    epoch: float
    loss: float
    metrics: dict[str, float | None]
    logits: np.ndarray


def judge(metric: str, value: float | None, best: float | None, rows: int) -> tuple[bool, bool]:
    """Whether a score is better than the best so far, and whether its weights are kept.

    Within a standard error of the best the rows cannot tell, and later weights are the better guess (docs/log.md).
    """
    sign = 1 if METRICS[metric].higher_is_better else -1
    better = value is not None and (best is None or sign * value > sign * best)
    best = value if better else best
    if best is None or value is None:  # a metric that is not defined yet cannot choose: the latest is kept
        return better, best is None
    return better, sign * value >= sign * best - standard_error(metric, best, rows)


def peak_rate(prepared: Prepared, steps: int) -> float:
    """The run's learning rate, or the default of a training of so many steps."""
    return prepared.config.learning_rate or default_rate(steps, len(prepared.schema.labels), prepared.pooling)


class Trainer:
    """State of one training: step, optimizer, best checkpoint. `records()` advances it; `state()` and `restore()` carry it over a kill.

    Args:
        prefix: hidden states of the splits, where they are known.
        evaluate_after: epochs after which to evaluate; default: every one, or as `eval_every` says; after the last step in any case.
        known: what cross-validation found at each evaluation, in place of scores of validation rows.
    """

    def __init__(
        self,
        prepared: Prepared,
        prefix: Mapping[str, HiddenStates] | None = None,
        evaluate_after: Sequence[float] | None = None,
        known: Sequence[Evaluation] | None = None,
    ):
        self.prepared, self.config, self.model, self.prefix = prepared, prepared.config, prepared.model, prefix or {}
        self.known = known
        self.train_set = prepared.sets["train"]
        self.lengths = self.train_set.lengths
        self.piece_tokens = piece_tokens(prepared)
        self.least_piece = MIN_SHARE_ONE_CORE if getattr(self.model, "one_core", False) else MIN_PIECE
        self.steps = plan(self.config, self.lengths)
        self.peak_rate = peak_rate(prepared, len(self.steps))
        self.loss = Loss(prepared)
        self.parameters = self.model.trainable()
        self.optimizer = self._optimizer()
        self.step = self.tokens = self.best_step = self.waited = 0
        self.evaluated_at = -1
        self.evaluate_at = evaluation_steps(self.config, [epoch for epoch, _ in self.steps], evaluate_after)
        self.evaluations: list[Evaluation] = []  # of the validation rows, so far
        self.seconds = self.best_epoch = 0.0
        self.best_score: float | None = None
        self.kept_score: float | None = None
        self.best = {name: t.detach().clone() for name, t in self.parameters.items()}
        self.recordings = self._recordings()
        self._filled: dict[int, list[Filled]] = {}  # batches of the next step

    def _recordings(self) -> Recordings | None:
        """On a GPU, where a step draws no random numbers and keeps all it computes."""
        plain = self.model.path == "packed" and not self.config.lora_dropout and not self.config.gradient_checkpointing
        if not plain or torch.device(self.prepared.device).type != "cuda" or self.model.dtype == torch.float32:
            return None
        zeros = [torch.zeros((), device=self.prepared.device), *(torch.zeros_like(t, requires_grad=False) for t in self.parameters.values())]
        return Recordings(self._sums, zeros)

    def _optimizer(self) -> AdamW:
        """AdamW; no decay on biases and norms; B's rate times `loraplus_ratio` (LoRA+, arXiv 2402.12354)."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, tensor in self.parameters.items():
            decay = self.config.weight_decay if tensor.ndim > 1 else 0.0
            ratio = self.config.loraplus_ratio if ".lora_B." in name else 1.0
            groups.setdefault((decay, ratio), []).append(tensor)
        return AdamW([{"params": tensors, "weight_decay": decay, "lr": 0.0, "ratio": ratio} for (decay, ratio), tensors in groups.items()])

    @property
    def finished(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.evaluated_at == self.step and (self.step == len(self.steps) or (patience is not None and self.waited >= patience))

    @property
    def epochs_done(self) -> float:
        return self.steps[self.step - 1][0] if self.step else 0.0

    def records(self) -> Iterator[dict[str, Any]]:
        """Advance to the end, one record per step and per evaluation.

        Raises:
            TrainingError: the loss is no longer a finite number.
        """
        with bounded_memory(self.model), side_by_side(self.prepared.device, self.model.path == "packed") as workers:
            while not self.finished:
                record = self._evaluate(workers) if self._evaluation_due() else self._train_step(workers)
                yield record | {"peak_memory_bytes": peak_memory(self.prepared.device)}

    def _evaluation_due(self) -> bool:
        return self.evaluated_at != self.step and self.step in self.evaluate_at

    def _batch(self, rows: list[int], device: str) -> PackedBatch:
        batch = pack([self.train_set.encoded[i] for i in rows], self.train_set.labels[rows], device)
        return self.prefix["train"].attach(batch, rows) if "train" in self.prefix else batch

    def _sums(self, batch: PackedBatch, counted: Tensor | None = None, seed: int | None = None) -> list[Tensor | None]:
        """Sum of the losses of a batch, or of the rows that count, and its gradients."""
        losses = self.loss(self.model.forward(batch, seed), batch.labels)
        loss = (losses if counted is None else losses * counted).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)]

    def _piece(self, item: tuple[int, list[int]]) -> list[Tensor | None]:
        """`_sums` of some of a step's rows."""
        number, rows = item
        seed = int(np.random.SeedSequence([self.config.seed, self.step, number]).generate_state(1, np.uint64)[0] >> 1)
        return self._sums(self._batch(rows, self.prepared.device), seed=seed)

    def _fill(self, step: int) -> list[Filled]:
        pieces = divide(self.lengths, self.steps[step][1], 1, self.piece_tokens)
        return [fill_up(self._batch(piece, "cpu")) for piece in pieces]

    def _step_sums(self, rows: list[int], workers: Workers) -> list[Tensor | None]:
        """`_sums` of all rows of a step."""
        if self.recordings is not None:
            self.recordings.clear()
            for filled in self._filled.pop(self.step, None) or self._fill(self.step):
                self.recordings.add(filled)
            return self.recordings.sums
        pieces = divide(self.lengths, rows, workers.count, self.piece_tokens, self.least_piece)
        found = []
        for parts in zip(*workers.map(self._piece, list(enumerate(pieces))), strict=True):
            known = [part for part in parts if part is not None]
            found.append(sum(known[1:], known[0]) if known else None)
        return found

    def _train_step(self, workers: Workers) -> dict[str, Any]:
        start = time.perf_counter()
        epoch, rows = self.steps[self.step]
        rate = self.peak_rate * rate_at(self.config, self.step, len(self.steps))
        tokens = int(self.lengths[rows].sum())
        weight = self.loss.weight(self.train_set.labels[rows])
        total, *gradients = self._step_sums(rows, workers)
        for tensor, gradient in zip(self.parameters.values(), gradients, strict=True):
            tensor.grad = gradient
        known = [gradient for gradient in gradients if gradient is not None]
        torch._foreach_mul_(known, 1 / max(weight, 1e-12))  # type: ignore[attr-defined]
        length = torch.nn.utils.get_total_norm(known)
        if self.config.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), self.config.max_grad_norm, length)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recordings is not None and self.step + 1 < len(self.steps):
            self._filled[self.step + 1] = self._fill(self.step + 1)  # while the device works
        loss, norm = torch.stack([total.float(), length.float()]).tolist()  # the one place where a step waits for the device
        mean = loss / weight if weight else 0.0
        if not math.isfinite(mean):
            raise TrainingError(f"the loss is {mean} at step {self.step + 1}", "lower --learning-rate")
        self.step += 1
        self.tokens += tokens
        taken = time.perf_counter() - start
        self.seconds += taken
        return {
            "kind": "step",
            "step": self.step,
            "epoch": round(epoch, 6),
            "loss": mean,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_per_second": tokens / taken,
        }

    def _evaluate(self, workers: Workers) -> dict[str, Any]:
        self.evaluated_at = self.step
        record = {"kind": "evaluation", "split": "validation", "step": self.step, "epoch": round(self.epochs_done, 6)}
        found = self._scores(workers)
        if found is None:
            self._keep(None)
            return record | {"loss": None, "metrics": {}, "best": True, "kept": True}
        value = found.metrics.get(self.prepared.metric)
        better, kept = judge(self.prepared.metric, value, self.best_score, len(found.logits))
        self.waited = 0 if better else self.waited + 1
        if better:
            self.best_score = value
        if kept:
            self._keep(value)
        return record | {"loss": found.loss, "metrics": found.metrics, "best": better, "kept": kept}

    def _scores(self, workers: Workers) -> Evaluation | None:
        """Of the validation rows now, or what cross-validation found at this point; None where there is neither."""
        if self.known is not None:
            return self.known[self.evaluate_at.index(self.step)]
        held = self.prepared.sets.get("validation")
        if held is None:
            return None
        self.evaluations.append(Evaluation(self.epochs_done, *score(self.prepared, held, self.loss, workers, self.prefix.get("validation"))))
        return self.evaluations[-1]

    def _keep(self, value: float | None) -> None:
        self.kept_score, self.best_step, self.best_epoch = value, self.step, self.epochs_done
        self.best = {name: t.detach().clone() for name, t in self.parameters.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts from which `restore` continues to the same bytes."""
        tensors = {f"now/{name}": t for name, t in self.parameters.items()} | {f"best/{name}": t for name, t in self.best.items()}
        for name, tensor in self.parameters.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"{key}/{name}"] = value
        facts = ("step", "tokens", "seconds", "evaluated_at", "best_score", "kept_score", "best_step", "best_epoch", "waited")
        return tensors, {fact: getattr(self, fact) for fact in facts}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        device = self.prepared.device
        self.model.load_trainable({name: tensors[f"now/{name}"] for name in self.parameters})
        self.best = {name: tensors[f"best/{name}"].to(device) for name in self.parameters}
        for name, tensor in self.parameters.items():
            if f"step/{name}" in tensors:
                self.optimizer.state[tensor] = {key: tensors[f"{key}/{name}"].to(device) for key in ("step", "exp_avg", "exp_avg_sq")}
        for fact, value in state.items():
            setattr(self, fact, value)


def score(
    prepared: Prepared,
    data: EncodedSet,
    loss: Loss,
    workers: Workers | None = None,
    states: HiddenStates | None = None,
    **calibration: Any,
) -> tuple[float, dict[str, float | None], np.ndarray]:
    """Mean loss, metrics and logits (N, C) of a model on a set."""
    logits = encoded_logits(prepared.model, data.encoded, workers, states)
    return *score_logits(prepared, data.labels, logits, loss, **calibration), logits


def score_logits(prepared: Prepared, labels: np.ndarray, logits: np.ndarray, loss: Loss, **calibration: Any) -> tuple[float, dict[str, float | None]]:
    """Mean loss and metrics of logits (N, C)."""
    rows = loss(torch.from_numpy(logits).to(prepared.device), torch.from_numpy(labels).to(prepared.device))
    weight = loss.weight(labels)
    metrics = evaluate(prepared.schema.problem_type, labels, logits, list(prepared.schema.labels), **calibration)
    return float(rows.sum()) / weight if weight else 0.0, metrics


def start_head(prepared: Prepared) -> None:
    """Start the head's last bias at what is known without reading a text: mean target, or log odds of each label (multi-label).

    The network then need not spend its first steps on it; merging and PEFT see an ordinary bias.
    """
    labels, kind = prepared.sets["train"].labels, prepared.schema.problem_type
    bias = list(prepared.model.trainable().values())[-1]
    with torch.no_grad():
        if kind == REGRESSION:
            bias.fill_(float(labels.mean()))
        elif kind == MULTI_LABEL:
            share = np.clip(labels.mean(0), 1e-3, 1 - 1e-3)
            bias.copy_(torch.from_numpy(np.log(share / (1 - share))).to(bias))

"""The training loop: a generator of step and evaluation records over any `Model`. Knows no files and prints
nothing.

Only A, B, DoRA's magnitudes and the head carry gradients. A step takes `batch_size x
gradient_accumulation_steps` rows, computed in pieces of at most 384 tokens or so (32,768 on a GPU), on a CPU
side by side; memory does not grow with the batch. Every random draw comes from (seed, epoch) or (seed, step,
piece), and the pieces' gradients are summed in order.
"""

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textlora.core.errors import TrainingError
from textlora.data.tokenize import PackedBatch, pack
from textlora.inference.classifier import MIN_SHARE_ONE_CORE
from textlora.kernels.devices import Workers, bounded_memory, peak_memory, side_by_side
from textlora.training.adamw import AdamW
from textlora.training.checkpoint_choice import Evaluation, judge, score
from textlora.training.cuda_graphs import Filled, Recordings, fill_up
from textlora.training.hidden_state_cache import HiddenStates
from textlora.training.learning_rate import peak_rate, rate_at
from textlora.training.losses import Loss
from textlora.training.prepare import Prepared
from textlora.training.steps import MIN_PIECE, divide, evaluation_steps, piece_tokens, plan


class Trainer:
    """State of one training: step, optimizer, best checkpoint. `records()` advances it; `state()` and
    `restore()` carry it over a kill.

    Args:
        prefix: hidden states of the splits, where they are known.
        evaluate_after: epochs after which to evaluate; default: every one, or as `eval_every` says; after the
            last step in any case.
        known: what cross-validation found at each evaluation, in place of scores of validation rows.
        loss: what a step minimises; default: the task's.
        steps: (epochs done after the step, its rows); default: as `steps.plan` has them.
        whole_steps: whether all rows of a step are one piece, for a loss that compares them with each other.
    """

    def __init__(
        self,
        prepared: Prepared,
        prefix: Mapping[str, HiddenStates] | None = None,
        evaluate_after: Sequence[float] | None = None,
        known: Sequence[Evaluation] | None = None,
        loss: Loss | None = None,
        steps: Sequence[tuple[float, list[int]]] | None = None,
        whole_steps: bool = False,
    ):
        self.prepared = prepared
        self.config = prepared.config
        self.model = prepared.model
        self.prefix = prefix or {}
        self.known = known
        self.train_set = prepared.sets["train"]
        self.lengths = self.train_set.lengths
        self.whole_steps = whole_steps
        self.piece_tokens = sys.maxsize if whole_steps else piece_tokens(prepared)
        self.least_piece = MIN_SHARE_ONE_CORE if self.model.one_core else MIN_PIECE
        self.steps = list(steps) if steps is not None else plan(self.config, self.lengths)
        self.peak_rate = peak_rate(prepared, len(self.steps))
        self.loss = loss or Loss(prepared)
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
        plain = (
            self.model.path == "packed"
            and not self.whole_steps
            and not self.config.lora_dropout
            and not self.config.gradient_checkpointing
        )
        if (
            not plain
            or torch.device(self.prepared.device).type != "cuda"
            or self.model.dtype == torch.float32
        ):
            return None
        zeros = [
            torch.zeros((), device=self.prepared.device),
            *(torch.zeros_like(t, requires_grad=False) for t in self.parameters.values()),
        ]
        return Recordings(self._sums, zeros)

    def _optimizer(self) -> AdamW:
        """AdamW; no decay on biases and norms; B's rate times `loraplus_ratio` (LoRA+, arXiv 2402.12354)."""
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, tensor in self.parameters.items():
            decay = self.config.weight_decay if tensor.ndim > 1 else 0.0
            ratio = self.config.loraplus_ratio if ".lora_B." in name else 1.0
            groups.setdefault((decay, ratio), []).append(tensor)
        return AdamW(
            [
                {"params": tensors, "weight_decay": decay, "lr": 0.0, "ratio": ratio}
                for (decay, ratio), tensors in groups.items()
            ]
        )

    @property
    def finished(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.evaluated_at == self.step and (
            self.step == len(self.steps) or (patience is not None and self.waited >= patience)
        )

    @property
    def epochs_done(self) -> float:
        return self.steps[self.step - 1][0] if self.step else 0.0

    def records(self) -> Iterator[dict[str, Any]]:
        """Advance to the end, one record per step and per evaluation.

        Raises:
            TrainingError: the loss is no longer a finite number.
        """
        in_pieces = self.model.path == "packed" and not self.whole_steps
        with bounded_memory(self.model), side_by_side(self.prepared.device, in_pieces) as workers:
            while not self.finished:
                record = self._evaluate(workers) if self._evaluation_due() else self._train_step(workers)
                yield record | {"peak_memory_bytes": peak_memory(self.prepared.device)}

    def _evaluation_due(self) -> bool:
        return self.evaluated_at != self.step and self.step in self.evaluate_at

    def _batch(self, rows: list[int], device: str) -> PackedBatch:
        batch = pack([self.train_set.encoded[i] for i in rows], self.train_set.labels[rows], device)
        return self.prefix["train"].attach(batch, rows) if "train" in self.prefix else batch

    def _sums(
        self, batch: PackedBatch, counted: Tensor | None = None, seed: int | None = None
    ) -> list[Tensor | None]:
        """Sum of the losses of a batch, or of the rows that count, and its gradients."""
        losses = self.loss(self.model.forward(batch, seed), batch.labels)
        loss = (losses if counted is None else losses * counted).sum()
        return [loss.detach(), *torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)]

    def _piece(self, item: tuple[int, list[int]]) -> list[Tensor | None]:
        """`_sums` of some of a step's rows."""
        number, rows = item
        seed = int(
            np.random.SeedSequence([self.config.seed, self.step, number]).generate_state(1, np.uint64)[0] >> 1
        )
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
            torch.nn.utils.clip_grads_with_norm_(
                list(self.parameters.values()), self.config.max_grad_norm, length
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recordings is not None and self.step + 1 < len(self.steps):
            self._filled[self.step + 1] = self._fill(self.step + 1)  # while the device works
        loss, norm = torch.stack(
            [total.float(), length.float()]
        ).tolist()  # the one place where a step waits for the device
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
        record = {
            "kind": "evaluation",
            "split": "validation",
            "step": self.step,
            "epoch": round(self.epochs_done, 6),
        }
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
        """Of the validation rows now, or what cross-validation found at this point; None where there is
        neither."""
        if self.known is not None:
            return self.known[self.evaluate_at.index(self.step)]
        held = self.prepared.sets.get("validation")
        if held is None:
            return None
        self.evaluations.append(
            Evaluation(
                self.epochs_done,
                *score(self.prepared, held, self.loss, workers, self.prefix.get("validation")),
            )
        )
        return self.evaluations[-1]

    def _keep(self, value: float | None) -> None:
        self.kept_score, self.best_step, self.best_epoch = value, self.step, self.epochs_done
        self.best = {name: t.detach().clone() for name, t in self.parameters.items()}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts from which `restore` continues to the same bytes."""
        tensors = {f"now/{name}": t for name, t in self.parameters.items()} | {
            f"best/{name}": t for name, t in self.best.items()
        }
        for name, tensor in self.parameters.items():
            for key, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"{key}/{name}"] = value
        facts = (
            "step",
            "tokens",
            "seconds",
            "evaluated_at",
            "best_score",
            "kept_score",
            "best_step",
            "best_epoch",
            "waited",
        )
        return tensors, {fact: getattr(self, fact) for fact in facts}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        device = self.prepared.device
        self.model.load_trainable({name: tensors[f"now/{name}"] for name in self.parameters})
        self.best = {name: tensors[f"best/{name}"].to(device) for name in self.parameters}
        for name, tensor in self.parameters.items():
            if f"step/{name}" in tensors:
                self.optimizer.state[tensor] = {
                    key: tensors[f"{key}/{name}"].to(device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
        for fact, value in state.items():
            setattr(self, fact, value)

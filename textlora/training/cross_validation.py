"""The trainings of a run: where no validation rows decide, one for each fold, scored on the rows it holds
out, and then the one on all rows.

The folds' scores are put together: after so many epochs, the scores of every row by a model that had not seen
it. They choose the last training's checkpoint, and its temperature and thresholds are fitted on them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from textlora.core.config import TrainConfig
from textlora.inference.classifier import encoded_logits
from textlora.training.checkpoint_choice import Evaluation, judge, score_logits
from textlora.training.head_start import start_head
from textlora.training.hidden_state_cache import HiddenStates, PickedStates
from textlora.training.learning_rate import peak_rate
from textlora.training.losses import Loss
from textlora.training.prepare import Prepared
from textlora.training.steps import evaluation_steps, plan
from textlora.training.trainer import Trainer


@dataclass(frozen=True)
class Held:
    """Logits (N, C) of rows by a model that did not train on them. `rows` are their places in `split`;
    `folds` is 0 for validation rows."""

    split: str
    rows: np.ndarray
    logits: np.ndarray
    folds: int


class Trainings:
    """All trainings of a run, one after the other: `records()` advances them, `state()` and `restore()` carry
    them over a kill.

    Args:
        prefix: hidden states of the splits, where they are known.
        start: sets a fresh model up for its rows (`head_start.start_head`, or another adapter's weights).
        last: whether to train on all rows after the folds; a search needs the folds alone.

    Attributes:
        trainer: the training at work; in the end the last one.
        number: which one that is, counted from 0.
        fold_seconds, fold_tokens: what the folds' trainings took so far.
    """

    def __init__(
        self,
        prepared: Prepared,
        prefix: Mapping[str, Any] | None = None,
        start: Callable[[Prepared], None] = start_head,
        last: bool = True,
    ):
        self.prepared, self.prefix, self.last, self._start = prepared, prefix or {}, last, start
        self._fresh = {name: tensor.detach().clone() for name, tensor in prepared.model.trainable().items()}
        self.folds = (
            [] if prepared.folds is None else sorted(set(prepared.folds[prepared.folds >= 0].tolist()))
        )
        steps = plan(prepared.config, prepared.sets["train"].lengths)
        self.final_steps, done = len(steps), [epoch for epoch, _ in steps]
        self._rate = peak_rate(prepared, len(steps))
        self._evaluate_after = [done[step - 1] for step in evaluation_steps(prepared.config, done)]
        sizes = [
            len(plan(self._config(), prepared.sets["train"].pick(self._rows(fold)[0]).lengths))
            for fold in self.folds
        ]
        self._before = (
            np.concatenate([[0], np.cumsum(sizes)]).astype(int).tolist()
        )  # steps before each training
        self.number, self.fold_seconds, self.fold_tokens = 0, 0.0, 0
        self._found: list[list[Evaluation]] = []  # of the folds that are done
        self.trainer = self._begin()

    def _config(self) -> TrainConfig:
        """A fold's settings: the last training's rate, and no end before it."""
        return dataclasses.replace(
            self.prepared.config, learning_rate=self._rate, eval_every=None, early_stopping_patience=None
        )

    def _rows(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Places of the rows a fold trains on and of those it holds out."""
        assert self.prepared.folds is not None
        return np.flatnonzero(self.prepared.folds != fold), np.flatnonzero(self.prepared.folds == fold)

    @property
    def in_folds(self) -> bool:
        return self.number < len(self.folds)

    def _begin(self) -> Trainer:
        """The trainer of training `number`, its model as fresh as at first."""
        prepared, prefix = self.prepared, self.prefix
        prepared.model.load_trainable(self._fresh)
        if not self.in_folds:
            self._start(prepared)
            return Trainer(prepared, prefix, known=self.evaluations() or None)
        train, held = self._rows(self.folds[self.number])
        rows = prepared.sets["train"]
        prepared = dataclasses.replace(
            prepared, config=self._config(), sets={"train": rows.pick(train), "validation": rows.pick(held)}
        )
        if "train" in prefix:
            prefix = {
                "train": PickedStates(prefix["train"], train),
                "validation": PickedStates(prefix["train"], held),
            }
        self._start(prepared)
        return Trainer(prepared, prefix, self._evaluate_after)

    def use(self, prefix: Mapping[str, HiddenStates], seconds: float) -> None:
        """Hand over hidden states that took so many seconds to compute. Before the first step of this
        process."""
        steps, self.prefix = self.trainer, prefix
        if self.in_folds and "train" in prefix:
            train, held = self._rows(self.folds[self.number])
            steps.prefix = {
                "train": PickedStates(prefix["train"], train),
                "validation": PickedStates(prefix["train"], held),
            }
        else:
            steps.prefix = prefix
        steps.seconds += seconds

    @property
    def steps(self) -> int:
        """Steps of all trainings."""
        return self._before[-1] + (self.final_steps if self.last else 0)

    @property
    def step(self) -> int:
        """Steps done."""
        return self._before[self.number] + self.trainer.step

    @property
    def finished(self) -> bool:
        return self.trainer.finished and self.number == len(self.folds) - (not self.last and bool(self.folds))

    def records(self) -> Iterator[dict[str, Any]]:
        """Advance to the end: the records of each trainer with `done`, the steps done of `steps`; in those of
        a fold its number `fold`, counted from 1, in those of the last training `folds`, how many there were,
        whose scores its evaluations have."""
        while True:
            mark = (
                {"fold": self.number + 1}
                if self.in_folds
                else {"folds": len(self.folds)}
                if self.folds
                else {}
            )
            for record in self.trainer.records():
                yield record | mark | {"done": self.step}
            if self.finished:
                break
            self._next()
        if self.in_folds:
            self._close_fold()

    def _close_fold(self) -> None:
        self._found.append(self.trainer.evaluations)
        self.fold_seconds += self.trainer.seconds
        self.fold_tokens += self.trainer.tokens

    def _next(self) -> None:
        self._close_fold()
        self.number += 1
        self.trainer = self._begin()

    def _done(self) -> list[list[Evaluation]]:
        """What the folds found that are done, the one at work among them when it has ended."""
        ended = self.in_folds and self.trainer.finished and len(self._found) == self.number
        return [*self._found, self.trainer.evaluations] if ended else self._found

    def evaluations(self) -> list[Evaluation]:
        """Scores of the rows that folds have held out so far, at each evaluation of the last training; empty
        where no fold is done."""
        done = self._done()
        if not done:
            return []
        rows, found = self.held_rows(), []
        labels = self.prepared.sets["train"].labels[rows]
        loss = Loss(self.prepared)
        for epoch in self._evaluate_after:
            at = [
                next((e for e in evaluations if e.epoch >= epoch - 1e-9), evaluations[-1])
                for evaluations in done
            ]
            logits = np.concatenate([e.logits for e in at])
            found.append(Evaluation(epoch, *score_logits(self.prepared, labels, logits, loss), logits))
        return found

    def held_rows(self) -> np.ndarray:
        """Places of the rows that the folds that are done have held out, in the order of `evaluations`."""
        return np.concatenate([self._rows(fold)[1] for fold in self.folds[: len(self._done())]])

    def chosen(self) -> int:
        """Place of the evaluation whose checkpoint the last training keeps, by the rule it follows itself."""
        best, kept, waited = None, 0, 0
        for i, found in enumerate(self.evaluations()):
            value = found.metrics.get(self.prepared.metric)
            better, keep = judge(self.prepared.metric, value, best, len(found.logits))
            best, kept, waited = value if better else best, i if keep else kept, 0 if better else waited + 1
            if waited == self.prepared.config.early_stopping_patience:
                break
        return kept

    def held(self) -> Held | None:
        """What temperature and thresholds are fitted on, at the checkpoint that is kept, whose weights the
        model must hold; None where there is nothing."""
        if self.folds:
            at = (
                self.trainer.evaluate_at.index(self.trainer.best_step)
                if self.last and self.trainer.best_step
                else self.chosen()
            )
            return Held("train", self.held_rows(), self.evaluations()[at].logits, len(self.folds))
        data = self.prepared.sets.get("validation")
        return data and Held(
            "validation", np.arange(len(data.rows)), encoded_logits(self.prepared.model, data.encoded), 0
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able facts from which `restore` continues to the same bytes."""
        tensors, facts = self.trainer.state()
        found = [*self._found, *([self.trainer.evaluations] if self.in_folds else [])]
        for fold, evaluations in enumerate(found):
            tensors |= {f"held/{fold}/{i}": torch.from_numpy(one.logits) for i, one in enumerate(evaluations)}
        scores = [[[one.epoch, one.loss, one.metrics] for one in evaluations] for evaluations in found]
        return tensors, {
            "trainer": facts, "number": self.number, "fold_seconds": self.fold_seconds, "fold_tokens": self.fold_tokens, "found": scores
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave."""
        found = [
            [
                Evaluation(epoch, loss, metrics, tensors[f"held/{fold}/{i}"].numpy())
                for i, (epoch, loss, metrics) in enumerate(evaluations)
            ]
            for fold, evaluations in enumerate(state["found"])
        ]
        self.number = state["number"]
        self.fold_seconds = state["fold_seconds"]
        self.fold_tokens = state["fold_tokens"]
        self._found = found[: self.number]
        self.trainer = self._begin()
        self.trainer.evaluations = found[self.number] if self.in_folds else []
        self.trainer.restore(dict(tensors), state["trainer"])

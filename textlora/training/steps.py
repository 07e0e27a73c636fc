"""The steps of a training: which rows in which order, when to evaluate, and in which pieces a
step is computed."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from textlora.core.config import TrainConfig
from textlora.data.tokenize import token_batches
from textlora.training.prepare import Prepared

PIECE_TOKENS = {
    "cpu": 384,
    "cuda": 32768,
}  # on a CPU faster than 768 and less memory (docs/log.md); what fills a GPU, where it fits
# tokens of a thread below which one piece on all cores is faster; `classifier.MIN_SHARE_ONE_CORE` where a
# product takes one core
MIN_PIECE = 96
KEPT_BYTES = (
    20  # of a token per layer and width for the backward pass in half precision, as measured (docs/log.md)
)


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


def evaluation_steps(
    config: TrainConfig, done: Sequence[float], epochs: Sequence[float] | None = None
) -> list[int]:
    """Numbers of steps, counted from 1, after which the model is evaluated.

    Args:
        done: epochs done after each step.
        epochs: those to evaluate after; default: every one, or every `config.eval_every` steps. The last step
            is always among them.
    """
    if epochs is not None:
        due = {
            1 + next((i for i, epoch in enumerate(done) if epoch >= wanted - 1e-9), len(done) - 1)
            for wanted in epochs
        }
    elif config.eval_every:
        due = set(range(config.eval_every, len(done), config.eval_every))
    else:
        due = {i for i in range(1, len(done)) if math.floor(done[i] - 1e-9) > math.floor(done[i - 1] - 1e-9)}
    return sorted(due | {len(done)})


def divide(
    lengths: np.ndarray, rows: Sequence[int], workers: int, piece_tokens: int, least: int = MIN_PIECE
) -> list[list[int]]:
    """Rows of a step as pieces of nearly equal work, one per worker, or more where a piece would pass
    `piece_tokens`, fewer where one would have less than `least`; the longest work first, so that workers end
    together.

    A text's work is taken as `L (1 + L / 512)`: attention costs about as much as the rest at 512 tokens (384
    wide).
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

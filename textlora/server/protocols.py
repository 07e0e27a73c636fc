"""Requests to texts, and answers to the shapes of other servers. Pure functions."""

import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.core.predictions import Answer
from textlora.metrics.calibration import probabilities
from textlora.server.service import Answers

FUNCTIONS = {"softmax": SINGLE_LABEL, "sigmoid": MULTI_LABEL}


def texts_of(inputs: str | list[str] | list[list[str]]) -> tuple[list[tuple[str, str | None]], bool]:
    """(text, pair) for each, and whether a batch was asked. A list of two strings is ONE pair, as in
    text-embeddings-inference."""
    batch = isinstance(inputs, list) and isinstance(inputs[0], list)
    rows = inputs if batch else [inputs if isinstance(inputs, list) else [inputs]]
    return [(row[0], row[1] if len(row) == 2 else None) for row in rows], batch


def scores_of(answer: Answer, raw: bool = False, function: str | None = None) -> dict[str, float]:
    """Label -> score in stored order: as the adapter was trained, the logits, or a function of these."""
    found = answer.prediction
    if raw or function == "none":
        return dict(zip(found.scores, found.logits, strict=True))
    if function is None or FUNCTIONS[function] == answer.problem_type:
        return found.scores
    return dict(
        zip(
            found.scores,
            probabilities(np.array([found.logits]), FUNCTIONS[function])[0].tolist(),
            strict=True,
        )
    )


def label_scores(
    answer: Answer, raw: bool = False, function: str | None = None, top_k: int | None = None
) -> list[dict[str, Any]]:
    """[{label, score}], best first, as text-embeddings-inference and the hub answer."""
    ranked = sorted(scores_of(answer, raw, function).items(), key=lambda item: -item[1])[:top_k]
    if answer.problem_type != MULTI_LABEL:
        return [{"label": label, "score": score} for label, score in ranked]
    chosen = set(answer.prediction.labels)
    return [{"label": label, "score": score, "chosen": label in chosen} for label, score in ranked]


def classified(answers: Answers, names: Sequence[str], several: bool, activation: bool) -> dict[str, Any]:
    """vLLM's answer to /classify."""
    data = []
    for index, row in enumerate(answers.rows):
        for name, answer in zip(names, row, strict=True):
            scores = scores_of(answer, not activation)
            label = (
                "value"
                if answer.problem_type == REGRESSION
                else max(answer.prediction.scores, key=answer.prediction.scores.get)
            )
            one: dict[str, Any] = {
                "index": index,
                "label": label,
                "probs": list(scores.values()),
                "num_classes": len(scores),
            }
            if answer.problem_type == MULTI_LABEL:
                one["labels"] = list(answer.prediction.labels)
            data.append(one | ({"model": name} if several else {}))
    usage = {
        "prompt_tokens": answers.tokens,
        "total_tokens": answers.tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }
    head = {
        "id": f"classify-{random.getrandbits(128):032x}",
        "object": "list",
        "created": int(time.time()),
        "model": ",".join(names),
    }
    return head | {"data": data, "usage": usage}

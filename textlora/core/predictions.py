"""What an answer is, and what an adapter is called. Imports nothing, so that whoever only passes answers on
needs no torch."""

import re
from dataclasses import dataclass

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class Prediction:
    """One text's answer.

    Attributes:
        label: the label, the labels joined by ", " (multi-label), or the value as text (regression).
        labels: those decided on: one, any number (multi-label), none (regression).
        score: probability of the label; of the likeliest label (multi-label); the value (regression).
        scores: probability of each label in stored order; {"value": x} for regression.
        logits: raw outputs in label order.
    """

    label: str
    labels: tuple[str, ...]
    score: float
    scores: dict[str, float]
    logits: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """A prediction, its adapter's problem type, the tokens it was made from (special ones included), and
    those of the text before it was cut."""

    prediction: Prediction
    problem_type: str
    tokens: int
    full: int

"""A budget for a comparison, and successive halving (arXiv 1502.07943) inside one method's share of it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from textlora.core.errors import UsageError

Candidate = TypeVar("Candidate")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True)
class Budget:
    """So many seconds, or so many runs of full length; a run over half the epochs or half the rows counts as
    half a run."""

    amount: float
    unit: str  # "seconds" or "runs"

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`90s`, `30m`, `2h` or `40runs`. Raises UsageError for anything else, and for nothing at all."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|d|runs?)\s*", text)
        if found is None:
            raise UsageError(f"--budget '{text}': not a time or a number of runs", "write 30m, 2h or 40runs")
        amount, unit = float(found[1]), found[2]
        if not amount:
            raise UsageError(f"--budget {text}: nothing can be run for that", "write 30m, 2h or 40runs")
        return cls(amount, "runs") if unit.startswith("run") else cls(amount * _UNITS[unit], "seconds")

    def cost(self, record: dict[str, Any], epochs: float, rows: int) -> float:
        """What a finished run took of it; `epochs` and `rows` are those of a run of full length."""
        return (
            record.get("total_seconds", 0.0)
            if self.unit == "seconds"
            else record["epochs"] / epochs * record["train_rows"] / rows
        )


def rungs(count: int) -> list[tuple[int, float]]:
    """How many candidates run in each round, and for what share of the epochs, until one is left, whose runs
    have full length.

    Three candidates: 3 at a quarter, 2 at a half.
    """
    numbers = []
    while count > 1:
        numbers.append(count)
        count = -(-count // 2)
    return [(number, 0.5 ** (len(numbers) - i)) for i, number in enumerate(numbers)]


def search_cost(count: int) -> float:
    """What halving takes, in runs of full length."""
    return sum(number * share for number, share in rungs(count))


def middle(candidates: Sequence[Candidate]) -> Candidate:
    """The candidate taken untried where there is no room for a search."""
    return candidates[(len(candidates) - 1) // 2]

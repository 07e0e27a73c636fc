"""How values are written: every number on a report page or in a model card comes through here."""

import math
import re
from typing import Any

NONE = "–"
_UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def number(value: Any, decimals: int = 4) -> str:
    """A measurement: fixed decimals, thousands separated; small values keep four digits (2e-05), no value is
    a dash."""
    if value is None or not math.isfinite(value):
        return NONE
    if value != 0 and abs(value) < 10**-decimals * 10:
        return f"{value:.4g}"
    return f"{value:,.{decimals}f}"


def whole(value: Any) -> str:
    """A count: no decimals, thousands separated."""
    return NONE if value is None or not math.isfinite(value) else f"{value:,.0f}"


def percent(value: Any) -> str:
    """A share of 1 as a percentage with two decimals, the same digits as `number` shows."""
    return NONE if value is None or not math.isfinite(value) else f"{100 * value:.2f}\N{NO-BREAK SPACE}%"


def size(value: Any) -> str:
    """Bytes as MB or GB (powers of ten)."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


def setting(value: Any) -> str:
    """A setting as it would be typed: no rounding, no separators."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(setting(part) for part in value)
    return clean(str(value))


def clean(text: str) -> str:
    """Text without what HTML and UTF-8 files cannot hold: control characters and lone surrogates become
    U+FFFD."""
    return _UNWRITABLE.sub("\ufffd", text)


def show(value: Any) -> Any:
    """What the page template does to each value it prints; text is escaped afterwards."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return setting(value)
    if isinstance(value, int):
        return whole(value)
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return ", ".join(str(show(part)) for part in value) or NONE
    if hasattr(value, "__html__"):
        return value
    return clean(str(value))


def metric_name(name: str) -> str:
    """`macro_f1` as people write it: macro F1."""
    shouted = {"f1": "F1", "mcc": "MCC", "auc": "AUC", "ece": "ECE", "mse": "MSE", "mae": "MAE", "r2": "R²"}
    named = {"spearman": "Spearman correlation", "pearson": "Pearson correlation"}
    return named.get(name) or " ".join(shouted.get(part, part) for part in name.split("_"))

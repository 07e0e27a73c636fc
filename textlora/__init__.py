"""textlora: one frozen encoder, thousands of small text classifiers.

    import textlora
    textlora.train("reviews.csv", output="reviews-adapter")
    textlora.TextClassifier.load("reviews-adapter").predict(["a fine film"])

Names are imported when they are first used, so `import textlora` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from textlora.answers import Prediction
    from textlora.api import train
    from textlora.classifier import TextClassifier
    from textlora.config import LoraConfig, TrainConfig
    from textlora.engine import AdapterEngine
    from textlora.errors import TextloraError

_HOMES = {
    "AdapterEngine": "textlora.engine",
    "train": "textlora.api",
    "Prediction": "textlora.answers",
    "TextClassifier": "textlora.classifier",
    "LoraConfig": "textlora.config",
    "TrainConfig": "textlora.config",
    "TextloraError": "textlora.errors",
}
__all__ = ["AdapterEngine", "LoraConfig", "Prediction", "TextClassifier", "TextloraError", "TrainConfig", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'textlora' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)

"""textlora: one frozen encoder, thousands of small text classifiers.

    import textlora
    textlora.train("reviews.csv", output="reviews-adapter")
    textlora.TextClassifier.load("reviews-adapter").predict(["a fine film"])

Names are imported when they are first used, so `import textlora` costs nothing.
"""

from typing import TYPE_CHECKING

from textlora.core.lazy import lazy_names

if TYPE_CHECKING:
    from textlora.api import train
    from textlora.core.config import LoraConfig, TrainConfig
    from textlora.core.errors import TextloraError
    from textlora.core.predictions import Prediction
    from textlora.inference.classifier import TextClassifier
    from textlora.inference.engine import AdapterEngine

_HOMES = {
    "AdapterEngine": "textlora.inference.engine",
    "train": "textlora.api",
    "Prediction": "textlora.core.predictions",
    "TextClassifier": "textlora.inference.classifier",
    "LoraConfig": "textlora.core.config",
    "TrainConfig": "textlora.core.config",
    "TextloraError": "textlora.core.errors",
}
__all__ = [
    "AdapterEngine",
    "LoraConfig",
    "Prediction",
    "TextClassifier",
    "TextloraError",
    "TrainConfig",
    "train",
]


__getattr__ = lazy_names(__name__, _HOMES)

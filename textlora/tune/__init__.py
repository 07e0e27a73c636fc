"""A search over the settings of `train`: `tune(TrainConfig(...))`."""

from textlora.core.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "tune": "textlora.tune.study",
    },
)

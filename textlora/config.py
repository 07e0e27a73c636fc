"""`textlora.core.config` under its path in releases before 0.2."""

from textlora.core.config import LoraConfig, TrainConfig, read_config, write_config

__all__ = ["LoraConfig", "TrainConfig", "read_config", "write_config"]

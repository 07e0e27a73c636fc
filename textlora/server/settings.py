"""Every setting of `textlora serve`: a flag, a key of the TOML file, an environment variable TEXTLORA_NAME.
Imports nothing heavy."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from textlora.core.config import PRECISION_HELP, PRECISIONS, field_type, read_config
from textlora.core.errors import UsageError


def _option(default: Any, help: str, metavar: str = "", choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "metavar": metavar})


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server; see the help of each field."""

    model: str = _option("minilm", "Base model of all adapters: folder, hub id, or minilm.")
    adapter: tuple[str, ...] = _option((), "An adapter folder under a name; repeat for more.", "NAME=PATH")
    adapter_dir: str | None = _option(
        None, "Folder whose sub-folders are adapters under their own names; watched.", "DIR"
    )
    default_adapter: str | None = _option(None, "Adapter of requests that name none.", "NAME")
    host: str = _option("127.0.0.1", "Address to listen on.")
    port: int = _option(8000, "Port; 0 takes a free one.")
    device: str = _option("auto", "cpu, cuda, cuda:N, or auto.")
    precision: str = _option("float32", PRECISION_HELP, choices=PRECISIONS)
    threads: int | None = _option(None, "CPU threads of torch.")
    adapter_memory_mb: int = _option(
        1024, "Adapters held in memory; those used least recently go first.", "MB"
    )
    batch_tokens: int = _option(512, "Estimated tokens of a batch.")
    batch_wait_ms: float = _option(2.0, "How long an idle server waits for a second request.", "MS")
    queue_rows: int = _option(512, "Rows (text x adapter) that may wait; beyond it the answer is 429.")
    deadline_seconds: float = _option(
        10.0, "Time for one request; beyond it the answer is 504 and its work is dropped.", "S"
    )
    drain_seconds: float = _option(30.0, "Time for running requests after SIGTERM.", "S")
    max_client_batch_size: int = _option(128, "Rows (text x adapter) of one request.")
    max_text_chars: int = _option(65536, "Characters of one text.")
    max_body_bytes: int = _option(4 * 2**20, "Bytes of one request's body.")
    max_header_bytes: int = _option(16384, "Bytes of one request's headers.")
    api_keys: str | None = _option(
        None, "TOML file of keys and the adapters each may use (docs/serving.md).", "FILE"
    )
    load_from: tuple[str, ...] = _option(
        (), "Folders from which adapters may be loaded over HTTP; none: the routes do not exist.", "DIRS"
    )
    cors_origins: tuple[str, ...] = _option((), "Origins whose pages may call the server.", "URLS")
    poll_seconds: float = _option(2.0, "How often --adapter-dir is looked at.", "S")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if item.metadata["choices"] and value not in item.metadata["choices"]:
                raise UsageError(f"--{item.name} {value}: not one of {', '.join(item.metadata['choices'])}")
            least = 0 if item.name in ("port", "batch_wait_ms") else 1 if field_type(item) is int else 0.001
            if field_type(item) in (int, float) and value is not None and not least <= value < 2**40:
                raise UsageError(f"--{item.name.replace('_', '-')} {value}: must be at least {least}")
        if self.port > 65535:
            raise UsageError(f"--port {self.port}: must be at most 65535")

    def named_adapters(self) -> dict[str, Path]:
        """`--adapter` as name -> folder. Raises UsageError where one is not NAME=PATH or a name stands twice."""
        found: dict[str, Path] = {}
        for one in self.adapter:
            name, sign, path = one.partition("=")
            if not sign or not name or not path or name in found:
                raise UsageError(
                    f"--adapter {one}: {'the name stands twice' if name in found else 'not NAME=PATH'}"
                )
            found[name] = Path(path)
        return found


def read_settings(
    flags: Mapping[str, Any], config_file: str | None, environment: Mapping[str, str]
) -> ServeSettings:
    """Flags, which win over the environment, which wins over the file.

    Raises:
        UsageError: an unknown setting, or a value that does not fit.
    """
    settings = read_config(Path(config_file), ServeSettings, "serve") if config_file else {}
    for item in dataclasses.fields(ServeSettings):
        text = environment.get(f"TEXTLORA_{item.name.upper()}")
        if text is not None:
            settings[item.name] = _parsed(item, text)
    return ServeSettings(
        **settings | {name: value for name, value in flags.items() if value not in (None, ())}
    )


def _parsed(item: dataclasses.Field, text: str) -> Any:
    kind = field_type(item)
    if kind is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    try:
        return kind(text)
    except ValueError:
        raise UsageError(
            f"TEXTLORA_{item.name.upper()}={text:.40}: not {'a whole number' if kind is int else 'a number'}"
        ) from None

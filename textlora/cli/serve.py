"""`textlora serve`."""

import dataclasses
import os
from typing import Any

import click

from textlora.cli.base import app
from textlora.cli.options import setting_options
from textlora.server.settings import ServeSettings, read_settings

_NAMES = [item.name for item in dataclasses.fields(ServeSettings) if item.name != "adapter"]


@app.command()
@click.option(
    "--adapter", multiple=True, metavar="NAME=PATH", help="An adapter folder under a name; repeat for more."
)
@setting_options(_NAMES, ServeSettings)
@click.option(
    "--config",
    "config_file",
    metavar="FILE",
    help="TOML file of settings; environment (TEXTLORA_PORT=8000) and flags win over it.",
)
def serve(config_file: str | None, **flags: Any) -> None:
    """Serve adapters of one base over HTTP, with a playground page.

    Protocols of text-embeddings-inference, huggingface_hub's InferenceClient, vLLM and SGLang. Needs the
    extra `serve`.
    """
    # before torch is imported: its threads must not spin beside the event loop
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from textlora.server.run import serve as run

    run(read_settings(flags, config_file, os.environ))

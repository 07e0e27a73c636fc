"""The `textlora` command, one module for each group of commands."""

from textlora.cli.entry import app, main, run

__all__ = ["app", "main", "run"]

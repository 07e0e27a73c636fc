"""Command-line options made from the fields of `TrainConfig`: one source for flags, help and config files."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from textlora.core.config import TrainConfig, field_type, read_config


class CommaList(click.ParamType):
    """Comma-separated names to a tuple."""

    name = "names"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        names = tuple(part.strip() for part in value.split(",") if part.strip())
        if not names:
            self.fail("give at least one name", param, ctx)
        return names


def setting_options(names: Iterable[str], config: type = TrainConfig) -> Callable[[Callable], Callable]:
    """Decorator that adds an option for each named field of `config`, in that order; unset ones arrive as
    None."""
    fields = {item.name: item for item in dataclasses.fields(config)}
    options = [_option(fields[name]) for name in names]

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _option(item: dataclasses.Field) -> Callable[[Callable], Callable]:
    flag, kind, choices = "--" + item.name.replace("_", "-"), field_type(item), item.metadata["choices"]
    help = item.metadata["help"]
    if item.default not in (None, ()) and kind is not bool:
        help += f"  [default: {item.default:g}]" if kind is float else f"  [default: {item.default}]"
    if kind is bool:
        return click.option(flag, item.name, is_flag=True, default=None, help=help)
    kinds = {tuple: CommaList(), int: int, float: float, str: str}
    shape = click.Choice(choices) if choices else kinds[kind]
    return click.option(
        flag, item.name, type=shape, default=None, metavar=item.metadata["metavar"] or None, help=help
    )


def merge_settings(flags: dict[str, Any], config_file: str | None) -> dict[str, Any]:
    """Settings from a config file, overridden by the flags that were given. Raises UsageError as
    `read_config` does."""
    settings = read_config(Path(config_file)) if config_file else {}
    return settings | {name: value for name, value in flags.items() if value is not None}

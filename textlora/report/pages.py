"""What all report pages share: the frame and the style sheet beside this file, and how values get into them."""

import functools
import math
import re
from importlib import resources
from typing import Any

import jinja2

from textlora.report.numbers import NONE, number, percent, setting, show

__all__ = ["css_share", "fill", "finite", "light_colours"]


def fill(template: str, **values: Any) -> str:
    """One self-contained page, light or dark as the reader's system is, without a script.

    Args:
        template: a file of this folder that extends `frame.html`.
        values: what it shows: `title`, `about` (the line below), `settings` (names and values, the last
            section) and the template's own. Text is escaped, numbers are written as `numbers.show` does, what
            is missing is a dash.
    """
    return _environment().get_template(template).render(values).rstrip() + "\n"


def light_colours() -> dict[str, str]:
    """The colours of the light page, by their names in the style sheet."""
    first_rule = (
        resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8").split("}", 1)[0]
    )
    return dict(re.findall(r"--([\w-]+): (#\w+);", first_rule))


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def css_share(value: float | None) -> str:
    return f"{100 * (value or 0):.2f}%"


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("textlora", "report"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        finalize=lambda value: NONE if isinstance(value, jinja2.Undefined) else show(value),
    )
    environment.filters |= {
        "percent": percent,
        "setting": setting,
        "css_number": "{:.3f}".format,
        "css_share": css_share,
    }
    environment.filters["one"] = lambda value: number(value, 1) if finite(value) else NONE
    return environment

"""How figures look and how they leave: marks and colours, PNG and SVG files, SVG inside the page.

A figure is drawn once in the light colours of the page. In the page those become the style sheet's variables,
so that it follows light and dark; as a file it keeps them, on white.
"""

import functools
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle

from textlora.core.files import atomic_path, write_text
from textlora.report.numbers import clean
from textlora.report.pages import light_colours

__all__ = ["MARKERS", "RC", "Drawing", "Mark", "icon", "mark"]

COLOURS = light_colours()
INK, SOFT, GRID, CARD, BLUE, ORANGE = (COLOURS[name] for name in ("ink", "soft", "grid", "card", "a", "b"))
# The last ones are stars of three, four and six points.
MARKERS = (*"osD^vPXph<>*d", (4, 1, 0), (3, 1, 0), (4, 1, 45), (3, 1, 180), (6, 1, 0))
FROZEN = ("majority", "tfidf", "probe", "head")
TEXT = 9.0  # points
_FONT = "DejaVu Sans"
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "textlora",
    "font.family": _FONT,
    "font.size": TEXT,
    "axes.unicode_minus": True,
}


@dataclass(frozen=True)
class Mark:
    """How a method looks in every figure."""

    shape: Any  # a marker of matplotlib
    colour: str


@dataclass(frozen=True)
class Drawing:
    """A figure with the name of its files and the sentence under it."""

    name: str
    caption: str
    figure: Figure

    def save(self, folder: Path) -> None:
        """Write `name`.png (white) and `name`.svg into the folder."""
        with rc_context(RC):
            with atomic_path(folder / f"{self.name}.png") as part:
                self.figure.savefig(part, format="png", dpi=160, facecolor=CARD, metadata={"Software": None})
            write_text(folder / f"{self.name}.svg", self._svg)

    def inline(self) -> Markup:
        """The figure as SVG for the page: the page's colours and fonts, ids of its own."""
        text = self._svg
        text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
        used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
        text = re.sub(r' id="([^"]+)"', lambda m: f' id="{self.name}-{m[1]}"' if m[1] in used else "", text)
        text = re.sub(r'(url\(#|href="#)', rf"\g<1>{self.name}-", text)
        for name, colour in COLOURS.items():
            text = text.replace(colour, f"var(--{name})")
        text = text.replace(f"'{_FONT}'", "system-ui, sans-serif")
        label = f'<svg role="img" aria-label="{escape(clean(self.caption))}" '
        return Markup(
            re.sub(
                r"<svg ", lambda _: label, re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2), count=1
            )
        )

    @functools.cached_property
    def _svg(self) -> str:
        text = io.StringIO()
        with rc_context(RC):
            self.figure.savefig(text, format="svg", facecolor=CARD, metadata={"Date": None, "Creator": None})
        return text.getvalue()


def mark(method: str, place_in_order: int) -> Mark:
    """Marker by the method's place in the order, colour by its kind: LoRA and its kin, the encoder untouched,
    all else."""
    colour = (
        SOFT
        if method in FROZEN
        else BLUE
        if "lora" in method or method in ("defaults", "dora", "pissa")
        else ORANGE
    )
    return Mark(MARKERS[place_in_order % len(MARKERS)], colour)


def icon(look: Mark) -> Markup:
    """The mark as a small drawing for a table."""
    style = MarkerStyle(look.shape)
    outline = style.get_path().transformed(style.get_transform()).to_polygons(closed_only=False)
    points = " ".join(f"{x:.2f},{-y:.2f}" for x, y in outline[0])
    name = next(name for name, colour in COLOURS.items() if colour == look.colour)
    return Markup(
        '<svg class="icon" viewBox="-.75 -.75 1.5 1.5" aria-hidden="true"><polygon points="{}" fill="var(--{})"/></svg>'
    ).format(points, name)

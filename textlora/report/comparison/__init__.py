"""The page of a comparison: `render` for one data set, `render_many` for several."""

from textlora.core.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "render": "textlora.report.comparison.page",
        "render_many": "textlora.report.comparison.page",
    },
)

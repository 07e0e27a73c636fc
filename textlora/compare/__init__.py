"""Methods side by side on one data set: `compare(Comparison(...))`, and `read_comparison(folder)` for a page
made later."""

from textlora.core.lazy import lazy_names

__getattr__ = lazy_names(
    __name__,
    {
        "Comparison": "textlora.compare.comparison",
        "compare": "textlora.compare.comparison",
        "read_comparison": "textlora.compare.store",
    },
)

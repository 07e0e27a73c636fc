"""Which column holds the text, its pair and the label, and which character parts the columns of a CSV."""

import csv
from collections.abc import Sequence

from textlora.core.errors import DataError
from textlora.data.rows import Columns

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
    ("sentence_1", "sentence_2"),
    ("text_1", "text_2"),
)
TEXTS = (
    *(
        "text",
        "sentence",
        "review",
        "content",
        "comment",
        "body",
        "message",
        "tweet",
        "document",
        "utterance",
        "query",
    ),
    *(
        "question",
        "post",
        "article",
        "review_text",
        "comment_text",
        "description",
        "headline",
        "abstract",
        "title",
    ),
)
LABELS = (
    *(
        "label",
        "labels",
        "class",
        "target",
        "category",
        "sentiment",
        "intent",
        "emotion",
        "emotions",
        "topic",
        "polarity",
    ),
    *("gold_label", "score", "rating", "stars", "tags", "tag", "y"),
)
# Row numbers that spreadsheets and pandas add; they never stand for a text or a label.
COUNTERS = ("", "id", "idx", "index", "unnamed: 0")
DELIMITERS = (",", ";", "\t", "|")


def find_columns(
    names: Sequence[str],
    source: str,
    *,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    label_column: str | None = None,
    need_labels: bool = True,
) -> Columns:
    """Columns by name, then by the tables above (letter case does not matter, the first entry that fits
    wins).

    A pair is taken on its own only where no text column was named. Where only one of two columns was
    recognised, the other is the missing one; row numbers ("id", "index", ...) do not count as columns for
    that rule.

    Raises:
        DataError: duplicate names, a named column that is not there, or no text or label column found.
    """
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"{source}: two columns are named {twice[0]!r}", "rename one of them")
    for name in (text_column, text_pair_column, label_column):
        if name is not None and name not in names:
            raise DataError(f"{source}: no column {name!r}; it has {_listed(names)}", "name one of these")
    named = [name for name in (text_column, text_pair_column, label_column) if name is not None]
    if len(set(named)) < len(named):
        raise DataError(
            f"{source}: one column is named for two purposes",
            "name different columns for text, pair and label",
        )
    free = {name.lower(): name for name in reversed(names) if name not in named}
    text, pair, label = text_column, text_pair_column, label_column
    if text is None and pair is None:
        text, pair = next(
            ((free.pop(a), free.pop(b)) for a, b in PAIRS if a in free and b in free), (None, None)
        )
    if text is None:
        text = next((free.pop(name) for name in TEXTS if name in free), None)
    if label is None:
        label = next((free.pop(name) for name in LABELS if name in free), None)
    others = [name for lower, name in free.items() if lower not in COUNTERS]
    if len(others) == 1 and text is None and (label is not None or not need_labels):
        text = others[0]
    elif len(others) == 1 and text is not None and label is None and pair is None and need_labels:
        label = others[0]
    if text is None:
        raise DataError(
            f"{source}: no text column found among {_listed(names)}",
            "name it with --text-column; the first line must hold the names",
        )
    if label is None and need_labels:
        raise DataError(
            f"{source}: no label column found among {_listed(names)}", "name it with --label-column"
        )
    return Columns(text, pair, label)


def has_text_name(names: Sequence[str]) -> bool:
    """Whether a line looks like a header: distinct names, one of which is a known text column."""
    known = set(TEXTS) | {name for pair in PAIRS for name in pair}
    return len(set(names)) == len(names) and any(name.lower() in known for name in names)


def header_fields(line: str, delimiter: str) -> list[str]:
    """Column names of a header line, without outer blanks. A broken header gives what could be read of it."""
    try:
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return [name.strip() for name in line.rstrip("\r\n").split(delimiter)]


def sniff_delimiter(line: str, tab_first: bool) -> str:
    """The most frequent of , ; tab | outside quotes in a header line; on a tie the earlier one, in a .tsv
    always the tab."""
    bare = "".join(line.split('"')[::2])
    if tab_first and "\t" in bare:
        return "\t"
    best = max(DELIMITERS, key=bare.count)
    return best if bare.count(best) else ("\t" if tab_first else ",")


def _listed(names: Sequence[str]) -> str:
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:12]]
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(shown) or "no columns") + more

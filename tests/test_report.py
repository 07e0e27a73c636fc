"""The report page: its numbers are the records' numbers, its text is escaped, it needs nothing from outside."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from textlora.data.check import DataReport, Lengths
from textlora.metrics import scores
from textlora.report import figures
from textlora.report.numbers import clean, number, percent, setting, size, whole
from textlora.report.pages import fill, light_colours
from textlora.report.run_page import markdown_summary, render

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def make_records(
    problem_type=SINGLE, classes=2, rows=400, names=None, text="a plain sentence of row {}", steps=120
):
    """Records as a run writes them, with made-up but consistent values."""
    random = np.random.default_rng(classes)
    names = names or [f"label_{i}" for i in range(classes)]
    if problem_type == SINGLE:
        labels = random.integers(0, classes, rows)
        logits = (
            random.normal(size=(rows, classes))
            + 2.2 * np.eye(classes)[labels]
            + 0.9 * np.eye(classes)[(labels + 1) % classes]
        )
    elif problem_type == MULTI:
        labels = (random.random((rows, classes)) < 0.2).astype(float)
        logits = random.normal(size=(rows, classes)) + 3 * labels - 2
    else:
        labels, names = random.random(rows) * 5, []
        logits = (labels + random.normal(size=rows) * 0.6)[:, None]
    finals = []
    for split in ("validation", "test"):
        final = {
            "kind": "final",
            "split": split,
            "rows": rows,
            "metrics": scores.evaluate(problem_type, labels, logits, names),
        }
        final["intervals"] = scores.intervals(problem_type, labels, logits, resamples=50)
        texts = [text.format(i) for i in range(rows)]
        wheres = [f"{split}.csv row {i + 1}" for i in range(rows)]
        finals.append(final | {"details": scores.details(problem_type, labels, logits, names, texts, wheres)})
    main = scores.DEFAULT_METRIC[problem_type]
    bars, edges = np.histogram(random.gamma(3, 12, 1000) + 4, bins=np.arange(0, 180, 8))
    counts = dict(zip(names, random.integers(20, 300, len(names)).tolist(), strict=True))
    data = DataReport(
        rows={"train": 1000, "validation": rows, "test": rows},
        problem_type=problem_type,
        classes=counts,
        shares={name: count / sum(counts.values()) for name, count in counts.items()},
        imbalance=None,
        target=None if names else {"min": 0.003, "mean": 2.497, "median": 2.5, "max": 4.993},
        unlabelled=0,
        lengths=Lengths(4, 40.25, 36.0, 81.0, 163, edges.tolist(), bars.tolist(), 128, 0.0125, 0.0041),
        empty={},
        duplicates=3,
        conflicts=0,
        leaks={},
        unknown_labels={},
        wheres={},
        warnings=["3 texts occur twice in train.csv (first: rows 5 and 19)"],
    )
    data = {"kind": "data", **data.as_dict()}
    settings = {
        "learning_rate": 0.001,
        "batch_size": 16,
        "r": 8,
        "lora_alpha": 16.0,
        "max_length": 128,
        "seed": 12345,
        "use_dora": False,
    }
    start = {
        "kind": "start",
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "path": "packed",
        "problem_type": problem_type,
        "labels": names,
        "settings": settings | {"target_modules": ["query", "value"], "init_adapter": None},
        "adapter_parameters": 147456,
        "head_parameters": 770,
        "versions": {"torch": "2.13.0"},
    }
    records = [start, data]
    for step in range(1, steps + 1):
        loss = 0.7 * np.exp(-step / 40) + 0.2 + random.normal() * 0.05
        speed = {"learning_rate": 1e-3, "grad_norm": 1.5, "tokens": 700, "tokens_per_second": 9000.0}
        records.append({"kind": "step", "step": step, "epoch": step / 40, "loss": float(loss), **speed})
        if step % 20 == 0:
            score = finals[0]["metrics"] | {main: finals[0]["metrics"][main] - 0.2 * np.exp(-step / 30)}
            loss = 0.7 * np.exp(-step / 35) + 0.27 + step / 2000
            records.append(
                {
                    "kind": "evaluation",
                    "split": "validation",
                    "step": step,
                    "loss": loss,
                    "metrics": score,
                    "best": True,
                    "kept": True,
                }
            )
    end = {
        "kind": "end",
        "train_seconds": 83.125,
        "tokens": 84000,
        "tokens_per_second": 1010.5,
        "peak_memory_bytes": 1_250_000_000,
    }
    end |= {
        "epochs": 3.0,
        "best_step": 100,
        "best_metric": {"name": main, "value": finals[0]["metrics"][main]},
    }
    return json.loads(json.dumps([*records, *finals, end]))


class _Page(HTMLParser):
    """Collects a page's visible text outside drawings, its tags and its attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "line", "rect", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag, "tags are nested"

    def handle_data(self, data):
        if not {"svg", "style"} & set(self.open):
            self.text.append(data)


def _forms(value):
    """Every way a value of the records may be written on the page."""
    if isinstance(value, bool) or value is None:
        return set()
    if isinstance(value, int | float):
        value = abs(value)  # signs are not part of _NUMBER
        return {
            number(value),
            number(value, 1),
            whole(value),
            percent(value).split("\xa0")[0],
            setting(value),
            size(value).split(" ")[0],
        }
    if isinstance(value, str):
        return set(_NUMBER.findall(value))
    return set().union(*map(_forms, value.values() if isinstance(value, dict) else value))


_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


@pytest.mark.parametrize(
    ("problem_type", "classes"), [(SINGLE, 2), (SINGLE, 30), (MULTI, 5), (REGRESSION, 1)]
)
def test_every_number_on_the_page_is_in_the_records(problem_type, classes):
    records = make_records(problem_type, classes)
    final = next(r for r in records if r.get("split") == "test" and r["kind"] == "final")
    allowed = _forms(records) | _forms([len(records[0]["labels"])])
    # Counted from the confusion matrix: its sums and shares; said by the page itself: 95 % intervals, 0.8 and
    # 80 %, bins, names.
    matrix = final["details"]["confusion"] or []
    counted = [
        sum(matrix[i][i] for i in range(len(matrix))),
        *[n / (sum(row) or 1) for row in matrix for n in row],
    ]
    counted += [sum(row) / final["rows"] for row in matrix] + [max(1, 120 // 25)]
    allowed |= _forms(counted) | {"95", "0.8", "80", "15", "1", "0"}
    text = re.sub(r"\bF1\b", "F", " ".join(_Page(render(records, "run")).text))
    assert [n for n in _NUMBER.findall(text) if n.rstrip(",") not in allowed] == []


def test_headline_says_the_test_score_in_words():
    records = make_records()
    test = records[-2]
    text = " ".join(" ".join(_Page(render(records, "run")).text).split())
    low, high = test["intervals"]["accuracy"]
    assert f"accuracy on 400 test rows; with 95 % confidence between {number(low)} and {number(high)}" in text
    matrix = test["details"]["confusion"]
    assert f"{matrix[0][0] + matrix[1][1]} of 400 rows got the right label" in text
    assert f"would be right in {100 * max(map(sum, matrix)) / 400:.2f} %" in text


def test_all_metrics_and_label_scores_are_on_the_page():
    records = make_records(classes=30)
    text = _Page(render(records, "run")).text
    final = records[-2]
    for value in final["metrics"].values():
        assert number(value) in text
    for row in final["details"]["per_class"]:
        assert {
            row["label"],
            whole(row["support"]),
            number(row["precision"]),
            number(row["recall"]),
            number(row["f1"]),
        } <= set(text)
    for row in final["details"]["mistakes"]:
        assert {row["text"], row["where"]} <= set(text)


def test_many_labels_give_the_most_confused_pairs_and_a_heat_map():
    matrix = np.diag(np.full(13, 10))
    matrix[3, 7], matrix[7, 3], matrix[0, 1] = 6, 2, 4
    records = [
        {"kind": "start", "problem_type": SINGLE, "labels": [f"L{i}" for i in range(13)]},
        {
            "kind": "final",
            "split": "test",
            "rows": 142,
            "metrics": {"accuracy": 130 / 142},
            "details": {"confusion": matrix.tolist()},
        },
    ]
    page = render(records, "run")
    table = page[page.index("Most confused pairs") : page.index("All pairs")]
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", table)
    assert cells == [
        "L3",
        "L7",
        "6",
        "37.50\xa0%",
        "L0",
        "L1",
        "4",
        "28.57\xa0%",
        "L7",
        "L3",
        "2",
        "16.67\xa0%",
    ]
    assert page.count('class="hit"') == 13
    assert page.count('class="miss"') == 3
    assert "<title>L3 predicted as L7: 6 of 16</title>" in page


EVIL = """</title></script><script>alert(1)</script><img src=x onerror="alert('2')">&amp;{{ 7*7 }}"""


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("classes", [2, 14])
def test_no_text_of_the_records_becomes_markup(problem_type, classes):
    names = [f"{EVIL}{i}" for i in range(classes)]
    records = make_records(problem_type, classes, names=names, text=EVIL + "{{}}{}")
    records[0] |= {"model": EVIL, "settings": {EVIL: EVIL}, "versions": {EVIL: EVIL}}
    records[1]["warnings"] = [EVIL]
    records[-1]["best_metric"] = {"name": EVIL, "value": 0.5}
    records.insert(3, {"kind": "evaluation", "step": 1, "metrics": {EVIL: 0.5}})
    records[-2]["metrics"][EVIL] = 0.5
    records[-2]["split"], records[-2]["details"]["mistakes"][0]["where"] = "test", EVIL
    page = render(records, EVIL)
    parsed = _Page(page)
    assert not {"script", "img", "iframe", "a", "link"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name in ("src", "href")]
    assert EVIL in parsed.text
    assert "<" not in markdown_summary(records)


def test_data_section_shows_classes_lengths_and_warnings():
    records = make_records(classes=30)
    data = records[1]
    page = render(records, "run")
    text = _Page(page).text
    ranked = sorted(data["classes"], key=lambda name: -data["classes"][name])
    section = page[page.index('<section id="data">') : page.index('<section id="labels">')]
    assert re.findall(r'<td dir="auto">([^<]*)</td>', section) == ranked[:12] + ranked[-12:]
    assert percent(data["shares"][ranked[0]]) in text
    assert data["warnings"][0] in text
    lengths = next(part for part in text if part.startswith("Tokens per training text"))
    assert (
        "4 to 163, mean 40.2, median 36.0; 95 % have at most 81.0. 1.25\xa0% of the rows were cut, and 0.41\xa0% of the"
        in lengths
    )
    bars = [int(count.replace(",", "")) for count in re.findall(r"<title>\d+ to \d+: ([\d,]+)</title>", page)]
    assert bars == [count for count in data["lengths"]["counts"] if count]


def test_page_needs_nothing_from_outside():
    page = render(make_records(MULTI, 3), "run")
    assert not re.search(r"https?://|url\(|@import|<script|<link", page)
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page


def test_control_characters_and_lone_surrogates_can_be_written():
    records = make_records(text="bad \x00 \ud800 text\x1b {}")
    page = render(records, "a\x07b")
    assert page.encode("utf-8").count(b"\x00") == 0
    assert "bad \ufffd \ufffd text\ufffd" in page
    assert clean("tab\tand\nline é 中 😀") == "tab\tand\nline é 中 😀"


def test_a_run_without_an_end_is_told_as_such():
    page = render(make_records()[:30], "run")
    assert "no final evaluation yet" in page
    assert "Learning curves" in page
    assert markdown_summary(make_records()[:30]) == ""
    assert "no final evaluation yet" in render([], "nothing")


def test_missing_values_are_dashes():
    records = make_records()
    records[-2]["metrics"]["auc"] = None
    records[-2]["intervals"].pop("auc")
    records[5]["loss"], records[6]["loss"] = None, float("nan")
    page = render(records, "run")
    assert re.search(r'AUC<div class="note">[^<]*</div></td><td class="n">–</td><td class="n"></td>', page)
    assert "nan" not in re.sub(r"[a-z]*nan[a-z]+", "", page).lower()


def test_a_step_written_twice_counts_once_and_the_last_record_wins():
    records = make_records()
    first = render(records, "run")
    again = [{**records[0], "model": "old"}, *records[:40], *records[10:]]
    assert render(again, "run") == first


def test_validation_stands_in_where_there_is_no_test_set():
    records = [r for r in make_records() if r.get("split") != "test"]
    page = render(records, "run")
    assert "on 400 validation rows" in page
    assert "There was no test set" in page


def test_markdown_summary_holds_the_metrics():
    records = make_records()
    test, validation = records[-2], records[-3]
    summary = markdown_summary(records)
    low, high = test["intervals"]["mcc"]
    line = next(line for line in summary.splitlines() if line.startswith("| MCC"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["MCC", number(test["metrics"]["mcc"]), f"{number(low)} to {number(high)}"]
    assert cells[3] == number(validation["metrics"]["mcc"])
    assert summary.startswith(f"**accuracy {number(test['metrics']['accuracy'])}** (95 % interval ")
    assert "adapter parameters: 147,456; head parameters: 770; epochs: 3.0; training time: 83.1 s" in summary


def test_page_and_summary_say_where_the_rows_cannot_tell():
    told = "4 rows cannot tell: the true accuracy may be anything between 0.51 and 1.00."
    about = "An interval is over other test rows"
    for rows, interval in ((4, [0.5101, 1.0]), (4000, [0.88, 0.9])):
        records = make_records(rows=rows)
        final = next(r for r in records if r.get("split") == "test" and r["kind"] == "final")
        final["rows"], final["intervals"]["accuracy"] = rows, interval
        for shown in (render(records, "a run"), markdown_summary(records)):
            assert (told in shown) == (rows == 4)
            assert shown.count(about) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.87, "0.8700"),
        (2e-05, "2e-05"),
        (0, "0.0000"),
        (None, "–"),
        (float("nan"), "–"),
        (12345.678, "12,345.6780"),
        (-0.5, "-0.5000"),
    ],
)
def test_number(value, text):
    assert number(value) == text


def test_other_formats():
    assert [
        whole(1234567),
        percent(0.12345),
        size(1_250_000_000),
        size(3_400_000),
        setting(["query", "value"]),
        setting(5e-05),
    ] == [
        "1,234,567",
        "12.35\xa0%",
        "1.25 GB",
        "3.4 MB",
        "query, value",
        "5e-05",
    ]


def test_thin_keeps_the_spikes_and_the_order():
    points = [(x, 0.0) for x in range(10_000)]
    points[4321], points[77] = (4321, 9.0), (77, -9.0)
    kept = figures.thin(points)
    assert len(kept) <= 400
    assert {(4321, 9.0), (77, -9.0)} <= set(kept) <= set(points)
    assert kept == sorted(kept)


def test_running_mean():
    assert figures.running_mean([(1, 2.0), (2, 4.0), (3, 9.0)], 2) == [(1, 2.0), (2, 3.0), (3, 6.5)]


def test_a_line_chart_puts_points_where_they_belong():
    line = figures.Line("one", "a", [(0, 0.0), (10, 1.0)])
    xy = re.search(
        r'class="line a" d="M([\d.]+),([\d.]+)L([\d.]+),([\d.]+)"', figures.lines([line], "step", "loss")
    ).groups()
    x0, y0, x1, y1 = map(float, xy)
    # The y axis has a margin of 6 % of the range at both ends; SVG's y grows downwards.
    height = figures.HEIGHT - figures.TOP - figures.BOTTOM
    assert (x0, x1) == (figures.LEFT, figures.WIDTH - figures.RIGHT)
    assert y1 == pytest.approx(figures.TOP + height * 0.06 / 1.12, abs=0.1)
    assert y0 == pytest.approx(figures.HEIGHT - figures.BOTTOM - height * 0.06 / 1.12, abs=0.1)


def test_all_report_pages_have_one_frame_and_one_style_sheet():
    frame = fill("frame.html", title="a <b>", about="c & d")
    head, end = frame[: frame.index("</header>")], frame[frame.index("</main>") :]
    assert "<title>a &lt;b&gt;</title>" in head
    assert head.endswith("<h1>a &lt;b&gt;</h1>\n<p>c &amp; d</p>\n")
    for template in ("run.html", "tuning.html", "comparison/page.html"):
        page = fill(template, title="a <b>", about="c & d")
        assert (page.startswith(head), page.endswith(end)) == (True, True)
    style = head[head.index("<style>") : head.index("</style>")]
    light, dark, printed = (
        dict(re.findall(r"--([\w-]+): (#\w+);", rule)) for rule in re.findall(r":root \{[^}]*", style)
    )
    assert light == light_colours()
    assert set(light) == set(dark) == set(printed)

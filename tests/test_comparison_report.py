"""The report of a comparison: its numbers are counted from the run records, its figures can be read, it needs
nothing from outside."""

import csv
import itertools
import json
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from browser import PATH, Browser
from comparison_records import failed, records
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from scipy import stats

from textlora.compare.methods import METHODS
from textlora.core.errors import DataError, UsageError
from textlora.report.comparison import cells
from textlora.report.comparison.across import across
from textlora.report.comparison.labels import place, spread
from textlora.report.comparison.page import render, render_many, require_matplotlib, summary
from textlora.report.comparison.table import compare
from textlora.report.comparison.words import Scale, p_text, seconds, sentences, sentences_of_many, stored

SOME = ("majority", "probe", "full", "lora-qv", "lora-all")
SETS = ("first", "second", "third")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A rendered comparison with a failed method, a failed rate and a curve: settings, runs, folder, summary."""
    settings, runs = records(
        curve=(32, 128),
        left_out=["lora-all: 0.003 did not fit"],
        descriptions={"full": "all of it", "other": "not here"},
    )
    runs = [
        failed(run)
        if run["method"] == "prefix" or (run["method"], run["learning_rate"]) == ("full", 3e-4)
        else run
        for run in runs
    ]
    folder = tmp_path_factory.mktemp("one")
    return settings, runs, folder, render(settings, runs, folder)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    sets = [records(data, SOME, curve=(128,)) for data in SETS]
    folder = tmp_path_factory.mktemp("many")
    (folder / "second").mkdir()
    (folder / "second" / "report.html").touch()
    return sets, folder, render_many(sets, folder)


class _Page(HTMLParser):
    """Visible text outside drawings, cells of table rows, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.rows, self.inside, self.cell = [], [], [], [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag in ("svg", "style"):
            self.inside.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.cell = True
        if tag == "small":
            self.rows[-1][-1] += "|"

    def handle_endtag(self, tag):
        if tag in self.inside:
            self.inside.remove(tag)
        if tag in ("td", "th", "tr"):
            self.cell = False

    def handle_data(self, data):
        if not self.inside:
            self.text.append(data)
            if self.cell:
                self.rows[-1][-1] += data.strip()


def rows_of(settings, runs):
    return {row.name: row for row in compare(settings, runs).rows}


def test_means_intervals_and_differences_are_those_of_the_runs(one):
    settings, runs, *_ = one
    table = compare(settings, runs)
    repeated = [run for run in runs if run["stage"] == "seeds" and "error" not in run]
    for row in table.scored:
        scores = [run["test"]["accuracy"] for run in repeated if run["method"] == row.method]
        assert row.mean == pytest.approx(np.mean(scores))
        if len(scores) > 1:
            assert row.half == pytest.approx(stats.t.ppf(0.975, len(scores) - 1) * stats.sem(scores))
        if row is not table.best:
            assert row.difference.value == pytest.approx(row.mean - table.best.mean)
            assert row.difference.low <= row.difference.value <= row.difference.high
            assert row.p_holm >= row.difference.p
    assert [row.mean for row in table.scored] == sorted((row.mean for row in table.scored), reverse=True)
    assert table.rows[-1].name == "prefix"


def test_spreads_and_curves_are_those_of_the_runs(one):
    settings, runs, *_ = one
    rows = rows_of(settings, runs)
    search = {
        run["learning_rate"]: run["validation"]["accuracy"]
        for run in runs
        if run["stage"] == "rates" and run["method"] == "dora"
    }
    assert rows["dora"].rates.points == [(rate, score, True) for rate, score in sorted(search.items())]
    assert rows["dora"].rates.width == pytest.approx(max(search.values()) - min(search.values()))
    full = rows["full"].rates
    assert (full.alike, full.failed, full.points[-1]) == (2, 1, (3e-4, None, True))
    assert rows["tfidf"].rates.width is None
    assert [count for count, *_ in rows["dora"].curve] == [32, 128, 500]
    small = [
        run["test"]["accuracy"]
        for run in runs
        if run["stage"] == "rows" and (run["method"], run["train_rows"]) == ("dora", 32)
    ]
    assert rows["dora"].curve[0][1:] == pytest.approx(
        (np.mean(small), stats.t.ppf(0.975, 2) * stats.sem(small), 3)
    )
    assert rows["dora"].seed_spread == pytest.approx(
        max(rows["dora"].scores.values()) - min(rows["dora"].scores.values())
    )


def test_rates_stopped_early_are_compared_at_the_length_that_most_had():
    settings, runs = records(methods=("lora-qv",))
    search = [run for run in runs if run["stage"] == "rates"]
    short = [
        {**run, "epochs": 1.0, "validation": {"accuracy": score}}
        for run, score in zip(search, (0.3, 0.6, 0.5), strict=True)
    ]
    spread_ = rows_of(settings, [*short, search[1], *(run for run in runs if run["stage"] == "seeds")])[
        "lora-qv"
    ].rates
    assert (spread_.width, spread_.alike) == (pytest.approx(0.3), 3)
    assert spread_.points == [
        (3e-4, 0.3, False),
        (1e-3, search[1]["validation"]["accuracy"], True),
        (3e-3, 0.5, False),
    ]


def test_sizes_that_were_repeated_are_rows_and_others_are_kept_for_the_figure():
    settings, runs = records(methods=("lora-qv", "probe"))
    larger = [{**run, "size": {"r": 32}} for run in runs if run["method"] == "lora-qv"]
    assert set(rows_of(settings, runs + larger)) == {"lora-qv r 8", "lora-qv r 32", "probe"}
    rows = rows_of(settings, runs + [run for run in larger if run["stage"] == "rates"])
    assert set(rows) == {"lora-qv", "probe"}
    assert list(rows["lora-qv"].other_sizes) == ["r 32"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda runs: [failed(run, "loss is nan") for run in runs], "all 3 runs failed: loss is nan"),
        (lambda runs: [], "not run"),
        (lambda runs: runs, "not finished: 3 runs of the search, none on the test rows"),
    ],
)
def test_a_method_without_a_score_is_a_row_that_says_why(tmp_path, change, why):
    settings, runs = records(methods=("probe", "lora-qv"))
    search = [run for run in runs if run["method"] == "lora-qv" and run["stage"] == "rates"]
    found = render(settings, [run for run in runs if run["method"] == "probe"] + change(search), tmp_path)
    assert found["methods"][-1]["error"] == why
    assert found["sentences"][-1] == f"lora-qv has no score: {why}."
    page = _Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ["lora-qv", why] in page.rows


def test_a_failed_seed_is_told_beside_the_mean_of_the_others():
    settings, runs = records(methods=("probe", "lora-qv"))
    runs = [failed(run) if (run["stage"], run["seed"]) == ("seeds", 2) else run for run in runs]
    row = rows_of(settings, runs)["lora-qv"]
    assert len(row.scores) == 2
    assert row.error == "1 of 3 seeds failed: the loss is not finite at step 12"
    assert row.difference is None or row.difference.value == pytest.approx(
        row.mean - rows_of(settings, runs)["probe"].mean
    )


def test_words_say_what_won_and_whether_that_is_noise(one):
    settings, runs, _, found = one
    table = compare(settings, runs)
    best, second = table.scored[:2]
    assert found["best"] == best.name
    assert found["sentences"][0].startswith(
        f"{best.name} has the best accuracy: {100 * best.mean:.1f} on 300 test rows, mean of 3 seeds."
    )
    assert f"{second.name} is next, {100 * (best.mean - second.mean):.1f} point" in found["sentences"][0]
    assert found["sentences"][0].endswith("which is no more than noise.") == (second.p_holm >= 0.05)
    text = " ".join(found["sentences"])
    lines = {line.split(":")[0]: line for line in found["sentences"]}
    for row in table.scored[1:]:
        line = lines[
            f"Behind {best.name} by more than noise"
            if row.p_holm < 0.05
            else f"Not told apart from {best.name}"
        ]
        assert re.search(rf"[ ,]{re.escape(row.name)}[ ,.]", line)
    assert "majority (−" in text
    moved = {row.name: row.rates.width for row in table.scored if row.rates.width is not None}
    assert f"{min(moved, key=moved.get)} moves least" in text
    assert f"{max(moved, key=moved.get)} most" in text


def test_a_clear_winner_is_told_as_such():
    settings, runs = records(methods=("majority", "lora-all", "full"))
    labels = settings["test_labels"]
    for run in runs:
        if run["method"] == "full" and run["test"]:
            wrong = [(label + 1) % 6 if i % 2 else label for i, label in enumerate(labels)]
            run.update(test={"accuracy": 0.5}, test_predictions=wrong)
    words = sentences(compare(settings, runs))
    assert words[0].endswith("which is more than noise.")
    assert any(line.startswith("Behind lora-all by more than noise: full (−") for line in words)
    assert "No method is told apart" not in " ".join(words)


def test_one_seed_is_told():
    words = " ".join(sentences(compare(*records(methods=("probe", "full", "lora-qv"), seeds=1))))
    assert "with one seed." in words
    assert "The luck of the seed is not in the intervals of" in words
    assert "probe" not in words[words.index("The luck") :].split(":")[0]


def as_defaults(settings, runs, method="lora-qv"):
    """The same with a method's runs as those of the defaults, which nothing was searched for."""
    runs = [run | {"method": "defaults", "size": {}} if run["method"] == method else run for run in runs]
    return settings | {"methods": ["defaults" if name == method else name for name in settings["methods"]]}, [
        run for run in runs if (run["method"], run["stage"]) != ("defaults", "rates")
    ]


def test_the_verdict_says_how_the_defaults_stand(tmp_path):
    settings, runs = as_defaults(*records(methods=("majority", "probe", "lora-qv", "lora-all")))
    found = render(settings | {"left_out": ["head: not run"]}, runs, tmp_path)
    assert found["sentences"][: len(found["verdict"])] == found["verdict"]
    assert found["left_out"] == ["head: not run"]
    rows = {line["method"]: line for line in found["methods"]}
    assert found["best"] == "lora-all"
    told = next(line for line in found["verdict"] if line.startswith("What textlora train does by default"))
    assert f"{100 * (rows['lora-all']['score'] - rows['defaults']['score']):.1f} point" in told
    assert told.endswith("more than noise." if rows["defaults"]["p_holm"] < 0.05 else "no more than noise.")
    alone = sentences(compare(*as_defaults(*records(methods=("majority", "lora-all")), "lora-all")))
    assert "Nothing that was tuned here is ahead of what textlora train does by default." in alone


@pytest.mark.parametrize(("rows", "few"), [(40, True), (300, False)])
def test_few_test_rows_are_told(rows, few):
    table = compare(*records(methods=("probe", "lora-qv", "full"), test_rows=rows))
    said = [line for line in sentences(table) if line.startswith(f"{rows} test rows are few")]
    assert bool(said) == few
    if few:
        halves = sorted((row.difference.high - row.difference.low) / 2 for row in table.scored[1:])
        assert f"about {100 * halves[1]:.1f} point" in said[0]


def test_kinds_of_intervals_are_named():
    several, one = (
        " ".join(sentences(compare(*records(methods=("probe", "lora-qv", "full"), seeds=seeds))))
        for seeds in (3, 1)
    )
    assert "95 % interval over test rows and seeds " in several
    assert "95 % interval over test rows " in one
    assert "and seeds" not in one


def test_heads_that_see_something_else_are_named(tmp_path):
    settings, runs = records(methods=("probe", "full", "prefix"))
    runs = [run | {"pooling": "first" if run["method"] == "prefix" else "mean"} for run in runs]
    render(settings | {"pooling": "mean"}, runs, tmp_path)
    assert "prefix: the head sees the first token" in (tmp_path / "report.md").read_text(encoding="utf-8")
    render(settings | {"pooling": "mean"}, [run for run in runs if run["method"] != "prefix"], tmp_path)
    assert "the head sees" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_lower_is_better_where_the_metric_says_so():
    settings, runs = records(methods=("probe", "lora-qv"))
    labels = np.linspace(0, 5, 300)
    settings |= {"metric": "mae", "problem_type": "regression", "test_labels": labels.tolist()}
    for run in runs:
        error = (0.5 if run["method"] == "probe" else 0.25) + 0.002 * run["seed"]
        run |= {"validation": {"mae": error}, "test": run["test"] and {"mae": error}}
        run["test_predictions"] = run["test"] and (labels + error).tolist()
    table = compare(settings, runs)
    assert [row.name for row in table.rows] == ["lora-qv", "probe"]
    assert table.rows[1].difference.value == pytest.approx(0.248)
    assert "probe is next, 0.2480 behind (95 % interval over test rows and seeds +0.24" in sentences(table)[0]
    assert "more than noise" in sentences(table)[0]


def test_a_metric_of_scores_has_no_paired_test(tmp_path):
    settings, runs = records(methods=("probe", "full"))
    for run in runs:
        run["validation"] = {"auc": 0.9}
        run["test"] = run["test"] and {"auc": 0.9 + 0.01 * run["seed"]}
    found = render(settings | {"metric": "auc"}, runs, tmp_path)
    assert all(line["p"] is None for line in found["methods"])
    assert "cannot be tested from decisions alone" in " ".join(found["sentences"])


def test_without_a_test_set_validation_is_shown_and_nothing_is_tested(tmp_path):
    settings, runs = records(methods=("probe", "full"))
    runs = [run | {"test": None, "test_predictions": None} for run in runs]
    found = render(settings | {"test_labels": []}, runs, tmp_path)
    assert (found["split"], found["methods"][0]["p"]) == ("validation", None)
    assert "There was no test set" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_predictions_of_other_rows_are_refused(tmp_path):
    settings, runs = records(methods=("probe",))
    runs[0]["test_predictions"] = [0, 1]
    with pytest.raises(DataError, match="probe of seed 0 has 2 predictions for 300 test rows"):
        render(settings, runs, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_to_show_is_a_page_too(tmp_path):
    settings, _ = records(methods=("probe", "full"))
    found = render(settings, [], tmp_path)
    assert found["sentences"] == [
        "No method has a score yet.",
        "probe has no score: not run.",
        "full has no score: not run.",
    ]
    assert not (tmp_path / "figures").exists()


def test_csv_holds_every_number_of_the_table(one):
    settings, runs, folder, found = one
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [line["method"] for line in found["methods"]]
    rows = rows_of(settings, runs)
    for line in lines:
        row, count = rows[line["method"]], int(line["train_rows"])
        if row.mean is None:
            assert line["error"] == "3 of 3 seeds failed: the loss is not finite at step 12"
        elif count == 500:
            assert (float(line["score"]), int(line["trainable_parameters"])) == (
                row.mean,
                row.trainable_parameters,
            )
            assert line["p_holm"] == ("" if row.p_holm is None else str(row.p_holm))
        else:
            assert float(line["score"]) == next(mean for n, mean, *_ in row.curve if n == count)
            assert line["p"] == ""
    assert json.loads(json.dumps(found)) == found


def test_page_and_markdown_show_the_numbers_of_the_csv(one):
    _, _, folder, found = one
    page = _Page((folder / "report.html").read_text(encoding="utf-8"))
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    text = " ".join(page.text)
    for line in found["methods"]:
        if line["train_rows"] != 500 or line["score"] is None:
            continue
        cells = next(row for row in page.rows if row and row[0] == line["method"])
        score = f"{100 * line['score']:.1f}"
        assert re.fullmatch(rf"{score}( ± [\d.]+)?\|(3 seeds|no seed)", cells[3])
        if line["difference"] is not None:
            assert cells[4].startswith(Scale("accuracy").signed(line["difference"]) + "|")
            assert cells[5] == p_text(line["p_holm"])
        assert cells[6] == f"{line['trainable_parameters']:,}"
        assert cells[8:11] == [seconds(line["train_seconds"]), f"{line['peak_memory_bytes'] / 1e6:,.1f} MB" if line["peak_memory_bytes"] < 1e9
                               else f"{line['peak_memory_bytes'] / 1e9:,.2f} GB", stored(line["saved_bytes"])]  # fmt: skip
        assert re.search(
            rf"^\| {re.escape(line['method'])} \|.*\| {re.escape(score)}", markdown, flags=re.MULTILINE
        )
    for sentence in found["sentences"]:
        assert sentence in text
        assert sentence in markdown
    assert "lora-all: 0.003 did not fit" in text
    assert "all of it" in text
    assert "not here" not in text
    for name in re.findall(r"\]\((figures/[a-z]+\.png)\)", markdown):
        assert (folder / name).is_file()


def test_the_order_of_the_runs_changes_nothing_and_neither_does_a_second_time(tmp_path):
    settings, runs = records(methods=("probe", "full", "lora-qv"))
    render(settings, runs, tmp_path / "a")
    random.Random(1).shuffle(runs)
    render(settings, runs, tmp_path / "b")
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".html", ".md", ".csv", ".png", ".svg"}
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


EVIL = """</title></script><script>alert(1)</script><img src=x onerror="alert('2')">&amp;{{ 7*7 }} | `x` **y** [z](u)"""


def test_no_text_of_the_records_becomes_markup(tmp_path):
    settings, runs = records(
        methods=("probe", "full", "lora-qv"), descriptions={"full": EVIL}, left_out=[EVIL]
    )
    runs = [failed(run, EVIL) if run["method"] == "lora-qv" else run for run in runs]
    render(settings | {"data": EVIL, "model": EVIL, "fixed": {EVIL: EVIL}}, runs, tmp_path)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    parsed = _Page(page)
    assert not {"script", "img", "iframe", "link"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on") or name == "src"]
    assert EVIL in parsed.text
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "<" not in markdown
    assert "**y**" not in markdown
    assert "[z]" not in markdown.replace("\\[", "(")


def test_page_needs_nothing_from_outside_and_its_figures_have_no_colour_of_their_own(one, many):
    for folder in (one[2], many[1]):
        page = (folder / "report.html").read_text(encoding="utf-8")
        body = page[page.index("<body>") :]
        assert not re.search(r"url\((?!#)|@import|<script|<link", page)
        assert not re.search(r'(?:href|src)="(?!#|second/)', body)
        assert "default-src 'none'" in page
        drawings = re.findall(r'<svg role="img".*?</svg>', body, flags=re.DOTALL)
        assert len(drawings) >= 6
        assert not re.search(r"#[0-9a-fA-F]{6}", "".join(drawings))
        ids = re.findall(r' id="([^"]+)"', body)
        assert len(ids) == len(set(ids))
        used = set(re.findall(r'(?:url\(#|xlink:href="#)([^)"]+)', "".join(drawings)))
        assert used <= set(ids)
        for drawing in drawings:
            assert "aria-label" in drawing[:400]


def test_figure_files_are_white_and_whole(one):
    folder = one[2] / "figures"
    names = {path.stem for path in folder.iterdir()}
    assert names == {"scores", "parameters", "seconds", "memory", "saved", "examples", "steadiness"}
    for name in names:
        with Image.open(folder / f"{name}.png") as image:
            assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)
            assert image.width >= 800
        tree = ElementTree.parse(folder / f"{name}.svg")
        assert tree.getroot().tag.endswith("svg")


@pytest.mark.parametrize("seed", range(4))
def test_names_in_a_crowded_figure_cover_neither_each_other_nor_points(seed):
    draw = np.random.default_rng(seed)
    points = np.concatenate([draw.uniform((60, 60), (600, 260), (5, 2)), draw.normal((320, 200), 18, (8, 2))])
    sizes = np.stack([draw.uniform(25, 60, 13), np.full(13, 11.0)], axis=1)
    boxes = place(points, sizes, 4, [], (40, 40, 680, 300))
    assert boxes[:, 2:] - boxes[:, :2] == pytest.approx(sizes)
    assert (boxes[:, :2] >= 40).all()
    assert (boxes[:, 2:] <= (680, 300)).all()
    for a, b in itertools.combinations(boxes, 2):
        assert overlap(a, b) == 0
    assert sum(overlap(box, (*(point - 3), *(point + 3))) > 0 for box in boxes for point in points) == 0


def overlap(a, b):
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def test_spread_moves_as_little_as_needed():
    assert spread([1, 50, 20], 5, 0, 100) == [1, 50, 20]
    assert spread([10, 10, 10], 4, 0, 100) == [6, 10, 14]
    assert spread([1, 2], 10, 0, 100) == [0, 10]
    moved = spread([99, 98, 97, 40], 10, 0, 100)
    assert moved == [100, 90, 80, 40]


def ticks_outside(axes):
    """Tick labels that matplotlib keeps but does not draw."""
    for limits, labels, way in (
        (axes.get_xlim(), axes.get_xticklabels(which="both"), 0),
        (axes.get_ylim(), axes.get_yticklabels(which="both"), 1),
    ):
        yield from (label for label in labels if not min(limits) <= label.get_position()[way] <= max(limits))


def test_every_text_of_the_figures_is_inside_large_enough_and_free_of_the_others(one, many):
    from textlora.report.comparison.drawings import of_many, of_one

    sections = of_one(compare(*one[:2]))[1] + of_many(across(many[0]))[1]
    for drawing in (drawing for section in sections for drawing in section["drawings"]):
        figure = drawing.figure
        FigureCanvasAgg(figure).draw()
        unseen = [text for axes in figure.axes for text in ticks_outside(axes)]
        texts = [
            text
            for text in figure.findobj(Text)
            if text.get_text() and text.get_visible() and text not in unseen
        ]
        boxes = [text.get_window_extent() for text in texts]
        # At 1,060 pixels (two columns: 510) a point of 1/72 inch is about 1.4 pixels.
        assert min(text.get_fontsize() for text in texts) >= 7.5
        for text, box in zip(texts, boxes, strict=True):
            assert figure.bbox.x0 <= box.x0 + 1, (drawing.name, text)
            assert box.x1 <= figure.bbox.x1 + 1, (drawing.name, text)
            assert figure.bbox.y0 <= box.y0 + 1 <= box.y1 <= figure.bbox.y1 + 2, (drawing.name, text)
        flat = [(box.x0 + 1, box.y0 + 2, box.x1 - 1, box.y1 - 2) for box in boxes]
        for (i, a), (j, b) in itertools.combinations(enumerate(flat), 2):
            assert overlap(a, b) == 0, (drawing.name, texts[i], texts[j])


def test_methods_are_told_apart_without_colour():
    from textlora.report.comparison.style import icon, mark

    shapes = [mark(method, i).shape for i, method in enumerate(METHODS)]
    assert len(set(shapes)) == len(METHODS)
    assert len({icon(mark(method, i)) for i, method in enumerate(METHODS)}) == len(METHODS)


def test_means_over_sets_and_their_two_intervals(many):
    sets, _, found = many
    tables = [compare(*one_set) for one_set in sets]
    assert found == summary(sets)
    assert json.loads(json.dumps(found)) == found
    for name, other in (("lora-all", "full"), ("probe", "lora-qv")):
        gaps = [
            100 * (rows[name].mean - rows[other].mean)
            for rows in ({row.name: row for row in table.rows} for table in tables)
        ]
        wanted = stats.ttest_1samp(gaps, 0.0)
        pair = found["differences"][name][other]
        assert pair["mean"] == pytest.approx(np.mean(gaps))
        assert pair["interval"] == pytest.approx(list(wanted.confidence_interval(0.95)))
        assert pair["p"] == pytest.approx(wanted.pvalue)
        assert pair["sets"] == pytest.approx(dict(zip(SETS, gaps, strict=True)))
        inside = [
            table.difference(*(next(row for row in table.rows if row.name == n) for n in (name, other)))
            for table in tables
        ]
        draws = 100 * np.mean([difference.draws for difference in inside], axis=0)
        assert pair["on_these_sets"] == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))
        assert draws.std() < 100 * np.mean([difference.draws.std() for difference in inside])
    means = [method["mean"] for method in found["methods"]]
    assert means == sorted(means, reverse=True)


def test_page_over_sets_links_to_the_pages_there_are(many):
    _, folder, found = many
    page = _Page((folder / "report.html").read_text(encoding="utf-8"))
    assert [value for name, value in page.attributes if name == "href" and not value.startswith("#")] == [
        "second/report.html"
    ]
    text = " ".join(page.text)
    best = found["methods"][0]
    assert f"{best['method']} has the best mean score over the 3 sets: {best['mean']:.1f}" in text
    assert "against full fine-tuning" in text
    with open(folder / "report.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {(line["data"], line["method"]) for line in lines} == set(itertools.product(SETS, SOME))


def test_a_method_that_lacks_a_set_comes_last_and_is_told():
    sets = [records(data, SOME) for data in SETS]
    sets[1] = (sets[1][0], [failed(run) if run["method"] == "full" else run for run in sets[1][1]])
    found = across(sets)
    assert [found.averages[-1].name, list(found.averages[-1].rows)] == ["full", ["first", "third"]]
    assert "full has no score on second, so its mean is over the others." in sentences_of_many(found)
    assert (
        "full on second: 3 of 3 seeds failed: the loss is not finite at step 12."
        in cells.by_set(found, {}, Path())["notes"]
    )


def test_errors_and_losses_are_not_averaged_over_sets():
    settings, runs = records(methods=("probe",))
    for run in runs:
        run |= {"validation": {"mae": 0.5}, "test": run["test"] and {"mae": 0.5}}
    with pytest.raises(UsageError, match="made-up is scored by mae, which cannot be averaged"):
        summary([(settings | {"metric": "mae", "problem_type": "regression"}, runs)])


def test_missing_matplotlib_is_told_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        UsageError, match=r"needs matplotlib; install it with pip install \"textlora\[compare\]\""
    ):
        require_matplotlib()
    with pytest.raises(UsageError):
        render(*records(methods=("probe",)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_report_imports_nothing_heavy():
    code = "import sys, textlora.report.comparison.page as c; print([m for m in ('torch', 'matplotlib', 'scipy', 'sklearn') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


@pytest.mark.parametrize(
    ("metric", "value", "score", "signed", "points"),
    [
        ("accuracy", 0.8734, "87.3", "+87.3", "87.3 points"),
        ("mcc", -0.01, "−1.0", "−1.0", "1.0 point"),
        ("mae", 0.25, "0.2500", "+0.2500", "0.2500"),
    ],
)
def test_scale(metric, value, score, signed, points):
    scale = Scale(metric)
    assert (scale.score(value), scale.signed(value), scale.points(value)) == (score, signed, points)


def test_other_formats():
    assert [p_text(p) for p in (None, 0.0004, 0.0441, 0.1444, 1.0)] == [
        "–",
        "< 0.001",
        "0.044",
        "0.14",
        "1.00",
    ]
    assert [stored(n) for n in (None, 9_300, 304_000, 1_340_000, 90_900_000)] == [
        "–",
        "9.3 kB",
        "304.0 kB",
        "1.3 MB",
        "90.9 MB",
    ]
    assert [seconds(s) for s in (None, 0.0101, 0.4, 38.21, 1234.5)] == [
        "–",
        "0.01",
        "0.40",
        "38.2",
        "1,234.5",
    ]
    assert [Scale("accuracy").signed(v) for v in (0.0004, -0.0004, -0.0006)] == ["0.0", "0.0", "−0.1"]
    assert [Scale("mcc").score(v) for v in (None, -0.0004, -0.0006, 0.0)] == ["–", "0.0", "−0.1", "0.0"]
    assert [Scale("mae").score(v) for v in (-1234.5, -2e-5, 0.0)] == ["−1,234.5000", "−2e-05", "0.0000"]


@pytest.mark.skipif(
    PATH is None, reason="needs a Chromium on the path, which pip cannot install; .ci/run fetches one"
)
@pytest.mark.parametrize("width", [1200, 390])
def test_figures_follow_light_and_dark_in_a_browser(one, width):
    with Browser(width) as page:
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
        page.open((one[2] / "report.html").as_uri())
        assert page.js("document.documentElement.scrollWidth") <= width
        ink = "getComputedStyle([...document.querySelectorAll('figure svg text')].find(t => t.textContent.includes('lora-all'))).fill"
        light = page.js(ink)
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        page.wait(f"{ink} === 'rgb(230, 233, 239)'")
        assert light == "rgb(27, 34, 48)"
        # Markers are used by reference: each must have a size.
        assert page.js(
            "[...document.querySelectorAll('figure use')].every(u => { const r = u.getBoundingClientRect(); return r.width + r.height > 1; })"
        )
        smallest = "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
        assert page.js(smallest) >= (10 if width > 500 else 6)
        assert page.problems() == []

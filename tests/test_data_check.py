"""The data report: every finding on rows where it is known."""

import json

import numpy as np

from textlora.data import check_tables, infer_schema, read_table


def report_of(train, evaluations=None, lengths=None, max_length=None, **options):
    train = read_table(train)
    evaluations = {split: read_table(rows, need_labels=False) for split, rows in (evaluations or {}).items()}
    return check_tables(train, evaluations, infer_schema(train.rows, **options), lengths, max_length)


def test_every_finding():
    train = [
        ("a", "x"),
        ("b", "y"),
        ("a", "x"),
        ("b", "x"),
        ("a", "x"),
        (" ", "x"),
        ("", "x"),
        ("c", "x"),
        ("d", "x"),
    ]
    test = [("a", "x"), ("new", "z"), ("b", "y"), ("", "x"), ("new", "z"), ("free", None)]
    lengths = np.array([4, 8, 4, 8, 4, 2, 2, 16, 40])
    report = report_of(train, {"test": test}, lengths, 10)
    assert report.rows == {"train": 9, "test": 6}
    assert report.classes == {"x": 8, "y": 1}
    assert report.shares == {"x": 8 / 9, "y": 1 / 9}
    assert report.imbalance == 8
    assert report.empty == {"train": 2, "test": 1}
    assert (report.duplicates, report.conflicts) == (3, 1)
    assert report.leaks == {"test": 2}
    assert report.unknown_labels == {"test": {"z": 2}}
    assert report.wheres == {
        "empty:train": ["rows row 6, column 'text'", "rows row 7, column 'text'"],
        "empty:test": ["rows row 4, column 'text'"],
        "duplicates": ["rows row 3 = rows row 1", "rows row 4 = rows row 2", "rows row 5 = rows row 1"],
        "conflicts": ["rows row 2"],
        "leaks:test": ["rows row 1 = rows row 1", "rows row 3 = rows row 2"],
        "unknown:test": ["rows row 2, column 'label'", "rows row 5, column 'label'"],
    }
    assert (report.lengths.min, report.lengths.median, report.lengths.max) == (2, 4, 40)
    assert report.lengths.edges == [0, 8, 16, 32, 64]
    assert report.lengths.counts == [5, 2, 1, 1]
    assert report.lengths.rows_truncated == 2 / 9
    assert report.lengths.tokens_lost == (6 + 30) / 88
    assert json.loads(json.dumps(report.as_dict()))["classes"] == {"x": 8, "y": 1}
    lines = report.lines()
    assert lines[:2] == ["Rows: 9 train, 6 test.", "2 classes: x 8 (88.9%), y 1 (11.1%)."]
    assert lines[3] == "Cutting at 10 tokens truncates 22.2% of the rows and loses 40.9% of the tokens."
    assert "Warning: 2 test rows (33.3%) also stand in train, the first is rows row 1 = rows row 1." in lines
    assert len(lines) <= 12


def test_clean_data_say_so():
    report = report_of([("a", "x"), ("b", "y")], {"test": [("c", "x")]})
    assert report.warnings == []
    assert report.lines()[-1] == "No empty rows, duplicates, shared rows or unknown labels."


def test_pairs_multi_label_and_regression():
    pairs = report_of(
        [("a", "b", "x"), ("a", "c", "y"), ("a", "b", "y")], {"test": [("a", "d", "x"), ("a", "c", "x")]}
    )
    assert (pairs.duplicates, pairs.conflicts, pairs.leaks) == (1, 1, {"test": 1})
    multi = report_of(
        [("a", ["x", "y"]), ("b", []), ("a", ["y", "x"]), ("c", ["x"])], {"test": [("d", ["x", "z"])]}
    )
    assert (multi.classes, multi.unlabelled) == ({"x": 3, "y": 2}, 1)
    assert multi.shares == {"x": 0.75, "y": 0.5}
    assert (multi.duplicates, multi.conflicts) == (1, 0)
    assert multi.unknown_labels == {"test": {"z": 1}}
    numbers = report_of([("a", 0.5), ("b", 1.5), ("c", 4)], {"test": [("d", "x")]})
    assert numbers.classes == {}
    assert numbers.target == {"min": 0.5, "mean": 2.0, "median": 1.5, "max": 4.0}
    assert numbers.unknown_labels == {"test": {"x": 1}}


def test_imbalance_and_many_classes_warn():
    rows = [(f"a{n}", "x") for n in range(20)] + [("b", "y"), ("c", "y")]
    assert report_of(rows).warnings == ["the largest class has 10 times the rows of the smallest, y (2)"]
    assert "25 classes in 25 rows" in report_of([(f"a{n}", f"c{n}") for n in range(25)]).warnings[0]


def test_at_most_twelve_lines():
    train = [("a", "x"), ("a", "y"), ("", "x")] + [(f"t{n}", "x") for n in range(20)]
    bad = [("a", "z"), ("", "x")]
    report = report_of(train, dict.fromkeys(("one", "two", "three", "four"), bad), np.full(23, 20), 10)
    assert len(report.lines()) == 12
    assert report.lines()[-1].startswith("... and ")

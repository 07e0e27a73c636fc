"""What labels mean: the detection rule, the order of classes, and encoded targets."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textlora.core.errors import DataError, UsageError
from textlora.data import MULTI, REGRESSION, SINGLE, LabelSchema, Row, infer_schema


def rows_of(*labels):
    return [Row("a", None, label, where, "test.csv") for where, label in enumerate(labels, 2)]


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["pos", "neg", "pos"], SINGLE, ("neg", "pos")),
        (["b ", "B", " a"], SINGLE, ("B", "a", "b")),
        ([1, 0, 1], SINGLE, ("0", "1")),
        ([1.0, 0.0, 10.0, 2.0], SINGLE, ("0", "1", "2", "10")),
        (["10", "9", "-1"], SINGLE, ("-1", "9", "10")),
        (["01", "1", "2"], SINGLE, ("01", "1", "2")),
        (["1.0", "2"], SINGLE, ("1.0", "2")),
        ([True, False], SINGLE, ("false", "true")),
        (["NA", "null"], SINGLE, ("NA", "null")),
        (["1", "nan"], SINGLE, ("1", "nan")),
        (["1.5", "1_000"], SINGLE, ("1.5", "1_000")),
        ([1, "2.5"], REGRESSION, ("value",)),
        (["0", ".5", "-1e-3"], REGRESSION, ("value",)),
        ([["x", "b"], [], ["b"]], MULTI, ("b", "x")),
        ([["x"], ["x"]], MULTI, ("x",)),
        ([[10], [2, 1]], MULTI, ("1", "2", "10")),
    ],
)
def test_the_rule(labels, kind, names):
    schema = infer_schema(rows_of(*labels))
    assert (schema.problem_type, schema.labels) == (kind, names)


def test_order_does_not_depend_on_the_rows():
    labels = ["c", "a", "b", "10", "9"]
    assert infer_schema(rows_of(*labels)) == infer_schema(rows_of(*reversed(labels)))


def test_override_and_separator():
    assert infer_schema(rows_of("1.5", "0.5"), "single-label").labels == ("0.5", "1.5")
    assert infer_schema(rows_of("1", "0"), "regression").encode(rows_of("1")[0]) == 1.0
    assert infer_schema(rows_of(1, 0), REGRESSION).problem_type == REGRESSION
    schema = infer_schema(rows_of("x|b ", "", "b||x"), label_separator="|")
    assert schema == LabelSchema(MULTI, ("b", "x"), "|")
    assert schema.encode_all(rows_of("x", "", "b|x|b", ["b"])).tolist() == [[0, 1], [0, 0], [1, 1], [1, 0]]
    assert infer_schema(rows_of(["a"], ["b"]), "single-label").encode_all(rows_of(["b"], "a")).tolist() == [
        1,
        0,
    ]
    with pytest.raises(
        UsageError, match="unknown problem type 'multi'; use single-label, multi-label, regression"
    ):
        infer_schema(rows_of("a"), "multi")
    with pytest.raises(UsageError, match="separator"):
        infer_schema(rows_of("a"), "regression", "|")


@pytest.mark.parametrize(
    ("labels", "kind", "match"),
    [
        ([], None, "no rows"),
        (["a", "a"], None, "test.csv, column 'label': every row has the label 'a'"),
        ([[], []], None, "no row has a label"),
        (["a", None], None, "test.csv line 3, column 'label': no label"),
        (["a", math.nan], None, "test.csv line 3, column 'label': no label"),
        (["a", " "], None, "test.csv line 3, column 'label': no label"),
        (["1", "x"], "regression", "test.csv line 3, column 'label': 'x' is not a finite number"),
        ([1.5, math.inf], "regression", "test.csv line 3, column 'label': inf is not a finite number"),
        ([1.5, None], "regression", "test.csv line 3, column 'label': no label"),
        ([1.5, [2]], "regression", "line 3, column 'label': a list in place of a number"),
        ([1.5, True], "regression", "line 3, column 'label': True is not a finite number"),
        ([1.5, 1e39], "regression", "line 3, column 'label': 1e.39 is not a finite number"),
        ([1.5, 10**400], "regression", "line 3, column 'label': 10+... is not a finite number"),
        (["a", ["b", "c"]], "single-label", "line 3, column 'label': 2 labels where one is needed"),
        (
            ["a|b"],
            "multi-label",
            "line 2, column 'label': 'a.b' is no list of labels; give --label-separator",
        ),
    ],
)
def test_labels_that_do_not_fit(labels, kind, match):
    with pytest.raises(DataError, match=match):
        infer_schema(rows_of(*labels), kind)


def test_encoding_kinds_and_unknown_labels():
    schema = infer_schema(rows_of("1", "0", "2"))
    encoded = schema.encode_all(rows_of(2, "0", 1.0))
    assert encoded.dtype == np.int64
    assert encoded.tolist() == [2, 0, 1]
    numbers = LabelSchema(REGRESSION, ("value",)).encode_all(rows_of("0.5", 2))
    assert numbers.dtype == np.float32
    assert numbers.tolist() == [0.5, 2.0]
    with pytest.raises(
        DataError,
        match=r"test.csv line 2, column 'kind': label 'x' was not in the training data \(known: 0, 1, 2\)",
    ):
        schema.encode(rows_of("x")[0], "kind")
    many = LabelSchema(SINGLE, tuple(str(n) for n in range(12)))
    with pytest.raises(DataError, match=r"known: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"):
        many.encode(rows_of("x")[0])


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())),
        max_size=5,
    )
)
def test_any_labels_give_a_schema_that_encodes_them_or_data_error(labels):
    rows = rows_of(*labels)
    try:
        schema = infer_schema(rows)
    except DataError:
        return
    assert len(schema.encode_all(rows)) == len(rows)
    if schema.problem_type != REGRESSION:
        encoded = schema.encode_all(rows)
        width = len(schema.labels)
        used = (
            set(encoded.tolist())
            if schema.problem_type == SINGLE
            else set(np.flatnonzero(encoded.any(axis=0)).tolist())
        )
        assert used == set(range(width))

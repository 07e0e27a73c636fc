"""Metrics against scikit-learn and SciPy, intervals against what they promise, tables against counts by hand."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from scipy.special import expit, softmax
from sklearn import metrics as sk

from textlora.core.errors import UsageError
from textlora.metrics.ranking import average_precision, roc_auc, spearman
from textlora.metrics.scores import (
    DEFAULT_METRIC,
    METRICS,
    calibration_bins,
    cannot_tell,
    confusion,
    details,
    evaluate,
    intervals,
    per_class,
)

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def names(count):
    return [f"label {i}" for i in range(count)]


def single(rows, classes, seed=0, strength=1.5):
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, rows)
    return labels, random.normal(size=(rows, classes)) + strength * np.eye(classes)[labels]


def multi(rows, classes, seed=0):
    random = np.random.default_rng(seed)
    labels = (random.random((rows, classes)) < 0.3).astype(np.float32)
    return labels, random.normal(size=(rows, classes)) + 2 * labels - 1


def regression(rows, seed=0):
    random = np.random.default_rng(seed)
    labels = np.round(random.random(rows) * 5, 1)  # rounded: some ties
    return labels, np.round(labels + random.normal(size=rows), 1)[:, None]


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_single_label_metrics_are_scikit_learns(classes, temperature):
    labels, logits = single(300, classes)
    probs = softmax(logits / temperature, axis=1)
    found = evaluate(SINGLE, labels, logits, names(classes), temperature=temperature)
    picked = logits.argmax(axis=1)
    area = (
        sk.roc_auc_score(labels, probs[:, 1])
        if classes == 2
        else sk.roc_auc_score(labels, probs, multi_class="ovr")
    )
    assert found.pop("ece") > 0
    assert found == pytest.approx(
        {
            "accuracy": sk.accuracy_score(labels, picked),
            "macro_f1": sk.f1_score(labels, picked, average="macro"),
            "weighted_f1": sk.f1_score(labels, picked, average="weighted"),
            "mcc": sk.matthews_corrcoef(labels, picked),
            "auc": area,
            "log_loss": sk.log_loss(labels, probs),
        },
        abs=1e-12,
    )


def test_multi_label_metrics_are_scikit_learns():
    labels, logits = multi(200, 6)
    labels[:, 5] = 0  # a label that never occurs, and is sometimes predicted
    logits[:, 4], labels[:, 4] = -9, 0  # and one that is not even predicted
    probs, thresholds = expit(logits / 1.3), np.array([0.5, 0.3, 0.7, 0.5, 0.5, 0.5])
    picked = probs >= thresholds
    assert evaluate(MULTI, labels, logits, names(6), temperature=1.3, thresholds=thresholds) == pytest.approx(
        {
            "micro_f1": sk.f1_score(labels, picked, average="micro", zero_division=0),
            "macro_f1": sk.f1_score(labels, picked, average="macro", zero_division=0),
            "exact_match": sk.accuracy_score(labels, picked),
            "hamming_loss": sk.hamming_loss(labels, picked),
            "macro_average_precision": sk.average_precision_score(
                labels[:, :4], probs[:, :4], average="macro"
            ),
            "log_loss": np.mean([sk.log_loss(labels[:, c], probs[:, c], labels=[0, 1]) for c in range(6)]),
        },
        abs=1e-12,
    )


def test_regression_metrics_are_scipys():
    labels, values = regression(250)
    guess = values[:, 0]
    expected = {
        "spearman": stats.spearmanr(labels, guess).statistic,
        "pearson": stats.pearsonr(labels, guess).statistic,
        "mse": sk.mean_squared_error(labels, guess),
        "mae": sk.mean_absolute_error(labels, guess),
        "r2": sk.r2_score(labels, guess),
    }
    assert evaluate(REGRESSION, labels, values, []) == pytest.approx(expected, abs=1e-12)
    assert evaluate(REGRESSION, labels, guess, []) == pytest.approx(expected, abs=1e-12)
    far = evaluate(REGRESSION, labels + 1e6, guess + 1e6, [])
    assert far["pearson"] == pytest.approx(expected["pearson"], abs=1e-8)


def test_ece_by_hand():
    # Confidences 0.9 (right) and 0.9 (wrong) share bin (13/15, 14/15]: gap |0.9 - 0.5|; 0.6 (right) is alone:
    # gap 0.4.
    logits = np.log(np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]]))
    assert evaluate(SINGLE, np.array([0, 1, 1]), logits, names(2))["ece"] == pytest.approx(
        (2 * 0.4 + 0.4) / 3
    )


@given(
    st.integers(2, 25).flatmap(
        lambda n: st.tuples(
            arrays(np.bool_, n),
            arrays(np.float64, n, elements=st.integers(-3, 3)),
            arrays(np.int64, n, elements=st.integers(0, 3)),
        )
    )
)
@settings(deadline=None)
def test_weighted_rank_metrics_equal_the_metric_of_repeated_rows(case):
    positive, scores, weights = case
    repeated, again = np.repeat(positive, weights), np.repeat(scores, weights)
    row = weights[None].astype(float)
    both = repeated.any() and not repeated.all()
    area = sk.roc_auc_score(repeated, again) if both else np.nan
    np.testing.assert_allclose(roc_auc(positive, scores, row), [area], atol=1e-12)
    precision = sk.average_precision_score(repeated, again) if repeated.any() else np.nan
    np.testing.assert_allclose(average_precision(positive, scores, row), [precision], atol=1e-12)
    other = positive + np.arange(len(scores)) % 2
    varied = both and len(set(again)) > 1 and len(set(np.repeat(other, weights))) > 1
    if varied:
        expected = stats.spearmanr(np.repeat(other, weights), again).statistic
        np.testing.assert_allclose(spearman(other, scores, row), [expected], atol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(2, 4))
@settings(max_examples=40, deadline=None)
def test_any_single_label_rows_give_values_in_range_or_none(seed, rows, classes):
    labels, logits = single(rows, classes, seed)
    found = evaluate(SINGLE, labels, logits, names(classes))
    assert list(found) == [n for n, info in METRICS.items() if SINGLE in info.problem_types]
    assert (found["auc"] is None) == (len(set(labels)) < classes)
    assert -1 <= found["mcc"] <= 1
    assert all(0 <= found[n] <= 1 for n in ("accuracy", "macro_f1", "weighted_f1", "ece"))
    order = np.random.default_rng(seed).permutation(rows)
    assert evaluate(SINGLE, labels[order], logits[order], names(classes)) == pytest.approx(found, nan_ok=True)


def test_what_cannot_be_computed_is_none():
    labels, logits = single(20, 3)
    for problem_type, y, z in (
        (SINGLE, labels[:0], logits[:0]),
        (SINGLE, labels, logits * np.nan),
        (MULTI, logits > 0, logits * np.inf),
    ):
        found = evaluate(problem_type, y, z, names(3))
        assert set(found.values()) == {None}
        assert json.loads(json.dumps(found)) == found
        assert intervals(problem_type, y, z) == {}
    constant = evaluate(REGRESSION, np.full(5, 0.1), np.arange(5.0), [])
    assert [constant[n] for n in ("spearman", "pearson", "r2")] == [None, None, None]
    assert constant["mae"] == pytest.approx(1.94)
    assert evaluate(REGRESSION, np.arange(5.0), np.full(5, 0.1), [])["pearson"] is None
    assert evaluate(REGRESSION, np.array([0.0, 1e200]), np.array([1e200, 0.0]), [])["mse"] is None
    assert evaluate(SINGLE, np.zeros(4, int), np.eye(2)[[0, 0, 0, 0]], names(2))["mcc"] == 0.0
    empty = evaluate(MULTI, np.zeros((3, 2)), np.full((3, 2), -1.0), names(2))
    assert (empty["micro_f1"], empty["exact_match"], empty["macro_average_precision"]) == (0.0, 1.0, None)


def test_wilson_interval_is_scipys():
    labels, logits = single(137, 3)
    right = int((logits.argmax(axis=1) == labels).sum())
    expected = stats.binomtest(right, 137).proportion_ci(method="wilson")
    assert intervals(SINGLE, labels, logits, metrics=["accuracy"])["accuracy"] == pytest.approx(
        (expected.low, expected.high)
    )
    truth, scores = multi(90, 2)
    right = int(((scores >= 0) == truth).all(axis=1).sum())
    expected = stats.binomtest(right, 90).proportion_ci(method="wilson")
    assert intervals(MULTI, truth, scores, metrics=["exact_match"])["exact_match"] == pytest.approx(
        (expected.low, expected.high)
    )
    perfect = intervals(SINGLE, np.arange(2), np.eye(2), metrics=["accuracy"])["accuracy"]
    assert perfect == pytest.approx(stats.binomtest(2, 2).proportion_ci(method="wilson")[:])
    assert perfect[1] == 1.0


@pytest.mark.parametrize(
    ("problem_type", "rows"),
    [
        (SINGLE, single(400, 2)),
        (SINGLE, single(400, 5)),
        (MULTI, multi(400, 4)),
        (REGRESSION, regression(400)),
    ],
)
def test_intervals_hold_the_estimate_for_every_metric_but_ece(problem_type, rows):
    estimate = evaluate(problem_type, *rows, names(rows[1].shape[1]))
    found = intervals(problem_type, *rows)
    assert set(found) == set(estimate) - {"ece"}
    for name, (low, high) in found.items():
        assert low < estimate[name] < high, name
    assert json.loads(json.dumps(found))


def test_bootstrap_matches_one_that_evaluates_every_resample():
    labels, logits = single(200, 3)
    random = np.random.default_rng(5)
    draws = [random.integers(200, size=200) for _ in range(400)]
    slow = [evaluate(SINGLE, labels[d], logits[d], names(3)) for d in draws]
    fast = intervals(SINGLE, labels, logits, seed=3)
    for name in ("macro_f1", "weighted_f1", "mcc", "auc", "log_loss"):
        low, high = np.percentile([s[name] for s in slow], [2.5, 97.5])
        assert fast[name] == pytest.approx((low, high), abs=0.2 * (high - low)), name


def test_intervals_cover_the_truth_about_95_times_in_100():
    everything = single(100_000, 2, seed=7)
    truth = evaluate(SINGLE, *everything, names(2))
    wanted = ["accuracy", "macro_f1", "auc", "log_loss"]
    hits = dict.fromkeys(wanted, 0)
    for start in range(0, 100_000, 500):
        part = slice(start, start + 500)
        for name, (low, high) in intervals(
            SINGLE, everything[0][part], everything[1][part], metrics=wanted, resamples=200
        ).items():
            hits[name] += low <= truth[name] <= high
    assert all(180 <= count <= 199 for count in hits.values()), hits


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_four_rows_without_a_mistake_make_no_score_certain(problem_type):
    labels = np.array([0, 1, 0, 1])
    logits = np.eye(2)[labels] * 8 - 4
    labels = labels if problem_type == SINGLE else np.eye(2)[labels]
    value, found = evaluate(problem_type, labels, logits, names(2)), intervals(problem_type, labels, logits)
    assert set(found) == set(value) - {"ece"}
    for name, (low, high) in found.items():
        assert low <= value[name] <= high, name
        if name in ("hamming_loss", "log_loss"):
            assert high >= 0.4, name
        else:
            assert low <= 0.6, name


def test_few_regression_rows_leave_everything_open():
    labels = np.array([1.0, 2.0, 3.0, 4.0])
    found = intervals(REGRESSION, labels, (labels + np.array([0.01, -0.02, 0.01, 0.02]))[:, None])
    assert found["spearman"][0] < 0.3
    assert found["spearman"][1] == 1
    assert found["pearson"][0] < 0.3
    assert found["mse"][1] > 5 * found["mse"][0]
    assert found["r2"][0] < 0.999
    assert not {"mse", "mae", "r2"} & set(
        intervals(REGRESSION, labels, labels[:, None])
    )  # an error of exactly 0 tells no spread
    assert set(intervals(REGRESSION, labels[:1], labels[:1, None] + 1)) == set()


def test_what_few_rows_cannot_tell_has_no_interval():
    one_label = intervals(SINGLE, np.zeros(4, int), np.eye(2)[[0, 0, 0, 0]])
    assert "mcc" not in one_label
    assert one_label["macro_f1"][0] < 0.3
    assert one_label["macro_f1"][1] == 1  # the other label's F1 may be anything
    assert "micro_f1" not in intervals(MULTI, np.zeros((4, 2)), np.full((4, 2), -1.0))


def _simulated(kind, count, random):
    if kind == SINGLE:
        labels = random.choice(3, size=count, p=[0.6, 0.3, 0.1])
        return labels, 2 * (random.normal(size=(count, 3)) + 2.5 * np.eye(3)[labels])
    if kind == MULTI:
        labels = random.random((count, 4)) < [0.5, 0.3, 0.2, 0.1]
        return labels.astype(int), 3 * (random.normal(size=(count, 4)) + 3 * labels - 1.8)
    labels = random.normal(size=count)
    return labels, (labels + 0.5 * random.normal(size=count))[:, None]


@pytest.mark.parametrize("kind", [SINGLE, MULTI, REGRESSION])
def test_intervals_of_few_rows_cover_the_truth(kind):
    random = np.random.default_rng(8)
    labels, logits = _simulated(kind, 20_000, random)
    truth = evaluate(kind, labels, logits, names(logits.shape[1]))
    for size in (4, 30):
        held: dict[str, list[bool]] = {}
        for _ in range(40):
            rows = random.integers(len(labels), size=size)
            for name, (low, high) in intervals(kind, labels[rows], logits[rows], resamples=50).items():
                assert low < high, name
                held.setdefault(name, []).append(low <= truth[name] <= high)
        # with 40 samples, a coverage of 95 % falls below 80 % less than once in a thousand times
        assert all(np.mean(found) >= 0.8 for found in held.values()), {
            name: np.mean(found) for name, found in held.items()
        }
        assert set(held) >= set(truth) - {"ece", "auc", "mcc"}


def test_intervals_depend_on_the_seed_only():
    rows = single(150, 3)
    whole = intervals(SINGLE, *rows, resamples=150)
    assert whole == intervals(SINGLE, *rows, resamples=150)
    assert whole["macro_f1"] != intervals(SINGLE, *rows, resamples=150, seed=1)["macro_f1"]
    assert intervals(SINGLE, *rows, resamples=150, metrics=["auc", "mcc"]) == {
        "mcc": whole["mcc"],
        "auc": whole["auc"],
    }


def test_large_intervals_are_quick():
    rows = single(25_000, 2)
    start = time.process_time()
    intervals(SINGLE, *rows)
    assert time.process_time() - start < 6  # below 1 s on an idle core


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: evaluate("other", np.zeros(1), np.zeros((1, 2)), names(2)), "unknown problem type 'other'"),
        (
            lambda: evaluate(SINGLE, np.array([0, 2]), np.zeros((2, 2)), names(2)),
            "label 2 of row 1 is not among the 2 labels",
        ),
        (
            lambda: evaluate(SINGLE, np.array([0]), np.zeros((2, 2)), names(2)),
            r"labels of shape \(1,\) do not fit logits of shape \(2, 2\)",
        ),
        (
            lambda: evaluate(MULTI, np.zeros(2), np.zeros((2, 2)), names(2)),
            r"multi_label_classification labels of shape \(2,\)",
        ),
        (lambda: evaluate(REGRESSION, np.zeros(2), np.zeros((2, 2)), []), "regression labels"),
        (
            lambda: evaluate(SINGLE, np.array([0]), np.zeros((1, 2)), names(3)),
            "3 label names for logits of 2 labels",
        ),
        (
            lambda: intervals(SINGLE, *single(5, 2), metrics=["mse"]),
            "'mse' is not a metric of single_label_classification; use one of accuracy",
        ),
    ],
)
def test_refusals(call, words):
    with pytest.raises(UsageError, match=words):
        call()


def test_the_table_of_metrics_is_complete():
    assert DEFAULT_METRIC == {SINGLE: "accuracy", MULTI: "micro_f1", REGRESSION: "spearman"}
    assert all(problem_type in METRICS[name].problem_types for problem_type, name in DEFAULT_METRIC.items())
    assert {n for n, info in METRICS.items() if not info.higher_is_better} == {
        "hamming_loss",
        "log_loss",
        "ece",
        "mse",
        "mae",
    }


def test_confusion_and_per_class_by_hand():
    labels, picked = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 0, 0])
    assert confusion(labels, picked, 4).tolist() == [[2, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert per_class(labels, picked, ["a", "b", "c", "d"]) == [
        {
            "label": "a",
            "support": 3,
            "precision": 0.5,
            "recall": pytest.approx(2 / 3),
            "f1": pytest.approx(4 / 7),
        },
        {"label": "b", "support": 2, "precision": 0.5, "recall": 0.5, "f1": 0.5},
        {"label": "c", "support": 1, "precision": None, "recall": 0.0, "f1": 0.0},
        {"label": "d", "support": 0, "precision": None, "recall": None, "f1": None},
    ]
    table = per_class(np.array([[1, 0], [1, 1]]), np.array([[True, False], [False, True]]), ["a", "b"])
    assert [(r["support"], r["precision"], r["recall"]) for r in table] == [(2, 1.0, 0.5), (1, 1.0, 1.0)]


def test_calibration_bins_by_hand():
    bins = calibration_bins(np.array([0.0, 0.5, 0.51, 0.7, 1.0]), np.array([0, 1, 0, 1, 1]), bins=2)
    assert bins == [
        {"low": 0.0, "high": 0.5, "count": 2, "confidence": 0.25, "accuracy": 0.5},
        {
            "low": 0.5,
            "high": 1.0,
            "count": 3,
            "confidence": pytest.approx(2.21 / 3),
            "accuracy": pytest.approx(2 / 3),
        },
    ]
    assert calibration_bins(np.array([0.9]), np.array([1]), bins=2)[0]["accuracy"] is None


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_the_bins_add_up_to_the_ece(seed):
    labels, logits = single(60, 3, seed)
    bins = details(SINGLE, labels, logits, names(3), ["t"] * 60, ["w"] * 60)["calibration"]
    gap = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins if b["count"]) / 60
    assert gap == pytest.approx(evaluate(SINGLE, labels, logits, names(3))["ece"])


def test_single_label_details():
    labels = np.array([0, 0, 1, 1])
    logits = np.log(np.array([[0.9, 0.1], [0.3, 0.7], [0.2, 0.8], [0.95, 0.05]]))
    found = details(
        SINGLE, labels, logits, ["no", "yes"], ["a", "b", "c", "x" * 400], ["r1", "r2", "r3", "r4"]
    )
    assert found["confusion"] == [[1, 1], [1, 1]]
    assert found["scatter"] == []
    assert found["mistakes"] == [
        {
            "text": "x" * 299 + "…",
            "where": "r4",
            "label": "yes",
            "predicted": "no",
            "score": pytest.approx(0.95),
        },
        {"text": "b", "where": "r2", "label": "no", "predicted": "yes", "score": pytest.approx(0.7)},
    ]
    assert json.loads(json.dumps(found)) == found
    assert (
        len(details(SINGLE, labels, logits, ["no", "yes"], ["t"] * 4, ["w"] * 4, mistakes=1)["mistakes"]) == 1
    )


def test_multi_label_details():
    labels = np.array([[1, 0], [0, 1], [1, 1]], dtype=np.float32)
    logits = np.log(
        np.array([[9.0, 1 / 9], [4.0, 9.0], [9.0, 1 / 19]])
    )  # odds: probabilities 0.9 0.1, 0.8 0.9, 0.9 0.05
    found = details(MULTI, labels, logits, ["a", "b"], ["t0", "t1", "t2"], ["w0", "w1", "w2"])
    assert found["confusion"] is None
    assert found["mistakes"] == [
        {"text": "t2", "where": "w2", "label": ["a", "b"], "predicted": ["a"], "score": pytest.approx(0.95)},
        {"text": "t1", "where": "w1", "label": ["b"], "predicted": ["a", "b"], "score": pytest.approx(0.8)},
    ]
    assert sum(b["count"] for b in found["calibration"]) == 6
    assert json.loads(json.dumps(found)) == found


def test_regression_details():
    labels = np.arange(600.0)
    values = labels.copy()
    values[17] += 5
    values[3] -= 8
    found = details(
        REGRESSION,
        labels,
        values[:, None],
        [],
        [f"t{i}" for i in range(600)],
        [f"w{i}" for i in range(600)],
        mistakes=2,
    )
    assert found["mistakes"] == [
        {"text": "t3", "where": "w3", "label": 3.0, "predicted": -5.0, "score": 8.0},
        {"text": "t17", "where": "w17", "label": 17.0, "predicted": 22.0, "score": 5.0},
    ]
    assert len(found["scatter"]) == 500
    assert {tuple(p) for p in found["scatter"]} <= set(zip(labels.tolist(), values.tolist(), strict=True))
    assert (found["per_class"], found["calibration"]) == ([], [])


def test_details_of_broken_logits_are_empty():
    found = details(SINGLE, np.array([0]), np.array([[np.nan, 0.0]]), names(2), ["t"], ["w"])
    assert found == {"confusion": None, "per_class": [], "calibration": [], "mistakes": [], "scatter": []}


@pytest.mark.parametrize(
    ("metric", "value", "interval", "told"),
    [
        ("accuracy", 0.9, (0.8, 0.95), True),
        ("accuracy", 0.9, (0.6, 0.95), False),
        ("micro_f1", 1.0, None, False),
        ("mse", 4.0, (3.0, 5.9), True),
        ("mse", 4.0, (1.0, 9.0), False),
        ("ece", 0.1, None, True),
        ("auc", None, None, True),
    ],
)
def test_a_sentence_where_the_rows_cannot_tell(metric, value, interval, told):
    assert (cannot_tell(metric, value, interval, 10) is None) == told

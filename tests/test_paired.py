"""Intervals over seeds and paired tests: SciPy is the oracle where it has the same thing."""

import numpy as np
import pytest
from scipy import stats

from textlora.metrics.paired import DECIDED, RESAMPLES, holm, paired_scores, t_975, t_interval, t_test
from textlora.metrics.scores import evaluate

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@pytest.mark.parametrize("freedom", [*range(1, 13), 29, 30, 100])
def test_t_quantile(freedom):
    assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


@pytest.mark.parametrize("values", [[0.81, 0.84, 0.79], [0.5, 0.9], [1.0, 2.0, 4.0, 8.0, 16.0, -3.0]])
def test_t_interval_and_t_test(values):
    found = stats.ttest_1samp(values, 0.0)
    mean, half = t_interval(values)
    assert (mean - half, mean + half) == pytest.approx(tuple(found.confidence_interval(0.95)))
    assert t_test(values) == pytest.approx(found.pvalue)


def test_t_of_one_value_and_of_equal_values():
    assert t_interval([0.8]) == (0.8, None)
    assert t_interval([0.8, 0.8, 0.8]) == pytest.approx((0.8, 0.0))
    assert [t_test([0.8]), t_test([0.0, 0.0]), t_test([0.5, 0.5])] == [None, 1.0, 0.0]


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last may not fall below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def decisions(problem_type, seed, rows=90):
    random = np.random.default_rng(seed)
    if problem_type == SINGLE:
        labels = random.integers(0, 3, rows)
        return labels, np.where(random.random(rows) < 0.7, labels, random.integers(0, 3, rows))
    if problem_type == MULTI:
        labels = random.integers(0, 2, (rows, 3))
        return labels, np.where(random.random((rows, 3)) < 0.8, labels, 1 - labels)
    labels = random.normal(size=rows)
    return labels, labels + random.normal(size=rows)


def as_logits(problem_type, made):
    made = np.asarray(made)
    return (
        np.eye(3)[made]
        if problem_type == SINGLE
        else made * 2.0 - 1
        if problem_type == MULTI
        else made[:, None]
    )


@pytest.mark.parametrize(
    ("problem_type", "metric"), [(kind, metric) for kind, names in DECIDED.items() for metric in names]
)
def test_scores_are_those_of_evaluate_on_the_rows_and_on_every_resample(problem_type, metric):
    labels, one = decisions(problem_type, 1)
    two = np.roll(one, 7, axis=0)
    names = ["a", "b", "c"] if problem_type != REGRESSION else ["value"]
    found = paired_scores(
        problem_type, metric, labels.tolist(), {"m": {0: one.tolist(), 1: two.tolist()}}, resamples=5, seed=3
    )

    def score(rows, made):
        return evaluate(problem_type, labels[rows], as_logits(problem_type, made[rows]), names)[metric]

    assert found.values["m"] == pytest.approx({0: score(slice(None), one), 1: score(slice(None), two)})
    random = np.random.default_rng([3, 0])
    draws = [random.integers(len(labels), size=len(labels)) for _ in range(5)]
    assert found.draws["m"] == pytest.approx([(score(rows, one) + score(rows, two)) / 2 for rows in draws])


def test_interval_is_scipys_paired_bootstrap_and_p_that_of_a_paired_t_test():
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 400)
    good = np.where(random.random(400) < 0.85, labels, 1 - labels)
    poor = np.where(random.random(400) < 0.79, labels, 1 - labels)
    found = paired_scores(SINGLE, "accuracy", labels, {"good": {0: good}, "poor": {0: poor}}).difference(
        "good", "poor"
    )
    gaps = (good == labels).astype(float) - (poor == labels)
    wanted = stats.bootstrap(
        (gaps,), np.mean, n_resamples=20000, method="percentile", rng=np.random.default_rng(1)
    )
    assert found.value == pytest.approx(gaps.mean())
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval), abs=0.004)
    assert found.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, abs=0.01)
    assert len(found.draws) == RESAMPLES


def shifted(shifts, labels):
    """Predictions whose mean absolute error is the shift on every row: the rows have no luck, only the seeds."""
    return {seed: [label + shift for label in labels] for seed, shift in shifts.items()}


def test_luck_of_the_seeds_is_the_paired_t_interval_where_rows_have_none():
    labels = np.linspace(0, 3, 40)
    mine, theirs = {1: 0.50, 2: 0.62, 3: 0.55, 4: 0.59}, {1: 0.41, 2: 0.58, 3: 0.40, 4: 0.52}
    both = {"mine": shifted(mine, labels), "theirs": shifted(theirs, labels)}
    found = paired_scores(REGRESSION, "mae", labels, both, resamples=20000).difference("mine", "theirs")
    wanted = stats.ttest_rel(list(mine.values()), list(theirs.values()))
    assert found.value == pytest.approx(0.0875)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)), abs=0.008)
    assert found.p == pytest.approx(wanted.pvalue, abs=0.01)


def test_luck_of_unlike_seeds_is_welchs_and_of_one_seed_none():
    labels = np.linspace(0, 3, 40)
    mine, theirs = {1: 0.50, 2: 0.62, 3: 0.55, 4: 0.59}, {5: 0.41, 6: 0.58, 7: 0.47}
    both = {
        "mine": shifted(mine, labels),
        "theirs": shifted(theirs, labels),
        "single": shifted({1: 0.7}, labels),
    }
    scores = paired_scores(REGRESSION, "mae", labels, both, resamples=20000)
    found = scores.difference("mine", "theirs")
    wanted = stats.ttest_ind(list(mine.values()), list(theirs.values()), equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)), abs=0.006)
    assert found.p == pytest.approx(wanted.pvalue, abs=0.01)
    fitted = scores.difference("mine", "single")
    half = stats.t.ppf(0.975, 3) * stats.sem(list(mine.values()))
    assert (fitted.low, fitted.high) == pytest.approx((fitted.value - half, fitted.value + half), abs=0.008)


def test_a_method_against_itself_and_its_mirror_image():
    labels, made = decisions(SINGLE, 5)
    scores = paired_scores(
        SINGLE,
        "macro_f1",
        labels,
        {"a": {0: made, 1: labels}, "b": {0: made, 1: labels}, "c": {0: made, 1: made}},
    )
    same, one, other = scores.difference("a", "b"), scores.difference("a", "c"), scores.difference("c", "a")
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert one.value == -other.value > 0
    assert one.p == pytest.approx(other.p, abs=0.02)


def test_a_score_without_a_value_has_no_difference():
    labels, made = decisions(REGRESSION, 1)
    scores = paired_scores(
        REGRESSION, "spearman", labels, {"a": {0: made}, "constant": {0: np.zeros(len(labels))}}, resamples=20
    )
    assert scores.difference("a", "constant") is None


def test_equal_methods_with_lucky_seeds_are_rarely_told_apart():
    """The rows alone would find a difference in about every third pair; with the seeds' part it stays below
    one in twenty."""
    random = np.random.default_rng(7)
    rows, pairs = 300, 150
    alone = found = 0
    for i in range(pairs):
        ease, labels = random.normal(1.6, 2, rows), np.zeros(rows, dtype=int)
        made = {
            m: {
                s: (ease + random.normal(0, 0.3) + random.logistic(size=rows) / 2 < 0).astype(int)
                for s in range(3)
            }
            for m in ("a", "b")
        }
        scores = paired_scores(SINGLE, "accuracy", labels, made, resamples=300, seed=i)
        gaps = scores.draws["a"] - scores.draws["b"]
        alone += min((gaps <= 0).mean(), (gaps >= 0).mean()) < 0.025
        found += scores.difference("a", "b").p < 0.05
    assert found <= 0.05 * pairs + 3
    assert alone > 0.2 * pairs

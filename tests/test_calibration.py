"""Probabilities, decisions, temperature and thresholds, against SciPy, scikit-learn and brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, softmax
from sklearn.metrics import log_loss

from textlora.core.errors import UsageError
from textlora.metrics.calibration import decide, fit_temperature, fit_thresholds, probabilities, row_log_loss

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
LOGITS = arrays(
    np.float64, st.tuples(st.integers(1, 6), st.integers(2, 5)), elements=st.floats(-1e4, 1e4, width=32)
)


@given(LOGITS, st.floats(0.05, 20))
def test_probabilities_are_scipys(logits, temperature):
    np.testing.assert_allclose(
        probabilities(logits, SINGLE, temperature), softmax(logits / temperature, axis=1), atol=1e-12
    )
    np.testing.assert_allclose(
        probabilities(logits, MULTI, temperature), expit(logits / temperature), atol=1e-12
    )
    assert np.array_equal(probabilities(logits, REGRESSION, temperature), logits)


def test_probabilities_of_huge_float32_logits_do_not_overflow():
    logits = np.array([[3e38, -3e38], [0.0, 88.0]], dtype=np.float32)
    single, multi = probabilities(logits, SINGLE), probabilities(logits, MULTI)
    assert single.dtype == multi.dtype == np.float64
    assert single[0].tolist() == multi[0].tolist() == [1.0, 0.0]
    assert single[1, 0] == pytest.approx(np.exp(-88.0))


def test_decide():
    probs = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    assert decide(probs, SINGLE).tolist() == [1, 0, 0]
    assert decide(probs, MULTI).tolist() == [[False, True], [True, True], [True, False]]
    assert decide(probs, MULTI, np.array([0.95, 0.1])).tolist() == [
        [False, True],
        [False, True],
        [False, True],
    ]
    assert decide(np.array([[1.5], [-2.0]]), REGRESSION).tolist() == [1.5, -2.0]


@given(LOGITS, st.floats(0.05, 20))
def test_temperature_never_changes_a_single_label_decision(logits, temperature):
    picked = decide(probabilities(logits, SINGLE, temperature), SINGLE)
    rows = np.arange(len(logits))
    # Logits closer than rounding may tie after the division; the picked one is still a highest one.
    np.testing.assert_allclose(logits[rows, picked], logits.max(axis=1), rtol=1e-12, atol=1e-10)


def test_row_log_loss_is_scikit_learns_and_stays_finite():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(50, 4)), random.integers(0, 4, 50)
    assert row_log_loss(logits, labels, SINGLE, 0.7).mean() == pytest.approx(
        log_loss(labels, softmax(logits / 0.7, axis=1))
    )
    truth = (random.random((50, 4)) < 0.5).astype(float)
    each = [log_loss(truth[:, c], expit(logits[:, c] / 0.7)) for c in range(4)]
    assert row_log_loss(logits, truth, MULTI, 0.7).mean() == pytest.approx(np.mean(each))
    assert row_log_loss(np.array([[1000.0, 0.0]]), np.array([1]), SINGLE).tolist() == [1000.0]
    assert row_log_loss(np.array([[1000.0, -1000.0]]), np.array([[0, 0]]), MULTI).tolist() == [500.0]
    with pytest.raises(UsageError, match="regression has no log loss"):
        row_log_loss(np.zeros((1, 1)), np.zeros(1), REGRESSION)


@pytest.mark.parametrize("true_temperature", [0.4, 1.7, 5.0])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_temperature_finds_the_one_the_labels_were_drawn_with(problem_type, true_temperature):
    random = np.random.default_rng(1)
    logits = random.normal(size=(40_000, 3)) * 3
    probs = probabilities(logits, problem_type, true_temperature)
    if problem_type == SINGLE:
        labels = (random.random((len(probs), 1)) > probs.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    else:
        labels = random.random(probs.shape) < probs
    assert fit_temperature(logits, labels, problem_type) == pytest.approx(true_temperature, rel=0.03)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_temperature_is_the_most_likely_on_a_fine_grid(problem_type):
    random = np.random.default_rng(2)
    labels = random.integers(0, 5, 60)
    logits = random.normal(size=(60, 5)) * 4 + 3 * np.eye(5)[labels]
    labels, parts = (labels, 1) if problem_type == SINGLE else (np.eye(5)[labels], 5)
    logs = np.linspace(-3, 3, 2001)
    posterior = [
        parts * row_log_loss(logits, labels, problem_type, np.exp(x)).sum() + x**2 / (2 * 0.5**2)
        for x in logs
    ]
    best = logs[np.argmin(posterior)]
    assert best > 0.3
    assert np.log(fit_temperature(logits, labels, problem_type)) == pytest.approx(best, abs=0.004)
    assert np.log(fit_temperature(logits, labels, problem_type, out_of_fold=True)) == pytest.approx(
        1.4 * best, abs=0.006
    )
    unsure = np.log(fit_temperature(logits / 20, labels, problem_type))
    assert unsure < -0.2
    decided = decide(probabilities(logits / 20, problem_type), problem_type)
    wrong = int(
        (decided != labels).sum() if problem_type == SINGLE else (decided != labels).any(axis=1).sum()
    )
    share = 0.25 * wrong / (wrong + 10)
    assert np.log(fit_temperature(logits / 20, labels, problem_type, out_of_fold=True)) == pytest.approx(
        share * unsure, abs=1e-3
    )


def test_few_mistakes_of_folds_hardly_sharpen():
    """150 rows, five of them wrong, scores far less sure than that: models of the folds, not the last one,
    are that unsure."""
    logits = np.zeros((150, 2))
    logits[:, 0], labels = 1.5, np.repeat([0, 1], [145, 5])
    held = np.log(fit_temperature(logits, labels, SINGLE))
    assert held < -0.5
    assert np.log(fit_temperature(logits, labels, SINGLE, out_of_fold=True)) == pytest.approx(
        held * 0.25 / 3, abs=1e-3
    )


@pytest.mark.parametrize("rows", [1, 4, 60, 240, 2000])
@pytest.mark.parametrize("out_of_fold", [False, True])
def test_rows_without_a_mistake_are_not_made_surer_than_their_number_supports(rows, out_of_fold):
    labels = np.arange(rows) % 2
    logits = np.outer(2 * labels - 1, [-6.0, 6.0]) + np.random.default_rng(1).normal(size=(rows, 2)) * 0.3
    for problem_type, truth in ((SINGLE, labels), (MULTI, np.eye(2)[labels])):
        found = fit_temperature(logits, truth, problem_type, out_of_fold=out_of_fold)
        assert found >= 1
        claimed = probabilities(logits, problem_type, found)
        right = (
            claimed.max(axis=1) if problem_type == SINGLE else np.maximum(claimed, 1 - claimed).prod(axis=1)
        )
        assert 1 - right.mean() >= (1 / (rows + 2) if rows >= 60 else 1e-3)
        assert found == 1 or 1 - right.mean() <= 7 / (rows + 2)


def test_unsure_rows_are_made_surer_with_a_mistake_among_them_only():
    labels = np.arange(200) % 2
    logits = np.eye(2)[labels] * 0.5
    assert fit_temperature(logits, labels, SINGLE) == 1
    labels[0] = 1
    found = fit_temperature(logits, labels, SINGLE)
    assert found < fit_temperature(logits[:20], labels[:20], SINGLE) < 1
    assert 1 - probabilities(logits, SINGLE, found).max(axis=1).mean() >= 1 / 202


def test_rows_of_cross_validation_call_for_more_the_more_of_them_are_wrong():
    random = np.random.default_rng(3)
    labels = random.integers(0, 2, 400)
    stretched = []
    for share in (0.05, 0.3):
        truth = np.where(np.arange(400) < 400 * share, 1 - labels, labels)
        logits = np.outer(2 * labels - 1, [-2.0, 2.0]) + random.normal(size=(400, 2))
        own, grown = (
            np.log(fit_temperature(logits, truth, SINGLE, out_of_fold=folds)) for folds in (False, True)
        )
        stretched.append(grown / own)
    assert stretched == pytest.approx([1.2, 1.4], abs=0.03)


def test_temperature_of_few_rows_stays_near_1():
    random = np.random.default_rng(4)
    logits = random.normal(size=(400, 3)) * 6
    labels = random.integers(0, 3, 400)
    found = [fit_temperature(logits[:n], labels[:n], SINGLE) for n in (4, 40, 400)]
    assert 1 < found[0] < found[1] < found[2]


def test_temperature_is_1_where_it_cannot_help():
    zeros, labels = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    assert fit_temperature(zeros, labels, SINGLE) == 1.0
    assert fit_temperature(zeros + np.nan, labels, SINGLE) == 1.0
    assert fit_temperature(zeros[:0], labels[:0], SINGLE) == 1.0
    assert fit_temperature(zeros[:, :1], labels.astype(float), REGRESSION) == 1.0


def _slow_best(scores, positive):
    """The threshold with the highest F1, tried one by one: the nearest to 0.5 of the best."""
    between = sorted(set(scores.tolist()))
    middles = [min(0.95, max(0.05, (x + y) / 2)) for x, y in itertools.pairwise(between)]
    return min([0.05, 0.95, 0.5, *middles], key=lambda t: (-_f1(positive, scores >= t), abs(t - 0.5), t))


def _logit(p):
    return np.log(p / (1 - p))


SCORES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        arrays(np.float64, (n, 2), elements=st.floats(0, 1)),
        arrays(np.int64, (n, 2), elements=st.integers(0, 1)),
    )
)


def _f1(truth, picked):
    return 2 * (truth & picked).sum() / (truth.sum() + picked.sum())


@given(SCORES)
@settings(deadline=None)
def test_thresholds_are_a_labels_own_as_far_as_its_positives_support_it(case):
    probs, labels = case
    found = fit_thresholds(probs, labels)
    assert ((found >= 0.05 - 1e-9) & (found <= 0.95 + 1e-9)).all()
    if not labels.any():
        assert (found == 0.5).all()
        return
    positives = labels.sum(axis=0)
    common = _logit(_slow_best(probs.ravel(), labels.ravel())) * positives.sum() / (positives.sum() + 10)
    for c, k in enumerate(positives):
        own = _logit(_slow_best(probs[:, c], labels[:, c])) if k else common
        assert _logit(found[c]) == pytest.approx((50 * common + k * own) / (50 + k), abs=1e-9)


def test_many_positives_give_each_label_its_own_threshold_and_few_a_common_one():
    random = np.random.default_rng(1)
    labels = (random.random((5000, 2)) < 0.5).astype(int)
    probs = np.clip(
        np.where(labels == 1, [0.3, 0.8], [0.1, 0.6]) + random.normal(size=labels.shape) * 0.04, 0.01, 0.99
    )
    np.testing.assert_allclose(fit_thresholds(probs, labels), [0.2, 0.7], atol=0.04)
    few = fit_thresholds(probs[:12], labels[:12])
    assert few[1] - few[0] < 0.25
    few = fit_thresholds(
        np.hstack([probs[:12], probs[:12, :1] * np.nan]), np.hstack([labels[:12], labels[:12, :1]])
    )
    assert few[2] == 0.5


def test_thresholds_tie_goes_to_the_middle_and_the_order_of_rows_does_not_matter():
    probs = np.array([[0.1], [0.45], [0.55], [0.9]])
    labels = np.array([[0], [0], [1], [1]])
    assert fit_thresholds(probs, labels).tolist() == [0.5]
    assert fit_thresholds(probs[::-1], labels[::-1]).tolist() == [0.5]
    assert fit_thresholds(probs * np.nan, labels).tolist() == [0.5]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: probabilities(np.zeros((1, 2)), "softmax"),
            "unknown problem type 'softmax'; use one of single_label_classification",
        ),
        (lambda: probabilities(np.zeros((1, 2)), SINGLE, 0.0), "temperature 0.0 is not above 0"),
        (lambda: probabilities(np.zeros((1, 2)), SINGLE, float("nan")), "temperature nan is not above 0"),
        (lambda: decide(np.zeros((1, 2)), "multi"), "unknown problem type 'multi'"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(UsageError, match=words):
        call()

"""Methods that end in something fitted, not trained: the commonest class, and logistic regression on TF-IDF
or on features. Needs scikit-learn."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.core.errors import UsageError
from textlora.metrics.scores import METRICS, evaluate
from textlora.training.prepare import Prepared

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of a logistic regression; a ridge regression takes 1 / C
UNTRIED = 1.0  # where no row is held out
FLOOR = 1e-12  # probability of a class that no training row had


class Inputs(NamedTuple):
    """What a linear model is fitted on, learned from some of the training rows: `of(split)` gives (rows of
    the split, features)."""

    of: Callable[[str], Any]
    kept_bytes: int = 0  # beside the coefficients


Learn = Callable[[np.ndarray], Inputs]  # places of training rows to `Inputs`


@dataclass(frozen=True)
class Fitted:
    """`logits(split)` gives (N, C), `held` those of the rows that chose; `chosen` is what they decided.

    Attributes:
        held: (split, places of its rows, logits (N, C) by a model that did not see them); None where no row
            is held out.
    """

    logits: Callable[[str], np.ndarray]
    held: tuple[str, np.ndarray, np.ndarray] | None
    parameters: int
    saved_bytes: int
    chosen: dict[str, Any]


def fit(way: str, prepared: Prepared, features: Mapping[str, np.ndarray] | None = None) -> Fitted:
    """Fit on the training rows, choosing on the rows that are held out.

    Args:
        way: "majority", "tfidf" or "probe".
        features: of a probe: split -> (N, H).

    Raises:
        UsageError: scikit-learn is not installed.
    """
    if way == "majority":
        return _majority(prepared)
    if way == "probe":
        assert features is not None
        return fit_linear(prepared, lambda rows: scaled(features, rows))
    return fit_linear(prepared, lambda rows: _words(prepared, rows))


def fit_linear(prepared: Prepared, learn: Learn, strength: float | None = None) -> Fitted:
    """A linear model on all training rows, its strength the one that scores best on held-out rows unless it
    is given.

    Raises:
        UsageError: scikit-learn is not installed.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "TF-IDF and the probe need scikit-learn", "pip install 'textlora[compare]'"
        ) from error
    kind = prepared.schema.problem_type
    count = len(prepared.schema.labels)
    labels = prepared.sets["train"].labels
    everything = np.arange(len(labels))
    inputs, held = None, None
    if strength is None:
        if prepared.folds is None:
            inputs = learn(everything)
        strength, held = held_out(prepared, learn, inputs)
    inputs = inputs or learn(everything)
    predict, coefficients = _linear(kind, inputs.of("train"), labels, count, strength)
    logits = lambda split: predict(inputs.of(split))
    return Fitted(logits, held, coefficients, inputs.kept_bytes + 4 * coefficients, {"C": strength})


def held_out(
    prepared: Prepared, learn: Learn, inputs: Inputs | None = None
) -> tuple[float, tuple[str, np.ndarray, np.ndarray] | None]:
    """The strength that scores best on the held-out rows (of equals the first, which is the most
    regularised), and their logits with it.

    Args:
        inputs: those of all training rows, where validation rows decide.
    """
    kind, names, train = prepared.schema.problem_type, list(prepared.schema.labels), prepared.sets["train"]
    if prepared.folds is not None:
        split, folds = "train", prepared.folds
        parts = [
            (np.flatnonzero(folds != fold), np.flatnonzero(folds == fold))
            for fold in sorted(set(folds[folds >= 0].tolist()))
        ]
        places = np.concatenate([held for _, held in parts])
        matrices = [
            (x[rows], train.labels[rows], x[held]) for rows, held in parts for x in [learn(rows).of("train")]
        ]
    elif "validation" in prepared.sets and inputs is not None:
        split, places = "validation", np.arange(len(prepared.sets["validation"].rows))
        matrices = [(inputs.of("train"), train.labels, inputs.of("validation"))]
    else:
        return UNTRIED, None
    labels = prepared.sets[split].labels[places]
    sign = 1 if METRICS[prepared.metric].higher_is_better else -1
    best, best_score, best_logits = STRENGTHS[0], -np.inf, None
    for strength in STRENGTHS:
        logits = np.concatenate([_linear(kind, x, y, len(names), strength)[0](new) for x, y, new in matrices])
        score = evaluate(kind, labels, logits, names)[prepared.metric]
        score = -1e9 if score is None else sign * score
        if score > best_score:
            best, best_score, best_logits = strength, score, logits
    assert best_logits is not None
    return best, (split, places, best_logits)


def _majority(prepared: Prepared) -> Fitted:
    labels, kind = prepared.sets["train"].labels, prepared.schema.problem_type
    if kind == REGRESSION:
        row = np.array([labels.mean()])
    elif kind == MULTI_LABEL:
        share = np.clip(labels.mean(0), 1e-6, 1 - 1e-6)
        row = np.log(share / (1 - share))
    else:
        row = np.log(
            np.maximum(np.bincount(labels, minlength=len(prepared.schema.labels)) / len(labels), FLOOR)
        )
    logits = lambda split: np.tile(row, (len(prepared.sets[split].rows), 1))
    split = (
        "validation" if "validation" in prepared.sets else "train"
    )  # it learns nothing of a row that could be held against it
    places = np.arange(len(prepared.sets[split].rows))
    return Fitted(logits, (split, places, logits(split)), 0, 4 * len(row), {})


def _words(prepared: Prepared, rows: np.ndarray) -> Inputs:
    """TF-IDF of words and word pairs, sublinear counts; words found in the given training rows only."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    text = lambda row: row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    vectorizer.fit([text(prepared.sets["train"].rows[i]) for i in rows])
    of = lambda split: vectorizer.transform([text(row) for row in prepared.sets[split].rows])
    return Inputs(of, sum(len(term.encode()) + 5 for term in vectorizer.get_feature_names_out()))


def scaled(values: Mapping[str, np.ndarray], rows: np.ndarray) -> Inputs:
    """Each feature with mean 0 and deviation 1 over the given training rows."""
    mean, spread = values["train"][rows].mean(0), values["train"][rows].std(0) + 1e-6
    return Inputs(lambda split: (values[split] - mean) / spread)


def _linear(
    kind: str, x: Any, labels: np.ndarray, count: int, strength: float
) -> tuple[Callable[[Any], np.ndarray], int]:
    """A linear model from features to logits (N, C), and its number of coefficients."""
    from scipy.special import logsumexp
    from sklearn.linear_model import LogisticRegression, Ridge

    if kind == REGRESSION:
        ridge = Ridge(alpha=1 / strength).fit(x, labels)
        return lambda new: ridge.predict(new).reshape(-1, 1), x.shape[1] + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: validation judges it
        if kind == SINGLE_LABEL:
            model = LogisticRegression(C=strength, max_iter=1000).fit(x, labels)

            def logits(new: Any) -> np.ndarray:
                scores = model.decision_function(new)
                scores = np.stack([np.zeros_like(scores), scores], 1) if scores.ndim == 1 else scores
                out = np.full((new.shape[0], count), np.log(FLOOR))
                out[:, model.classes_] = np.maximum(
                    scores - logsumexp(scores, axis=1, keepdims=True), np.log(FLOOR)
                )
                return out

            return logits, count * (x.shape[1] + 1)
        models = [_one_label(x, labels[:, c], strength) for c in range(count)]
    return lambda new: np.stack([model(new) for model in models], 1), count * (x.shape[1] + 1)


def _one_label(x: Any, labels: np.ndarray, strength: float) -> Callable[[Any], np.ndarray]:
    from sklearn.linear_model import LogisticRegression

    if len(set(labels.tolist())) < 2:
        value = 20.0 if labels[0] else -20.0
        return lambda new: np.full(new.shape[0], value)
    return LogisticRegression(C=strength, max_iter=1000).fit(x, labels).decision_function

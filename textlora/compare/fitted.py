"""Methods that are fitted, not trained: the commonest class, TF-IDF and a linear probe with logistic regression. Needs scikit-learn."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from textlora.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL
from textlora.errors import UsageError
from textlora.metrics import METRICS, evaluate
from textlora.prepare import Prepared

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of a logistic regression; a ridge regression takes 1 / C
FLOOR = 1e-12  # probability of a class that no training row had


@dataclass(frozen=True)
class Fitted:
    """`logits(split)` gives (N, C); `chosen` is what validation decided."""

    logits: Callable[[str], np.ndarray]
    parameters: int
    saved_bytes: int
    chosen: dict[str, Any]


def fit(way: str, prepared: Prepared, features: Mapping[str, Mapping[str, np.ndarray]]) -> Fitted:
    """Fit on the training rows, choosing on validation.

    Args:
        way: "majority", "tfidf" or "probe".
        features: of a probe: pooling -> split -> (N, H).

    Raises:
        UsageError: scikit-learn is not installed.
    """
    if way == "majority":
        return _majority(prepared)
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UsageError("TF-IDF and the probe need scikit-learn", "pip install 'textlora[compare]'") from error
    if way == "probe":
        best = _choose(prepared, {pooling: _scaled(values) for pooling, values in features.items()})
        weights = best.coefficients
        return Fitted(best.logits, weights, 4 * weights, best.chosen)
    matrices, terms = _words(prepared)
    best = _choose(prepared, {"words": matrices})
    return Fitted(best.logits, best.coefficients, sum(len(term.encode()) + 1 for term in terms) + 4 * (len(terms) + best.coefficients), best.chosen)


def _majority(prepared: Prepared) -> Fitted:
    labels, kind = prepared.sets["train"].labels, prepared.schema.problem_type
    if kind == REGRESSION:
        row = np.array([labels.mean()])
    elif kind == MULTI_LABEL:
        share = np.clip(labels.mean(0), 1e-6, 1 - 1e-6)
        row = np.log(share / (1 - share))
    else:
        row = np.log(np.maximum(np.bincount(labels, minlength=len(prepared.schema.labels)) / len(labels), FLOOR))
    return Fitted(lambda split: np.tile(row, (len(prepared.sets[split].rows), 1)), 0, 4 * len(row), {})


def _words(prepared: Prepared) -> tuple[dict[str, Any], list[str]]:
    """TF-IDF of words and word pairs, sublinear counts; words found in training rows only."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    text = lambda row: row.text if row.text_pair is None else f"{row.text}\n{row.text_pair}"
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
    of = lambda rows: [text(row) for row in rows]
    vectorizer.fit(of(prepared.sets["train"].rows))
    return {split: vectorizer.transform(of(data.rows)) for split, data in prepared.sets.items()}, list(vectorizer.get_feature_names_out())


def _scaled(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each feature with mean 0 and deviation 1 over the training rows."""
    mean, spread = values["train"].mean(0), values["train"].std(0) + 1e-6
    return {split: (x - mean) / spread for split, x in values.items()}


@dataclass(frozen=True)
class _Choice:
    logits: Callable[[str], np.ndarray]
    coefficients: int
    chosen: dict[str, Any]


def _choose(prepared: Prepared, inputs: Mapping[str, Mapping[str, Any]]) -> _Choice:
    """The input and the strength that score best on validation; of equals the first, which is the most regularised."""
    kind, names, held = prepared.schema.problem_type, list(prepared.schema.labels), prepared.sets["validation"]
    sign = 1 if METRICS[prepared.metric].higher_is_better else -1
    best, best_score = None, -np.inf
    for name, matrices in inputs.items():
        for strength in STRENGTHS:
            predict, count = _linear(kind, matrices["train"], prepared.sets["train"].labels, len(names), strength)
            score = evaluate(kind, held.labels, predict(matrices["validation"]), names)[prepared.metric]
            score = -1e9 if score is None else sign * score
            if score > best_score:
                logits = lambda split, predict=predict, matrices=matrices: predict(matrices[split])
                chosen = {"C": strength} | ({"features": name} if len(inputs) > 1 else {})
                best, best_score = _Choice(logits, count, chosen), score
    assert best is not None
    return best


def _linear(kind: str, x: Any, labels: np.ndarray, count: int, strength: float) -> tuple[Callable[[Any], np.ndarray], int]:
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
                out[:, model.classes_] = np.maximum(scores - logsumexp(scores, axis=1, keepdims=True), np.log(FLOOR))
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

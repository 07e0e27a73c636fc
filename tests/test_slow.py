"""Training a real small model to an accuracy floor; run with `pytest -m slow`."""

from pathlib import Path

import pytest

import textlora

REVIEWS = Path(__file__).resolve().parent.parent / "examples" / "film-reviews"


@pytest.mark.slow
def test_minilm_learns_the_film_reviews(tmp_path):
    classifier = textlora.train(
        str(REVIEWS / "train.csv"),
        test=str(REVIEWS / "test.csv"),
        output=str(tmp_path / "out"),
        learning_rate=2e-3,
        epochs=6,
    )
    assert classifier.meta.scores["test"]["accuracy"] >= 0.8
    assert (
        classifier.predict(["A wonderful, moving film that I would happily see again."])[0].label
        == "positive"
    )

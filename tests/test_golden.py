"""Folders of every release still give the answers that were written down with them, and so will those of this
one."""

import dataclasses
import json
import math
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from support import trained

from textlora import TextClassifier
from textlora.adapters.folder import _REFUSED, FOLDER_FILES, FORMAT, AdapterMeta
from textlora.inference.classifier import encoded_logits
from textlora.model.reference_model import ReferenceModel
from textlora.transform.inspect import inspect_folder

GOLDEN = Path(__file__).resolve().parent / "golden"
RELEASES = sorted(path for path in GOLDEN.iterdir() if (path / "answers.json").is_file())
CASES = [
    pytest.param(release, name, answers, id=f"{release.name}-{name}")
    for release in RELEASES
    for name, answers in json.loads((release / "answers.json").read_text(encoding="utf-8")).items()
]


@pytest.mark.parametrize(("release", "name", "answers"), CASES)
def test_answers_of_a_release(release, name, answers):
    folder, base = release / "adapters" / name, release / "bases" / answers["base"]
    classifier = TextClassifier.load(folder, base=str(base), device="cpu")
    records = [
        classifier.record(prediction, with_logits=True)
        for prediction in classifier.predict(answers["texts"], answers["pairs"])
    ]
    assert [record.keys() for record in records] == [record.keys() for record in answers["records"]]
    for now, then in zip(records, answers["records"], strict=True):
        assert [(now.get("label"), now.get("labels"))] == [(then.get("label"), then.get("labels"))]
        assert all(
            abs(a - b) <= 1e-5 * max(1, abs(b)) for a, b in zip(now["logits"], then["logits"], strict=True)
        )
        assert now.get("value") == pytest.approx(then.get("value"), abs=1e-5)
        assert now.get("scores") == pytest.approx(then.get("scores"), abs=1e-5)
    facts = inspect_folder(folder, str(base))
    assert (facts["fits"], facts["edited"], facts["textlora_version"]) == (True, [], release.name)


@pytest.mark.parametrize(("release", "name", "answers"), CASES)
def test_transformers_and_peft_agree(release, name, answers):
    """The stored logits are those of plain transformers + peft, so they are right and not only the same."""
    folder, base = release / "adapters" / name, release / "bases" / answers["base"]
    classifier = TextClassifier.load(folder, base=str(base), device="cpu")
    reference = ReferenceModel.from_adapter(
        folder, base, len(classifier.meta.labels), pooling=classifier.meta.pooling
    )
    theirs = encoded_logits(reference, classifier.tokenizer.encode(answers["texts"], answers["pairs"]))
    assert np.allclose(theirs, [record["logits"] for record in answers["records"]], atol=1e-5)


def test_this_release_has_a_folder():
    assert version("textlora") in [release.name for release in RELEASES], (
        "python tests/golden/make.py makes it"
    )


def test_golden_folders_are_small():
    """They stay in the tree for good."""
    for release in RELEASES:
        sizes = [path.stat().st_size for path in release.rglob("*") if path.is_file()]
        assert max(sizes) < 200_000
        assert sum(sizes) < 600_000


def test_stored_answers_tell_texts_apart():
    """A file of equal or empty answers would prove nothing."""
    for case in CASES:
        logits = np.array([record["logits"] for record in case.values[2]["records"]])
        assert np.ptp(logits, axis=0).min() > 0.1, case.id
        assert all(math.isfinite(x) for x in logits.ravel())


# --- docs/adapter-format.md ---


def keys(content: dict, under: str = "") -> set[str]:
    """Dotted names of the keys that textlora chooses; those of `files`, `rows` and `scores` are file, split
    and metric names."""
    found = set()
    for key, value in content.items():
        found.add(under + key)
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = value[0]
        if isinstance(value, dict) and key not in (
            "files",
            "rows",
            "scores",
            "rank_pattern",
            "alpha_pattern",
        ):
            found |= keys(value, f"{under}{key}.")
    return found


def test_the_page_on_the_format_names_every_key(tiny_base, tmp_path_factory):
    page = (GOLDEN.parent.parent / "docs" / "adapter-format.md").read_text(encoding="utf-8")
    named = {word for piece in re.findall(r"`([^`]+)`", page) for word in re.split(r"[\s:]+", piece)}
    folders = [path for release in RELEASES for path in (release / "adapters").iterdir()]
    folders += [
        trained(tiny_base, tmp_path_factory).folder,
        trained(tiny_base, tmp_path_factory, task="multi").folder,
    ]
    written = set()
    for folder in folders:
        side = keys(json.loads((folder / "textlora.json").read_text(encoding="utf-8")))
        written |= {key.removeprefix("training.settings.") for key in side}
        written |= keys(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        written |= {
            path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
        }
    assert sorted(written - named) == []
    assert sorted({*_REFUSED, *FOLDER_FILES} - named) == []
    assert {item.name for item in dataclasses.fields(AdapterMeta)} <= written
    assert f"whole number, now {FORMAT} " in page

"""Folds of a cross-validation, and trainings in them: every row held out once by a model that has not seen
it, and what is decided on that."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import log_of, settings, single_rows, task_files, write_csv

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter
from textlora.inference.classifier import encoded_logits
from textlora.metrics.calibration import fit_temperature
from textlora.model.base import base_pooling, find_base
from textlora.training.cross_validation import Trainings
from textlora.training.folds import make_folds
from textlora.training.head_start import start_head
from textlora.training.prepare import prepare
from textlora.training.run import run_training
from textlora.training.trainer import Trainer


def one_hot(classes: list[int]) -> np.ndarray:
    return np.eye(max(classes) + 1, dtype=bool)[classes]


# --- which fold ---


def test_classes_are_spread_evenly():
    classes = [0] * 30 + [1] * 9 + [2] * 3
    folds = make_folds(one_hot(classes), range(42), seed=1)
    assert [np.bincount(folds[np.array(classes) == c], minlength=3).tolist() for c in range(3)] == [
        [10] * 3,
        [3] * 3,
        [1] * 3,
    ]
    assert np.array_equal(folds, make_folds(one_hot(classes), range(42), seed=1))
    assert not np.array_equal(folds, make_folds(one_hot(classes), range(42), seed=2))


def test_a_class_of_one_text_is_in_every_training():
    classes = [0] * 6 + [1] * 6 + [2] + [3, 3]
    keys = [*range(13), "twice", "twice"]  # class 3 has two rows, but one text
    folds = make_folds(one_hot(classes), keys, seed=0)
    assert folds[12:].tolist() == [-1, -1, -1]
    assert (folds[:12] >= 0).all()


def test_equal_texts_stay_together():
    folds = make_folds(one_hot([0, 1] * 20), [i // 4 for i in range(40)], seed=3)
    assert all(len(set(folds[i : i + 4].tolist())) == 1 for i in range(0, 40, 4))


@pytest.mark.parametrize("seed", range(20))
def test_every_training_has_every_class(seed):
    """Labels of several a row, some of them rare."""
    draw = np.random.default_rng(seed)
    marks = draw.random((60, 12)) < draw.choice([0.02, 0.05, 0.3], size=12)
    folds = make_folds(marks, range(60), seed)
    for fold in range(3):
        train, held = marks[folds != fold], marks[folds == fold]
        assert not (held.any(0) & ~train.any(0)).any()
    counts = np.bincount(folds[folds >= 0], minlength=3)
    assert counts.max() - counts.min() <= 10


def test_nothing_to_hold_out():
    assert make_folds(one_hot([0, 1, 2]), range(3), seed=0) is None
    assert make_folds(one_hot([0, 0, 1, 1]), ["a", "a", "b", "b"], seed=0) is None


def test_regression_is_cut_in_three():
    folds = make_folds(np.ones((10, 1), dtype=bool), range(10), seed=0)
    assert sorted(np.bincount(folds).tolist()) == [3, 3, 4]


# --- trainings ---


def folded(folder: Path, base: Path, task: str = "single", **changes):
    return settings(folder, base, task, validation=None, **changes)


@pytest.mark.parametrize("task", ["single", "multi", "regression", "pairs"])
def test_held_out_scores_are_those_of_trainings_without_the_rows(tiny_base, tmp_path, task):
    """The slow way: each fold as a training of its own, with a fresh model."""
    config = folded(tmp_path, tiny_base("bert"), task)
    prepared = prepare(config)
    trainings = Trainings(prepared)
    for _ in trainings.records():
        pass
    whole, rows = prepared.sets["train"], trainings.held_rows()
    assert sorted(rows.tolist()) == np.flatnonzero(prepared.folds >= 0).tolist()
    found = trainings.evaluations()
    assert [one.epoch for one in found] == [1.0, 2.0]
    for fold in range(3):
        train, held = np.flatnonzero(prepared.folds != fold), np.flatnonzero(prepared.folds == fold)
        alone = replace(prepare(config), sets={"train": whole.pick(train)})
        start_head(alone)
        for _ in Trainer(alone).records():
            pass
        expected = encoded_logits(alone.model, whole.pick(held).encoded)
        assert np.allclose(found[-1].logits[np.isin(rows, held)], expected, atol=1e-6)


def test_the_last_training_is_one_on_all_rows(tiny_base, tmp_path):
    config = folded(tmp_path, tiny_base("bert"))
    trainings = Trainings(prepare(config))
    for _ in trainings.records():
        pass
    alone = prepare(config)
    start_head(alone)
    trainer = Trainer(alone)
    for _ in trainer.records():
        pass
    assert all(
        torch.equal(tensor, trainer.parameters[name]) for name, tensor in trainings.trainer.parameters.items()
    )
    chosen = trainings.evaluations()[trainings.chosen()]
    assert trainings.trainer.kept_score == chosen.metrics["accuracy"]
    tokens = trainings.fold_tokens + trainings.trainer.tokens
    assert tokens <= 3 * trainings.trainer.tokens


def test_states_below_the_adapted_blocks_change_nothing(tiny_base, tmp_path):
    weights = []
    for name in ("known", "computed"):
        config = folded(tmp_path / name, tiny_base("bert"), layers="last:1")
        trainings = Trainings(prepare(config))
        if name == "known":
            from textlora.training.hidden_state_cache import build_prefix

            trainings.use(build_prefix(trainings.prepared), 0.0)
            assert trainings.prefix
        for _ in trainings.records():
            pass
        weights.append((trainings.evaluations()[-1].logits, trainings.trainer.parameters))
    assert np.allclose(weights[0][0], weights[1][0], atol=1e-6)
    assert all(
        torch.allclose(weights[0][1][name], tensor, atol=1e-6) for name, tensor in weights[1][1].items()
    )


def test_a_run_by_cross_validation(tiny_base, tmp_path):
    config = folded(tmp_path, tiny_base("bert"), learning_rate=0.02, epochs=4.0)
    result = run_training(config)
    log, folder = log_of(Path(config.output)), read_adapter(config.output)
    assert (result["rows"], result["folds"], result["held_out"], result["left_out"]) == (
        {"train": 40, "test": 16},
        3,
        40,
        [],
    )
    last = [r for r in log if r["kind"] == "evaluation" and "fold" not in r]
    kept = [r for r in last if r["kept"]][-1]
    assert (result["best_step"], result["best_metric"]["value"]) == (
        kept["step"],
        kept["metrics"]["accuracy"],
    )
    final = next(r for r in log if r["kind"] == "final" and r["split"] == "validation")
    assert (final["rows"], final["folds"], final["metrics"]["accuracy"]) == (
        40,
        3,
        kept["metrics"]["accuracy"],
    )
    assert folder.meta.temperature == 1
    assert folder.meta.fitted_temperature == result["temperature"] != 1
    assert result["cross_validation_seconds"] > 0


def test_the_saved_head_has_the_temperature_in_it(tiny_base, tmp_path):
    """Scores are softmax of the saved logits, and those times the temperature are the trained model's."""
    config = folded(tmp_path, tiny_base("bert"), learning_rate=0.02, epochs=4.0)
    run_training(config)
    classifier = TextClassifier.load(config.output, base=config.model)
    texts = [text for text, _ in single_rows(12, 5)]
    logits, predictions = classifier.logits(texts).astype(np.float64), classifier.predict(texts)
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose(
        shares, [[p.scores[label] for label in classifier.meta.labels] for p in predictions], atol=1e-6
    )
    trainings = Trainings(prepare(config))
    for _ in trainings.records():
        pass
    trainings.prepared.model.load_trainable(trainings.trainer.best)
    held = trainings.held()
    temperature = fit_temperature(
        held.logits,
        trainings.prepared.sets["train"].labels[held.rows],
        classifier.meta.problem_type,
        out_of_fold=True,
    )
    assert temperature == pytest.approx(classifier.meta.fitted_temperature)
    trained = encoded_logits(trainings.prepared.model, trainings.prepared.tokenizer.encode(texts))
    assert np.allclose(trained, temperature * logits, atol=1e-5)


def test_going_on_from_an_adapter_takes_the_temperature_out_again(tiny_base, tmp_path):
    config = folded(tmp_path / "a", tiny_base("bert"), learning_rate=0.02, epochs=4.0)
    run_training(config)
    again = settings(tmp_path / "b", tiny_base("bert"), init_adapter=config.output)
    prepared = prepare(again)
    from textlora.training.run import _start

    _start(prepared)
    folder = read_adapter(config.output)
    head = [name for name in folder.tensors if ".classifier." in name]
    for name in head:
        assert torch.allclose(
            prepared.model.trainable()[name], folder.tensors[name] * folder.meta.fitted_temperature
        )


def test_less_certain_scores_move_to_the_class_frequencies(tiny_base, tmp_path):
    """Uneven classes and few steps: the saved logits are the trained ones over T and what the frequencies
    say; going on takes both out again."""
    rows = [(f"{text} {i}", "pos" if i % 4 else "neg") for i, (text, _) in enumerate(single_rows(60, seed=6))]
    config = folded(
        tmp_path / "a",
        tiny_base("bert"),
        train=str(write_csv(tmp_path / "uneven.csv", rows)),
        test=None,
        learning_rate=0.03,
        epochs=6.0,
    )
    run_training(config)
    meta, texts = read_adapter(config.output).meta, [text for text, _ in single_rows(12, 5)]
    assert meta.fitted_temperature > 1
    prior = np.log(np.array([15 + 1, 45 + 1]))
    assert np.allclose(meta.fitted_shift, (1 - 1 / meta.fitted_temperature) * (prior - prior.mean()))
    trainings = Trainings(prepare(config))
    for _ in trainings.records():
        pass
    trainings.prepared.model.load_trainable(trainings.trainer.best)
    trained = encoded_logits(trainings.prepared.model, trainings.prepared.tokenizer.encode(texts))
    saved = TextClassifier.load(config.output, base=config.model).logits(texts)
    assert np.allclose(saved, trained / meta.fitted_temperature + meta.fitted_shift, atol=1e-5)
    from textlora.training.run import _start

    again = prepare(settings(tmp_path / "b", tiny_base("bert"), init_adapter=config.output))
    _start(again)
    assert np.allclose(encoded_logits(again.model, again.tokenizer.encode(texts)), trained, atol=1e-4)


def test_every_row_is_accounted_for(tiny_base, tmp_path):
    rows = single_rows(40)
    path = write_csv(tmp_path / "rows.csv", [*rows, rows[0], rows[1]])
    prepared = prepare(
        settings(
            tmp_path / "a", tiny_base("bert"), train=str(path), validation=None, limit_train=20, limit_eval=4
        )
    )
    counts = {split: len(data.rows) for split, data in prepared.sets.items()}
    assert (
        sum(count for count, split, _ in prepared.left_out if split in ("training", "validation"))
        + counts["train"]
        + counts["validation"]
        == 42
    )
    assert all(
        f"{count} {split} row" in " ".join(prepared.split_lines) for count, split, _ in prepared.left_out
    )
    prepared = prepare(settings(tmp_path / "b", tiny_base("bert"), limit_eval=4))
    assert prepared.left_out == [
        (12, "validation", "beyond --limit-eval"),
        (12, "test", "beyond --limit-eval"),
    ]


# --- pooling ---


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode": ["mean", "max"]}, "first"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, "first"),
        ({"pooling_mode_max_tokens": True}, "first"),
        ([], "first"),
    ],
)
def test_pooling_of_a_base(tiny_base, tmp_path, content, expected):
    import shutil

    folder = Path(shutil.copytree(tiny_base("bert"), tmp_path / "base"))
    if content is not None:
        modules = [
            {"path": "", "type": "sentence_transformers.models.Transformer"},
            {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(content), encoding="utf-8")
    assert base_pooling(find_base(str(folder)))[0] == expected
    prepared = prepare(settings(tmp_path / "run", folder))
    assert prepared.pooling == prepared.model.pooling == expected


def test_a_pooling_path_out_of_the_folder_is_not_followed(tiny_base, tmp_path):
    import shutil

    folder = Path(shutil.copytree(tiny_base("bert"), tmp_path / "base"))
    (tmp_path / "config.json").write_text('{"pooling_mode_mean_tokens": true}', encoding="utf-8")
    (folder / "modules.json").write_text(json.dumps([{"path": "..", "type": "x.Pooling"}]), encoding="utf-8")
    assert base_pooling(find_base(str(folder)))[0] == "first"


def test_task_files_are_folded_as_they_are_named(tiny_base, tmp_path):
    """A share that is asked for takes the place of cross-validation."""
    files = task_files(tmp_path, "single")
    config = settings(
        tmp_path / "run", tiny_base("bert"), train=files["train"], validation=None, validation_share=0.25
    )
    prepared = prepare(config)
    assert prepared.folds is None
    assert {split: len(data.rows) for split, data in prepared.sets.items()} == {
        "train": 30,
        "validation": 10,
        "test": 16,
    }

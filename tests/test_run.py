"""Training runs: every task to a whole folder, the numbers in every place the same, every setting doing what
it says."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_tiny
from safetensors.torch import load_file
from support import (
    SIDE,
    WEIGHTS,
    Cli,
    log_of,
    settings,
    single_rows,
    snapshot,
    task_files,
    trained,
    write_csv,
)

import textlora
import textlora.training.head_start
import textlora.training.steps
import textlora.training.trainer
from textlora import TextClassifier
from textlora.adapters.folder import read_meta
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, TrainConfig, read_config
from textlora.core.errors import AdapterError, DataError, TrainingError, UsageError
from textlora.inference.evaluate import evaluate_table, read_rows
from textlora.model.adapter_tensors import scaled_head
from textlora.model.reference_model import ReferenceModel
from textlora.training.checkpoint_choice import score
from textlora.training.learning_rate import rate_at
from textlora.training.losses import Loss, class_weights
from textlora.training.prepare import Prepared, prepare
from textlora.training.run import run_training
from textlora.training.steps import plan
from textlora.training.trainer import Trainer


def prepared_run(folder: Path, base: Path, task: str = "single", **changes: Any) -> Prepared:
    return prepare(settings(folder, base, task, **changes))


def weights_of(config: TrainConfig) -> bytes:
    run_training(config)
    return (Path(config.output) / WEIGHTS).read_bytes()


def steps_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [record for record in log_of(Path(config.output)) if record["kind"] == "step"]


def evaluations_of(config: TrainConfig) -> list[dict[str, Any]]:
    return [record for record in log_of(Path(config.output)) if record["kind"] == "evaluation"]


# --- whole runs ---

KINDS = {"single": SINGLE_LABEL, "pairs": SINGLE_LABEL, "multi": MULTI_LABEL, "regression": REGRESSION}


@pytest.mark.parametrize("task", list(KINDS))
def test_a_run_ends_with_a_whole_folder_and_one_set_of_numbers(tiny_base, tmp_path_factory, task):
    run = trained(tiny_base, tmp_path_factory, task=task)
    names = [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "run",
        SIDE,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in run.folder.iterdir()) == sorted(names)
    assert sorted(p.name for p in (run.folder / "run").iterdir() if p.name != ".lock") == [
        "config.toml", "metrics.jsonl", "report.html", "result.json"
    ]  # fmt: skip
    assert TrainConfig(**read_config(run.folder / "run" / "config.toml")) == run.config

    log, meta = log_of(run.folder), read_meta(run.folder)
    assert [r["kind"] for r in log] == [
        "start",
        "data",
        *["step"] * 5,
        "evaluation",
        *["step"] * 5,
        "evaluation",
        "final",
        "final",
        "end",
    ]
    assert meta.problem_type == run.result["problem_type"] == log[0]["problem_type"] == KINDS[task]
    assert meta.pairs == (task == "pairs")
    finals = {record["split"]: record for record in log if record["kind"] == "final"}
    classifier = TextClassifier.load(run.folder, base=run.config.model)
    report = (run.folder / "run" / "report.html").read_text(encoding="utf-8")
    for split in ("validation", "test"):
        metrics = finals[split]["metrics"]
        assert run.result[split] == metrics == meta.scores[split]
        again = evaluate_table(classifier, read_rows(getattr(run.config, split), {}, classifier, None, 0))
        assert again["rows"] == finals[split]["rows"] == 16
        for name, value in metrics.items():
            assert again["test"][name] == (None if value is None else pytest.approx(value, abs=1e-6)), name
        assert {name: value for name, value in again["intervals"].items() if value} == {
            name: pytest.approx(value, abs=1e-6)
            for name, value in finals[split]["intervals"].items()
            if value
        }
    main = {"single": "accuracy", "pairs": "accuracy", "multi": "micro_f1", "regression": "spearman"}[task]
    assert f"{finals['test']['metrics'][main]:.4f}"[:5] in report
    end = log[-1]
    assert run.result["best_metric"] == end["best_metric"]
    evaluations = [r for r in log if r["kind"] == "evaluation"]
    kept = [r for r in evaluations if r["kept"]][-1]
    assert (end["best_metric"]["value"], end["best_step"]) == (kept["metrics"][main], kept["step"])
    best = max(r["metrics"][main] for r in evaluations)
    assert (
        kept["metrics"][main]
        >= best - (0 if task == "regression" else math.sqrt(best * (1 - best) / 16)) - 1e-12
    )
    assert (end["steps"], end["epochs"]) == (10, 2.0)
    assert end["tokens"] == sum(r["tokens"] for r in log if r["kind"] == "step")
    assert run.result["golden_difference"] < 1e-5
    card = (run.folder / "README.md").read_text(encoding="utf-8")
    front = dict(line.split(": ", 1) for line in card.split("---")[1].strip().splitlines())
    values = {
        row["type"]: row["value"] for row in json.loads(front["model-index"])[0]["results"][0]["metrics"]
    }
    assert values == {
        name: round(value, 6) for name, value in finals["test"]["metrics"].items() if value is not None
    }


def test_learning_learns(tiny_base, tmp_path):
    """The two word sets are told apart after a few epochs."""
    train = write_csv(tmp_path / "train.csv", single_rows(300, 7))
    test = write_csv(tmp_path / "test.csv", single_rows(100, 8))
    given = {"train": str(train), "test": str(test), "target_modules": ("all-linear",), "pooling": "mean"}
    config = settings(tmp_path / "run", tiny_base("bert"), epochs=8.0, learning_rate=0.01, **given)
    result = run_training(config)
    assert result["test"]["accuracy"] > 0.85
    losses = [record["loss"] for record in steps_of(config)]
    assert losses[0] == pytest.approx(math.log(2), abs=0.2)
    assert losses[-1] < 0.3


def test_the_base_is_left_as_it_was(tiny_base, tmp_path):
    before = snapshot(tiny_base("bert"))
    run_training(settings(tmp_path, tiny_base("bert")))
    assert snapshot(tiny_base("bert")) == before


def test_train_from_python(tiny_base, tmp_path):
    seen: list[dict[str, Any]] = []
    rows = single_rows()
    classifier = textlora.train(
        rows, test=[{"text": text, "label": label} for text, label in single_rows(8, 5)], output=tmp_path / "out", model=str(tiny_base("bert")),
        epochs=1.0, callback=seen.append, max_length=32,
    )  # fmt: skip
    assert seen == log_of(tmp_path / "out")
    assert classifier.meta.labels == ("neg", "pos")
    facts = classifier.meta.training
    assert (facts["rows"], facts["folds"], facts["held_out"], facts["left_out"]) == (
        {"train": 40, "test": 8},
        3,
        40,
        [],
    )
    assert (
        classifier.meta.scores["test"]
        == next(r for r in seen if r["kind"] == "final" and r["split"] == "test")["metrics"]
    )


def test_a_finished_run_is_not_given_out_for_another(tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"))
    result = run_training(config)
    assert run_training(config, resume=True) == result
    with pytest.raises(UsageError, match="holds a finished run with other settings; choose another --output"):
        run_training(replace(config, r=2), resume=True)


def test_loss_that_is_no_number_stops_the_run(tiny_base, tmp_path, capfd):
    config = settings(tmp_path, tiny_base("bert"), learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(TrainingError, match=r"the loss is nan at step [0-9]+; lower --learning-rate"):
        run_training(config)
    assert not (Path(config.output) / SIDE).exists()
    arguments = (
        "train",
        "--quiet",
        "--train",
        config.train,
        "--model",
        config.model,
        "--output",
        tmp_path / "cli",
        "--learning-rate",
        "1e30",
    )
    assert Cli(capfd).fails(*arguments, "--max-grad-norm", 0, code=1).startswith("the loss is nan at step ")


def test_a_text_with_a_line_separator_of_unicode(tiny_base, tmp_path):
    rows = [(f"{text}\u2028 \x85 film \u2029", label) for text, label in single_rows(16)]
    path = write_csv(tmp_path / "odd.csv", rows)
    config = settings(
        tmp_path / "run", tiny_base("bert"), train=str(path), validation=str(path), test=str(path), epochs=1.0
    )
    run_training(config)
    assert log_of(Path(config.output))[-1]["kind"] == "end"


@pytest.mark.parametrize("task", ["single", "multi", "regression"])
def test_validation_rows_on_which_the_metrics_are_not_defined(tiny_base, tmp_path, task):
    """One class, no label, one target: what has no value is null in the log, and the last checkpoint is kept
    where none is better."""
    rows = {
        "single": [("good film", "pos"), ("fun plot", "pos")],
        "multi": [("good film", ""), ("fun plot", "")],
        "regression": [("good film", 1.5), ("fun plot", 1.5)],
    }[task]
    path = write_csv(tmp_path / "flat.csv", rows)
    train = {
        "single": single_rows(16),
        "multi": [(text, "a;b" if label == "pos" else "b") for text, label in single_rows(16)],
        "regression": [(text, 0.5 if label == "pos" else 1.25) for text, label in single_rows(16)],
    }[task]
    data = write_csv(tmp_path / "train.csv", train)
    given = {"label_separator": ";"} if task == "multi" else {}
    config = settings(
        tmp_path / "run", tiny_base("bert"), train=str(data), validation=str(path), test=str(path), **given
    )
    result = run_training(config)
    log = log_of(Path(config.output))
    if task == "single":
        assert result["test"]["auc"] is None
    if task == "regression":
        assert result["test"]["spearman"] is None
        assert result["best_metric"] == {"name": "spearman", "value": None}
        assert result["best_step"] == 4
    assert log[-1]["kind"] == "end"


def test_other_precision_and_batches_by_tokens(tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"), precision="bfloat16", batch_tokens=60)
    result = run_training(config)
    assert result["golden_difference"] < 1e-5  # the saved adapter is proved in float32
    assert max(record["tokens"] for record in steps_of(config)) <= 60
    assert sum(record["tokens"] for record in steps_of(config)) == result["tokens"]
    assert TextClassifier.load(config.output, base=config.model).meta.scores["test"] == result["test"]


# --- the two paths ---


def on_the_reference(prepared: Prepared) -> Prepared:
    config = prepared.config
    model = ReferenceModel.create(
        Path(config.model), config.lora, len(prepared.schema.labels), pooling=config.pooling
    )
    model.load_trainable({name: tensor.detach() for name, tensor in prepared.model.trainable().items()})
    return replace(prepared, model=model, reason="on purpose")


@pytest.mark.parametrize(
    ("family", "task", "changes"),
    [
        ("bert", "single", {}),
        ("bert", "multi", {"pooling": "mean"}),
        ("bert-no-pooler", "pairs", {"use_dora": True}),
        ("roberta", "regression", {"target_modules": ("all-linear",)}),
        ("distilbert", "single", {"use_rslora": True, "label_smoothing": 0.1, "class_weights": "balanced"}),
        ("electra", "pairs", {"loraplus_ratio": 4.0}),
    ],
)
def test_both_paths_have_the_same_losses(tiny_base, tmp_path, family, task, changes):
    fast = prepared_run(tmp_path, tiny_base(family), task, **changes)
    assert fast.model.path == "packed"
    slow = on_the_reference(fast)
    ours, theirs = (list(Trainer(one).records()) for one in (fast, slow))
    assert (
        [record["kind"] for record in ours]
        == [record["kind"] for record in theirs]
        == [*["step"] * 5, "evaluation"] * 2
    )
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    assert len({record["loss"] for record in ours}) >= 11  # it does train
    for name, tensor in fast.model.trainable().items():
        assert torch.allclose(tensor, slow.model.trainable()[name], atol=2e-3), name


@pytest.mark.parametrize("family", ["modernbert", "deberta-v2"])
def test_architectures_without_a_fast_path_train_on_the_reference(tiny_base, tmp_path, capfd, family):
    files = task_files(tmp_path, "single")
    arguments = [
        "train",
        "--train",
        files["train"],
        "--test",
        files["test"],
        "--model",
        tiny_base(family),
        "--epochs",
        1,
    ]
    code, out, err = Cli(capfd)(
        *arguments, "--output", tmp_path / "out", "--max-length", 24, "--device", "cpu", "--json"
    )
    assert code == 0, err
    assert f"(reference path: model type '{family}' is not on the fast path)" in err
    assert json.loads(out)["path"] == "reference"
    classifier = TextClassifier.load(tmp_path / "out", base=str(tiny_base(family)))
    assert classifier.model.path == "reference"
    assert json.loads(out)["golden_difference"] < 1e-5
    assert read_meta(tmp_path / "out").training["path"] == "reference"


def test_the_reference_path_gives_the_same_bytes_twice(tiny_base, tmp_path):
    made = [
        weights_of(settings(tmp_path / name, tiny_base("modernbert"), epochs=1.0, lora_dropout=0.2))
        for name in ("a", "b")
    ]
    assert made[0] == made[1]


# --- steps, batches, rates ---


def test_accumulation_is_exactly_a_larger_batch(tiny_base, tmp_path):
    whole = weights_of(settings(tmp_path / "8", tiny_base("bert"), batch_size=8, lora_dropout=0.2))
    parts = weights_of(
        settings(
            tmp_path / "4x2", tiny_base("bert"), batch_size=4, gradient_accumulation_steps=2, lora_dropout=0.2
        )
    )
    other = weights_of(settings(tmp_path / "4", tiny_base("bert"), batch_size=4, lora_dropout=0.2))
    assert parts == whole
    assert other != whole


@pytest.mark.parametrize("changes", [{}, {"class_weights": "pos=3", "label_smoothing": 0.2}])
def test_pieces_of_a_step_add_up_to_it(tiny_base, tmp_path, monkeypatch, changes):
    def losses(tokens: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        monkeypatch.setattr(textlora.training.steps, "PIECE_TOKENS", {"cpu": tokens})
        trainer = Trainer(prepared_run(tmp_path, tiny_base("bert"), **changes))
        return [record["loss"] for record in trainer.records()], trainer.parameters

    (whole, a), (pieces, b) = losses(10_000), losses(20)
    assert pieces == pytest.approx(whole, abs=1e-5)
    assert all(torch.allclose(a[name], b[name], atol=1e-4) for name in a)


def test_every_row_once_an_epoch_in_an_order_of_its_own(tiny_base, tmp_path):
    prepared = prepared_run(tmp_path, tiny_base("bert"), epochs=2.5)
    steps = plan(prepared.config, prepared.sets["train"].lengths)
    assert [round(epoch, 9) for epoch, _ in steps] == [
        round((i + 1) / 5, 9) for i in range(12)
    ]  # 5 steps an epoch, the last half: 2 of 5
    first, second = ([row for _, rows in steps[a : a + 5] for row in rows] for a in (0, 5))
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first == np.random.default_rng([42, 0]).permutation(40).tolist()


def test_learning_rates_of_every_scheduler():
    def rates(**given: Any) -> list[float]:
        config = TrainConfig(**given)
        return [rate_at(config, step, 10) for step in range(10)]

    assert rates(scheduler="constant", warmup=0.0) == [1.0] * 10
    assert rates(scheduler="linear", warmup=0.0) == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(scheduler="cosine", warmup=0.0) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    )
    assert rates(scheduler="linear", warmup=0.2) == pytest.approx(
        [1 / 3, 2 / 3, *[1 - i / 8 for i in range(8)]]
    )
    assert rates(scheduler="constant", warmup=3.0) == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])


def test_the_log_has_the_rates_that_were_used(tiny_base, tmp_path):
    config = settings(tmp_path, tiny_base("bert"), scheduler="cosine", warmup=2.0, learning_rate=0.004)
    run_training(config)
    assert [record["learning_rate"] for record in steps_of(config)] == pytest.approx(
        [0.004 * rate_at(config, step, 10) for step in range(10)]
    )


def test_groups_of_the_optimizer(tiny_base, tmp_path):
    trainer = Trainer(
        prepared_run(tmp_path, tiny_base("bert"), loraplus_ratio=16.0, weight_decay=0.05, learning_rate=0.001)
    )
    next(trainer.records())
    place = {id(tensor): group for group in trainer.optimizer.param_groups for tensor in group["params"]}
    rate = 0.001 * rate_at(trainer.config, 0, 10)
    for name, tensor in trainer.parameters.items():
        group = place[id(tensor)]
        assert group["lr"] == pytest.approx(rate * (16 if ".lora_B." in name else 1)), name
        assert group["weight_decay"] == (0.0 if name.endswith(".bias") else 0.05), name


def test_one_step_is_that_of_adamw(tiny_base, tmp_path):
    """Against the formula: after one step each value has moved by the rate against the sign of its gradient,
    and decayed."""
    prepared = prepared_run(tmp_path, tiny_base("bert"), weight_decay=0.1, warmup=0.0)
    start = {name: tensor.detach().clone() for name, tensor in prepared.model.trainable().items()}
    trainer = Trainer(prepared)
    kept: dict[str, torch.Tensor] = {}
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (
        kept.update({n: t.grad.clone() for n, t in trainer.parameters.items()}),
        step(),
    )[1]
    next(trainer.records())
    for name, tensor in trainer.parameters.items():
        gradient, decay = kept[name], 0.0 if name.endswith(".bias") else 0.1
        expected = start[name] * (1 - 5e-3 * decay) - 5e-3 * gradient / (gradient.abs() + 1e-8)
        assert torch.allclose(tensor, expected, atol=1e-6), name


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e6])
def test_gradients_are_clipped_to_their_common_norm(tiny_base, tmp_path, limit):
    trainer = Trainer(prepared_run(tmp_path, tiny_base("bert"), max_grad_norm=limit))
    norms: list[float] = []
    step = trainer.optimizer.step

    def seen() -> None:
        norms.append(math.sqrt(sum(float((t.grad**2).sum()) for t in trainer.parameters.values())))
        step()

    trainer.optimizer.step = seen
    record = next(trainer.records())
    expected = record["grad_norm"] if not limit else min(limit, record["grad_norm"])
    assert norms == [pytest.approx(expected, rel=1e-4)]
    assert record["grad_norm"] > 1e-2


# --- losses ---


def test_weights_of_classes():
    single, multi = np.array([0, 0, 0, 1]), np.array([[1, 0], [1, 1], [0, 0], [1, 0]], dtype=np.float32)
    assert class_weights(None, ("a", "b"), SINGLE_LABEL, single) is None
    assert class_weights("balanced", ("a", "b", "c"), SINGLE_LABEL, single).tolist() == pytest.approx(
        [4 / 9, 4 / 3, 0.0]
    )
    assert class_weights("balanced", ("a", "b"), MULTI_LABEL, multi).tolist() == pytest.approx([1 / 3, 3.0])
    assert class_weights("b=2.5", ("a", "b"), SINGLE_LABEL, single).tolist() == [1.0, 2.5]
    assert class_weights("x=y=3,b=0", ("a", "b", "x=y"), SINGLE_LABEL, single).tolist() == [1.0, 0.0, 3.0]
    with pytest.raises(UsageError, match="a regression task has no classes"):
        class_weights("balanced", ("value",), REGRESSION, single)


def test_loss_is_that_of_torch(tiny_base, tmp_path):
    generator = torch.Generator().manual_seed(1)

    def mean(prepared: Prepared, logits: torch.Tensor, labels: torch.Tensor) -> float:
        loss = Loss(prepared)
        return float(loss(logits, labels).sum()) / loss.weight(labels.numpy())

    logits, labels = torch.randn(12, 2, generator=generator), torch.randint(2, (12,), generator=generator)
    prepared = prepared_run(
        tmp_path / "s", tiny_base("bert"), class_weights="neg=0.25,pos=2", label_smoothing=0.3
    )
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([0.25, 2.0]), label_smoothing=0.3)
    assert mean(prepared, logits, labels) == pytest.approx(float(expected), abs=1e-6)

    logits = torch.randn(12, 3, generator=generator)
    labels = torch.randint(2, (12, 3), generator=generator).float()
    prepared = prepared_run(
        tmp_path / "m", tiny_base("bert"), "multi", class_weights="warm=3", label_smoothing=0.2
    )
    expected = F.binary_cross_entropy_with_logits(
        logits, labels * 0.8 + 0.1, pos_weight=torch.tensor([1.0, 1.0, 3.0])
    )
    assert mean(prepared, logits, labels) == pytest.approx(float(expected), abs=1e-6)

    logits, labels = torch.randn(12, 1, generator=generator), torch.randn(12, generator=generator)
    prepared = prepared_run(tmp_path / "r", tiny_base("bert"), "regression")
    assert mean(prepared, logits, labels) == pytest.approx(float(F.mse_loss(logits[:, 0], labels)), abs=1e-6)


# --- evaluations, the best checkpoint, early stopping ---


def test_evaluations_after_each_epoch_or_every_n_steps(tiny_base, tmp_path):
    config = settings(tmp_path / "a", tiny_base("bert"))
    run_training(config)
    assert [record["step"] for record in evaluations_of(config)] == [5, 10]
    config = settings(tmp_path / "b", tiny_base("bert"), eval_every=4)
    run_training(config)
    assert [record["step"] for record in evaluations_of(config)] == [4, 8, 10]


@pytest.mark.parametrize("metric", ["accuracy", "log_loss"])
def test_the_best_checkpoint_is_what_is_saved(tiny_base, tmp_path, metric):
    """With a large rate to the end the best is not the last; accuracy should be large and log loss small."""
    config = settings(
        tmp_path,
        tiny_base("bert"),
        epochs=8.0,
        learning_rate=0.02,
        scheduler="constant",
        metric=metric,
        eval_every=4,
    )
    trainer = Trainer(prepare(config))
    textlora.training.head_start.start_head(trainer.prepared)
    kept, best = None, None
    for record in trainer.records():
        if record["kind"] == "evaluation":
            value = record["metrics"][metric] * (1 if metric == "accuracy" else -1)
            assert record["best"] == (best is None or value > best)
            best = value if record["best"] else best
            noise = math.sqrt(best * (1 - best) / 16) if metric == "accuracy" else 0.0
            assert record["kept"] == (value >= best - noise)
            if record["kept"]:
                score = value
                kept = {name: t.detach().clone() for name, t in trainer.parameters.items()}
                at = record["step"]
    assert at < 40
    run_training(config)
    saved = load_file(Path(config.output) / WEIGHTS)
    temperature = read_meta(Path(config.output)).fitted_temperature
    kept = scaled_head(kept, 1 / temperature)
    assert temperature != 1
    assert all(torch.equal(saved[name], kept[name]) for name in saved)
    log = log_of(Path(config.output))
    assert log[-1]["best_step"] == at
    final = next(r for r in log if r["kind"] == "final" and r["split"] == "validation")
    if metric == "accuracy":
        assert final["metrics"]["accuracy"] == score


def test_early_stopping(tiny_base, tmp_path):
    config = settings(
        tmp_path,
        tiny_base("bert"),
        epochs=50.0,
        early_stopping_patience=2,
        learning_rate=0.05,
        scheduler="constant",
    )
    result = run_training(config)
    marks = [record["best"] for record in evaluations_of(config)]
    assert marks[-2:] == [False, False]
    assert marks[-3] is True
    assert all(True in marks[i : i + 2] for i in range(len(marks) - 3))
    assert result["steps"] == 5 * len(marks) < 250
    assert result["best_step"] == [record["step"] for record in evaluations_of(config) if record["kept"]][-1]


def test_a_run_without_validation_keeps_the_last(tiny_base, tmp_path):
    """Each class has one text, so that none can be held out."""
    path = write_csv(tmp_path / "same.csv", single_rows(2) * 6)
    config = settings(tmp_path / "run", tiny_base("bert"), train=str(path), validation=None, test=None)
    assert set(prepare(config).sets) == {"train"}
    result = run_training(config)
    assert result["best_step"] == result["steps"] == 4
    assert "validation" not in result
    assert read_meta(Path(config.output)).fitted_temperature == 1.0


# --- which rows ---


def test_limit_train_takes_the_first_of_a_permutation(tiny_base, tmp_path):
    rows = single_rows()
    for seed in (42, 3):
        prepared = prepared_run(tmp_path, tiny_base("bert"), limit_train=12, seed=seed)
        picked = np.random.default_rng(seed).permutation(40)[:12]
        assert [row.text for row in prepared.sets["train"].rows] == [rows[i][0] for i in picked]


def test_rows_beyond_the_limit_validate(tiny_base, tmp_path):
    rows = single_rows()
    prepared = prepared_run(tmp_path, tiny_base("bert"), limit_train=30, validation=None)
    order = np.random.default_rng(42).permutation(40)
    assert [row.text for row in prepared.sets["validation"].rows] == [rows[i][0] for i in order[30:]]
    prepared = prepared_run(tmp_path, tiny_base("bert"), limit_train=30, validation=None, limit_eval=4)
    assert [row.text for row in prepared.sets["validation"].rows] == [rows[i][0] for i in order[30:34]]


def test_half_as_many_rows_as_train_validate_at_most(tiny_base, tmp_path):
    path = write_csv(tmp_path / "many.csv", single_rows(900, seed=4))
    for limit, held in ((300, 150), (40, 100)):
        prepared = prepared_run(
            tmp_path / str(limit), tiny_base("bert"), train=str(path), limit_train=limit, validation=None
        )
        assert len(prepared.sets["validation"].rows) == held


def test_a_share_of_each_class_is_split_off(tiny_base, tmp_path):
    rows = [(text, "pos" if i % 4 else "neg") for i, (text, _) in enumerate(single_rows(80, seed=6))] + [
        ("water door", "odd"),
        ("red door", "few"),
        ("blue door", "few"),
    ]
    path = write_csv(tmp_path / "uneven.csv", rows)
    sets = prepared_run(
        tmp_path, tiny_base("bert"), train=str(path), validation=None, validation_share=0.1
    ).sets
    count = lambda split: Counter(row.label for row in sets[split].rows)
    assert count("validation") == {"pos": 6, "neg": 2, "few": 1}
    assert count("train") == {"pos": 54, "neg": 18, "few": 1, "odd": 1}
    assert not {row.text for row in sets["train"].rows} & {row.text for row in sets["validation"].rows}


def test_own_validation_rows_never_repeat_a_training_text(tiny_base, tmp_path):
    rows = single_rows(20)
    path = write_csv(tmp_path / "twice.csv", rows * 2)
    sets = prepared_run(tmp_path, tiny_base("bert"), train=str(path), validation=None, limit_train=20).sets
    seen = {row.text for row in sets["train"].rows}
    order = np.random.default_rng(42).permutation(40)
    expected = [(rows * 2)[i][0] for i in order[20:] if (rows * 2)[i][0] not in seen]
    assert [row.text for row in sets["validation"].rows] == expected
    assert 0 < len(expected) < 20


def test_limit_eval_picks_by_the_seed(tiny_base, tmp_path):
    prepared = prepared_run(tmp_path, tiny_base("bert"), limit_eval=5, seed=9)
    for split, seed in (("validation", 1), ("test", 2)):
        rows = single_rows(16, seed)
        assert [row.text for row in prepared.sets[split].rows] == [
            rows[i][0] for i in np.random.default_rng(9).permutation(16)[:5]
        ]


def test_a_limit_that_leaves_one_class(tiny_base, tmp_path):
    with pytest.raises(DataError, match="the training rows picked hold one class only; raise --limit-train"):
        prepared_run(tmp_path, tiny_base("bert"), limit_train=1)


def test_the_head_starts_at_what_is_known(tiny_base, tmp_path):
    prepared = prepared_run(tmp_path / "r", tiny_base("bert"), "regression")
    textlora.training.head_start.start_head(prepared)
    assert list(prepared.model.trainable().values())[-1].tolist() == pytest.approx([0.5])
    prepared = prepared_run(tmp_path / "m", tiny_base("bert"), "multi")
    textlora.training.head_start.start_head(prepared)
    share = prepared.sets["train"].labels.mean(0)
    assert list(prepared.model.trainable().values())[-1].detach().numpy() == pytest.approx(
        np.log(share / (1 - share)), abs=1e-6
    )


# --- starting from another adapter ---


@pytest.fixture
def source(tiny_base, tmp_path_factory) -> Path:
    return trained(tiny_base, tmp_path_factory).folder


def test_warm_start(tiny_base, tmp_path, source):
    """With a rate of nearly nothing, the new adapter is the old one."""
    config = settings(
        tmp_path, tiny_base("bert"), init_adapter=str(source), learning_rate=1e-12, weight_decay=0.0, seed=5
    )
    run_training(config)
    old, new = load_file(source / WEIGHTS), load_file(Path(config.output) / WEIGHTS)
    assert list(old) == list(new)
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old)


def test_warm_start_on_other_labels_takes_a_and_b_only(tiny_base, tmp_path, source):
    path = write_csv(
        tmp_path / "other.csv", [(text, {"pos": "yes", "neg": "no"}[label]) for text, label in single_rows()]
    )
    given = {
        "train": str(path),
        "validation": None,
        "test": None,
        "learning_rate": 1e-12,
        "weight_decay": 0.0,
        "seed": 5,
    }
    config = settings(tmp_path / "warm", tiny_base("bert"), init_adapter=str(source), **given)
    run_training(config)
    old, new = load_file(source / WEIGHTS), load_file(Path(config.output) / WEIGHTS)
    head = "base_model.model.classifier.weight"
    assert all(torch.allclose(old[name], new[name], atol=1e-9) for name in old if ".lora_" in name)
    assert not torch.allclose(old[head], new[head], atol=1e-3)
    fresh = settings(tmp_path / "fresh", tiny_base("bert"), **given)
    run_training(fresh)
    trained_head = lambda run: (
        load_file(Path(run.output) / WEIGHTS)[head] * read_meta(Path(run.output)).fitted_temperature
    )
    assert torch.allclose(trained_head(fresh), trained_head(config), atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"layers": "0"},
            "adapts other layers than this run; give the same --target-modules, --layers and --use-dora",
        ),
        ({"target_modules": ("query", "key", "value")}, "adapts other layers than this run"),
        ({"use_dora": True}, "adapts other layers than this run"),
        ({"r": 8}, "has shape (4, 32), this model needs (8, 32)"),
    ],
)
def test_warm_start_from_what_does_not_fit(tiny_base, tmp_path, source, changes, said):
    config = settings(tmp_path, tiny_base("bert"), init_adapter=str(source), **changes)
    with pytest.raises((UsageError, AdapterError)) as caught:
        run_training(config)
    assert said in str(caught.value)
    assert str(source) in str(caught.value)
    assert not Path(config.output).exists()


def test_warm_start_on_another_base(tmp_path, source):
    config = settings(
        tmp_path / "run", make_tiny("bert", tmp_path / "base", seed=4), init_adapter=str(source)
    )
    with pytest.raises(UsageError, match="was trained on another base model"):
        run_training(config)
    assert not Path(config.output).exists()


def test_score_is_the_mean_over_rows(tiny_base, tmp_path):
    prepared = prepared_run(tmp_path, tiny_base("bert"))
    loss, metrics, logits = score(prepared, prepared.sets["test"], Loss(prepared))
    labels = prepared.sets["test"].labels
    assert loss == pytest.approx(
        float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels))), abs=1e-6
    )
    assert metrics["accuracy"] == (logits.argmax(1) == labels).mean()

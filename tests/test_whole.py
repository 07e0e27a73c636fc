"""Full fine-tuning, BitFit, the head alone, PiSSA and peft's other methods, against transformers and peft
with autograd."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import FAST, MAX_POSITIONS, random_adapter, random_batch

from textlora.compare.full_finetuning import FeatureModel, FullFinetuningModel, transformers_names
from textlora.compare.peft_methods import KINDS, PeftMethodModel
from textlora.compare.pissa import PissaModel, principal
from textlora.core.config import LoraConfig
from textlora.core.errors import UsageError
from textlora.data.tokenize import PackedBatch
from textlora.model.base import find_base, read_weights
from textlora.model.encoder import PackedEncoder
from textlora.model.families import read_spec
from textlora.model.packed_model import PackedModel
from textlora.model.reference_model import ReferenceModel

LENGTHS = [7, 3, 9, 3]
LABELS = torch.tensor([0, 1, 2, 1])


def base_of(folder, pooling="first"):
    files = find_base(str(folder))
    return read_weights(files.folder, read_spec(files.config), pooler=pooling == "first")


def batch_for(family: str) -> PackedBatch:
    specials = (0, 1) if "roberta" not in family and family != "camembert" else (1, 4)
    return random_batch(LENGTHS, specials=specials, labels=LABELS.numpy())


def answers_of_transformers(net: torch.nn.Module, batch: PackedBatch) -> torch.Tensor:
    """Logits in packed order, one text at a time and no padding."""
    rows, bounds = [], batch.cu_seqlens.tolist()
    takes_types = getattr(net.config, "type_vocab_size", 0) > 1
    for start, stop in pairwise(bounds):
        types = {"token_type_ids": batch.type_ids[None, start:stop]} if takes_types else {}
        rows.append(net(input_ids=batch.ids[None, start:stop], **types).logits)
    return torch.cat(rows)


def transformers_twin(folder, model: FullFinetuningModel) -> torch.nn.Module:
    """The same classifier in transformers; trained tensors of `model` copied by name, each of them once."""
    net = transformers.AutoModelForSequenceClassification.from_pretrained(str(folder), num_labels=3).eval()
    parameters = dict(net.named_parameters())
    with torch.no_grad():
        for name, tensor in transformers_names(model, model.trainable()).items():
            parameters[name].copy_(tensor)
    return net


@pytest.mark.parametrize("part", ["all", "biases", "head"])
@pytest.mark.parametrize("family", FAST)
def test_logits_and_gradients_are_those_of_transformers(tiny_base, family, part):
    model, batch = FullFinetuningModel(base_of(tiny_base(family)), part, 3, seed=5), batch_for(family)
    net = transformers_twin(tiny_base(family), model)
    logits, theirs = model.forward(batch), answers_of_transformers(net, batch)
    torch.testing.assert_close(logits, theirs, atol=1e-5, rtol=1e-4)
    names, leaves = list(model.trainable()), list(model.trainable().values())
    mine = torch.autograd.grad(F.cross_entropy(logits, batch.labels), leaves, allow_unused=True)
    mine = {
        name: torch.zeros_like(leaf) if g is None else g
        for name, leaf, g in zip(names, leaves, mine, strict=True)
    }
    named = transformers_names(model, mine)
    assert len(named) == len(set(named))
    F.cross_entropy(theirs, batch.labels).backward()
    for name, gradient in named.items():
        wanted = dict(net.named_parameters())[name].grad
        torch.testing.assert_close(
            gradient, torch.zeros_like(gradient) if wanted is None else wanted, atol=2e-6, rtol=1e-3
        )


@pytest.mark.parametrize("family", FAST)
def test_full_trains_every_tensor_that_transformers_trains(tiny_base, family):
    model = FullFinetuningModel(base_of(tiny_base(family)), "all", 3)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(tiny_base(family)), num_labels=3
    )
    everything = {name: tuple(p.shape) for name, p in net.named_parameters()}
    assert {
        name: tuple(t.shape) for name, t in transformers_names(model, model.trainable()).items()
    } == everything


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bitfit_trains_every_bias_and_the_head(tiny_base, family):
    model = FullFinetuningModel(base_of(tiny_base(family)), "biases", 3)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(tiny_base(family)), num_labels=3
    )
    wanted = {
        name for name, _ in net.named_parameters() if name.endswith("bias") or name.startswith("classifier.")
    }
    assert set(transformers_names(model, model.trainable())) == wanted


def test_training_leaves_the_shared_base_alone(tiny_base):
    base = base_of(tiny_base("bert"))
    before = {name: tensor.clone() for name, tensor in base.tensors.items()}
    encoder = PackedEncoder(base)
    model, batch = FullFinetuningModel(base, "all", 3, encoder=encoder), batch_for("bert")
    first = model.forward(batch).detach()
    optimizer = torch.optim.SGD(model.trainable().values(), lr=0.5)
    F.cross_entropy(model.forward(batch), batch.labels).backward()
    optimizer.step()
    assert not torch.allclose(model.forward(batch), first, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.tensors.items())
    torch.testing.assert_close(FullFinetuningModel(base, "all", 3, encoder=encoder).forward(batch), first)


def test_saved_values_come_back(tiny_base):
    base, batch = base_of(tiny_base("bert")), batch_for("bert")
    model, other = (FullFinetuningModel(base, "all", 3, seed=seed) for seed in (1, 2))
    other.load_trainable({name: tensor.detach() for name, tensor in model.trainable().items()})
    assert torch.equal(model.forward(batch), other.forward(batch))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_head_on_known_features_is_the_head_on_texts(tiny_base, pooling):
    base, batch = base_of(tiny_base("bert"), pooling), batch_for("bert")
    model = FullFinetuningModel(base, "head", 3, pooling=pooling, seed=3)
    features = FeatureModel(base, "head", 1, pooling=pooling, encoder=model.encoder).forward(batch)
    assert features.shape == (4, 32)
    assert torch.equal(
        model.forward(replace(batch, hidden=features, depth=model.depth)), model.forward(batch)
    )
    trained = {name for name in model.trainable() if not name.startswith("base_model.model.classifier.")}
    assert trained == set()


def test_checkpointing_changes_no_gradient(tiny_base):
    model, batch = FullFinetuningModel(base_of(tiny_base("bert")), "all", 3), batch_for("bert")
    found = []
    for keep_less in (False, True):
        model.gradient_checkpointing = keep_less
        found.append(
            torch.autograd.grad(
                F.cross_entropy(model.forward(batch), batch.labels),
                list(model.trainable().values()),
                allow_unused=True,
            )
        )
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_principal_part_is_the_best_approximation():
    weight = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    A, B = principal(weight, 3, 2.0)
    rest = weight.double() - 2.0 * B.double() @ A.double()
    singular = torch.linalg.svdvals(weight.double())
    assert torch.allclose(rest.norm() ** 2, (singular[3:] ** 2).sum(), rtol=1e-5)
    torch.testing.assert_close((A @ A.T).diagonal(), (singular[:3] / 2.0).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_pissa_starts_as_the_base_and_is_saved_as_ordinary_lora(tiny_base, use_rslora):
    base, batch = base_of(tiny_base("bert")), batch_for("bert")
    lora = LoraConfig(r=3, use_rslora=use_rslora)
    model = PissaModel(base, lora, 3, {}, seed=4)
    plain = PackedModel(base, lora, 3, seed=4)
    torch.testing.assert_close(
        model.forward(batch), plain.forward(batch), atol=1e-5, rtol=1e-4
    )  # B of a fresh LoRA is zero
    with torch.no_grad():
        for k, tensor in enumerate(model.trainable().values()):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)))
    assert not torch.allclose(model.forward(batch), plain.forward(batch), atol=1e-2)
    settings, tensors = model.ordinary()
    assert settings.r == 6
    saved, oracle = PackedModel(base, settings, 3), ReferenceModel.create(tiny_base("bert"), settings, 3)
    for ordinary in (saved, oracle):
        ordinary.load_trainable(tensors)
        torch.testing.assert_close(ordinary.forward(batch), model.forward(batch), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((f, kind) for f in ("bert", "bert-no-pooler", "roberta") for kind in KINDS),
        ("electra", "ia3"),
        ("electra", "prefix"),
        ("distilbert", "ia3"),
    ],
)
def test_peft_methods_train_what_they_should_and_ignore_padding(tiny_base, family, kind):
    model = PeftMethodModel.open(kind, 4, tiny_base(family), 3, seed=6)
    batch = batch_for(family)
    leaves = model.trainable()
    assert list(leaves)[-1].endswith("bias")  # the head's last bias
    with torch.no_grad():
        for k, tensor in enumerate(leaves.values()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(k)))
    logits = model.forward(batch)
    bounds = batch.cu_seqlens.tolist()
    alone = [model.forward(cut(batch, start, stop)) for start, stop in pairwise(bounds)]
    torch.testing.assert_close(logits, torch.cat(alone), atol=1e-5, rtol=1e-4)
    gradients = torch.autograd.grad(F.cross_entropy(logits, batch.labels), list(leaves.values()))
    assert all(
        gradient.abs().max() > 0
        for name, gradient in zip(leaves, gradients, strict=True)
        if ".key." not in name
    )


def cut(batch: PackedBatch, start: int, stop: int) -> PackedBatch:
    """One text of a batch."""
    count = stop - start
    parts = {name: getattr(batch, name)[start:stop] for name in ("ids", "positions", "type_ids")}
    return PackedBatch(**parts, cu_seqlens=torch.tensor([0, count]), rows=torch.tensor([0]))


def test_ia3_starts_as_the_base_and_is_a_rescaling(tiny_base):
    """The formula by hand: keys and values scaled, inputs of the output layers scaled, in plain transformers."""
    model, batch = PeftMethodModel.open("ia3", 0, tiny_base("bert"), 3, seed=6), batch_for("bert")
    net = transformers.AutoModelForSequenceClassification.from_pretrained(
        str(tiny_base("bert")), num_labels=3
    ).eval()
    heads = {
        name.removeprefix("base_model.model."): t
        for name, t in model.trainable().items()
        if "ia3" not in name
    }
    with torch.no_grad():
        for name, tensor in heads.items():
            dict(net.named_parameters())[name].copy_(tensor)
    torch.testing.assert_close(
        model.forward(batch), answers_of_transformers(net, batch), atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        for k, (name, scale) in enumerate(model.trainable().items()):
            if "ia3" not in name:
                continue
            scale.mul_(1 + 0.3 * torch.randn(scale.shape, generator=torch.Generator().manual_seed(k)))
            layer = net.get_submodule(name.removeprefix("base_model.model.").removesuffix(".ia3_l.default"))
            if scale.shape[0] == 1:  # on the input
                layer.weight.mul_(scale)
            else:
                layer.weight.mul_(scale)
                layer.bias.mul_(scale[:, 0])
    torch.testing.assert_close(
        model.forward(batch), answers_of_transformers(net, batch), atol=1e-5, rtol=1e-4
    )


def test_what_peft_cannot_do_is_one_line(tiny_base):
    with pytest.raises(UsageError, match="embeddings are narrower"):
        PeftMethodModel.open("prompt", 4, tiny_base("electra"), 3)
    with pytest.raises(UsageError, match="peft has no ia3 for a mpnet"):
        PeftMethodModel.open("ia3", 0, tiny_base("mpnet"), 3)


def test_learned_positions_take_room(tiny_base):
    model = PeftMethodModel.open("prompt", 4, tiny_base("bert"), 3)
    assert model.max_length == MAX_POSITIONS - 4
    with pytest.raises(UsageError, match="lower --max-length"):
        model.forward(random_batch([MAX_POSITIONS - 3]))


def test_random_adapter_has_no_part_in_whole_models(tiny_base):
    model = FullFinetuningModel(base_of(tiny_base("bert")), "biases", 3)
    assert not any(".lora_" in name for name in random_adapter(model))
    assert model.loras() == {}

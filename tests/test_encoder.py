"""The fast path against transformers + peft: logits, gradients, every family, every target, every length."""

import copy
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
import torch
from conftest import FAST, both_ways, make_tiny, random_adapter, random_batch

from textlora.core.config import LoraConfig
from textlora.core.errors import UsageError
from textlora.data.tokenize import Encoded, TextTokenizer, load_tokenizer, pack
from textlora.model.adapter_batch import ScaledLora
from textlora.model.adapter_tensors import parameter_counts
from textlora.model.attention import attend, attend_first, attend_plain
from textlora.model.base import find_base, read_weights
from textlora.model.encoder import activate
from textlora.model.families import read_spec
from textlora.model.lora import Lora, dora_scale, lora_linear
from textlora.model.open import open_model
from textlora.model.packed_model import PackedModel
from textlora.model.reference_model import ReferenceModel

LENGTHS = [5, 1, 2, 3, 5, 48, 5, 8, 13, 21, 3]
TEXTS = [
    "good", "A dull film, and far too long!", "The plot is thin; the actors are not.", "ok", "Was that the second time this week?!",
    "El mercado abre los domingos.", "회의는 수요일에 시작합니다.", "I would watch it again and again and again. " * 6,
]  # fmt: skip
SHORT = {
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
}
VARIANTS = {
    "last-layer": {"layers": "last:1", "target_modules": ("all-linear",)},
    "layer-list": {"layers": "1,0"},
    "first-layer": {"layers": "0"},
    "rslora": {"use_rslora": True, "lora_alpha": 3.0},
    "dora": {"use_dora": True, "target_modules": ("all-linear",)},
    "all-linear": {"target_modules": ("all-linear",)},
}


def float64_logits(model, batch):
    exact = copy.deepcopy(model)
    exact._net.double()
    with torch.no_grad():
        return exact.forward(batch).double()


def compare(fast, slow, batch):
    """Logits and every gradient of the two paths for one random cotangent."""
    a, b = fast.forward(batch), slow.forward(batch)
    assert a.dtype == torch.float32
    if not (a - b).abs().le(1e-5 * b.abs().clamp(min=1)).all():
        exact = float64_logits(slow, batch)
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max()
    cotangent = torch.randn(a.shape, generator=torch.Generator().manual_seed(7))
    mine, theirs = fast.trainable(), slow.trainable()
    assert list(mine) == list(theirs)
    grads = [
        torch.autograd.grad((y * cotangent).sum(), list(leaves.values()))
        for y, leaves in ((a, mine), (b, theirs))
    ]
    floor = (
        1e-7 * torch.stack([g.norm() for g in grads[1]]).norm()
    )  # rounding of a gradient that is zero, such as q's of one-token texts
    for name, ga, gb in zip(mine, *grads, strict=True):
        assert (ga - gb).norm() <= 1e-4 * gb.norm() + floor, name
        assert gb.norm() > 0 or batch.cu_seqlens.diff().max() == 1, name


def test_targets_name_every_dense_layer(tiny_base):
    """The names below are all there are, so that "every target" is true."""
    for family, count in (("bert", 12), ("distilbert", 12)):
        model = open_model(
            find_base(str(tiny_base(family))), LoraConfig(r=2, target_modules=("all-linear",)), 2
        )[0]
        assert len(model.target_modules) == count
        assert all(
            any(name.endswith("." + short) for short in SHORT[family]) for name in model.target_modules
        )


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("slot", range(6))
def test_each_target_alone(family, slot, tiny_base):
    name = SHORT.get(family, SHORT["bert"])[slot]
    lora = LoraConfig(r=4, target_modules=(name,))
    fast, slow = both_ways(tiny_base(family), lora, seed=slot)
    assert fast.target_modules == slow.target_modules
    compare(fast, slow, random_batch(LENGTHS, seed=slot))


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(family, variant, tiny_base):
    fast, slow = both_ways(tiny_base(family), LoraConfig(**({"r": 4} | VARIANTS[variant])))
    assert (fast.target_modules, fast.modules_to_save, fast.max_length) == (
        slow.target_modules,
        slow.modules_to_save,
        slow.max_length,
    )
    compare(fast, slow, random_batch(LENGTHS))


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_mean_pooling(family, dora, tiny_base):
    fast, slow = both_ways(
        tiny_base(family), LoraConfig(r=4, use_dora=dora, target_modules=("all-linear",)), pooling="mean"
    )
    assert fast.modules_to_save == slow.modules_to_save == ["classifier"]
    compare(fast, slow, random_batch(LENGTHS))


@pytest.mark.parametrize("family", FAST)
def test_every_length_alone_and_regression(family, tiny_base):
    fast, slow = both_ways(tiny_base(family), LoraConfig(r=4), num_labels=1)
    assert fast.max_length == 48
    for length in range(1, 49):
        batch = random_batch([length], seed=length)
        with torch.no_grad():
            a, b = fast.forward(batch), slow.forward(batch)
        assert a.shape == (1, 1)
        assert (a - b).abs().item() <= 1e-5 * max(1, b.abs().item()), length
    compare(fast, slow, random_batch([1, 1, 1]))
    compare(fast, slow, random_batch([48]))


@pytest.mark.parametrize(
    ("family", "setting", "activation"),
    [("bert", "hidden_act", a) for a in ("gelu_new", "gelu_pytorch_tanh", "relu")]
    + [
        ("electra", "hidden_act", "gelu_new"),
        ("distilbert", "activation", "relu"),
        ("roberta", "hidden_act", "relu"),
    ],
)
def test_activations(family, setting, activation, tmp_path):
    fast, slow = both_ways(
        make_tiny(family, tmp_path, **{setting: activation}), LoraConfig(r=4, target_modules=("all-linear",))
    )
    assert fast.base.spec.activation == activation
    compare(fast, slow, random_batch(LENGTHS))


def test_activate_matches_transformers():
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    for name in ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "tanh"):
        torch.testing.assert_close(activate(x, name), ACT2FN[name](x), rtol=1e-6, atol=1e-6)
    assert activate(x, None) is x


def test_electra_without_projection_and_other_eps(tmp_path):
    folder = make_tiny("electra", tmp_path, embedding_size=32, layer_norm_eps=1e-2)
    fast, slow = both_ways(folder, LoraConfig(r=4))
    assert "project.weight" not in fast.encoder.embeddings
    assert fast.base_hash() == slow.base_hash()
    compare(fast, slow, random_batch(LENGTHS))


def test_roberta_with_another_padding_id(tmp_path):
    fast, slow = both_ways(make_tiny("roberta", tmp_path, pad_token_id=3), LoraConfig(r=4))
    assert (fast.base.spec.position_offset, fast.max_length, slow.max_length) == (4, 46, 46)
    compare(fast, slow, random_batch([1, 5, 46], specials=(0, 3)))


def test_roberta_counts_positions_past_a_padding_token(tiny_base):
    """A text may spell out "<pad>"; transformers gives that token the padding row and does not count it."""
    for family in ("roberta", "xlm-roberta", "camembert"):
        fast, slow = both_ways(tiny_base(family), LoraConfig(r=4))
        texts = ([0, 5, 1, 6, 2], [0, 1, 1, 7, 8, 2], [1], [9, 1], [0, 5, 6, 7, 2])
        compare(fast, slow, pack([Encoded(np.array(ids), np.zeros(len(ids)), len(ids)) for ids in texts]))


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("variant", ["all-linear", "dora"])
def test_packed_is_one_text_at_a_time(pooling, variant, tiny_base):
    for family in ("bert", "roberta", "distilbert"):
        model = open_model(
            find_base(str(tiny_base(family))),
            LoraConfig(**({"r": 4} | VARIANTS[variant])),
            3,
            pooling=pooling,
        )[0]
        random_adapter(model)
        batch = random_batch(LENGTHS)
        with torch.no_grad():
            together = model.forward(batch)
            for b, (start, stop) in enumerate(itertools.pairwise(batch.cu_seqlens.tolist())):
                alone = Encoded(
                    batch.ids[start:stop].numpy(), batch.type_ids[start:stop].numpy(), stop - start
                )
                torch.testing.assert_close(model.forward(pack([alone]))[0], together[b], rtol=2e-6, atol=2e-6)


def test_batch_order_does_not_matter(tiny_base):
    """`rows` leads back to the list that was packed."""
    model = open_model(find_base(str(tiny_base("bert"))), LoraConfig(r=4), 3)[0]
    random_adapter(model)
    generator = np.random.default_rng(0)
    texts = [Encoded(generator.integers(5, 100, n), np.zeros(n, dtype=np.int8), n) for n in LENGTHS]
    outcomes = []
    for order in (range(len(texts)), generator.permutation(len(texts))):
        batch = pack([texts[i] for i in order], labels=np.asarray(order))
        assert batch.labels.tolist() == [order[row] for row in batch.rows]
        result = torch.empty(len(texts), 3)
        with torch.no_grad():
            result[batch.labels] = model.forward(batch)
        outcomes.append(result)
    torch.testing.assert_close(*outcomes, rtol=2e-6, atol=2e-6)


def test_real_weights(minilm):
    """all-MiniLM-L6-v2 with real words: texts, pairs, every target module."""
    tokenizer = TextTokenizer(load_tokenizer(minilm.folder, "bert"), 128)
    texts = pack(tokenizer.encode(TEXTS))
    pairs = pack(tokenizer.encode(TEXTS, [*TEXTS[3:], None, "yes", "no"]))
    assert pairs.type_ids.unique().tolist() == [0, 1]
    for settings, pooling, batch in (
        ({}, "first", texts),
        ({"target_modules": ("all-linear",), "use_dora": True}, "first", pairs),
        ({"target_modules": ("all-linear",)}, "mean", pairs),
        ({"layers": "last:2", "use_rslora": True}, "mean", texts),
    ):
        fast, slow = both_ways(minilm.folder, LoraConfig(r=8, **settings), pooling=pooling)
        assert fast.base_hash() == slow.base_hash()
        compare(fast, slow, batch)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_stays_near_float32(dtype, tiny_base):
    batch = random_batch(LENGTHS)
    for family, dora in (("bert", False), ("roberta", True)):
        lora = LoraConfig(r=4, use_dora=dora, target_modules=("all-linear",))
        fast, _ = both_ways(tiny_base(family), lora)
        tensors = {name: t.detach().clone() for name, t in fast.trainable().items()}
        low_fast, _ = open_model(find_base(str(tiny_base(family))), lora, 3, dtype=dtype)
        low_slow = ReferenceModel.create(tiny_base(family), lora, 3, dtype=dtype)
        assert low_fast.base_hash() == low_slow.base_hash() == fast.base_hash()
        exact = fast.forward(batch)
        for model in (low_fast, low_slow):
            model.load_trainable(tensors)
            logits = model.forward(batch)
            assert logits.dtype == torch.float32
            assert 0 < (logits - exact).abs().max() <= 0.05 * exact.abs().max()
            logits.sum().backward()
            assert all(
                t.dtype == torch.float32 and t.grad.dtype == torch.float32 for t in model.trainable().values()
            )


@pytest.mark.parametrize("first_only", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cpu_attention_is_plain_attention(first_only, dtype):
    batch = random_batch(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
    projected = draw(batch.tokens, 64 if first_only else 96)
    inputs = [projected, *([draw(batch.size, 32)] if first_only else [])]
    queries = inputs[1] if first_only else None
    results = [way(projected, queries, batch.layout, 4) for way in (attend, attend_plain)]
    cotangent = torch.randn(results[0].shape, generator=generator, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(
        *(torch.autograd.grad((y * cotangent).sum(), inputs) for y in results), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=10 * tolerance)


def test_cpu_attention_takes_a_strided_gradient():
    batch = random_batch([3, 3, 4])
    projected = torch.randn(10, 96, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grads = [
        torch.autograd.grad(way(projected, None, batch.layout, 4).sum(), projected)[0]
        for way in (attend, attend_plain)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("kind", ["plain", "lora", "dora"])
def test_first_token_attention_needs_no_keys_and_values(kind):
    """float64: the folded product gives what forming K and V gives, and so do its gradients."""
    batch = random_batch(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = draw(batch.tokens, 32).requires_grad_()
    queries = draw(batch.size, 32).requires_grad_()
    weight = 0.2 * draw(64, 32)
    bias = draw(64)
    leaves = [x, queries]
    loras = [None, None]
    if kind != "plain":
        loras = [
            Lora(draw(4, 32), draw(32, 4), 0.3, draw(32).abs() if kind == "dora" else None) for _ in range(2)
        ]
        leaves += [
            t.requires_grad_() for lora in loras for t in (lora.A, lora.B, lora.magnitude) if t is not None
        ]
    adapted = [(32 * k, lora) for k, lora in enumerate(loras) if lora is not None]
    slow = attend_plain(lora_linear(x, weight, bias, adapted), queries, batch.layout, 4)
    folded = [
        None if lora is None else ScaledLora(lora.A, lora.scaling * lora.B, dora_scale(part, lora))
        for part, lora in zip(weight.split(32), loras, strict=True)
    ]
    fast = attend_first(x, queries, batch.layout, 4, weight, bias[32:], *folded)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-11)
    cotangent = draw(*slow.shape)
    for mine, theirs in zip(
        *(torch.autograd.grad((y * cotangent).sum(), leaves) for y in (fast, slow)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pooling", ["first", "mean"])
@pytest.mark.parametrize("family", FAST)
def test_hidden_states_computed_before_give_the_same_logits(family, pooling, tiny_base):
    lora = LoraConfig(r=4, layers="last:1", target_modules=("all-linear",))
    model = open_model(find_base(str(tiny_base(family))), lora, 3, pooling=pooling)[0]
    random_adapter(model)
    batch = random_batch(LENGTHS)
    hidden = dataclasses.replace(batch, hidden=model.encoder.prefix(batch, 1), depth=1)
    assert torch.equal(model.forward(hidden), model.forward(batch))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_checkpointing_changes_no_gradient(dropout, tiny_base):
    lora = LoraConfig(r=4, lora_dropout=dropout, use_dora=True, target_modules=("all-linear",))
    model = open_model(find_base(str(tiny_base("bert"))), lora, 3)[0]
    random_adapter(model)
    batch = random_batch(LENGTHS)
    found = []
    for model.gradient_checkpointing in (False, True):
        found.append(
            torch.autograd.grad(model.forward(batch, 5).square().sum(), list(model.trainable().values()))
        )
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_training_never_touches_the_base(pooling, tiny_base):
    """Optimizer steps with dropout and DoRA change every trainable tensor and not one bit of the base or its
    file."""
    folder = tiny_base("bert")
    file_hash = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    lora = LoraConfig(r=4, use_dora=True, lora_dropout=0.3, target_modules=("all-linear",))
    model = open_model(find_base(str(folder)), lora, 3, pooling=pooling)[0]
    held = {
        **model.base.tensors,
        **{f"{i}{k}": v for i, block in enumerate(model.encoder.blocks) for k, v in block.items()},
    }
    before = {name: t.clone() for name, t in held.items()}
    start = {name: t.detach().clone() for name, t in model.trainable().items()}
    optimizer = torch.optim.AdamW(model.trainable().values(), lr=1e-2)
    losses = []
    batch = random_batch(LENGTHS, labels=np.arange(len(LENGTHS)) % 3)
    for step in range(8):
        loss = torch.nn.functional.cross_entropy(model.forward(batch, step), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(t, before[name]) and not t.requires_grad for name, t in held.items())
    assert not any(torch.equal(t, start[name]) for name, t in model.trainable().items())
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == file_hash


def test_a_fresh_adapter_changes_nothing(tiny_base):
    """B starts at zero and magnitudes at the row lengths: logits are those of the base under the same head."""
    for dora in (False, True):
        lora = LoraConfig(r=4, use_dora=dora, target_modules=("all-linear",))
        model = open_model(find_base(str(tiny_base("roberta"))), lora, 3, seed=5)[0]
        batch = random_batch(LENGTHS)
        adapted = model.forward(batch)
        model._slots = {}
        torch.testing.assert_close(adapted, model.forward(batch), rtol=1e-5, atol=1e-6)


def test_seed_fixes_the_start(tiny_base):
    files = find_base(str(tiny_base("bert-no-pooler")))
    state = torch.get_rng_state()
    first, again, other = (
        open_model(files, LoraConfig(r=4), 3, seed=seed)[0].trainable() for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert torch.equal(tensor, other[name]) == (not tensor.any()), (
            name
        )  # only zeros do not depend on the seed
    adapter, head = parameter_counts(first)
    assert (adapter, head) == (4 * 2 * 4 * 32, 32 * 32 + 32 + 3 * 32 + 3)


def test_dropout_follows_the_seed(tiny_base):
    lora = LoraConfig(r=4, lora_dropout=0.5)
    model = open_model(find_base(str(tiny_base("bert"))), lora, 3)[0]
    random_adapter(model)
    batch = random_batch(LENGTHS)
    still = model.forward(batch)
    state = torch.get_rng_state()
    first = model.forward(batch, 1)
    assert not torch.equal(first, still)
    assert torch.equal(model.forward(batch, 1), first)
    assert not torch.equal(model.forward(batch, 2), first)
    assert torch.equal(model.forward(batch), still)
    assert torch.equal(torch.get_rng_state(), state)
    plain = open_model(find_base(str(tiny_base("bert"))), LoraConfig(r=4), 3)[0]
    plain.load_trainable(model.trainable())
    assert torch.equal(plain.forward(batch, 1), still)  # dropout 0: a seed changes nothing


def test_a_text_longer_than_the_position_table_is_refused(tiny_base):
    for family in ("bert", "roberta"):
        for model in both_ways(tiny_base(family), LoraConfig(r=4)):
            with pytest.raises(
                UsageError, match=r"^a text of 49 tokens, the base model takes 48; lower --max-length$"
            ):
                model.forward(random_batch([3, 49]))


def test_models_share_one_base(tiny_base):
    """Two classifiers on the same weights do not see each other."""
    files = find_base(str(tiny_base("bert")))
    base = read_weights(files.folder, read_spec(files.config), pooler=True)
    one = PackedModel(base, LoraConfig(r=4), 2, seed=1)
    two = PackedModel(base, LoraConfig(r=2, layers="last:1"), 5, seed=2)
    batch = random_batch(LENGTHS)
    before = one.forward(batch)
    random_adapter(two)
    assert two.forward(batch).shape == (len(LENGTHS), 5)
    assert torch.equal(one.forward(batch), before)

"""All blocks in one call, with the adapters of a mixed batch: against float64, one text at a time, on
AVX-512, AVX2 and matrix units, and in models."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FAST, make_tiny, random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_engine import KINDS, engine_of, make_adapter, random_texts

from textlora import TextClassifier
from textlora.core.config import LoraConfig
from textlora.data.tokenize import Encoded, pack
from textlora.kernels import bindings
from textlora.kernels.bindings import Panels, Product
from textlora.kernels.block_inference import NORMS, PRODUCTS, Blocks, Jobs
from textlora.kernels.packed_linear import Bf16x2Weight, PackedWeight
from textlora.model.adapter_batch import AdapterBatch, ScaledAdapter, ScaledLora
from textlora.model.base import find_base, read_weights
from textlora.model.families import read_spec
from textlora.model.packed_model import PackedModel

SLOTS = ("query", "key", "value", "attention_output", "intermediate", "output")
needs_vectors = pytest.mark.skipif(
    not bindings.lanes(), reason="this processor has no AVX2, or nothing was compiled"
)


def frozen(layers: int, width: int, inner: int, g: torch.Generator) -> list[dict[str, torch.Tensor]]:
    """Blocks whose sums stay about one."""
    shapes = {
        "qkv": (3 * width, width),
        "attention_output": (width, width),
        "intermediate": (inner, width),
        "output": (width, inner),
    }
    made = []
    for _ in range(layers):
        block = {
            f"{name}.weight": torch.randn(out, into, generator=g) / math.sqrt(into)
            for name, (out, into) in shapes.items()
        }
        block |= {f"{name}.bias": torch.randn(out, generator=g) / 4 for name, (out, _) in shapes.items()}
        block |= {f"{name}.weight": 1 + torch.randn(width, generator=g) / 4 for name in NORMS}
        made.append(block | {f"{name}.bias": torch.randn(width, generator=g) / 4 for name in NORMS})
    return made


def in_c(blocks: list[dict[str, torch.Tensor]], heads: int, kind: type = Product) -> Blocks:
    return Blocks(
        blocks, [{name: kind(block[f"{name}.weight"]) for name in PRODUCTS} for block in blocks], heads, 1e-5
    )


def adapter(
    places: list[tuple[int, str]], width: int, inner: int, r: int, dora: bool, g: torch.Generator
) -> ScaledAdapter:
    made = {}
    for place in places:
        out, into = inner if place[1] == "intermediate" else width, inner if place[1] == "output" else width
        A = torch.randn(r, into, generator=g) / math.sqrt(into)
        B = torch.randn(out, r, generator=g) / math.sqrt(r) / 2
        made[place] = ScaledLora(A, B, 1 + torch.randn(out, generator=g) / 4 if dora else None)
    return ScaledAdapter(made)


def by_torch(
    blocks: list[dict[str, torch.Tensor]],
    x: torch.Tensor,
    lengths: list[int],
    owners: list[int],
    adapters: list[ScaledAdapter],
    heads: int,
) -> list[torch.Tensor]:
    """The oracle: the formulas as written in float64, one text at a time. What each block gives, (T, width)."""
    states = []
    for i, block in enumerate(blocks):
        w, width, parts = {name: tensor.double() for name, tensor in block.items()}, x.shape[1], []
        for part, owner in zip(x.split(lengths), owners, strict=True):

            def dense(
                value: torch.Tensor,
                slot: str,
                weight: torch.Tensor,
                bias: torch.Tensor,
                i: int = i,
                owner: int = owner,
            ) -> torch.Tensor:
                one, y = adapters[owner].get((i, slot)), value @ weight.T
                if one is not None:
                    y = (y + value @ one.A.double().T @ one.B.double().T) * (
                        1 if one.scale is None else one.scale.double()
                    )
                return y + bias

            stacked = zip(SLOTS[:3], w["qkv.weight"].split(width), w["qkv.bias"].split(width), strict=True)
            q, k, v = (dense(part, *one).view(len(part), heads, -1).transpose(0, 1) for one in stacked)
            context = (
                (torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), -1) @ v)
                .transpose(0, 1)
                .reshape(len(part), width)
            )
            named = lambda name, w=w: (name, w[f"{name}.weight"], w[f"{name}.bias"])
            norm = lambda value, name, w=w, width=width: F.layer_norm(
                value, (width,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5
            )
            part = norm(dense(context, *named("attention_output")) + part, "attention_norm")
            parts.append(
                norm(
                    dense(F.gelu(dense(part, *named("intermediate"))), *named("output")) + part, "output_norm"
                )
            )
        x = torch.cat(parts)
        states.append(x)
    return states


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=6) | st.sampled_from(
    [[1], [3, 200], [2] * 70, [512]]
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=LENGTHS, layers=st.integers(1, 3), head=st.sampled_from([(1, 16), (2, 32), (3, 16), (1, 64)]), inner=st.sampled_from([16, 48, 256]),
    kinds=st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.sets(st.sampled_from(SLOTS))), min_size=1, max_size=3),
    only_first=st.booleans(), threads=st.sampled_from([1, 2, 5]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_blocks_are_the_formula_with_the_adapter_of_each_text(
    lanes, lengths, layers, head, inner, kinds, only_first, threads, seed
):
    g, lengths = torch.Generator().manual_seed(seed), sorted(lengths)
    (heads, width), starts = (
        (head[0], head[0] * head[1]),
        torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
    )
    blocks, x = frozen(layers, width, inner, g), torch.randn(sum(lengths), width, generator=g)
    adapters = [
        adapter([(i, slot) for i in range(layers) for slot in slots] if r else [], width, inner, r, dora, g)
        for r, dora, slots in kinds
    ]
    owners = torch.randint(len(adapters), (len(lengths),), generator=g).tolist()
    jobs, made = AdapterBatch(adapters, owners, lengths).jobs(layers, only_first), in_c(blocks, heads)
    expected = by_torch(blocks, x.double(), lengths, owners, adapters, heads)
    before, whole = x.clone(), made.forward(x, starts, jobs, only_first=only_first)
    wanted = expected[-1][starts[:-1].long()] if only_first else expected[-1]
    assert whole.shape == wanted.shape
    assert (whole - wanted).abs().max() <= 2e-5 * wanted.abs().max()
    assert torch.equal(x, before)
    count = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(made.forward(x, starts, jobs, only_first=only_first), whole)  # however many cores
    finally:
        torch.set_num_threads(count)
    text = len(lengths) - 1  # and whatever stands beside a text
    alone = AdapterBatch([adapters[owners[text]]], [0], [lengths[text]]).jobs(layers, only_first)
    found = made.forward(
        x[starts[text] :].contiguous(),
        torch.tensor([0, lengths[text]], dtype=torch.int32),
        alone,
        only_first=only_first,
    )
    assert torch.equal(found, whole[text:] if only_first else whole[starts[text] :])
    if layers > 1:
        below = made.forward(x, starts, AdapterBatch(adapters, owners, lengths).jobs(layers, False), last=1)
        assert (below - expected[0]).abs().max() <= 2e-5 * expected[0].abs().max()
        assert torch.equal(made.forward(below, starts, jobs, 1, only_first=only_first), whole)


@pytest.mark.skipif(not bindings.has_amx(), reason="this processor has no AMX")
def test_blocks_on_matrix_units():
    g = torch.Generator().manual_seed(0)
    blocks, lengths = frozen(3, 64, 112, g), [1, 7, 20, 40, 133]
    x = torch.randn(sum(lengths), 64, generator=g)
    starts = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    adapters = [
        ScaledAdapter({}),
        adapter([(i, slot) for i in range(3) for slot in SLOTS], 64, 112, 5, True, g),
    ]
    owners, made = [0, 1, 1, 0, 1], in_c(blocks, 2, Panels)
    expected = by_torch(blocks, x.double(), lengths, owners, adapters, 2)[-1]
    for only_first, wanted in ((False, expected), (True, expected[starts[:-1].long()])):
        found = made.forward(
            x, starts, AdapterBatch(adapters, owners, lengths).jobs(3, only_first), only_first=only_first
        )
        assert (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()


@needs_vectors
@pytest.mark.parametrize(
    "wrong",
    [
        "x",
        "empty",
        "long",
        "rows",
        "blocks",
        "first",
        "rank",
        "column",
        "address",
        "row",
        "many",
        "in",
        "out",
        "order",
        "type",
        "kind",
    ],
)
def test_no_call_outside_its_bounds(wrong):
    g = torch.Generator().manual_seed(0)
    made, x = in_c(frozen(2, 32, 64, g), 2), torch.randn(9 if wrong != "long" else 600, 32, generator=g)
    starts = torch.tensor(
        {"empty": [0, 0, 9], "long": [0, 600], "rows": [0, 4, 8]}.get(wrong, [0, 4, 9]), dtype=torch.int32
    )
    one = adapter([(0, "key")], 32, 64, 3, False, g)
    jobs = AdapterBatch([one], [0, 0], [4, 5]).jobs(2, False)
    spoilt = {"rank": (5, 300), "column": (6, 5), "address": (2, 0), "row": (0, -1), "many": (1, 10)}
    if wrong in spoilt:
        place, value = spoilt[wrong]
        jobs.words[0, place] = value
    if wrong in ("in", "out"):
        jobs.widths[0, int(wrong == "out")] = 64
    if wrong in ("order", "type"):
        ends = jobs.ends[::-1].copy() if wrong == "order" else jobs.ends.astype(np.int32)
        jobs = Jobs(jobs.words, ends, jobs.widths)
    if wrong == "kind":
        with pytest.raises(ValueError, match="not for this function"):
            in_c(frozen(2, 32, 64, g), 4)
        return
    with pytest.raises(ValueError, match=r"wanted|blocks|jobs|layer|texts"):
        made.forward(
            x.double() if wrong == "x" else x,
            starts,
            jobs,
            2 if wrong == "blocks" else 0,
            1 if wrong == "first" else None,
            wrong == "first",
        )


@needs_vectors
def test_an_adapter_that_c_cannot_take_has_no_jobs():
    g = torch.Generator().manual_seed(0)
    wide, plain = adapter([(0, "query")], 32, 64, 300, False, g), adapter([(0, "query")], 32, 64, 3, False, g)
    assert AdapterBatch([wide, plain], [0, 1], [2, 2]).jobs(1, True) is None
    assert len(AdapterBatch([plain], [0, 0], [2, 2]).jobs(1, True).words) == 1


@needs_vectors
@pytest.mark.parametrize("types", [True, False])
def test_embeddings_are_sums_of_rows(types):
    g = torch.Generator().manual_seed(0)
    tables = [torch.randn(rows, 48, generator=g) for rows in (50, 2, 20)]
    places = [torch.randint(len(table), (33,), generator=g) for table in tables]
    if not types:
        del tables[1], places[1]
    weight, shift = torch.randn(48, generator=g), torch.randn(48, generator=g)
    expected = F.layer_norm(
        sum(table.double()[at] for table, at in zip(tables, places, strict=True)),
        (48,),
        weight.double(),
        shift.double(),
        1e-5,
    )
    np.testing.assert_allclose(
        bindings.embed(places, tables, weight, shift, 1e-5).numpy(), expected.numpy(), atol=1e-5
    )
    for outside in (-1, 50):
        places[0][7] = outside
        with pytest.raises(ValueError, match="in a table of 50 rows"):
            bindings.embed(places, tables, weight, shift, 1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Family -> a base that C takes, and a folder of each kind of adapter on it."""
    made = {}

    def get(family):
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = make_tiny(family, root / family, num_attention_heads=2)
            made[family] = (
                base,
                [make_adapter(root / f"kind-{k}", base, kind, seed=k) for k, kind in enumerate(KINDS)],
            )
        return made[family]

    return get


@needs_vectors
@pytest.mark.parametrize(
    "precision",
    ["float32", pytest.param("high", marks=pytest.mark.skipif(not bindings.has_amx(), reason="no AMX"))],
)
@pytest.mark.parametrize("family", FAST)
def test_what_predicts_is_what_was_trained(family, precision, bases):
    """Merged and mixed, in one call, against the adapter beside the plain base, for every kind of adapter."""
    base, folders = bases(family)
    engine, tolerance = (
        engine_of(folders, base, precision=precision),
        3e-5 if precision == "float32" else 1e-2,
    )  # tiny random weights magnify rounding
    texts, picked = random_texts(45, 4), [k % len(KINDS) for k in range(45)]
    pairs = [random_texts(1, i)[0] if KINDS[k].pairs else None for i, k in enumerate(picked)]
    mixed = engine.predict(texts, [folders[k].name for k in picked], pairs)
    for k, folder in enumerate(folders):
        rows = [i for i in range(45) if picked[i] == k]
        classifier = TextClassifier.load(folder, base=str(base), device="cpu", precision=precision)
        given_ = [texts[i] for i in rows], [pairs[i] for i in rows] if KINDS[k].pairs else None
        plain, fast = classifier.plain_logits(*given_), classifier.logits(*given_)
        encoder = classifier.running.encoder
        assert encoder.fused_stack
        assert isinstance(encoder.weights[0]["qkv"], PackedWeight if precision == "float32" else Bf16x2Weight)
        assert not classifier.model.encoder.fused_stack  # what was loaded is left as it was
        scale = np.maximum(1, np.abs(plain))
        assert np.abs((fast - plain) / scale).max() < tolerance
        assert np.abs((np.array([mixed[i].logits for i in rows]) - plain) / scale).max() < tolerance


@needs_vectors
@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_one_call_is_the_way_operation_by_operation(pooling, tmp_path, monkeypatch):
    """Long texts and adapters of a high rank go there; so does everything on other processors. States of
    lower blocks, too."""
    files = find_base(
        str(
            make_tiny(
                "bert",
                tmp_path / "base",
                num_attention_heads=2,
                num_hidden_layers=3,
                max_position_embeddings=600,
            )
        )
    )
    weights = read_weights(files.folder, read_spec(files.config), pooler=pooling == "first")
    model = PackedModel(weights, LoraConfig(r=4), 3, pooling)
    random_adapter(model, 1)
    running = model.for_inference("float32")
    encoder = model.encoder.for_inference()
    draw = np.random.default_rng(0)
    calls = []
    real = Blocks.forward
    monkeypatch.setattr(
        Blocks, "forward", lambda blocks, *rest, **more: calls.append(1) or real(blocks, *rest, **more)
    )
    for lengths, taken in (([3, 9, 30], 1), ([3, 590], 0)):
        batch = pack(
            [
                Encoded(draw.integers(5, 40, n).astype(np.int32), np.zeros(n, dtype=np.int8), n)
                for n in lengths
            ]
        )
        with torch.inference_mode():
            calls.clear()
            found, below = running.forward(batch), encoder.prefix(batch, 2)
            assert len(calls) == 2 * taken
            expected, plain = model.forward(batch), model.encoder.prefix(batch, 2)
        for one, other in ((found, expected), (below, plain)):
            np.testing.assert_allclose(one.numpy(), other.numpy(), rtol=1e-4, atol=1e-4)

"""Mixed batches: every row as its adapter alone gives it, one base product per layer, few adapters in memory,
none lost in use."""

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import FAST, random_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import textlora.model.adapter_batch
import textlora.model.encoder
from textlora import AdapterEngine, TextClassifier
from textlora.adapters.folder import AdapterMeta, peft_config, write_side_file, write_weights
from textlora.core.config import MULTI_LABEL, REGRESSION, SINGLE_LABEL, LoraConfig
from textlora.core.errors import AdapterError, ModelError, UsageError
from textlora.kernels.packed_linear import STEP
from textlora.model.base import find_base
from textlora.model.open import open_model
from textlora.model.packed_model import PackedModel

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "was",
    "it",
    "very",
    "time",
    "good",
    "bad",
    "dull",
    "fun",
    "fast",
    "slow",
    "boring",
    "great",
    "story",
    "actor",
    "about",
]


@dataclass(frozen=True)
class Kind:
    """What an adapter of a test is: LoRA settings, labels, task, pooling, one text or two."""

    lora: LoraConfig
    labels: int = 2
    task: str = SINGLE_LABEL
    pooling: str = "first"
    pairs: bool = False


KINDS = (
    Kind(LoraConfig(r=4)),
    Kind(LoraConfig(r=1, target_modules=("all-linear",)), 77),
    Kind(LoraConfig(r=8, use_dora=True), 5, MULTI_LABEL),
    Kind(LoraConfig(r=3, use_rslora=True, layers="last:1"), 1, REGRESSION),
    Kind(LoraConfig(r=32, target_modules=("key",)), 3),
    Kind(LoraConfig(r=2, use_dora=True, target_modules=("all-linear",), layers="last:1"), 4, MULTI_LABEL),
    Kind(LoraConfig(r=4), 3, pooling="mean"),
    Kind(LoraConfig(r=5, target_modules=("query", "value")), 2, pairs=True),
    Kind(LoraConfig(r=4, layers="0"), 6),
)


def make_adapter(folder: Path, base: Path, kind: Kind, seed: int) -> Path:
    """An adapter folder with random numbers in every tensor, its golden example included."""
    files = find_base(str(base))
    lora = (
        kind.lora
        if "distil" not in base.name or kind.lora.target_modules in (None, ("all-linear",))
        else None
    )
    model, _ = open_model(
        files, lora or LoraConfig(r=kind.lora.r), kind.labels, pooling=kind.pooling, seed=seed
    )
    random_adapter(model, seed)
    folder.mkdir(parents=True)
    settings = lora or LoraConfig(r=kind.lora.r)
    write_weights(
        folder,
        peft_config(settings, model.target_modules, model.modules_to_save, kind.pooling, None, None),
        model.trainable(),
    )
    meta = AdapterMeta(
        labels=tuple(f"label {k}" for k in range(kind.labels)) if kind.task != REGRESSION else ("value",),
        problem_type=kind.task, pairs=kind.pairs, pooling=kind.pooling, max_length=40, truncation="head", textlora_version="0",
        base={"id": None, "revision": None, "model_type": files.config["model_type"], "hash": model.base_hash()},
        thresholds=tuple(0.4 for _ in range(kind.labels)) if kind.task == MULTI_LABEL else None,
    )  # fmt: skip
    write_side_file(folder, meta)
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base, tmp_path_factory):
    """Family -> folders of one adapter per kind."""
    made: dict[str, list[Path]] = {}

    def get(family: str = "bert") -> list[Path]:
        if family not in made:
            root = tmp_path_factory.mktemp(family)
            base = tiny_base(family)
            made[family] = [
                make_adapter(root / f"kind-{k}", base, kind, seed=k) for k, kind in enumerate(KINDS)
            ]
        return made[family]

    return get


def engine_of(folders: list[Path], base: Path, **changes) -> AdapterEngine:
    engine = AdapterEngine(str(base), device="cpu", **changes)
    for folder in folders:
        engine.add(folder, folder.name)
    return engine


def random_texts(count: int, seed: int) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 30))) for _ in range(count)]


def assert_as_alone(
    engine: AdapterEngine,
    base: Path,
    texts: list[str],
    names: list[str],
    pairs: list[str | None],
    folders: list[Path],
    tolerance: float = 3e-5,
) -> None:
    """`tolerance` of 1e-5 is for real weights: tiny random ones, and LoRA of their size, magnify rounding."""
    found = engine.predict(texts, names, pairs)
    assert len(found) == len(texts)
    for folder in folders:
        rows = [i for i, name in enumerate(names) if name == folder.name]
        if not rows:
            continue
        classifier = TextClassifier.load(folder, base=str(base), device="cpu")
        alone = classifier.predictions(
            classifier.plain_logits([texts[i] for i in rows], [pairs[i] for i in rows])
        )
        for i, want in zip(rows, alone, strict=True):
            want_logits, got = np.array(want.logits), np.array(found[i].logits)
            assert got.shape == want_logits.shape
            assert (np.abs(got - want_logits) <= tolerance * np.maximum(1, np.abs(want_logits))).all(), (
                folder.name,
                np.abs(got - want_logits).max(),
            )
            if want.labels:
                assert (found[i].label, found[i].labels) == (want.label, want.labels)


def drawn(mixture: str, count: int, kinds: int) -> list[int]:
    """Which kind of adapter each of `count` texts goes to."""
    draw = np.random.default_rng(1)
    return {
        "identical": [2] * count,
        "distinct": [k % kinds for k in range(count)],
        "uniform": draw.integers(0, kinds, count).tolist(),
        "zipf": np.minimum(draw.zipf(1.5, count) - 1, kinds - 1).tolist(),
    }[mixture]


MIXTURES = ("identical", "distinct", "uniform", "zipf")


@pytest.mark.parametrize("mixture", MIXTURES)
@pytest.mark.parametrize("family", FAST)
def test_a_mixed_batch_is_each_adapter_alone(family, mixture, adapters, tiny_base):
    folders, count = adapters(family), 40
    picked = drawn(mixture, count, len(KINDS))
    texts, seconds = random_texts(count, 2), random_texts(count, 3)
    pairs = [seconds[i] if KINDS[k].pairs else None for i, k in enumerate(picked)]
    assert_as_alone(
        engine_of(folders, tiny_base(family)),
        tiny_base(family),
        texts,
        [folders[k].name for k in picked],
        pairs,
        folders,
    )


@pytest.fixture(scope="module")
def real_adapters(minilm, tmp_path_factory):
    """Ranks 1 to 64, 1 to 77 labels and all problem types, on real weights."""
    kinds = (
        Kind(LoraConfig(r=1)),
        Kind(LoraConfig(r=64, target_modules=("all-linear",)), 77),
        Kind(LoraConfig(r=16, use_dora=True), 5, MULTI_LABEL),
        Kind(LoraConfig(r=64, use_rslora=True, layers="last:1"), 1, REGRESSION),
        Kind(LoraConfig(r=8), 3, pooling="mean"),
        Kind(LoraConfig(r=8), 4, pairs=True),
    )
    root = tmp_path_factory.mktemp("real")
    return kinds, [
        make_adapter(root / f"real-{k}", minilm.folder, kind, seed=k) for k, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_200_texts_on_a_real_base_are_each_adapter_alone(mixture, real_adapters, minilm):
    kinds, folders = real_adapters
    picked, texts, seconds = drawn(mixture, 200, len(kinds)), random_texts(200, 6), random_texts(200, 7)
    pairs = [seconds[i] if kinds[k].pairs else None for i, k in enumerate(picked)]
    assert_as_alone(
        engine_of(folders, minilm.folder),
        minilm.folder,
        texts,
        [folders[k].name for k in picked],
        pairs,
        folders,
        1e-5,
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_draw_of_rows(data, adapters, tiny_base):
    folders = adapters("bert")
    single = [k for k, kind in enumerate(KINDS) if not kind.pairs]
    picked = data.draw(st.lists(st.sampled_from(single), min_size=1, max_size=24))
    texts = data.draw(
        st.lists(st.sampled_from(random_texts(6, 9)), min_size=len(picked), max_size=len(picked))
    )
    engine = engine_of(folders, tiny_base("bert"))
    assert_as_alone(
        engine, tiny_base("bert"), texts, [folders[k].name for k in picked], [None] * len(picked), folders
    )


def test_several_adapters_on_one_text_share_what_is_below_them(adapters, tiny_base, monkeypatch):
    """Adapters of the last block only: the first block's products see each text once."""
    folders = [adapters("bert")[k] for k in (3, 5)]
    texts = random_texts(5, 4)
    engine = engine_of(folders, tiny_base("bert"))
    names = [folder.name for folder in folders for _ in texts]
    expected = engine.predict(texts, folders[0].name) + engine.predict(texts, folders[1].name)
    seen = []
    real = textlora.model.encoder.attend
    monkeypatch.setattr(
        textlora.model.encoder,
        "attend",
        lambda projected, *rest: seen.append(projected.shape[0]) or real(projected, *rest),
    )
    found = engine.predict(texts * 2, names)
    tokens = sum(
        len(one.ids) for one in engine.bank._tokenizers[next(iter(engine.bank._tokenizers))].encode(texts)
    )
    assert tokens <= sum(seen) < tokens + STEP  # rows that fill up a step belong to nobody
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, rtol=1e-5, atol=1e-6)


def test_one_base_product_per_layer_and_batch(adapters, tiny_base, monkeypatch):
    """However many adapters: q, k and v in one product, then the three dense layers; in the last block q
    alone."""
    folders = [adapters("bert")[k] for k in (0, 1, 2, 4)]
    engine = engine_of(folders, tiny_base("bert"))
    texts = random_texts(16, 5)
    engine.predict(texts, [folders[i % 4].name for i in range(16)])
    products, pools = [], []
    dense, pool = textlora.model.adapter_batch.dense, PackedModel.pool
    monkeypatch.setattr(
        textlora.model.adapter_batch,
        "dense",
        lambda x, weight, *rest, **more: products.append(weight.shape) or dense(x, weight, *rest, **more),
    )
    monkeypatch.setattr(PackedModel, "pool", lambda model, x: pools.append(len(x)) or pool(model, x))
    engine.predict(texts, [folders[i % 4].name for i in range(16)])
    assert len(products) == 4 + 4  # of two layers
    assert pools == [16]  # the base's pooler of all rows


@pytest.mark.parametrize("family", FAST)
def test_plain_rows_of_the_base_in_a_mixed_batch(family, adapters, tiny_base):
    """A row without an adapter gives the base's own hidden state, its neighbours what they give alone."""
    folders, base = adapters(family), tiny_base(family)
    engine = engine_of(folders[:3], base)
    texts = random_texts(12, 8)
    names = [None if i % 4 == 3 else folders[i % 4].name for i in range(12)]
    found = engine.predict(texts, names)
    net = transformers.AutoModel.from_pretrained(base).eval()
    tokenizer = engine.bank.plain.classifier.tokenizer
    for text, name, prediction in zip(texts, names, found, strict=True):
        if name is None:
            with torch.inference_mode():
                expected = (
                    net(torch.tensor([tokenizer.encode([text])[0].ids.tolist()]))
                    .last_hidden_state[0, 0]
                    .numpy()
                )
            np.testing.assert_allclose(prediction.logits, expected, atol=1e-5)
            assert (prediction.label, prediction.labels, prediction.scores) == ("", (), {})
        else:
            np.testing.assert_allclose(
                prediction.logits, engine.predict([text], name)[0].logits, rtol=1e-5, atol=1e-5
            )
    assert len(engine.predict(["one text"], [None])[0].logits) == 32
    with pytest.raises(UsageError, match="empty"):
        engine.predict([" "], [None])


def test_few_are_resident_and_the_oldest_goes(adapters, tiny_base):
    folders = [adapters("bert")[k] for k in (0, 2, 3, 8)]
    engine = engine_of(folders, tiny_base("bert"))
    assert engine.bank.state() == {"registered": 4, "resident": 0, "resident_bytes": 0}
    for folder in folders[:2]:
        engine.predict(["good"], folder.name)
    both = engine.bank.state()["resident_bytes"]
    engine.bank.resident_bytes = both
    engine.predict(["good"], folders[0].name)
    engine.predict(["good"], folders[2].name)
    assert folders[1].name not in engine.bank._resident
    assert folders[0].name in engine.bank._resident
    assert engine.bank.state()["resident_bytes"] <= both
    assert (
        len(engine.predict(["good"] * 4, [folder.name for folder in folders])) == 4
    )  # in use together, above the budget
    assert engine.bank.state()["resident_bytes"] <= both


def test_removing_waits_for_those_in_use(adapters, tiny_base):
    folder = adapters("bert")[0]
    engine = engine_of([folder], tiny_base("bert"))
    order = []
    with engine.bank.use([folder.name]) as (resident,):
        thread = threading.Thread(target=lambda: (engine.remove(folder.name), order.append("removed")))
        thread.start()
        while folder.name in engine.bank.names():
            time.sleep(0.001)
        with pytest.raises(UsageError, match=r"^no adapter 'kind-0'; there are: none$"):
            engine.predict(["good"], folder.name)
        assert resident.classifier.predict("good")[0].label
        order.append("used")
    thread.join(10)
    assert order == ["used", "removed"]
    assert engine.bank.state() == {"registered": 0, "resident": 0, "resident_bytes": 0}


def test_loading_does_not_hold_up_others(adapters, tiny_base, monkeypatch):
    slow, quick = adapters("bert")[:2]
    engine = engine_of([slow, quick], tiny_base("bert"))
    engine.predict(["good"], quick.name)
    begun, go = threading.Event(), threading.Event()
    real = engine.bank._read

    def read(entry):
        begun.set()
        assert go.wait(10)
        return real(entry)

    monkeypatch.setattr(engine.bank, "_read", read)
    thread = threading.Thread(target=lambda: engine.predict(["good"], slow.name))
    thread.start()
    assert begun.wait(10)
    assert engine.predict(["bad"], quick.name)[0].logits
    go.set()
    thread.join(10)
    assert not thread.is_alive()


def test_registering_reads_the_side_file_only(adapters, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(adapters("bert")[0], folder)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    engine = engine_of([folder], tiny_base("bert"))
    with pytest.raises(AdapterError, match="was changed after it was saved"):
        engine.predict(["good"], "copy")
    assert engine.bank.state()["resident"] == 0
    shutil.copyfile(adapters("bert")[0] / "adapter_model.safetensors", folder / "adapter_model.safetensors")
    assert engine.predict(["good"], "copy")[0].logits


def test_mistakes(adapters, tiny_base, tmp_path):
    folder = adapters("bert")[0]
    engine = engine_of([folder], tiny_base("bert"))
    for name in ("", "../up", "a/b", ".hidden", "x" * 129, "ü"):
        with pytest.raises(UsageError, match="use letters, digits"):
            engine.add(folder, name)
    with pytest.raises(UsageError, match=r"^adapter name 'kind-0' is taken; remove it first$"):
        engine.add(folder, "kind-0")
    with pytest.raises(AdapterError, match=r"no textlora.json; `textlora convert`"):
        engine.add(tmp_path, "empty")
    with pytest.raises(AdapterError, match="was trained on another base"):
        engine.add(adapters("roberta")[0], "roberta")
    with pytest.raises(UsageError, match=r"^no adapter 'other'; there are: kind-0$"):
        engine.predict(["good"], "other")
    with pytest.raises(UsageError, match=r"^text 2: empty$"):
        engine.predict(["good", " "], "kind-0")
    with pytest.raises(UsageError, match="was trained on single texts and got pairs"):
        engine.predict(["good"], "kind-0", ["bad"])
    with pytest.raises(UsageError, match="2 texts, 1 adapters"):
        engine.predict(["good", "bad"], ["kind-0"])
    with pytest.raises(UsageError, match="no adapter"):
        engine.remove("other")
    with pytest.raises(ModelError, match="so its adapters cannot share batches"):
        AdapterEngine(str(tiny_base("modernbert")))
    assert engine.predict([], "kind-0") == []


def test_a_replaced_adapter_of_another_base_is_refused(adapters, tiny_base, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(adapters("bert")[0], folder)
    engine = engine_of([folder], tiny_base("bert"))
    shutil.rmtree(folder)
    shutil.copytree(adapters("roberta")[0], folder)
    with pytest.raises(AdapterError, match="was replaced by an adapter of another base"):
        engine.predict(["good"], "copy")
    content = json.loads((folder / "textlora.json").read_text())
    assert content["base"]["hash"] != engine.bank.weights.hash


def test_an_adapter_read_again_is_not_computed_again(adapters, tiny_base, tmp_path, monkeypatch):
    """Its hashes say that it is what was proved; a change of the side file asks for a new proof."""
    import shutil
    from dataclasses import replace

    from textlora.adapters.folder import read_meta

    folder = tmp_path / "copy"
    shutil.copytree(adapters("bert")[0], folder)
    golden = [
        {
            "text": "good",
            "text_pair": None,
            "logits": list(
                TextClassifier.load(folder, base=str(tiny_base("bert"))).predict("good")[0].logits
            ),
        }
    ]
    write_side_file(folder, replace(read_meta(folder), golden=golden))
    engine = engine_of([folder], tiny_base("bert"))
    engine.bank.resident_bytes = 0
    real, proofs = TextClassifier.verify, []
    monkeypatch.setattr(
        TextClassifier, "verify", lambda self, name="": proofs.append(name) or real(self, name)
    )
    for _ in range(3):
        engine.predict(["good"], "copy")
    assert proofs == ["copy"]
    golden[0]["logits"][0] += 1
    write_side_file(folder, replace(read_meta(folder), golden=golden))
    with pytest.raises(AdapterError, match="golden example 1 gives logits that differ"):
        engine.predict(["good"], "copy")


def test_a_replaced_adapter_ends_with_its_last_user(adapters, tiny_base):
    old, new = adapters("bert")[0], adapters("bert")[4]
    engine = engine_of([old], tiny_base("bert"))
    with engine.bank.use([old.name]) as (resident,):
        engine.bank.add(new, old.name, replace=True, load=True)
        assert len(engine.predict(["good"], old.name)[0].scores) == 3
        assert len(resident.classifier.predict("good")[0].scores) == 2
        assert engine.bank.state()["resident"] == 1
    alone = engine_of([new], tiny_base("bert"))
    alone.predict(["good"], new.name)
    assert engine.bank.state() == alone.bank.state()


def test_answers_stand_beside_errors(adapters, tiny_base, tmp_path):
    import shutil

    from textlora.core.errors import TextloraError, UnknownAdapterError

    folder = tmp_path / "damaged"
    shutil.copytree(adapters("bert")[2], folder)
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    engine = engine_of([adapters("bert")[0], adapters("bert")[7], folder], tiny_base("bert"))
    found = engine.answers(
        ["good", " ", "bad", "good", "dull", "good"],
        ["kind-0", "kind-0", "damaged", "none", "kind-7", "kind-0"],
        [None] * 6,
    )
    kinds = [type(one) if isinstance(one, TextloraError) else None for one in found]
    assert kinds == [None, UsageError, AdapterError, UnknownAdapterError, UsageError, None]
    for logits in (found[5].prediction.logits, engine.predict(["good"], "kind-0")[0].logits):
        np.testing.assert_allclose(found[0].prediction.logits, logits, rtol=1e-5)
    assert (found[0].tokens, found[0].full) == (3, 3)
    assert engine.answers(["good " * 60], "kind-0")[0].full == 62

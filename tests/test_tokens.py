"""Token ids equal AutoTokenizer's; truncation; packing."""

import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from conftest import FAST, SLOW, WORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from textlora.core.errors import ModelError, UsageError
from textlora.data.tokenize import Encoded, TextTokenizer, even_batches, load_tokenizer, pack, token_batches

FAMILIES = (*FAST, *SLOW, "minilm")
pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(["good!", "<pad>", "[SEP]", "ÉTÉ", "회의", "\t", "😀", "a-b", "xyzzy", "I'm"]),
    st.text(max_size=4),
)
texts = st.lists(pieces, min_size=1, max_size=30).map(" ".join)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def both(tiny_base, minilm):
    """family -> (a function from max_length and truncation to our tokenizer, AutoTokenizer)."""

    @cache
    def get(family):
        folder = minilm.folder if family == "minilm" else tiny_base(family)
        theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return cache(
            lambda length, truncation="head": TextTokenizer(
                load_tokenizer(folder, "bert"), length, truncation
            )
        ), theirs

    return get


def type_ids(theirs, *args, **kwargs):
    """Segment ids from the tokenizer's own post-processor; RoBERTa-like tokenizers do not hand them out."""
    return theirs(*args, return_token_type_ids=True, **kwargs)["token_type_ids"]


@pytest.mark.parametrize("family", FAMILIES)
@quick
@given(text=texts, length=st.sampled_from([8, 9, 16, 31, 512]))
def test_single_texts_are_autotokenizers(family, both, text, length):
    make, theirs = both(family)
    [mine] = make(length).encode([text])
    expected = theirs(text, truncation=True, max_length=length)["input_ids"]
    assert mine.ids.tolist() == expected
    assert mine.type_ids.tolist() == type_ids(theirs, text, truncation=True, max_length=length)
    assert mine.full == len(theirs(text)["input_ids"])


@pytest.mark.parametrize("family", FAMILIES)
@quick
@given(text=texts, pair=texts, length=st.sampled_from([8, 9, 16, 31, 512]))
def test_pairs_are_autotokenizers(family, both, text, pair, length):
    make, theirs = both(family)
    [mine] = make(length).encode([text], [pair])
    listed = ([text], [pair])  # AutoTokenizer takes an empty pair for none where it is not in a list
    assert mine.ids.tolist() == theirs(*listed, truncation=True, max_length=length)["input_ids"][0]
    assert mine.type_ids.tolist() == type_ids(theirs, *listed, truncation=True, max_length=length)[0]
    assert mine.full == len(theirs(*listed)["input_ids"][0])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_pair_of_lengths(family, both):
    """Longest-first truncation, exhaustively: all lengths up to 12 and an odd and an even limit."""
    make, theirs = both(family)
    words = [" ".join(["good"] * n) for n in range(13)]
    for length in (9, 12):
        firsts, seconds = zip(*((a, b) for a in words[1:] for b in words[1:]), strict=True)
        mine = make(length).encode(firsts, seconds)
        expected = theirs(list(firsts), list(seconds), truncation=True, max_length=length)["input_ids"]
        assert [e.ids.tolist() for e in mine] == expected


@pytest.mark.parametrize("truncation", ["tail", "head-tail"])
@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
def test_tail_and_head_tail(family, truncation, both):
    """The special tokens stay; of the text the end stays, or the first quarter and the last three."""
    make, _ = both(family)
    text = " ".join(WORDS[:40])
    [whole] = make(512).encode([text])
    body = whole.ids[1:-1].tolist()
    for length in (8, 13, 20):
        [cut] = make(length, truncation).encode([text])
        room = length - 2
        front = room // 4 if truncation == "head-tail" else 0
        assert cut.ids.tolist() == [
            whole.ids[0],
            *body[:front],
            *body[len(body) - (room - front) :],
            whole.ids[-1],
        ]
        assert cut.full == len(whole.ids)
    for kept in ("head", "tail", "head-tail"):
        assert np.array_equal(make(len(whole.ids), kept).encode([text])[0].ids, whole.ids)


def test_head_tail_of_a_long_text_keeps_a_quarter_in_front(both):
    """510 tokens are 127 and 383: Sun et al. 2019 keep the first 128 and the last 382."""
    [cut] = both("bert")[0](512, "head-tail").encode(["good " * 300 + "bad " * 400])
    good, bad = (both("bert")[0](8).encode([word])[0].ids[1] for word in ("good", "bad"))
    assert cut.ids[1:-1].tolist() == [good] * 127 + [bad] * 383


def test_pair_truncation_by_tail(both):
    """Each text of a pair loses its start; which loses more is decided as for head."""
    make, _ = both("bert")
    first, second = " ".join(WORDS[:20]), " ".join(WORDS[20:24])
    [head], [tail] = (make(13, kept).encode([first], [second]) for kept in ("head", "tail"))
    a, b = (make(512).encode([text])[0].ids[1:-1].tolist() for text in (first, second))
    assert head.ids[1:-1].tolist() == [*a[:6], head.ids[-1], *b]
    assert tail.ids[1:-1].tolist() == [*a[-6:], tail.ids[-1], *b]
    assert tail.type_ids.tolist() == [0] * 8 + [1] * 5


def test_some_texts_have_a_pair(both):
    make, theirs = both("bert")
    mine = make(16).encode(["good", "bad film", "fun"], [None, "very dull", ""])
    assert mine[0].ids.tolist() == theirs("good")["input_ids"]
    assert mine[1].ids.tolist() == theirs("bad film", "very dull")["input_ids"]
    assert mine[2].ids.tolist() == theirs(["fun"], [""])["input_ids"][0]  # an empty pair is a pair
    assert [e.type_ids.max() for e in mine] == [0, 1, 1]
    alone = make(16).encode(["good", "fun"], [None, None])
    assert [e.ids.tolist() for e in alone] == theirs(["good", "fun"])["input_ids"]
    assert make(16).encode([]) == []


def test_the_files_own_truncation_and_padding_are_off(both, minilm):
    """all-MiniLM-L6-v2 ships a tokenizer.json that cuts at 128 and pads."""
    stored = json.loads((minilm.folder / "tokenizer.json").read_text())
    assert stored["truncation"]
    assert stored["padding"]
    short, long = both("minilm")[0](512).encode(["good", "good " * 300])
    assert (len(short.ids), len(long.ids)) == (3, 302)


def test_too_short_a_limit_is_refused(both):
    for family, special in (("bert", 3), ("roberta", 4)):
        make, _ = both(family)
        with pytest.raises(UsageError) as caught:
            make(special + 1)
        assert str(caught.value) == f"--max-length {special + 1}: too short for the special tokens of a pair"
        assert len(make(special + 2).encode(["good film"], ["bad film"])[0].ids) == special + 2


def test_vocab_txt_gives_the_same_tokenizer(both, tmp_path):
    make, theirs = both("bert")
    vocab = theirs.get_vocab()
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)) + "\n", encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    converted = TextTokenizer(load_tokenizer(tmp_path, "bert"), 32)
    for text in ("A good film!", "xyzzy ÉTÉ", " ".join(WORDS)):
        mine = converted.encode([text, text], [None, "so"])
        expected = make(32).encode([text, text], [None, "so"])
        assert [e.ids.tolist() for e in mine] == [e.ids.tolist() for e in expected]
        assert [e.type_ids.tolist() for e in mine] == [e.type_ids.tolist() for e in expected]


def test_unreadable_tokenizers_are_refused(tmp_path):
    def refusal(name):
        with pytest.raises(ModelError) as caught:
            load_tokenizer(tmp_path / name, "bert")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    for name in ("none", "broken"):
        (tmp_path / name).mkdir()
    assert refusal("none").startswith(
        f"{tmp_path / 'none'}: no tokenizer.json; a base model folder needs one (or one of vocab.txt, "
    )
    path = tmp_path / "broken" / "tokenizer.json"
    for content in ("{", "[]", '{"version": "1.0"}'):
        path.write_text(content)
        assert refusal("broken").startswith(f"{path}: not a tokenizer file (")
    path.unlink()
    shutil.copy(__file__, tmp_path / "broken" / "spiece.model")
    assert refusal("broken").startswith(f"{tmp_path / 'broken'}: the tokenizer cannot be read (")

    deaf = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    deaf.normalizer = normalizers.Replace("a", "")
    deaf.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(
        ModelError, match=r"^the tokenizer drops the letter 'a'; check its normalizer and vocabulary$"
    ):
        TextTokenizer(deaf, 16)


def texts_of(lengths):
    start = np.cumsum([0, *lengths])
    return [
        Encoded(np.arange(start[i], start[i + 1], dtype=np.int32), np.full(n, i % 2, dtype=np.int8), n) for i, n in enumerate(lengths)
    ]  # fmt: skip


def test_packing():
    batch = pack(texts_of([3, 1, 3, 2]), np.array([10, 11, 12, 13]))
    assert batch.ids.tolist() == [3, 7, 8, 0, 1, 2, 4, 5, 6]
    assert batch.positions.tolist() == [0, 0, 1, 0, 1, 2, 0, 1, 2]
    assert batch.type_ids.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 6, 9]
    assert batch.rows.tolist() == [1, 3, 0, 2]
    assert batch.labels.tolist() == [11, 13, 10, 12]
    assert (batch.tokens, batch.size) == (9, 4)
    assert batch.runs() == [(0, 1, 0, 1), (1, 1, 1, 2), (2, 2, 3, 3)]
    assert {t.dtype for t in (batch.ids, batch.positions, batch.type_ids, batch.cu_seqlens, batch.rows)} == {
        torch.int64
    }


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30))
def test_packing_loses_nothing(lengths):
    batch = pack(texts_of(lengths))
    bounds = batch.cu_seqlens.tolist()
    assert sorted(batch.rows.tolist()) == list(range(len(lengths)))
    for b, row in enumerate(batch.rows.tolist()):
        assert torch.equal(
            batch.ids[bounds[b] : bounds[b + 1]], torch.from_numpy(texts_of(lengths)[row].ids).long()
        )
        assert batch.positions[bounds[b] : bounds[b + 1]].tolist() == list(range(lengths[row]))
    covered = 0
    for first, count, start, length in batch.runs():
        assert (first, start) == (covered, bounds[covered])
        assert {lengths[row] for row in batch.rows[first : first + count].tolist()} == {length}
        covered += count
    assert covered == len(lengths)
    assert len({run[3] for run in batch.runs()}) == len(batch.runs())


def test_label_kinds():
    many = pack(texts_of([2, 1]), np.array([[1, 0], [0, 1]], dtype=np.float32))
    assert many.labels.tolist() == [[0, 1], [1, 0]]
    assert many.labels.dtype == torch.float32
    assert pack(texts_of([1])).labels is None
    with pytest.raises(UsageError, match=r"^an empty batch cannot be packed$"):
        pack([])


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 60))
def test_token_batches(lengths, limit):
    order = list(np.random.default_rng(0).permutation(len(lengths)))
    batches = list(token_batches(lengths, order, limit))
    assert [i for batch in batches for i in batch] == order
    for k, batch in enumerate(batches):
        total = sum(lengths[i] for i in batch)
        assert total <= limit or len(batch) == 1
        if k + 1 < len(batches):
            assert total + lengths[batches[k + 1][0]] > limit  # no batch ends early


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60),
    st.integers(1, 200),
    st.integers(1, 4),
    st.integers(1, 40),
)
def test_even_batches(lengths, limit, workers, least):
    order = np.argsort(lengths, kind="stable")
    batches = even_batches(lengths, order, limit, workers, least)
    assert [i for batch in batches for i in batch] == order.tolist()
    sums, longest = [sum(lengths[i] for i in batch) for batch in batches], max(lengths)
    assert all(batches)
    assert max(sums) <= limit + longest
    assert len(batches) <= max(workers, -(-sum(lengths) // limit) + workers - 1)
    share = sum(lengths) / len(batches)
    if longest <= share / 4:  # no text is so long that parts must be uneven
        assert max(sums) - min(sums) <= 2 * longest
    assert even_batches([5, 5, 5, 5], [0, 1, 2, 3], 100, 2, 10) == [[0, 1], [2, 3]]
    assert even_batches([5, 5, 5, 5], [0, 1, 2, 3], 100, 2, 11) == [[0, 1, 2, 3]]

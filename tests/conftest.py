"""Tiny base models of every family, made from a seed: 2 layers, 32 wide, 4 heads, about 200 words. Nothing is
downloaded."""

import contextlib
import io
import json
import os
import string
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
import transformers
from support import Cli, Trained, trained
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from textlora.core.config import LoraConfig
from textlora.data.tokenize import Encoded, PackedBatch, pack
from textlora.kernels import bindings
from textlora.model.base import BaseFiles, find_base
from textlora.model.interface import Model
from textlora.model.open import open_model
from textlora.model.reference_model import ReferenceModel
from textlora.transform import fresh_process

transformers.logging.disable_progress_bar()
torch.set_num_threads(
    1
)  # tiny models gain nothing from more, and threads that wait for a busy core cost minutes

FAST = ("bert", "bert-no-pooler", "roberta", "xlm-roberta", "camembert", "electra", "distilbert")
SLOW = ("modernbert", "deberta-v2", "mpnet", "albert")
_TEXT = (
    "the of and to in is it was for on that by this with you not are from at as good bad very film story plot actor great dull boring "
    "fun slow fast red blue door water train time never always again people said would could about after before because between where"
)
WORDS = _TEXT.split() + [consonant + vowel for consonant in "bcdfgklmnprst" for vowel in "aeiu"]
PIECES = [*string.ascii_lowercase, *string.digits, *".,!?'-"]
MAX_POSITIONS = 48

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.1,
    "layer_norm_eps": 1e-6,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
_BERT_IDS = {"pad_token_id": 0, "max_position_embeddings": MAX_POSITIONS}
_ROBERTA_IDS = {
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": MAX_POSITIONS + 2, "type_vocab_size": 1,
}  # fmt: skip
# family -> class that is saved, its config class, what differs from _SIZES
_FAMILIES = {
    "bert": ("BertForPreTraining", "BertConfig", _BERT_IDS),
    "bert-no-pooler": ("BertForMaskedLM", "BertConfig", _BERT_IDS),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _ROBERTA_IDS),
    "xlm-roberta": ("XLMRobertaModel", "XLMRobertaConfig", _ROBERTA_IDS),
    "camembert": ("CamembertForMaskedLM", "CamembertConfig", _ROBERTA_IDS),
    "electra": ("ElectraForPreTraining", "ElectraConfig", _BERT_IDS | {"embedding_size": 20}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        _BERT_IDS | {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "seq_classif_dropout": 0.2},
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3, "max_position_embeddings": MAX_POSITIONS}
        | {"local_attention": 8, "global_attn_every_n_layers": 2},
    ),
    "deberta-v2": (
        "DebertaV2Model",
        "DebertaV2Config",
        _BERT_IDS | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0}
        | {"share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm", "max_relative_positions": -1},
    ),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", {k: v for k, v in _ROBERTA_IDS.items() if k != "type_vocab_size"}),
    "albert": ("AlbertModel", "AlbertConfig", _BERT_IDS | {"embedding_size": 20, "num_hidden_groups": 1, "inner_group_num": 1}),
}  # fmt: skip


def _wordpiece(cls: str, sep: str, pad: str, unk: str, mask: str, roberta: bool) -> Tokenizer:
    special = [cls, pad, sep, unk] if roberta else [pad, unk, cls, sep]
    vocab = {
        word: i
        for i, word in enumerate(
            [*special, mask, *WORDS, *PIECES, *(f"##{c}" for c in PIECES), "##ing", "##ed"]
        )
    }
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=unk, max_input_chars_per_word=40))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = ((sep, vocab[sep]), (cls, vocab[cls]))
    tokenizer.post_processor = (
        processors.RobertaProcessing(*ends) if roberta else processors.BertProcessing(*ends)
    )
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([*special, mask])
    return tokenizer


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("i", "n"),
        ("in", "g"),
        ("\u0120", "the"),
        ("a", "n"),
        ("an", "d"),
        ("o", "o"),
        ("g", "oo"),
        ("goo", "d"),
    ]
    vocab = {
        word: i
        for i, word in enumerate(
            ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *alphabet, *(a + b for a, b in merges)]
        )
    }
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return tokenizer


def _unigram(special: list[str], template: tuple[str, str]) -> Tokenizer:
    words = [("\u2581" + word, -4.0 - i / 20) for i, word in enumerate(WORDS)]
    vocab = [(s, 0.0) for s in special] + words + [(c, -9.0) for c in ("\u2581", *PIECES)]
    tokenizer = Tokenizer(
        models.Unigram(vocab, unk_id=special.index(next(s for s in special if "unk" in s.lower())))
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ids = [(s, i) for i, s in enumerate(special)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template[0], pair=template[1], special_tokens=ids
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens, ids and pair layout of the family."""
    bert = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    roberta = {
        "cls_token": "<s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    if family == "roberta":
        backend, names = _byte_level(), roberta
    elif family in ("xlm-roberta", "camembert"):
        pair = "<s> $A </s> </s> $B </s>"
        backend, names = _unigram(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], ("<s> $A </s>", pair)), roberta
    elif family in ("deberta-v2", "albert"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        backend = _unigram(special, ("[CLS]:0 $A:0 [SEP]:0", "[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1"))
        names = bert
    elif family == "mpnet":
        backend, names = _wordpiece("<s>", "</s>", "<pad>", "<unk>", "<mask>", roberta=True), roberta
    else:
        backend, names = _wordpiece("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]", roberta=False), bert
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_tiny(family: str, folder: Path, seed: int = 0, **config: object) -> Path:
    """Save the family's tiny model and tokenizer into `folder`. No tensor is left at zero or one, so that a
    dropped one shows."""
    architecture, config_class, special = _FAMILIES[family]
    tokenizer = tiny_tokenizer(family)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        settings = getattr(transformers, config_class)(
            **(_SIZES | special | {"vocab_size": len(tokenizer)} | config)
        )
        model = getattr(transformers, architecture)(settings)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`tiny_base(family)` gives the folder of a tiny base model, made once per session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp("base") / family)
        return made[family]

    return get


@pytest.fixture(params=[16, 8])
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """AVX-512 and AVX2, each where the processor has it."""
    if bindings.lanes() < request.param:
        pytest.skip(f"no vectors of {request.param} here")
    monkeypatch.setattr(bindings, "lanes", lambda: request.param)
    return request.param


@pytest.fixture(scope="session")
def minilm() -> BaseFiles:
    """The real all-MiniLM-L6-v2, from its package."""
    return find_base("minilm")


def random_adapter(model: Model, seed: int = 0) -> dict[str, torch.Tensor]:
    """Fill A, B, magnitudes and head at random (B not zero, magnitudes positive) and return what was filled
    in."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, tensor in model.trainable().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("lora_magnitude_vector"):
            drawn[name] = tensor.detach().cpu() * (1 + 0.3 * noise.tanh())
        elif ".lora_" in name:
            drawn[name] = noise * (0.5 / tensor.shape[1] ** 0.5 if ".lora_A." in name else 0.2)
        else:
            drawn[name] = noise * (0.2 if tensor.ndim == 1 else 1 / tensor.shape[1] ** 0.5)
    model.load_trainable(drawn)
    return drawn


def random_batch(
    lengths: list[int],
    seed: int = 0,
    vocabulary: int = 120,
    types: int = 2,
    labels: object = None,
    specials: tuple[int, ...] = (0, 1),
) -> PackedBatch:
    """Random texts of the lengths given, no padding ids in them, the second half of each in segment 1."""
    generator = torch.Generator().manual_seed(seed)
    encoded = []
    for length in lengths:
        ids = torch.randint(max(specials) + 1, vocabulary, (length,), generator=generator)
        kinds = (torch.arange(length) > length // 2).long() * (types - 1)
        encoded.append(Encoded(ids.int().numpy(), kinds.to(torch.int8).numpy(), length))
    return pack(encoded, labels)


def both_ways(
    folder: Path, lora: LoraConfig, num_labels: int = 3, pooling: str = "first", seed: int = 0
) -> tuple[Model, ReferenceModel]:
    """The fast path and transformers + peft on one base, with one random adapter."""
    fast, reason = open_model(find_base(str(folder)), lora, num_labels, pooling=pooling)
    assert reason is None
    slow = ReferenceModel.create(folder, lora, num_labels, pooling=pooling)
    slow.load_trainable(random_adapter(fast, seed))
    return fast, slow


@pytest.fixture
def cli(capfd) -> Cli:
    return Cli(capfd)


@pytest.fixture
def single(tiny_base, tmp_path_factory) -> Trained:
    return trained(tiny_base, tmp_path_factory)


@pytest.fixture
def near(monkeypatch, tmp_path_factory):
    """Run the script of the fresh process in this one: it costs seconds to import transformers again."""
    modules = str(tmp_path_factory.mktemp("modules"))

    def here(command: list[str], input: str, **_: object) -> SimpleNamespace:
        out, before = io.StringIO(), hf_logging.get_verbosity()
        assert command[:3] == [sys.executable, "-P", "-c"]
        try:
            with monkeypatch.context() as patched, contextlib.redirect_stdout(out):
                patched.setattr(sys, "argv", ["-c", *command[4:]])
                patched.setattr(sys, "path", [*sys.path])
                patched.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
                patched.setattr(sys, "stdin", io.StringIO(input))
                exec(command[3], {"__name__": "__main__"})
        except Exception as error:
            return SimpleNamespace(stdout="", stderr=f"Traceback\n{error}\n", returncode=1)
        finally:
            hf_logging.set_verbosity(before)
        said = json.loads(out.getvalue())
        said["imported"].remove("textlora")
        return SimpleNamespace(stdout=json.dumps(said), stderr="", returncode=0)

    monkeypatch.setattr(fresh_process, "subprocess", SimpleNamespace(run=here))

"""The methods that `textlora compare` sets side by side: one row each. Rows, not classes: what differs is
data, the loop is one.

Light on purpose: the command line lists them, so nothing heavy is imported here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from textlora.core.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        what: one line for people.
        trains: what carries a gradient, or is fitted.
        saved: what has to be kept for each task.
        way: how it is run: "majority", "tfidf" and "probe" are fitted; "lora", "pissa", "whole", "peft" and
            "contrast" are trained.
        rates: learning rates that are tried; none for what is fitted, and for what has a rule of its own.
        size: what `--sizes` sets ("r" or "tokens"); None where there is nothing to set.
        sizes: sizes that are tried without `--sizes`.
        settings: what makes it this method: fields of `TrainConfig` (lora), `part` (whole).
    """

    name: str
    what: str
    trains: str
    saved: str
    way: str
    rates: tuple[float, ...] = ()
    size: str | None = None
    sizes: tuple[int, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fitted(self) -> bool:
        """Whether nothing about it is random, so that one run stands for all seeds."""
        return self.way in ("majority", "tfidf", "probe")


# Three rates each, about three times the last.
_LORA, _WIDER, _LOWER = (7e-4, 2e-3, 6e-3), (3e-4, 1e-3, 3e-3), (2e-4, 6e-4, 2e-3)
_FULL, _SMALL, _LARGE, _HEAD = (3e-5, 1e-4, 3e-4), (3e-3, 1e-2, 3e-2), (1e-2, 3e-2, 1e-1), (3e-2, 1e-1, 3e-1)
_AB, _ADAPTER = "A and B of rank r, head", "A, B, head"


def _lora(
    name: str,
    what: str,
    rates: tuple[float, ...] = _LORA,
    saved: str = _ADAPTER,
    trains: str = _AB,
    **settings: Any,
) -> Method:
    return Method(name, what, trains, saved, "lora", rates, "r", (8,), settings)


def _soft(name: str, what: str) -> Method:
    return Method(
        name, what, "learned vectors, head", "learned vectors, head", "peft", _SMALL, "tokens", (8,)
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("majority", "the commonest class, or the mean", "nothing", "one label", "majority"),
        Method(
            "tfidf",
            "logistic regression on TF-IDF of words and word pairs",
            "weights of words",
            "words and their weights",
            "tfidf",
        ),
        Method("probe", "logistic regression on frozen features", "linear layer", "linear layer", "probe"),
        Method(
            "defaults",
            "what textlora train does with its defaults: nothing is searched",
            "A and B on query and value, head",
            _ADAPTER,
            "lora",
        ),
        Method(
            "head", "the head alone, by gradient", "head", "head", "whole", _HEAD, settings={"part": "head"}
        ),
        Method(
            "bitfit",
            "all biases (arXiv 2106.10199)",
            "biases, head",
            "biases, head",
            "whole",
            _SMALL,
            settings={"part": "biases"},
        ),
        Method(
            "full",
            "full fine-tuning",
            "everything",
            "the whole model",
            "whole",
            _FULL,
            settings={"part": "all"},
        ),
        _lora("lora-qv", "LoRA on query and value (arXiv 2106.09685)"),
        _lora("lora-all", "LoRA on every dense layer of the blocks", _WIDER, target_modules=("all-linear",)),
        _lora(
            "lora-last2",
            "LoRA on every dense layer of the last two blocks",
            target_modules=("all-linear",),
            layers="last:2",
        ),
        _lora(
            "rslora",
            "LoRA on query and value scaled by alpha / sqrt(r) (arXiv 2312.03732)",
            _WIDER,
            use_rslora=True,
        ),
        _lora(
            "lora+",
            "LoRA on query and value, B learning 16 times faster than A (arXiv 2402.12354)",
            _LOWER,
            loraplus_ratio=16.0,
        ),
        _lora(
            "dora",
            "DoRA on query and value (arXiv 2402.09353)",
            saved="A, B, magnitudes, head",
            trains="A, B, magnitudes, head",
            use_dora=True,
        ),
        Method(
            "pissa",
            "LoRA on query and value started at principal singular vectors (arXiv 2404.02948)",
            _AB,
            "A and B of rank 2r, head",
            "pissa",
            _LOWER,
            "r",
            (8,),
        ),
        Method(
            "ia3",
            "IA3: learned scales on keys, values and inner activations (arXiv 2205.05638)",
            "scales, head",
            "scales, head",
            "peft",
            _LARGE,
        ),
        _soft("prefix", "prefix tuning: learned keys and values in every block (arXiv 2101.00190)"),
        _soft("prompt", "prompt tuning: learned embeddings before the text (arXiv 2104.08691)"),
        Method(
            "few-shot",
            "contrastive training of the encoder, then logistic regression, as SetFit (arXiv 2209.11055)",
            "the encoder, linear layer",
            "the whole model",
            "contrast",
            _FULL,
        ),
    )
}
DEFAULT_METHODS = (
    "majority",
    "tfidf",
    "probe",
    "defaults",
    "head",
    "bitfit",
    "full",
    "lora-qv",
    "lora-all",
    "dora",
    "ia3",
)
# In which order a budget that is too small for all is spent: what is cheap or what most readers come for
# first.
USEFULNESS = (
    "majority",
    "tfidf",
    "probe",
    "defaults",
    "lora-qv",
    "full",
    "lora-all",
    "head",
    "few-shot",
    "bitfit",
    "dora",
    "lora-last2",
)


def by_usefulness(names: Sequence[str]) -> list[str]:
    """The names, those of `USEFULNESS` first and in its order, then the others in theirs."""
    return sorted(names, key=lambda name: USEFULNESS.index(name) if name in USEFULNESS else len(USEFULNESS))


def find_methods(names: Sequence[str]) -> list[Method]:
    """The rows of these names, each once. Raises UsageError for an unknown name or none at all."""
    if not names:
        raise UsageError("--methods: no method", f"there are: {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise UsageError(f"--methods {name}: no such method", f"there are: {', '.join(METHODS)}")
    return [METHODS[name] for name in dict.fromkeys(names)]

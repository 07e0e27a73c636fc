"""Make the golden folder of this release: `python tests/golden/make.py`. A folder that is there is never
changed.

tests/golden/VERSION/ holds tiny bases, adapters trained on them on made-up rows, and answers.json with what
each adapter answers. tests/test_golden.py reads every such folder: a later release must give the same
answers.
"""

import contextlib
import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from conftest import make_tiny  # noqa: E402
from support import settings  # noqa: E402

from textlora import TextClassifier  # noqa: E402
from textlora.inference.classifier import encoded_logits  # noqa: E402
from textlora.model.reference_model import ReferenceModel  # noqa: E402
from textlora.training.run import run_training  # noqa: E402

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
BASES = {"bert": SIZES, "roberta": SIZES, "distilbert": {**SIZES, "dim": 16, "hidden_dim": 24, "n_heads": 2}}
# adapter -> family, task of tests/support.py, settings
ADAPTERS = {
    "bert-single": ("bert", "single", {}),
    "bert-pairs": ("bert", "pairs", {"truncation": "tail"}),
    "bert-dora": ("bert", "single", {"use_dora": True, "target_modules": ("all-linear",), "lora_alpha": 6.0}),
    "bert-mean": ("bert", "single", {"pooling": "mean", "layers": "last:1"}),
    "bert-mean-folds": ("bert", "single", {"pooling": "mean", "validation": None}),
    "roberta-multi": ("roberta", "multi", {"use_rslora": True}),
    "distilbert-regression": ("distilbert", "regression", {"truncation": "head-tail"}),
}
TEXTS = [
    "the plot was great",
    "dull, boring and slow",
    "It was the second TIME; never again!",
    "caf\u00e9 \u00fcber 123",
    "good film " * 40,
    "x",
]
PAIRS = ["it was not good", "slow", "the door was red", "x", "very " * 50, "good film " * 20]


def main() -> int:
    target = HERE / version("textlora")
    if target.exists():
        print(f"{target} is there already; golden folders are never changed", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        made, answers = Path(name) / "made", {}
        for family, sizes in BASES.items():
            make_tiny(family, made / "bases" / family, **sizes)
        for adapter, (family, task, changes) in ADAPTERS.items():
            base = made / "bases" / family
            config = settings(
                Path(name) / adapter,
                base,
                task,
                learning_rate=0.03,
                epochs=16.0,
                r=2,
                max_length=24,
                **changes,
            )
            run_training(config)
            folder = Path(
                shutil.copytree(
                    config.output, made / "adapters" / adapter, ignore=shutil.ignore_patterns("run", ".*")
                )
            )
            answers[adapter] = {"base": family, **answer(folder, base, PAIRS if task == "pairs" else None)}
        (made / "answers.json").write_text(
            json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        shutil.copytree(made, target)
    return 0


def answer(folder: Path, base: Path, pairs: list[str] | None) -> dict[str, object]:
    """What an adapter says about the texts, checked against transformers + peft."""
    classifier = TextClassifier.load(folder, base=str(base), device="cpu")
    meta = classifier.meta
    reference = ReferenceModel.from_adapter(folder, base, len(meta.labels), pooling=meta.pooling)
    theirs = encoded_logits(reference, classifier.tokenizer.encode(TEXTS, pairs))
    assert np.allclose(classifier.logits(TEXTS, pairs), theirs, atol=1e-5), folder
    records = [
        classifier.record(prediction, with_logits=True) for prediction in classifier.predict(TEXTS, pairs)
    ]
    return {"texts": TEXTS, "pairs": pairs, "records": records}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        sys.exit(main())

"""Round trips of a real adapter on real rows: the largest difference of a logit on the way out to PEFT,
loralib, a merged model, and back.

python benchmarks/roundtrip.py path/to/imdb/train.parquet path/to/an/adapter
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from common import write_result
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter
from textlora.data.tokenize import Encoded
from textlora.inference.classifier import find_adapter_base
from textlora.transform.convert import convert
from textlora.transform.extract import extract
from textlora.transform.merge import merge
from textlora.transform.onnx.session import padded

PIPELINE = """
import json, sys
from transformers import pipeline
folder, texts = sys.argv[1], json.load(sys.stdin)
pipe = pipeline("text-classification", model=folder, device="cpu", top_k=None, function_to_apply="none", truncation=True)
scores = [{row["label"]: row["score"] for row in rows} for rows in pipe(texts)]
print(json.dumps({"scores": scores, "textlora": "textlora" in sys.modules}))
"""


def logits_of(net: torch.nn.Module, encoded: list[Encoded], spec: object) -> np.ndarray:
    """Eight texts a batch, padded to the longest."""
    parts = []
    with torch.inference_mode():
        for at in range(0, len(encoded), 8):
            inputs = {
                name: torch.from_numpy(value) for name, value in padded(encoded[at : at + 8], spec).items()
            }
            parts.append(net(**inputs).logits.numpy())
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="rows as Parquet, column text; the last of them are taken")
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    options = parser.parse_args()
    table = pq.read_table(options.data)
    picked = np.random.default_rng(42).permutation(table.num_rows)[-options.rows :]
    texts = table.take(picked).column("text").to_pylist()
    classifier, folder = TextClassifier.load(options.adapter, device="cpu"), read_adapter(options.adapter)
    files, labels, spec = find_adapter_base(folder), list(classifier.meta.labels), classifier.model.base.spec
    encoded, ours = classifier.tokenizer.encode(texts), classifier.logits(texts)
    apart: dict[str, float] = {}

    def note(what: str, found: np.ndarray, expected: np.ndarray = ours) -> None:
        apart[what] = float((np.abs(found - expected) / np.maximum(1, np.abs(expected))).max())

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        net = AutoModelForSequenceClassification.from_pretrained(files.folder, num_labels=len(labels))
        peft = PeftModel.from_pretrained(net, str(options.adapter)).eval()
        theirs = logits_of(peft, encoded, spec)
        note("textlora -> PEFT", theirs)
        peft.save_pretrained(str(root / "peft"))
        length = classifier.tokenizer.max_length
        convert(root / "peft", root / "from-peft", model=str(files.folder), labels=labels, max_length=length)
        note(
            "PEFT -> textlora",
            TextClassifier.load(root / "from-peft", base=str(files.folder)).logits(texts),
            theirs,
        )

        tensors = {}
        for name, tensor in folder.tensors.items():
            tensors[
                name.removeprefix("base_model.model.").removesuffix(".weight")
                if ".lora_" in name
                else name.removeprefix("base_model.model.")
            ] = tensor
        torch.save(tensors, root / "loralib.bin")
        alpha = float(folder.config["lora_alpha"])
        convert(
            root / "loralib.bin",
            root / "from-loralib",
            model=str(files.folder),
            labels=labels,
            max_length=length,
            lora_alpha=alpha,
        )
        note(
            "loralib -> textlora",
            TextClassifier.load(root / "from-loralib", base=str(files.folder)).logits(texts),
        )

        merge(classifier, files, options.adapter, root / "merged")
        command = [sys.executable, "-c", PIPELINE, str(root / "merged")]
        done = subprocess.run(
            command, input=json.dumps(texts), capture_output=True, text=True, check=True, cwd=scratch
        )
        said = json.loads(done.stdout)
        assert not said["textlora"]
        note(
            "textlora -> merged -> pipeline in a process without textlora",
            np.array([[row[label] for label in labels] for row in said["scores"]]),
        )
        extract(str(root / "merged"), str(files.folder), root / "extracted")
        note(
            "merged -> extract -> textlora",
            TextClassifier.load(root / "extracted", base=str(files.folder)).logits(texts),
        )
    rows = [
        (f"{what}, {len(texts)} texts: largest logit difference / max(1, logit)", f"{value:.1e}")
        for what, value in apart.items()
    ]
    write_result(
        "roundtrip",
        "round trips of an adapter",
        rows,
        {"rows": len(texts), "largest_logit": float(np.abs(ours).max()), "differences": apart},
    )


if __name__ == "__main__":
    main()

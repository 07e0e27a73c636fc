"""ONNX beside the packed encoder: sizes, and texts/s of the same texts, packed, ONNX Runtime, ..., packed,
ONNX Runtime, ...

Every system gets the same token ids, made beforehand, and as many threads as torch. textlora packs them; ONNX
Runtime gets batches of 64 texts sorted by length and padded to the longest. (Named `export` since a script
`onnx.py` would hide the package.)

    python benchmarks/export.py path/to/banking77/test.parquet path/to/an/adapter
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pyarrow.parquet as pq
import torch
from common import median_ratio, write_result

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter
from textlora.data.tokenize import Encoded
from textlora.inference.classifier import encoded_logits, find_adapter_base
from textlora.transform.onnx import adapter_inputs, export_adapter, export_base, export_classifier
from textlora.transform.onnx.graph import LOGITS
from textlora.transform.onnx.session import open_session, padded


def onnx_logits(
    session: ort.InferenceSession,
    encoded: Sequence[Encoded],
    spec: Any,
    size: int,
    inputs: dict,
    options: Any = None,
) -> np.ndarray:
    order = np.argsort([len(row.ids) for row in encoded], kind="stable")
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    parts = [
        session.run([LOGITS], padded([encoded[i] for i in rows], spec) | inputs, options)[0]
        for rows in batches
    ]
    logits = np.empty((len(encoded), parts[0].shape[1]), dtype=np.float32)
    logits[order] = np.concatenate(parts)
    return logits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", help="rows as Parquet, column text")
    parser.add_argument("adapter")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    table = pq.read_table(options.data)
    picked = np.random.default_rng(42).permutation(table.num_rows)[: options.rows]
    texts = table.take(picked).column("text").to_pylist()
    classifier = TextClassifier.load(options.adapter, device="cpu")
    files = find_adapter_base(read_adapter(options.adapter))
    spec = classifier.model.base.spec
    encoded = classifier.tokenizer.encode(texts)
    with tempfile.TemporaryDirectory() as scratch:
        one, graph, file = Path(scratch) / "merged", Path(scratch) / "base", Path(scratch) / "a.onnx_adapter"
        sizes = export_classifier(classifier, files, one, int8=True)["bytes"]
        sizes["base graph"] = export_base(files, graph, pooling=classifier.meta.pooling)["bytes"][
            "model.onnx"
        ]
        sizes["adapter"] = export_adapter(classifier, files, file)["bytes"][file.name]
        float32, int8, base = (
            open_session(path)
            for path in (one / "model.onnx", one / "model_quantized.onnx", graph / "model.onnx")
        )
        adapter, active, arrays = ort.LoraAdapter(), ort.RunOptions(), adapter_inputs(classifier.model)
        adapter.Load(str(file))
        active.add_active_adapter(adapter)
        systems: dict[str, Callable[[], np.ndarray]] = {
            "textlora, merged": lambda: encoded_logits(classifier.running, encoded),
            "textlora, adapter beside the base": lambda: encoded_logits(classifier.model, encoded),
            "ONNX Runtime, merged": lambda: onnx_logits(float32, encoded, spec, options.batch, {}),
            "ONNX Runtime, merged, int8": lambda: onnx_logits(int8, encoded, spec, options.batch, {}),
            "ONNX Runtime, adapter as .onnx_adapter": lambda: onnx_logits(
                base, encoded, spec, options.batch, {}, active
            ),
            "ONNX Runtime, adapter as arrays": lambda: onnx_logits(
                base, encoded, spec, options.batch, arrays
            ),
        }
        expected = systems["textlora, merged"]()
        apart = {
            name: float(np.abs(system() - expected).max()) for name, system in systems.items()
        }  # a warm-up too
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for _ in range(options.pairs):
            for name, system in systems.items():
                start = time.perf_counter()
                system()
                seconds[name].append(time.perf_counter() - start)
    first = seconds["textlora, merged"]
    speeds = [
        (f"texts/s: {name}", f"{len(texts) / statistics.median(taken):,.0f}")
        for name, taken in seconds.items()
    ]
    shown = {
        "model.onnx": "merged",
        "model_quantized.onnx": "merged, int8",
        "base graph": "base graph for every adapter",
        "adapter": "one .onnx_adapter",
    }
    write_result(
        "export",
        "ONNX beside the packed encoder: sizes and speed",
        [
            *speeds,
            ("... textlora over ONNX Runtime, merged, median of pairs", f"{median_ratio(seconds['ONNX Runtime, merged'], first):.2f}x"),
            *((f"ONNX size: {shown[name]}", f"{size / 1e6:.1f} MB") for name, size in sizes.items()),
        ],
        {
            "texts": len(texts), "tokens": sum(len(row.ids) for row in encoded), "batch": options.batch, "threads": torch.get_num_threads(),
            "onnxruntime": ort.__version__, "seconds": seconds, "logit_difference": apart, "bytes": sizes,
            "ratios_to_textlora_merged": {name: median_ratio(taken, first) for name, taken in seconds.items()},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()

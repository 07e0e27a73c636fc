"""Texts per second of one merged classifier beside its peers, in three orders: as the texts arrive (textlora
takes 64 at a time), sorted in windows of 256, sorted over the set.

    python benchmarks/inference.py path/to/data demo/bench

The second folder holds adapters named as the sets, from adapters.py. Every system gets the same merged weights
and as many threads as torch; a peer takes its best batch size of each order. "textlora high" has products of
halves on AMX, where there is one; "textlora int8" is the adapter itself on a base in 8 bits, not merged. The
floor (floor.py) is measured beside each pair.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pyarrow.parquet as pq
import torch
from common import median_ratio, write_result
from floor import count, floor_seconds
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from textlora import TextClassifier
from textlora.adapters.folder import read_adapter
from textlora.data.tokenize import Encoded
from textlora.inference.classifier import encoded_logits, eval_tokens, find_adapter_base
from textlora.kernels.bindings import has_amx
from textlora.transform.merge import merge
from textlora.transform.onnx import export_classifier
from textlora.transform.onnx.session import open_session, padded

ORDERS = {"arrival": 64, "windows": 256, "sorted": None}  # texts that textlora gets at a time
BATCHES = (4, 8, 16, 32)
Forward = Callable[[list[Encoded]], np.ndarray]


def in_order(encoded: Sequence[Encoded], order: str, batch: int, forward: Forward) -> np.ndarray:
    """Run a padded system: rows as they come, or sorted inside each window, cut into batches."""
    size, parts, rows = (ORDERS[order] if order == "windows" else None) or len(encoded), [], []
    for start in range(0, len(encoded), size):
        lengths = [len(e.ids) for e in encoded[start : start + size]]
        order_of_rows = start + (
            np.arange(len(lengths)) if order == "arrival" else np.argsort(lengths, kind="stable")
        )
        for at in range(0, len(order_of_rows), batch):
            rows.append(order_of_rows[at : at + batch])
            parts.append(forward([encoded[i] for i in rows[-1]]))
    logits = np.concatenate(parts)
    result = np.empty_like(logits)
    result[np.concatenate(rows)] = logits
    return result


def packed(encoded: Sequence[Encoded], window: int | None, model: Any) -> np.ndarray:
    size = window or len(encoded)
    return np.concatenate(
        [encoded_logits(model, encoded[start : start + size]) for start in range(0, len(encoded), size)]
    )


def peers(folder: Path, onnx: Path, spec: Any) -> dict[str, Forward]:
    """Padded systems: token rows to logits."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    float32, int8 = open_session(onnx / "model.onnx"), open_session(onnx / "model_quantized.onnx")
    compiled = openvino.Core().compile_model(
        str(onnx / "model.onnx"),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "THROUGHPUT",
        },
    )

    def transformers(rows: list[Encoded]) -> np.ndarray:
        with torch.inference_mode():
            return model(
                **{name: torch.from_numpy(value) for name, value in padded(rows, spec).items()}
            ).logits.numpy()

    return {
        "transformers": transformers,
        "ONNX Runtime": lambda rows: float32.run(None, padded(rows, spec))[0],
        "ONNX Runtime int8": lambda rows: int8.run(None, padded(rows, spec))[0],
        "OpenVINO": lambda rows: compiled(padded(rows, spec))[0].copy(),
    }


def best_batch(encoded: Sequence[Encoded], order: str, forward: Forward) -> int:
    """The batch size with which a padded system is fastest in an order."""
    taken = {}
    for batch in BATCHES:
        in_order(encoded[: 4 * batch], order, batch, forward)
        start = time.perf_counter()
        in_order(encoded, order, batch, forward)
        taken[batch] = time.perf_counter() - start
    return min(taken, key=taken.__getitem__)


def measure(name: str, data: Path, adapter: Path, rows: int, pairs: int) -> dict[str, Any]:
    table = pq.read_table(data)
    table = table.take(
        np.random.default_rng(42).permutation(table.num_rows)[-rows:]
    )  # beyond what --limit-train --seed 42 takes
    texts = table.column("text").to_pylist()
    labels = [str(label) for label in table.column("label").to_pylist()]
    classifier, files = TextClassifier.load(adapter, device="cpu"), find_adapter_base(read_adapter(adapter))
    encoded, spec = classifier.tokenizer.encode(texts), classifier.model.base.spec
    own = {"textlora": classifier.running, "textlora int8": classifier.model.for_inference("int8")}
    if has_amx():
        own["textlora high"] = classifier.model.for_inference("high")
    found: dict[str, Any] = {
        "set": name,
        "rows": rows,
        "tokens": sum(len(e.ids) for e in encoded),
        "seconds": {},
        "ratio": {},
    }
    found |= {"floor_seconds": {}, "floor_share": {}, "floor_ratio": {}}
    work = count(spec, [len(e.ids) for e in encoded], train=None)
    with tempfile.TemporaryDirectory() as scratch:
        folder, onnx = Path(scratch) / "merged", Path(scratch) / "onnx"
        merge(classifier, files, adapter, folder)
        export_classifier(classifier, files, onnx, int8=True)
        others = peers(folder, onnx, spec)
        expected = in_order(encoded, "sorted", 32, others["transformers"])
        best = {
            (peer, order): best_batch(encoded[: max(32, rows // 4)], order, forward)
            for peer, forward in others.items()
            for order in ORDERS
        }
        found["batch"] = {order: {peer: best[peer, order] for peer in others} for order in ORDERS}
        logging.set_verbosity_error()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pipe = pipeline(
            "text-classification",
            model=str(folder),
            tokenizer=tokenizer,
            device="cpu",
            batch_size=32,
            truncation=True,
        )
        scale = np.maximum(1, np.abs(expected))
        found["difference"], found["accuracy"] = {}, {}
        right = lambda logits: float(
            np.mean(
                [
                    classifier.meta.labels[k] == label
                    for k, label in zip(logits.argmax(1), labels, strict=True)
                ]
            )
        )
        answers = {system: packed(encoded, None, model) for system, model in own.items()}
        answers |= {
            peer: in_order(encoded, "sorted", best[peer, "sorted"], forward)
            for peer, forward in others.items()
        }
        for system, logits in answers.items():
            found["difference"][system] = float((np.abs(logits - expected) / scale).max())
            found["accuracy"][system] = right(logits)
        for order, window in ORDERS.items():
            systems: dict[str, Callable[[], Any]] = {
                system: lambda window=window, model=model: packed(encoded, window, model)
                for system, model in own.items()
            }
            for peer, forward in others.items():
                systems[peer] = lambda order=order, peer=peer, forward=forward: in_order(
                    encoded, order, best[peer, order], forward
                )
            if order == "arrival":
                systems["transformers pipeline"] = lambda: pipe(texts)
            taken, floors = {system: [] for system in systems}, []
            for _ in range(pairs):
                floors.append(floor_seconds(spec, work, eval_tokens(classifier.running), predicting=True)[0])
                for system, run in systems.items():
                    start = time.perf_counter()
                    run()
                    taken[system].append(time.perf_counter() - start)
            found["seconds"][order] = taken
            found["ratio"][order] = {
                system: median_ratio(values, taken["textlora"]) for system, values in taken.items()
            }
            found["floor_seconds"][order] = floors
            found["floor_share"][order] = median_ratio(floors, taken["textlora"])
            found["floor_ratio"][order] = median_ratio(
                taken["ONNX Runtime"], floors
            )  # what nothing but products and attention would give
            for system in own:
                found.setdefault("against", {}).setdefault(system, {})[order] = {
                    peer: median_ratio(taken[peer], taken[system])
                    for peer in ("ONNX Runtime", "ONNX Runtime int8")
                }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", type=Path, help="folder of adapters")
    parser.add_argument("--rows", type=int, nargs=3, default=(640, 448, 24))
    parser.add_argument("--pairs", type=int, nargs=3, default=(5, 5, 3))
    options = parser.parse_args()
    sets = zip(("banking77", "sst2", "imdb"), options.rows, options.pairs, strict=True)
    tables = [
        measure(name, options.data / name / "train.parquet", options.adapters / name, count, pairs)
        for name, count, pairs in sets
    ]
    rows = []
    capability = (
        torch.backends.cpu.get_cpu_capability()
    )  # textlora has its own way with each, and so have the peers
    for table in tables:
        for order, taken in table["seconds"].items():
            speed = {system: table["rows"] / statistics.median(values) for system, values in taken.items()}
            ratio = table["ratio"][order]
            shown = ", ".join(
                f"{system} {ratio[system]:.2f}x ({speed[system]:,.0f})"
                for system in speed
                if system != "textlora"
            )
            what = (
                f"inference, {table['set']}, {order}, {capability}: texts/s of textlora, and times each peer"
            )
            rows.append((what, f"{speed['textlora']:,.0f}; {shown}"))
            share = f"{table['floor_share'][order]:.0%}; {table['floor_ratio'][order]:.2f}x"
            rows.append(("... share of the floor; what the floor itself would be times ONNX Runtime", share))
            if "textlora high" in speed:
                against = table["against"]["textlora high"][order]
                what = "... textlora high against ONNX Runtime, against ONNX Runtime int8"
                rows.append((what, f"{against['ONNX Runtime']:.2f}x, {against['ONNX Runtime int8']:.2f}x"))
        for what, values, style in (
            ("largest logit difference from transformers", table["difference"], ".1e"),
            ("accuracy", table["accuracy"], ".4f"),
        ):
            shown = ", ".join(
                f"{system} {values[system]:{style}}" for system in (*table["against"], "ONNX Runtime int8")
            )
            rows.append((f"... {table['set']}: {what} on these rows", shown))
    write_result(
        f"inference-{capability.lower()}",
        f"one merged classifier beside its peers, {capability}",
        rows,
        {"tables": tables},
    )


if __name__ == "__main__":
    main()

"""Mixed-adapter batches on banking77 texts in arrival order, 64 a batch: textlora's engine, its own single
merged model, and peft's `adapter_names`; several adapters on one text; and what 1 to 1,000 registered
adapters cost.

Adapters are random numbers on MiniLM (query and value, r 8, 2 labels), so that peft can take them: equal
linear heads.

    python benchmarks/mixed.py path/to/data
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from common import median_ratio, write_result
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from textlora import AdapterEngine, TextClassifier
from textlora.adapters.folder import AdapterMeta, peft_config, write_side_file, write_weights
from textlora.core.config import LoraConfig
from textlora.model.base import BaseWeights, find_base, read_weights
from textlora.model.encoder import PackedEncoder
from textlora.model.families import read_spec
from textlora.model.packed_model import PackedModel
from textlora.transform.onnx.session import padded

BATCH = 64
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "mixed.svg"


def write_adapters(folder: Path, count: int, layers: str = "all") -> list[Path]:
    """Adapter folders of random numbers that share everything but their tensors."""
    files = find_base("minilm")
    spec = read_spec(files.config)
    weights: BaseWeights = read_weights(files.folder, spec, pooler=True)
    encoder, made = PackedEncoder(weights), []
    for k in range(count):
        model = PackedModel(weights, LoraConfig(layers=layers), 2, seed=k, encoder=encoder)
        draw = torch.Generator().manual_seed(k)
        drawn = {
            name: t.detach() if ".lora_A." in name else 0.05 * torch.randn(t.shape, generator=draw)
            for name, t in model.trainable().items()
        }
        path = folder / f"{layers.replace(':', '-')}-{k}"
        path.mkdir(parents=True)
        config = peft_config(model.lora, model.target_modules, model.modules_to_save, "first", None, None)
        write_weights(path, config, drawn)
        base = {"id": None, "revision": None, "model_type": "bert", "hash": weights.hash}
        write_side_file(
            path,
            AdapterMeta(
                ("a", "b"),
                "single_label_classification",
                False,
                "first",
                128,
                "head",
                base,
                textlora_version="0",
            ),
        )
        made.append(path)
    return made


def paired(systems: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[float]]:
    for run in systems.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(pairs):
        for name, run in systems.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return taken


def beside_peft(texts: list[str], folder: Path, pairs: int) -> dict[str, Any]:
    paths = write_adapters(folder, BATCH)
    names, engine = [path.name for path in paths], AdapterEngine("minilm")
    for path in paths:
        engine.add(path, path.name)
    classifier = TextClassifier.load(paths[0], base="minilm")
    encoded, spec = classifier.tokenizer.encode(texts), classifier.model.base.spec
    net = AutoModelForSequenceClassification.from_pretrained(find_base("minilm").folder, num_labels=2)
    peft = PeftModel.from_pretrained(net, str(paths[0]), adapter_name=names[0])
    for path in paths[1:]:
        peft.load_adapter(str(path), adapter_name=path.name)
    peft.eval()
    batches = [range(at, at + BATCH) for at in range(0, len(texts), BATCH)]

    def peft_logits() -> np.ndarray:
        with torch.inference_mode():
            inputs = (
                {
                    key: torch.from_numpy(value)
                    for key, value in padded([encoded[i] for i in rows], spec).items()
                }
                for rows in batches
            )
            return np.concatenate([peft(**given, adapter_names=names).logits.numpy() for given in inputs])

    def ours() -> np.ndarray:
        return np.array(
            [answer.logits for rows in batches for answer in engine.predict([texts[i] for i in rows], names)]
        )

    apart = float(np.abs(peft_logits() - ours()).max())
    systems = {
        "mixed": ours,
        "merged": lambda: [classifier.predict([texts[i] for i in rows]) for rows in batches],
        "peft": peft_logits,
    }
    return {"seconds": paired(systems, pairs), "difference": apart}


def many_tasks(texts: list[str], folder: Path, pairs: int) -> dict[str, Any]:
    """Eight adapters on 8 texts against 64 texts with an adapter each, of the same lengths."""
    found = {}
    order = np.argsort([len(text) for text in texts], kind="stable")
    few = [texts[i] for i in order[len(order) // 2 : len(order) // 2 + 64 : 8]]
    many = [
        text + " ." * k for k in range(8) for text in few
    ]  # other texts to the engine, at most a few tokens longer
    for layers in ("last:3", "last:1"):
        engine, names = AdapterEngine("minilm"), []
        for path in write_adapters(folder, 8, layers):
            engine.add(path, path.name)
            names += [path.name] * len(few)
        taken = paired(
            {
                "shared": lambda e=engine, n=names: e.predict(few * 8, n),
                "apart": lambda e=engine, n=names: e.predict(many, n),
            },
            pairs,
        )
        found[layers] = taken
    return found


def growth(texts: list[str], folder: Path) -> list[dict[str, float]]:
    """Throughput, memory and time to add, against the number of registered adapters; Zipf traffic."""
    paths, made = write_adapters(folder, 1000), []
    batches = [range(at, at + BATCH) for at in range(0, len(texts), BATCH)]
    for count in (1, 3, 10, 30, 100, 300, 1000):
        engine = AdapterEngine("minilm", resident_bytes=2**28)
        adding = []
        for path in paths[:count]:
            start = time.perf_counter()
            engine.add(path, path.name)
            adding.append(time.perf_counter() - start)
        draw = np.random.default_rng(0)
        picks = [paths[k].name for k in np.minimum(draw.zipf(1.2, len(texts)) - 1, count - 1)]
        run = lambda engine=engine, picks=picks: [
            engine.predict([texts[i] for i in rows], [picks[i] for i in rows]) for rows in batches
        ]
        run()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        first = []
        for path in paths[: min(count, 20)]:  # from the folder into memory, golden examples apart
            entry = engine.bank._entries[path.name]
            start = time.perf_counter()
            engine.bank._read(entry)
            first.append(time.perf_counter() - start)
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        made.append(
            {
                "adapters": count,
                "texts_per_second": len(texts) / statistics.median(taken),
                "process_bytes": resident,
                "adapter_bytes": engine.bank.state()["resident_bytes"],
                "register_ms": 1e3 * statistics.median(adding),
                "load_ms": 1e3 * statistics.median(first),
            }
        )
    return made


def draw(grown: list[dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "textlora"
    counts = [point["adapters"] for point in grown]
    panels = (
        ("texts/s, Zipf traffic", [[point["texts_per_second"] for point in grown]], ["mixed batches of 64"]),
        (
            "MiB",
            [[point[key] / 2**20 for point in grown] for key in ("process_bytes", "adapter_bytes")],
            ["whole process", "adapters in memory"],
        ),
        (
            "ms",
            [[point[key] for point in grown] for key in ("load_ms", "register_ms")],
            ["read into memory", "register"],
        ),
    )
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, (unit, series, names) in zip(axes, panels, strict=True):
        for values, name, style in zip(series, names, ("o-", "s--"), strict=False):
            axis.plot(counts, values, style, label=name, color="#1f5fa8" if style == "o-" else "#b3541e")
        axis.set_xscale("log")
        axis.set_xlabel("adapters registered")
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, facecolor="white", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    texts = pq.read_table(options.data / "banking77" / "train.parquet").column("text").to_pylist()
    picked = np.random.default_rng(42).permutation(len(texts))[: options.rows]
    texts = [texts[i] for i in picked]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        peer = beside_peft(texts, folder / "peft", options.pairs)
        tasks = many_tasks(texts, folder / "tasks", options.pairs)
        grown = growth(texts, folder / "growth")
    seconds = peer["seconds"]
    shares = {layers: median_ratio(taken["shared"], taken["apart"]) for layers, taken in tasks.items()}
    speed = {name: len(texts) / statistics.median(taken) for name, taken in seconds.items()}
    rows = [
        ("mixed batch, 64 texts of 64 adapters, banking77: texts/s", f"{speed['mixed']:,.0f}"),
        (
            "... times peft's mixed batch",
            f"{median_ratio(seconds['peft'], seconds['mixed']):.1f}x ({speed['peft']:,.0f})",
        ),
        (
            "... share of one merged model's",
            f"{median_ratio(seconds['merged'], seconds['mixed']):.0%} ({speed['merged']:,.0f})",
        ),
        *(
            (f"eight adapters ({k} of 6) on one text: time of eight separate texts", f"{share:.0%}")
            for k, share in shares.items()
        ),
        (
            "1,000 adapters registered, Zipf traffic: share of one adapter's texts/s",
            f"{grown[-1]['texts_per_second'] / grown[0]['texts_per_second']:.0%}",
        ),
        (
            "... registering one; reading one into memory, golden examples apart",
            f"{grown[-1]['register_ms']:.1f} ms; {grown[-1]['load_ms']:.1f} ms",
        ),
    ]
    draw(grown)
    write_result("mixed", "many adapters on one base", rows, {"peft": peer, "tasks": tasks, "growth": grown})


if __name__ == "__main__":
    main()

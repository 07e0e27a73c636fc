"""Training and inference on a CUDA device beside the peers: models of bert-base's and bert-large's size,
random weights, bfloat16.

    python benchmarks/gpu.py path/to/data

The recipe as written trains in float32 (Trainer's default) on rows padded to 512. The tuned stack has dynamic
padding, length grouping, no base dropout, and its best of autocast and bfloat16 weights at its best batch
size; textlora too has its best batch size, and trains three epochs where the others train one: it records a
step when a shape of batch comes the second time, which an epoch of so few rows hardly outlasts. Shares are
against two measures of the same run: the floor (products at the encoder's own shapes, attention as it is
called), and the rate of one large product.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import median_ratio, write_result
from floor import count, zeros
from systems import random_base, read_rows, textlora_run, transformers_run
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from textlora.core.config import LoraConfig
from textlora.data.tokenize import Encoded, TextTokenizer, load_tokenizer
from textlora.inference.classifier import encoded_logits
from textlora.model.attention import attend
from textlora.model.base import find_base
from textlora.model.families import EncoderSpec, read_spec
from textlora.model.open import open_model

SIZES = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
BATCHES, PEER_BATCHES = (8, 32, 64, 128), (32, 64, 128)
LARGE_PRODUCT = 8192
LONGER = {"epochs": 3, "eval_every": 10**6}


def seconds_of(call: Callable[[], object], least: float = 0.05) -> float:
    """Seconds of one call on the device, the mean of as many as fill `least` seconds."""
    for _ in range(3):
        call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    calls, taken = 4, 0.0
    while taken < least:
        calls *= 2
        start.record()
        for _ in range(calls):
            call()
        end.record()
        torch.cuda.synchronize()
        taken = start.elapsed_time(end) / 1000
    return taken / calls


def product_rate(rows: int, inner: int, outer: int) -> float:
    """FLOP/s of a bfloat16 product."""
    x, weight = (torch.randn(n, inner, device="cuda", dtype=torch.bfloat16) for n in (rows, outer))
    return 2 * rows * inner * outer / seconds_of(lambda: torch.nn.functional.linear(x, weight))


def attention_seconds(spec: EncoderSpec, lengths: Sequence[int], train: bool) -> float:
    """One layer's attention over texts of these lengths in one call, and back."""
    layout, tokens = zeros(lengths, "cuda").layout, sum(lengths)
    projected = torch.randn(tokens, 3 * spec.hidden, device="cuda", dtype=torch.bfloat16, requires_grad=train)
    cotangent = torch.randn(tokens, spec.hidden, device="cuda", dtype=torch.bfloat16)

    def call() -> None:
        out = attend(projected, None, layout, spec.heads)
        if train:
            torch.autograd.grad(out, projected, cotangent)

    return seconds_of(call)


def floor_of(spec: EncoderSpec, lengths: Sequence[int], batch: int, train: str | None) -> tuple[float, float]:
    """Seconds that the products and the attention of all rows take at the rates of their shapes in steps of
    `batch` rows, and FLOP of the products."""
    work = count(spec, lengths, train=train)
    tokens = round(np.mean(lengths) * batch)
    flop = {shape: 2.0 * rows * shape[0] * shape[1] for shape, rows in work.products.items()}
    seconds = sum(flop[shape] / product_rate(min(tokens, work.products[shape]), *shape) for shape in flop)
    steps = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    one = statistics.mean(attention_seconds(spec, step, train is not None) for step in steps[:3])
    return seconds + one * (spec.layers - 1) * len(lengths) / batch, sum(flop.values())


def measured(run: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and the peak of device memory while it ran."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return run(), torch.cuda.max_memory_allocated()


def textlora_speed(folder: str, rows: list[dict[str, Any]], full: bool, batch: int) -> float:
    seconds, tokens = textlora_run(folder, rows, full, batch, LONGER)
    return tokens / seconds


def tuned_speed(folder: str, rows: list[dict[str, Any]], tokens: int, batch: int, precision: str) -> float:
    try:
        return tokens / transformers_run(folder, rows, True, batch, precision)
    except torch.OutOfMemoryError:
        return 0.0


def training(folder: str, rows: list[dict[str, Any]], lengths: list[int], pairs: int) -> dict[str, Any]:
    few = rows[:64]
    tokens, few_tokens = sum(lengths), sum(lengths[:64])
    sweep = {}
    for precision in ("autocast", "bfloat16"):
        transformers_run(folder, few, True, 32, precision)
        for batch in PEER_BATCHES:
            sweep["tuned", precision, batch] = tuned_speed(folder, rows, tokens, batch, precision)
    for batch in BATCHES:
        sweep["textlora", "bfloat16", batch] = textlora_speed(folder, rows, False, batch)
    best = {
        system: max((key for key in sweep if key[0] == system), key=sweep.__getitem__)
        for system in ("tuned", "textlora")
    }
    systems: dict[str, Callable[[], float]] = {
        "textlora": lambda: textlora_speed(folder, rows, False, best["textlora"][2]),
        "tuned": lambda: tuned_speed(folder, rows, tokens, best["tuned"][2], best["tuned"][1]),
        "recipe": lambda: few_tokens / transformers_run(folder, few, False, 8),
        "full": lambda: textlora_speed(folder, rows, True, best["textlora"][2]),
    }
    speed: dict[str, list[float]] = {system: [] for system in systems}
    memory: dict[str, int] = {}
    for _ in range(pairs):
        for system, run in systems.items():
            value, memory[system] = measured(run)
            speed[system].append(value)
    spec = read_spec(find_base(folder).config)
    least, flop = floor_of(spec, lengths, best["textlora"][2], "lora")
    at = statistics.median(speed["textlora"]) / tokens
    return {
        "tokens_per_second": speed,
        "ratio": {system: median_ratio(speed["textlora"], values) for system, values in speed.items()},
        "peak_bytes": memory,
        "sweep": {" ".join(map(str, key)): value for key, value in sweep.items()},
        "batch": best["textlora"][2],
        "tuned_batch": f"{best['tuned'][1]}, batch {best['tuned'][2]}",
        "floor_share": least * at,
        "product_flop_per_second": flop * at,
    }


def padded_run(model: Any, encoded: Sequence[Encoded], batch: int) -> np.ndarray:
    """Logits of a transformers model over batches sorted by length; waits for the device once, at the end."""
    order = np.argsort([len(e.ids) for e in encoded], kind="stable")
    parts = []
    with torch.inference_mode():
        for at in range(0, len(order), batch):
            some = [encoded[i].ids for i in order[at : at + batch]]
            ids = np.zeros((len(some), max(map(len, some))), dtype=np.int64)
            mask = np.zeros_like(ids)
            for k, one in enumerate(some):
                ids[k, : len(one)], mask[k, : len(one)] = one, 1
            inputs = {
                "input_ids": torch.from_numpy(ids).to("cuda"),
                "attention_mask": torch.from_numpy(mask).to("cuda"),
            }
            parts.append(model(**inputs).logits.float())
    result = np.empty((len(encoded), parts[0].shape[1]), dtype=np.float32)
    result[order] = torch.cat(parts).cpu().numpy()
    return result


def inference(folder: str, encoded: Sequence[Encoded], pairs: int) -> dict[str, Any]:
    """The base with a random head, LoRA merged, in bfloat16."""
    files = find_base(folder)
    model, _ = open_model(files, LoraConfig(), 2, device="cuda")
    running = model.for_inference("bfloat16")
    peer = (
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, dtype=torch.bfloat16)
        .cuda()
        .eval()
    )
    exact = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).cuda().eval()
    head = model.trainable()
    with torch.no_grad():
        for one in (peer, exact):
            one.classifier.weight.copy_(head["base_model.model.classifier.weight"])
            one.classifier.bias.copy_(head["base_model.model.classifier.bias"])
    taken: dict[int, float] = {}
    for batch in (32, 64, 128, 256):
        padded_run(peer, encoded[: 4 * batch], batch)
        taken[batch] = _clock(lambda batch=batch: padded_run(peer, encoded, batch))
    batch = min(taken, key=taken.__getitem__)
    expected = padded_run(exact, encoded, 64)
    off = {"textlora": encoded_logits(running, encoded), "transformers": padded_run(peer, encoded, batch)}
    seconds: dict[str, list[float]] = {"textlora": [], "transformers": []}
    for _ in range(pairs):
        seconds["textlora"].append(_clock(lambda: encoded_logits(running, encoded)))
        seconds["transformers"].append(_clock(lambda: padded_run(peer, encoded, batch)))
    lengths = [len(e.ids) for e in encoded]
    least, flop = floor_of(model.base.spec, lengths, max(1, round(16384 / np.mean(lengths))), None)
    middle = statistics.median(seconds["textlora"])
    return {
        "texts": len(encoded),
        "tokens": sum(lengths),
        "seconds": seconds,
        "ratio": median_ratio(seconds["transformers"], seconds["textlora"]),
        "batch": batch,
        "largest_difference": {name: float(np.abs(value - expected).max()) for name, value in off.items()},
        "largest_logit": float(np.abs(expected).max()),
        "floor_share": least / middle,
        "product_flop_per_second": flop / middle,
    }


def _clock(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets imdb and banking77")
    parser.add_argument("--tokenizer", default="minilm", help="folder whose tokenizer is used")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    imdb = read_rows(str(options.data / "imdb" / "train.parquet"), options.rows)
    banking = read_rows(str(options.data / "banking77" / "train.parquet"), 4 * options.rows)
    rate = product_rate(LARGE_PRODUCT, LARGE_PRODUCT, LARGE_PRODUCT)
    details: dict[str, Any] = {"device": torch.cuda.get_device_name(), "product_flop_per_second": rate}
    shown = [("a large bfloat16 product on this device", f"{details['device']}: {rate / 1e12:,.0f} TFLOP/s")]
    for size, sizes in SIZES.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = str(random_base(Path(scratch), str(find_base(options.tokenizer).folder), **sizes))
            files = find_base(folder)
            tokenizer = TextTokenizer(load_tokenizer(files.folder, files.config["model_type"]), 512)
            encoded = {
                name: tokenizer.encode([row["text"] for row in rows])
                for name, rows in (("imdb", imdb), ("banking77", banking))
            }
            made = training(
                folder, imdb, [len(e.ids) for e in encoded["imdb"]], options.pairs if size == "base" else 3
            )
            details[size] = {"training": made} | {
                name: inference(folder, some, options.pairs) for name, some in encoded.items()
            }
        speed = {system: statistics.median(values) for system, values in made["tokens_per_second"].items()}
        share = made["product_flop_per_second"] / rate
        what = f"training, bert-{size} size, IMDB"
        shown.append(
            (f"{what}: real tokens/s of textlora, batch {made['batch']}", f"{speed['textlora']:,.0f}")
        )
        shown.append(
            (
                "... share of the floor, and of the large product's rate",
                f"{made['floor_share']:.0%}, {share:.0%}",
            )
        )
        shown.append(
            (
                "... times the tutorial's transformers + peft + Trainer",
                f"{made['ratio']['recipe']:.1f}x ({speed['recipe']:,.0f})",
            )
        )
        shown.append(
            (
                f"... times the tuned stack ({made['tuned_batch']})",
                f"{made['ratio']['tuned']:.2f}x ({speed['tuned']:,.0f})",
            )
        )
        shown.append(
            (
                "... times full fine-tuning in the same engine",
                f"{made['ratio']['full']:.2f}x ({speed['full']:,.0f})",
            )
        )
        memory = made["peak_bytes"]
        shown.append(
            (
                "... peak memory, and the tuned stack's",
                f"{memory['textlora'] / 2**20:,.0f} MiB, {memory['tuned'] / 2**20:,.0f} MiB",
            )
        )
        for name in encoded:
            one = details[size][name]
            value = (
                f"{one['texts'] / statistics.median(one['seconds']['textlora']):,.0f}, {one['ratio']:.2f}x"
            )
            shown.append(
                (
                    f"inference, bert-{size} size, {name}: texts/s, and times transformers in bfloat16, sorted",
                    value,
                )
            )
            off = one["largest_difference"]
            value = f"{one['floor_share']:.0%}, {one['product_flop_per_second'] / rate:.0%}; {off['textlora']:.1e}, {off['transformers']:.1e}"
            shown.append(
                (
                    "... share of the floor, and of the large product's rate; largest difference from float32, and transformers'",
                    value,
                )
            )
    write_result("gpu", "training and inference on a CUDA device, bfloat16", shown, details)


if __name__ == "__main__":
    main()

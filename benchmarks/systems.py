"""Training systems side by side, each run in a process of its own so that its peak memory is its own.

Every system trains the same base weights on the same rows for one epoch, and counts real tokens only:

recipe    a user's transformers + peft + Trainer script as the tutorial has it: texts padded to 512, LoRA on
query and value (r 8, alpha 16,
          dropout 0.1), Trainer's defaults (batch 8, AdamW, 5e-5, base dropout on)
tuned     the same stack as well as it can be set up: dynamic padding, length grouping, base dropout off
textlora  the defaults of `textlora train`
full      every weight of the base trained, in textlora's own engine
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read_rows(data: str, count: int) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(data)
    return table.take(np.random.default_rng(42).permutation(table.num_rows)[:count]).to_pylist()


def transformers_run(
    folder: str, rows: list[dict[str, Any]], tuned: bool, batch_size: int, precision: str | None = None
) -> float:
    """Seconds of one epoch; on a GPU in `precision`: None as written, "autocast" to bfloat16, or "bfloat16"
    weights."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(
        [row["text"] for row in rows],
        padding=False if tuned else "max_length",
        truncation=True,
        max_length=512,
    )
    names = sorted({str(row["label"]) for row in rows})
    data = [
        {"labels": names.index(str(row["label"])), **{key: values[i] for key, values in encoded.items()}}
        for i, row in enumerate(rows)
    ]
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if tuned else {}
    off |= {"dtype": torch.bfloat16} if precision == "bfloat16" else {}
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=max(2, len(names)), **off)
    model = get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.0 if tuned else 0.1)
    )
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch, num_train_epochs=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=not torch.cuda.is_available(), logging_strategy="no",
            bf16=precision == "autocast", per_device_train_batch_size=batch_size, train_sampling_strategy="group_by_length" if tuned else "random",
        )  # fmt: skip
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=DataCollatorWithPadding(tokenizer) if tuned else None,
        )
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def textlora_run(
    folder: str, rows: list[dict[str, Any]], full: bool, batch_size: int, settings: dict[str, Any]
) -> tuple[float, int]:
    from textlora.core.config import TrainConfig
    from textlora.training.head_start import start_head
    from textlora.training.hidden_state_cache import build_prefix
    from textlora.training.prepare import prepare
    from textlora.training.trainer import Trainer

    pairs = [(row["text"], str(row["label"])) for row in rows]
    config = TrainConfig(
        **{"model": folder, "pooling": "first", "epochs": 1, "batch_size": batch_size, **settings}
    )
    prepared = prepare(config, {"train": pairs, "validation": pairs[:2]})
    if full:
        train_everything(prepared)
    trainer = Trainer(prepared, build_prefix(prepared))
    if not full:
        start_head(prepared)
    for record in trainer.records():
        if record["kind"] == "evaluation":
            break
    return trainer.seconds, trainer.tokens


def train_everything(prepared: Any) -> None:
    """Turn the packed model into full fine-tuning: every tensor of the encoder carries a gradient, A and B
    are gone."""
    model = prepared.model
    model.encoder = model.encoder.plain()  # laid out, weights get no gradients
    leaves = {f"embeddings.{name}": tensor for name, tensor in model.encoder.embeddings.items()}
    leaves |= {
        f"{i}.{name}": tensor
        for i, block in enumerate(model.encoder.blocks)
        for name, tensor in block.items()
    }
    model._slots = {}
    model._trainable = {name: t.requires_grad_() for name, t in leaves.items()} | {
        n: t for n, t in model._trainable.items() if ".lora_" not in n
    }


def random_base(folder: Path, tokenizer_folder: str, **sizes: int) -> Path:
    """A model with random weights and a real tokenizer, of bert-base's size or `sizes`."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained(folder)
    return folder


def measure(
    system: str,
    folder: str,
    data: str,
    rows: int,
    batch_size: int = 8,
    threads: int | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Run one system in a fresh process: seconds, real tokens, peak resident bytes."""
    asked = {
        "system": system,
        "folder": folder,
        "data": data,
        "rows": rows,
        "batch_size": batch_size,
        "threads": threads,
        "settings": settings,
    }
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    if done.returncode:
        raise SystemExit(f"{system} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("asked", help="one measurement as JSON; `measure` makes it")
    asked = json.loads(parser.parse_args().asked)
    if asked["threads"]:
        torch.set_num_threads(asked["threads"])
    rows = read_rows(asked["data"], asked["rows"])
    column = next(name for name in ("text", "sentence") if name in rows[0])
    rows = [{"text": row[column], "label": row["label"]} for row in rows]
    if asked["system"] in ("recipe", "tuned"):
        seconds = transformers_run(asked["folder"], rows, asked["system"] == "tuned", asked["batch_size"])
        tokens = 0
    else:
        seconds, tokens = textlora_run(
            asked["folder"], rows, asked["system"] == "full", asked["batch_size"], asked["settings"]
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"seconds": seconds, "tokens": tokens, "peak_bytes": peak}))


if __name__ == "__main__":
    main()

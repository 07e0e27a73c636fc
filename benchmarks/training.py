"""Training speed beside the recipe: the same base weights and IMDB rows, recipe, textlora, recipe, textlora, ...

The recipe is a user's transformers + peft + Trainer script as the tutorial has it: every text padded to 512, LoRA on query and
value (r 8, alpha 16, dropout 0.1), Trainer's defaults (batch 8, AdamW, 5e-5). Real tokens only are counted for both.

    python benchmarks/training.py path/to/imdb/train.parquet
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq
import torch
from common import median_ratio, write_result
from peft import LoraConfig as PeftLoraConfig
from peft import TaskType, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

from textlora.base import find_base
from textlora.config import TrainConfig
from textlora.prepare import prepare
from textlora.training import Trainer as OurTrainer
from textlora.training import start_head


def recipe_seconds(folder: str, rows: list[dict]) -> float:
    """Seconds of one epoch of the recipe on `rows`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer([row["text"] for row in rows], padding="max_length", truncation=True, max_length=512)
    data = [
        {"labels": row["label"], **{key: torch.tensor(encoded[key][i]) for key in ("input_ids", "attention_mask", "token_type_ids")}}
        for i, row in enumerate(rows)
    ]
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model = get_peft_model(model, PeftLoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, lora_dropout=0.1))
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(scratch, num_train_epochs=1, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True)
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start


def textlora_seconds(rows: list[dict]) -> tuple[float, int]:
    """Seconds and real tokens of one epoch with textlora's defaults."""
    config = TrainConfig(model="minilm", epochs=1)
    pairs = [(row["text"], str(row["label"])) for row in rows]
    prepared = prepare(config, {"train": pairs, "validation": pairs[:2]})
    trainer = OurTrainer(prepared)
    start_head(prepared)
    start = time.perf_counter()
    for record in trainer.records():
        if record["kind"] == "evaluation":
            break
    return min(time.perf_counter() - start, trainer.seconds), trainer.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="IMDB rows as Parquet, columns text and label")
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    folder = str(find_base("minilm").folder)
    table = pq.read_table(options.data)
    picked = np.random.default_rng(42).permutation(table.num_rows)[: options.rows]
    rows = table.take(picked).to_pylist()
    recipe_seconds(folder, rows[:8])  # warm-up
    textlora_seconds(rows[:8])
    recipe, ours, tokens = [], [], 0
    for _ in range(options.pairs):
        recipe.append(recipe_seconds(folder, rows))
        seconds, tokens = textlora_seconds(rows)
        ours.append(seconds)
    ratio = median_ratio(recipe, ours)
    write_result(
        "training",
        "training speed, MiniLM on IMDB rows",
        [
            ("training, real tokens/s: textlora", f"{tokens / statistics.median(ours):,.0f}"),
            ("training, real tokens/s: transformers + peft + Trainer as in the tutorial", f"{tokens / statistics.median(recipe):,.0f}"),
            ("... ratio, median of pairs", f"{ratio:.1f}x"),
        ],
        {"rows": len(rows), "tokens": tokens, "recipe_seconds": recipe, "textlora_seconds": ours, "ratio": ratio},
    )


if __name__ == "__main__":
    main()

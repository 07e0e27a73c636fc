"""The tutorial's recipe to its end, by a faster equivalent: same rows, order, rate, dropouts and steps,
without the padding.

python benchmarks/recipe.py path/to/data imdb

25 epochs of the recipe as written take hours on two cores. Padding changes no arithmetic of a text, so its
accuracy may come from packed batches; what those epochs cost is measured on the recipe as written
(time_to_accuracy.py). Writes results/recipe-SET.json.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import write_result
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from systems import read_rows
from torch import Tensor

from textlora.core.config import TrainConfig
from textlora.model.encoder import PackedEncoder, activate
from textlora.model.lora import lora_linear
from textlora.training.prepare import prepare
from textlora.training.trainer import Trainer

DROPOUT, EPOCHS, ROWS = 0.1, 25, 1000
SETS = {"imdb": "test", "sst2": "validation", "banking77": "test"}  # the split that is scored after an epoch


class DroppingEncoder(PackedEncoder):
    """The packed encoder with BERT's own dropouts (on embeddings, attention and both outputs) while training."""

    def forward(self, batch, loras, *, pooling="first", dropout_seed=None, checkpointing=False):
        if dropout_seed is None:
            return super().forward(batch, loras, pooling=pooling)
        generator = torch.Generator().manual_seed(dropout_seed)
        x, runs, firsts = drop(self._embed(batch), generator), batch.runs(), batch.cu_seqlens[:-1]
        for i, w in enumerate(self.blocks):
            adapted = [
                (k * self.spec.hidden, loras[i, slot])
                for k, slot in enumerate(("query", "key", "value"))
                if (i, slot) in loras
            ]
            context = attend(
                lora_linear(x, w["qkv.weight"], w["qkv.bias"], adapted, generator),
                runs,
                self.spec.heads,
                generator,
            )
            if i == self.spec.layers - 1:
                x, context = x[firsts], context[firsts]
            x = self._norm(
                i,
                "attention_norm",
                x
                + drop(
                    F.linear(context, w["attention_output.weight"], w["attention_output.bias"]), generator
                ),
            )
            inner = activate(
                F.linear(x, w["intermediate.weight"], w["intermediate.bias"]), self.spec.activation
            )
            x = self._norm(
                i, "output_norm", x + drop(F.linear(inner, w["output.weight"], w["output.bias"]), generator)
            )
        return x


def drop(x: Tensor, generator: torch.Generator) -> Tensor:
    """Dropout by 16 random bits a number, four from one draw: a quarter of `bernoulli_`'s time, and the share
    is right to 1e-5."""
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    kept = bits.view(torch.int16)[: x.numel()].view(x.shape).to(x.dtype).ge_(DROPOUT * 2**16 - 2**15)
    return x * kept.div_(1 - DROPOUT)


def attend(projected: Tensor, runs: Any, heads: int, generator: torch.Generator) -> Tensor:
    outputs = []
    for (_, count, _, length), part in zip(
        runs, projected.split([run[1] * run[3] for run in runs]), strict=True
    ):
        q, k, v = part.view(count, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
        shares = drop(torch.softmax(q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2), -1), generator)
        outputs.append((shares @ v).transpose(1, 2).reshape(count * length, -1))
    return torch.cat(outputs)


def hf_order(rows: int) -> list[list[int]]:
    """Batches of 8 of every epoch as transformers' Trainer draws them: its data loader's sampler, seeded with
    42, epoch after epoch."""
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    tiny = BertForSequenceClassification(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            max_position_embeddings=8,
        )
    )
    arguments = TrainingArguments("unused", report_to="none", use_cpu=True, per_device_train_batch_size=8)
    loader = Trainer(
        model=tiny, args=arguments, train_dataset=[{"input_ids": [1], "labels": i} for i in range(rows)]
    ).get_train_dataloader()
    order = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        order += [batch["labels"].tolist() for batch in loader]
    return order


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("set", choices=SETS)
    parser.add_argument(
        "--state", type=Path, help="file to keep the run in after each score, and to go on from"
    )
    options = parser.parse_args()
    folder = options.data / options.set
    train = [(row["text"], str(row["label"])) for row in read_rows(str(folder / "train.parquet"), ROWS)]
    held = [
        (row["text"], str(row["label"]))
        for row in read_rows(str(folder / f"{SETS[options.set]}.parquet"), ROWS)
    ]
    config = TrainConfig(
        model="minilm", pooling="first", epochs=EPOCHS, batch_size=8, learning_rate=5e-5, warmup=0.0, weight_decay=0.0, lora_dropout=DROPOUT, eval_every=math.ceil(ROWS / 8) * 5
    )  # fmt: skip
    prepared = prepare(config, {"train": train, "validation": held})
    model = prepared.model
    model.encoder = DroppingEncoder(model.base)
    plain = model.head
    model.head = lambda x, seed=None: plain(x) if seed is None else dropped_head(model, x, seed)
    trainer = Trainer(prepared)
    ends = [
        (epoch + (i + 1) / math.ceil(ROWS / 8)) for epoch in range(EPOCHS) for i in range(math.ceil(ROWS / 8))
    ]
    trainer.steps = list(zip(ends, hf_order(len(prepared.sets["train"].rows)), strict=True))
    curve: list[dict[str, float]] = []
    if options.state and options.state.is_file():
        tensors, facts = load_file(options.state), safe_open(options.state, "pt").metadata()
        trainer.restore(tensors, json.loads(facts["state"]))
        curve = json.loads(facts["curve"])
    for record in trainer.records():
        if record["kind"] == "evaluation":
            curve.append(
                {"epoch": record["epoch"], "accuracy": record["metrics"]["accuracy"], "loss": record["loss"]}
            )
            print(curve[-1], flush=True)
            if options.state:
                tensors, state = trainer.state()
                save_file(tensors, options.state, {"state": json.dumps(state), "curve": json.dumps(curve)})
    final = curve[-1]["accuracy"]
    write_result(
        f"recipe-{options.set}",
        f"accuracy of the tutorial's recipe on {options.set} after its 25 epochs, by a faster equivalent",
        [(f"the tutorial's recipe, {options.set}, {ROWS:,} rows, 25 epochs: accuracy", f"{final:.4f}")],
        {
            "curve": curve,
            "train_rows": len(train),
            "scored_rows": len(held),
            "split": SETS[options.set],
            "tokens": trainer.tokens,
        },
    )


def dropped_head(model: Any, x: Tensor, seed: int) -> Tensor:
    """Pooler, dropout, classifier."""
    generator = torch.Generator().manual_seed(seed + 1000)
    *pooler, last = model._head
    t = model._trainable
    for layer in pooler:
        x = activate(
            F.linear(x, model.base.tensors["pooler.weight"], model.base.tensors["pooler.bias"]),
            layer.activation,
        )
    name = f"base_model.model.{last.module}"
    return F.linear(drop(x, generator), t[f"{name}.weight"], t[f"{name}.bias"])


if __name__ == "__main__":
    main()

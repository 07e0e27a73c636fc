"""Several adapters of one base to one: weighted sum, SVD to a smaller rank, TIES and DARE, heads averaged.

With `D_i = s_i B_i A_i` the difference that adapter i makes to a layer and `w_i` its weight:

    linear  D = sum w_i D_i, exactly, by putting the A and B side by side (PEFT calls this "cat"; its "linear"
            mixes A and B apart)
    svd     the same sum, cut to rank r
    ties    each D_i keeps its `density` largest entries; per entry the sign with the larger weighted sum wins,
            and the weighted mean of the entries of that sign is taken, times sum w_i (arXiv 2306.01708); cut to
            rank r
    dare    each entry of D_i is kept with probability `density` and divided by it, then the weighted sum
            (arXiv 2311.03099); cut to rank r

Entries are counted layer by layer. What the adapters train in full (the head) is averaged by weight, labels
matched by name. Heads are averaged as they were trained, and then divided by the geometric mean of the
temperatures, weighted alike: one that was fitted to be less sure of itself does not count for less.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textlora.adapters.folder import AdapterMeta, read_adapter
from textlora.adapters.hub import adapter_folder
from textlora.core.errors import AdapterError, UsageError
from textlora.data import Table
from textlora.inference.classifier import TextClassifier, find_adapter_base
from textlora.inference.evaluate import evaluate_table
from textlora.metrics.scores import DEFAULT_METRIC
from textlora.model.adapter_tensors import PREFIX, scaled_head, shifted_head
from textlora.model.base import BaseFiles
from textlora.model.interface import Model
from textlora.model.lora import delta
from textlora.model.open import open_model
from textlora.transform.extract import base_facts, write_adapter
from textlora.transform.output_folder import new_folder, require_free
from textlora.transform.transformers_names import load_net, named_loras, temperature_of, trained_whole

COMBINATION_TYPES = ("linear", "svd", "ties", "dare")
DENSITY = {"ties": 0.2, "dare": 0.5}
Factors = tuple[Tensor, Tensor]  # A (r, in) and B (out, r)


def combine(
    folders: Sequence[Path],
    output: Path,
    weights: Sequence[float] | None = None,
    combination_type: str = "linear",
    *,
    density: float | None = None,
    r: int | None = None,
    seed: int = 42,
    base: str | None = None,
    device: str = "auto",
    rows: Callable[[TextClassifier], Table] | None = None,
) -> dict[str, Any]:
    """Write one adapter made of several.

    Args:
        folders: adapters of one base, with one pooling, truncation, task and set of labels. The result has
            the longest `max_length` of them and the first one's order of labels; its temperature is the mean
            of theirs, and it has no thresholds.
        output: new or empty folder.
        weights: one per adapter; default: equal, with sum 1. Negative ones subtract.
        combination_type: linear, svd, ties or dare.
        density: share of entries kept by ties (default 0.2, as in its paper) and dare (default 0.5).
        r: rank of svd, ties and dare; default: the largest of the adapters.
        seed: of dare's choice.
        base: base model; default: the one the first adapter names.
        rows: gives labelled rows, read as the first adapter needs them, to score each adapter and the
            combination on.

    Returns:
        {"output", "combination_type", "weights", "r", "residual", "metric", "scores"}: "residual" is what
        cutting to rank r left out (Frobenius, relative), "scores" has "name" and all metrics of each adapter
        and then of the combination; None without rows.

    Raises:
        UsageError: the adapters do not go together, or an argument makes no sense.
        AdapterError, ModelError: one cannot be loaded.
    """
    require_free(output)
    weights, density = _checked(len(folders), weights, combination_type, density, r)
    places = [adapter_folder(folder) for folder in folders]
    files = find_adapter_base(read_adapter(places[0]), base)
    loaded = [
        TextClassifier.load(folder, base=str(files.folder), device=device) for folder in places
    ]  # refuses one of another base
    for folder, classifier in zip(folders[1:], loaded[1:], strict=True):
        _require_same(folders[0], loaded[0], folder, classifier)
    table = None if rows is None else rows(loaded[0])
    models, first = [classifier.model for classifier in loaded], loaded[0].meta
    r = r or max(lora.A.shape[0] for model in models for lora in named_loras(model).values())
    made, size, left = _combined_layers(
        models, files, len(first.labels), weights, combination_type, density, r, seed
    )
    rank = max(A.shape[0] for A, _ in made.values())
    lora = dataclasses.replace(
        models[0].lora, r=rank, lora_alpha=rank, target_modules=tuple(made), layers="all", use_rslora=False, use_dora=False,
        rank_pattern={}, alpha_pattern={}, lora_dropout=0.0,
    )  # fmt: skip
    model, _ = open_model(files, lora, len(first.labels), pooling=first.pooling)
    temperature = math.exp(
        sum(w * math.log(_whole_temperature(c.meta)) for w, c in zip(weights, loaded, strict=True))
        / sum(weights)
    )
    shift = _mean_shift(loaded, weights)
    model.load_trainable(
        shifted_head(scaled_head(_tensors(model, made, rank, loaded, weights), 1 / temperature), shift)
    )
    meta = AdapterMeta(
        labels=first.labels, problem_type=first.problem_type, pairs=first.pairs, pooling=first.pooling,
        max_length=max(classifier.tokenizer.max_length for classifier in loaded), truncation=first.truncation,
        base=base_facts(files, model), label_separator=first.label_separator, fitted_temperature=temperature, fitted_shift=shift,
        training={
            "combination_type": combination_type, "combined_from": [folder.name for folder in folders], "weights": list(weights),
            "density": density, "seed": seed if combination_type == "dare" else None,
        },
        textlora_version=version("textlora"),
    )  # fmt: skip
    tokenizer = max(
        (classifier.tokenizer for classifier in loaded), key=lambda tokenizer: tokenizer.max_length
    )
    with new_folder(output) as folder:
        summary = f"Made of {len(folders)} adapters by `textlora combine --combination {combination_type}`."
        result = write_adapter(folder, output.name, model, files, meta, tokenizer, places[0], summary)
        scores = None if table is None else _scores([*folders, output], [*loaded, result], table)
    return {
        "output": str(output),
        "combination_type": combination_type,
        "weights": list(weights),
        "r": rank,
        "residual": left / size if size else 0.0,
        "metric": DEFAULT_METRIC[first.problem_type],
        "scores": scores,
    }


def _checked(
    count: int, weights: Sequence[float] | None, kind: str, density: float | None, r: int | None
) -> tuple[tuple[float, ...], float | None]:
    if count < 2:
        raise UsageError("there is one adapter only", "name at least two folders")
    weights = tuple(weights) if weights is not None else (1 / count,) * count
    if len(weights) != count:
        raise UsageError(f"--weights has {len(weights)} numbers for {count} adapters", "give one per adapter")
    if not all(math.isfinite(weight) for weight in weights) or sum(weights) <= 0:
        raise UsageError(
            f"--weights {','.join(f'{weight:g}' for weight in weights)}: must be finite numbers with a sum above 0"
        )
    if kind not in COMBINATION_TYPES:
        raise UsageError(f"--combination {kind}: not one of {', '.join(COMBINATION_TYPES)}")
    if density is not None and kind not in DENSITY:
        raise UsageError(f"--density goes with ties and dare, --combination {kind} keeps every entry")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density {density:g}: must be above 0 and at most 1")
    if r is not None and kind == "linear":
        raise UsageError(
            "--combination linear is exact, its rank is the sum of the ranks",
            "leave out --r, or take --combination svd",
        )
    if r is not None and r < 1:
        raise UsageError(f"--r {r}: the rank must be at least 1")
    return weights, density if density is not None else DENSITY.get(kind)


def _require_same(name: Path, first: TextClassifier, other_name: Path, other: TextClassifier) -> None:
    """Refuse adapters that do not go together. Raises UsageError with the first thing that differs."""
    a, b = first.meta, other.meta
    facts = [
        (what, getattr(a, what), getattr(b, what))
        for what in ("problem_type", "pairs", "pooling", "truncation")
    ]
    for what, mine, theirs in [
        *facts,
        ("tokenizer", first.tokenizer.backend.to_str(), other.tokenizer.backend.to_str()),
    ]:
        if mine != theirs:
            shown = f" ({mine} and {theirs})" if what != "tokenizer" else ""
            raise UsageError(
                f"{name} and {other_name} have different values of {what}{shown}, one adapter cannot have both"
            )
    if sorted(a.labels) != sorted(b.labels):
        odd = sorted(set(a.labels) ^ set(b.labels))[0]
        raise UsageError(
            f"{name} and {other_name} have different labels ({odd!r} is in one only), so their heads cannot be averaged",
            "`textlora inspect --relabel old=new` renames what means the same",
        )
    if trained_whole(first.model).keys() != trained_whole(other.model).keys():
        raise UsageError(
            f"{name} and {other_name} train different tensors besides A and B, so those cannot be averaged"
        )


def _combined_layers(
    models: list[Model],
    files: BaseFiles,
    num_labels: int,
    weights: Sequence[float],
    kind: str,
    density: float | None,
    r: int,
    seed: int,
) -> tuple[dict[str, Factors], float, float]:
    """A and B of every layer that some adapter changes, at scale 1; the size of the whole difference and what
    was cut off."""
    loras = [named_loras(model) for model in models]
    names = list(dict.fromkeys(name for found in loras for name in found))
    dora = any(lora.magnitude is not None for found in loras for lora in found.values())
    if dora and kind == "linear":
        raise UsageError(
            "a DoRA adapter's difference has no low rank, so the sum is not exact",
            "take --combination svd, and look at its residual",
        )
    base = dict(load_net(files.folder, num_labels).named_parameters()) if dora else {}
    generator, made, size, left = torch.Generator().manual_seed(seed), {}, 0.0, 0.0
    for name in names:
        parts = [(weight, found[name]) for weight, found in zip(weights, loras, strict=True) if name in found]
        if kind == "linear":
            made[name] = (
                torch.cat([lora.A for _, lora in parts]),
                torch.cat([w * lora.scaling * lora.B for w, lora in parts], dim=1),
            )
            rank, most = made[name][0].shape[0], min(made[name][0].shape[1], made[name][1].shape[0])
            if rank > most:
                raise UsageError(
                    f"the ranks add up to {rank}, more than {name} takes ({most})", "take --combination svd"
                )
            continue
        like = parts[0][1].B @ parts[0][1].A
        weight_of = base[f"{name}.weight"].detach().double() if dora else like
        deltas = [
            delta(weight_of, found[name]) if name in found else torch.zeros_like(like) for found in loras
        ]
        change = combined_delta(deltas, weights, kind, density, generator)
        U, values, V = torch.linalg.svd(change, full_matrices=False)
        root = values[:r].sqrt()
        made[name] = (root.unsqueeze(1) * V[:r], U[:, :r] * root)
        size, left = math.hypot(size, float(values.norm())), math.hypot(left, float(values[r:].norm()))
    return made, size, left


def combined_delta(
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    kind: str,
    density: float | None,
    generator: torch.Generator,
) -> Tensor:
    """One layer's difference out of several, (out, in) each, by the formulas at the head of this module."""
    stacked, scale = torch.stack(list(deltas)), torch.tensor(weights, dtype=deltas[0].dtype).view(-1, 1, 1)
    if kind == "ties":
        keep = max(1, int(density * deltas[0].numel()))
        order = stacked.abs().flatten(1).argsort(dim=1, descending=True, stable=True)[:, :keep]
        kept = torch.zeros_like(stacked).flatten(1).scatter_(1, order, 1.0).view_as(stacked) * stacked * scale
        sign = kept.sum(0).sign()
        agree = (kept.sign() == sign) & (kept != 0)
        share = (agree * scale.abs()).sum(0)
        return (kept * agree).sum(0) / share.clamp(min=torch.finfo(share.dtype).tiny) * scale.sum()
    if kind == "dare":
        stacked = stacked * (torch.rand(stacked.shape, generator=generator) < density) / density
    return (stacked * scale).sum(0)


def _tensors(
    model: Model, made: dict[str, Factors], rank: int, loaded: list[TextClassifier], weights: Sequence[float]
) -> dict[str, Tensor]:
    """The combination's tensors: A and B filled up to one rank with zeros, the head as it was trained
    averaged, with its labels in the first one's order."""
    found, first = {}, loaded[0].meta
    for name, (A, B) in made.items():
        found[f"{PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0]))
        found[f"{PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(B, (0, rank - B.shape[1]))
    whole = [
        scaled_head(
            shifted_head(trained_whole(classifier.model), classifier.meta.fitted_shift, -1),
            classifier.meta.fitted_temperature,
        )
        for classifier in loaded
    ]
    last = list(trained_whole(model))[-1].rpartition(".")[0]  # the layer whose rows are labels
    for key in model.trainable():
        if ".lora_" in key:
            continue
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        total = torch.zeros_like(whole[0][name])
        for weight, classifier, tensors in zip(weights, loaded, whole, strict=True):
            tensor = tensors[name]
            if name.rpartition(".")[0] == last:
                tensor = tensor[[classifier.meta.labels.index(label) for label in first.labels]]
            total += weight * tensor
        found[key] = total / sum(weights)
    if strange := next((key for key in model.trainable() if key not in found), None):
        raise AdapterError(f"no adapter has tensor '{strange}'")
    return {key: found[key].float() for key in model.trainable()}


def _mean_shift(loaded: list[TextClassifier], weights: Sequence[float]) -> tuple[float, ...] | None:
    """What is added to each logit, by weight, in the first one's order of labels; None where no adapter adds
    anything."""
    if all(classifier.meta.fitted_shift is None for classifier in loaded):
        return None
    labels, found = loaded[0].meta.labels, []
    for classifier in loaded:
        own = dict(
            zip(classifier.meta.labels, classifier.meta.fitted_shift or (0.0,) * len(labels), strict=True)
        )
        found.append([own[label] for label in labels])
    return tuple(
        sum(w * one[c] for w, one in zip(weights, found, strict=True)) / sum(weights)
        for c in range(len(labels))
    )


def _whole_temperature(meta: AdapterMeta) -> float:
    """What the logits of the head as it was trained are divided by, whether in the saved head or by who reads
    it."""
    return meta.fitted_temperature * temperature_of(meta)


def _scores(
    names: Sequence[Path], classifiers: Sequence[TextClassifier], table: Table
) -> list[dict[str, Any]]:
    results = [evaluate_table(classifier, table) for classifier in classifiers]
    return [
        {"name": name.name, "rows": result["rows"], **result["test"]}
        for name, result in zip(names, results, strict=True)
    ]

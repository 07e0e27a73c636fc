"""Requests to packed mixed-adapter batches to predictions. Knows no HTTP and prints nothing.

A batch may hold texts of any adapters of the base. A text that several adapters ask for is run once through
the blocks that none of the batch's adapters changes, then once for each of them.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from textlora.adapters.folder import AdapterMeta
from textlora.core.errors import AdapterError, TextloraError, UsageError
from textlora.core.predictions import Answer, Prediction
from textlora.data.tokenize import Encoded, PackedBatch, even_batches, pack
from textlora.inference.adapter_bank import RESIDENT_BYTES, AdapterBank, Resident
from textlora.inference.classifier import eval_tokens, min_share
from textlora.kernels.devices import bounded_memory, side_by_side
from textlora.model.adapter_batch import AdapterBatch

MOST_SHARING = 16  # rows of one text in a batch: bounds its memory


@dataclass(frozen=True)
class _Job:
    """Rows of one batch: texts, and for each row (text, adapter) as numbers."""

    texts: list[Encoded]
    rows: list[tuple[int, int]]


class AdapterEngine:
    """Many adapters on one frozen base.

    Args:
        base: folder, hub id, or minilm.
        resident_bytes: budget of adapters in memory.
        precision: "high" has faster products on CPUs with AMX (docs/decisions/native.md); "int8" runs the
            base's dense layers in 8 bits, on CPUs (docs/decisions/int8.md).

    Raises:
        ModelError: the base cannot be read, or its architecture has no packed path.
        UsageError: int8 is asked for where it cannot be had.
    """

    def __init__(
        self,
        base: str = "minilm",
        *,
        device: str = "auto",
        resident_bytes: int = RESIDENT_BYTES,
        precision: str = "float32",
        verify: bool = True,
    ):
        self.bank = AdapterBank(
            base, device=device, resident_bytes=resident_bytes, precision=precision, verify=verify
        )

    def add(self, path: str | Path, name: str) -> AdapterMeta:
        """Register an adapter folder. Raises as `AdapterBank.add` does."""
        return self.bank.add(path, name)

    def remove(self, name: str) -> None:
        """Forget an adapter when its last batch is done. Raises UsageError where there is none."""
        self.bank.remove(name)

    def predict(
        self,
        texts: Sequence[str],
        adapters: str | Sequence[str | None],
        pairs: Sequence[str | None] | None = None,
    ) -> list[Prediction]:
        """One prediction per text by its adapter.

        Args:
            texts: to ask several adapters about one text, name the text once for each; the engine computes
                what they share once.
            adapters: a name for all texts, or one for each. None is the plain base: its prediction has no
                label, and the last hidden state of the first token, (H,), as logits.
            pairs: second texts, for adapters trained on pairs.

        Raises:
            UsageError: no such adapter, an empty text, or pairs that do not fit the task.
            AdapterError: an adapter is damaged.
        """
        answers = self.answers(texts, adapters, pairs)
        for answer in answers:
            if isinstance(answer, TextloraError):
                raise answer
        return [answer.prediction for answer in answers if isinstance(answer, Answer)]

    def answers(
        self,
        texts: Sequence[str],
        adapters: str | Sequence[str | None],
        pairs: Sequence[str | None] | None = None,
    ) -> list[Answer | TextloraError]:
        """As `predict`, with what went wrong in the place of a row's answer: rows of other people share a
        batch.

        Raises:
            UsageError: the three lists differ in length.
        """
        names = [adapters] * len(texts) if isinstance(adapters, str) else list(adapters)
        seconds = [None] * len(texts) if pairs is None else list(pairs)
        if not len(names) == len(texts) == len(seconds):
            raise UsageError(
                f"{len(texts)} texts, {len(names)} adapters and {len(seconds)} pairs",
                "give one of each per text",
            )
        with ExitStack() as held:
            opened = {name: self._open(held, name) for name in dict.fromkeys(names)}
            found = [self._refusal(i, texts[i], seconds[i], opened[name]) for i, name in enumerate(names)]
            good = [i for i, refusal in enumerate(found) if refusal is None]
            known = list(dict.fromkeys(names[i] for i in good))
            residents = [opened[name] for name in known]
            owners = [known.index(names[i]) for i in good]
            logits = self._logits([texts[i] for i in good], [seconds[i] for i in good], owners, residents)
            for k, resident in enumerate(residents):
                mine = [j for j, own in enumerate(owners) if own == k]
                for j, prediction in zip(
                    mine, resident.classifier.predictions(np.stack([logits[j][0] for j in mine])), strict=True
                ):
                    encoded = logits[j][1]
                    found[good[j]] = Answer(
                        prediction, resident.classifier.meta.problem_type, len(encoded.ids), encoded.full
                    )
            return [answer for answer in found if answer is not None]

    def _open(self, held: ExitStack, name: str | None) -> Resident | TextloraError:
        if name is None:
            return self.bank.plain
        try:
            return held.enter_context(self.bank.use([name]))[0]
        except TextloraError as error:
            return error
        except OSError as error:  # deleted or replaced while it was read
            return AdapterError(
                f"adapter '{name}' cannot be read: {error.strerror or error}", "copy it again"
            )

    @staticmethod
    def _refusal(
        i: int, text: str, second: str | None, resident: Resident | TextloraError
    ) -> TextloraError | None:
        """Why row `i` cannot be answered; None where it can."""
        if not isinstance(text, str) or not text.strip():
            return UsageError(f"text {i + 1}: {'empty' if isinstance(text, str) else 'not a string'}")
        if isinstance(resident, TextloraError):
            return resident
        try:
            resident.classifier.require_pairs(second is not None, second is not None)
        except UsageError as error:
            return error
        return None

    def _logits(
        self, texts: Sequence[str], pairs: Sequence[str | None], owners: list[int], residents: list[Resident]
    ) -> list[tuple[np.ndarray, Encoded]]:
        found: dict[int, tuple[np.ndarray, Encoded]] = {}
        if not texts:
            return []
        jobs: list[tuple[_Job, list[int]]] = []
        with bounded_memory(self.bank.running), side_by_side(self.bank.device) as workers:
            for group in self._groups(residents):
                jobs += self._jobs(
                    texts,
                    pairs,
                    [i for i, k in enumerate(owners) if k in group],
                    owners,
                    residents,
                    workers.count,
                )
            for (job, rows), answers in zip(
                jobs, workers.map(lambda job: self._run(job[0], residents), jobs), strict=True
            ):
                for i, (text, _), answer in zip(rows, job.rows, answers, strict=True):
                    found[i] = answer, job.texts[text]
        return [found[i] for i in range(len(texts))]

    @staticmethod
    def _groups(residents: list[Resident]) -> list[set[int]]:
        """Adapters that can share a batch: the same pooling and no biases of the base of their own."""
        groups: dict[object, set[int]] = {}
        for k, resident in enumerate(residents):
            groups.setdefault(resident.model.pooling if resident.model.mixes else k, set()).add(k)
        return list(groups.values())

    def _jobs(
        self,
        texts: Sequence[str],
        pairs: Sequence[str | None],
        chosen: list[int],
        owners: list[int],
        residents: list[Resident],
        workers: int,
    ) -> list[tuple[_Job, list[int]]]:
        """Batches of the chosen rows by length, about `eval_tokens` tokens each."""
        asked: dict[tuple[int, str, str | None], list[int]] = {}
        for i in chosen:
            asked.setdefault((id(residents[owners[i]].classifier.tokenizer), texts[i], pairs[i]), []).append(
                i
            )
        groups = [
            rows[at : at + MOST_SHARING]
            for rows in asked.values()
            for at in range(0, len(rows), MOST_SHARING)
        ]
        encoded: list[Encoded | None] = [None] * len(groups)
        by_tokenizer: dict[int, list[int]] = {}
        for g, rows in enumerate(groups):
            by_tokenizer.setdefault(id(residents[owners[rows[0]]].classifier.tokenizer), []).append(g)
        for members in by_tokenizer.values():
            tokenizer = residents[owners[groups[members[0]][0]]].classifier.tokenizer
            firsts = [groups[g][0] for g in members]
            for g, one in zip(
                members, tokenizer.encode([texts[i] for i in firsts], [pairs[i] for i in firsts]), strict=True
            ):
                encoded[g] = one
        lengths = [len(one.ids) for one in encoded if one is not None]
        loads = [
            (length + 1) * len(rows) for length, rows in zip(lengths, groups, strict=True)
        ]  # a row costs about a token more
        above = 1 - min(residents[owners[i]].model.depth for i in chosen) / max(
            1, self.bank.weights.spec.layers
        )
        work = sum(
            length * (1 + (len(rows) - 1) * above) for length, rows in zip(lengths, groups, strict=True)
        )  # what rows share counts once
        least = min_share(self.bank.running)
        workers = min(workers, max(1, int(work) // least))
        jobs = []
        for members in even_batches(
            loads, np.argsort(lengths, kind="stable"), eval_tokens(self.bank.running), workers, least
        ):
            asking = [(t, i) for t, g in enumerate(members) for i in groups[g]]
            asking.sort(key=lambda one: owners[one[1]])  # an adapter's rows side by side
            jobs.append(
                (
                    _Job([encoded[g] for g in members], [(t, owners[i]) for t, i in asking]),
                    [i for _, i in asking],
                )
            )
        return jobs

    def _run(self, job: _Job, residents: list[Resident]) -> list[np.ndarray]:
        """Logits of each row of a batch, in the order of `job.rows`."""
        with torch.inference_mode():
            used = list(dict.fromkeys(k for _, k in job.rows))
            models = [residents[k].model for k in used]
            batch = self._batch(job, min(model.depth for model in models))
            number, rows = {k: n for n, k in enumerate(used)}, batch.rows.tolist()
            owners = [number[job.rows[i][1]] for i in rows]
            adapters = AdapterBatch(
                [residents[k].folded for k in used], owners, batch.cu_seqlens.diff().tolist()
            )
            x = models[0].encoder.forward(batch, adapters, pooling=models[0].pooling)
            pooling = [model for model in models if model.pools_as_base]
            pooled = pooling[0].pool(x) if pooling else x
            answers: list[np.ndarray] = [np.empty(0)] * len(rows)
            mine: list[list[int]] = [[] for _ in models]
            for b, owner in enumerate(owners):
                mine[owner].append(b)
            for model, own in zip(models, mine, strict=True):
                logits = model.head(pooled[own], pooled=True) if model.pools_as_base else model.head(x[own])
                for b, row in zip(own, logits.cpu().numpy(), strict=True):
                    answers[rows[b]] = row
            return answers

    def _batch(self, job: _Job, depth: int) -> PackedBatch:
        """Rows packed; where a text stands for several rows, with the states of the blocks below `depth`,
        computed once per text."""
        batch = pack([job.texts[t] for t, _ in job.rows], device=self.bank.device)
        if depth == 0 or len(job.rows) == len(job.texts):
            return batch
        shared = pack(job.texts, device=self.bank.device)
        states = self.bank.running.prefix(shared, depth)
        start = dict(zip(shared.rows.tolist(), shared.cu_seqlens[:-1].tolist(), strict=True))
        begins = np.array([start[job.rows[i][0]] for i in batch.rows.tolist()])
        index: Tensor = (
            torch.from_numpy(np.repeat(begins, batch.cu_seqlens.diff().numpy())).to(states.device)
            + batch.positions
        )
        return replace(batch, hidden=states[index], depth=depth)

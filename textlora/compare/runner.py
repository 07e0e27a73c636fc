"""What a comparison runs and in which order. The plan follows from the settings and the finished runs, never
from memory."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from textlora.compare.halving import Budget, middle, rungs, search_cost
from textlora.compare.methods import METHODS, by_usefulness
from textlora.compare.run_one import Bench, Run, pick_rows
from textlora.compare.store import best_of, read_runs, write_json
from textlora.metrics.scores import METRICS
from textlora.training.learning_rate import peak_rate
from textlora.training.prepare import Prepared
from textlora.training.steps import plan

# of what is left of a budget, the most that a short run may take which only tells how long a method's runs
# are
PROBE = 0.1
FEWEST_STEPS = 100  # of a run on fewer rows: at the usual epochs eight rows would be four steps
Record = dict[str, Any]
Choice = tuple[Mapping[str, int], float | None]  # size and rate


class Runner:
    """`all` makes every run that is missing; `shown` are the records of the report; `left_out` says what a
    budget had no room for."""

    def __init__(
        self, prepared: Prepared, folder: Path, settings: Record, on_record: Callable[[Record], None]
    ):
        self.bench, self.folder, self.settings, self.on_record = Bench(prepared), folder, settings, on_record
        self.done = read_runs(folder)
        self.rows, self.epochs = len(prepared.sets["train"].rows), float(prepared.config.epochs)
        self.methods, self.seeds, self.metric = settings["methods"], settings["seeds"], prepared.metric
        self.higher = METRICS[prepared.metric].higher_is_better
        self.budget = Budget.parse(settings["budget"]) if settings["budget"] else None
        self.planned: list[Run] = []
        self.left_out: list[str] = []
        self.folds = prepared.folds is not None

    def all(self) -> None:
        if self.budget is not None:
            self._within_budget()
            return
        for method in self.methods:
            self._make_all(self.searches(method))
            self._make_all(self.repeats(method, self.best(method)))
        for method in self.methods:
            self._make_all(self.curve(method, self.best(method)))

    def _make_all(self, runs: Sequence[Run]) -> None:
        for run in runs:
            self.make(run)

    def candidates(self, method: str) -> list[Choice]:
        row, settings = METHODS[method], self.settings
        if row.fitted:
            return [({}, None)]
        if not row.rates:
            return [({}, self._own_rate(self.rows, self.seeds[0]))]
        sizes = [{row.size: size} for size in settings["sizes"][method]] if row.size else [{}]
        return [(size, rate) for size in sizes for rate in settings["learning_rates"][method]]

    def _own_rate(self, rows: int, seed: int) -> float:
        """The rate that `train` takes for so many rows."""
        prepared = self.bench.prepared
        train = prepared.sets["train"]
        lengths = train.lengths if rows == self.rows else train.lengths[pick_rows(train.labels, rows, seed)]
        return peak_rate(prepared, len(plan(replace(prepared.config, seed=seed), lengths)))

    def searches(self, method: str) -> list[Run]:
        """Every size and rate on the first seed; none where there is nothing to choose."""
        return (
            [self.search(method, choice, self.epochs) for choice in self.candidates(method)]
            if METHODS[method].rates
            else []
        )

    def search(self, method: str, choice: Choice, epochs: float) -> Run:
        return Run("rates", method, *choice, self.seeds[0], self.rows, epochs)

    def best(self, method: str) -> Choice | None:
        """Size and rate that validation prefers; None where every search failed."""
        return (
            self._best_of([self.done[run.key] for run in self.searches(method)])
            if METHODS[method].rates
            else self.candidates(method)[0]
        )

    def _best_of(self, records: Sequence[Record]) -> Choice | None:
        found = best_of(records, self.metric, self.higher)
        return None if found is None else (found["size"], found["learning_rate"])

    def repeats(self, method: str, best: Choice | None) -> list[Run]:
        """The best with every seed. A fitted method draws nothing at random, so one run stands for all seeds."""
        seeds = self.seeds[:1] if METHODS[method].fitted else self.seeds
        return (
            []
            if best is None
            else [Run("seeds", method, *best, seed, self.rows, self.epochs) for seed in seeds]
        )

    def curve(self, method: str, best: Choice | None) -> list[Run]:
        """The best on fewer rows; each seed draws rows of its own."""
        fewer = [rows for rows in self.settings["rows"] if rows < self.rows] if best is not None else []
        runs = [
            Run("rows", method, *best, seed, rows, self._epochs_for(method, rows))
            for rows in fewer
            for seed in self.seeds
        ]
        own = METHODS[method].fitted or METHODS[method].rates
        return (
            runs
            if own
            else [replace(run, learning_rate=self._own_rate(run.train_rows, run.seed)) for run in runs]
        )

    def _epochs_for(self, method: str, rows: int) -> float:
        config = self.bench.prepared.config
        per_epoch = lambda rows: -(-rows // (config.batch_size * config.gradient_accumulation_steps))
        fewest = min(FEWEST_STEPS, per_epoch(self.rows) * self.epochs)
        return (
            max(self.epochs, float(-(-fewest // per_epoch(rows)))) if METHODS[method].rates else self.epochs
        )  # the defaults have as many as ever

    def spent(self, method: str) -> float:
        """What a method's finished runs took of the budget."""
        assert self.budget is not None
        return sum(
            self.budget.cost(record, self.epochs, self.rows)
            for record in self.done.values()
            if record["method"] == method
        )

    def _within_budget(self) -> None:
        """Whole methods, the most useful first, as far as the budget reaches; a trained one in part only
        where none fits whole."""
        assert self.budget is not None
        skipped, whole = [], []
        for method in by_usefulness(self.methods):
            (whole if self._whole(method) else skipped).append(method)
        if skipped and all(METHODS[method].fitted for method in whole):
            first = next((method for method in skipped if not METHODS[method].fitted), None)
            if first is not None and self._in_part(first, self._available(first)):
                skipped.remove(first)
        self.planned = [
            run for run in self.planned if run.method not in skipped
        ]  # short runs that told how long one takes
        if skipped:
            self.left_out.append(
                f"{', '.join(skipped)}: not run, what is left of the budget does not reach for search and seeds"
            )
        for method in whole:
            curve = self.curve(method, self.best(method))
            costs = [
                self._typical(method) * run.epochs / self.epochs * run.train_rows / self.rows for run in curve
            ]
            made = sum(
                self._if_it_fits(run, cost, self._available(method))
                for run, cost in zip(curve, costs, strict=True)
            )
            if made < len(curve):
                self.left_out.append(f"{method}: {made} of {len(curve)} runs on fewer rows")

    def _available(self, method: str) -> float:
        """What of the budget is a method's, with what it has spent."""
        assert self.budget is not None
        return self.budget.amount - sum(self.spent(other) for other in {*self.methods} - {method})

    def _typical(self, method: str) -> float:
        """What a run of full length on all rows took of the budget, at most."""
        assert self.budget is not None
        records = [
            record
            for record in self.done.values()
            if record["method"] == method and record["stage"] == "seeds"
        ]
        return max((self.budget.cost(record, self.epochs, self.rows) for record in records), default=0.0)

    def _whole(self, method: str) -> bool:
        """Search and repeat a method if all of that fits; one that searches nothing with as many seeds as
        fit."""
        assert self.budget is not None
        available, row = self._available(method), METHODS[method]
        fits = lambda cost: cost <= available * (1 + 1e-9)
        if not row.rates:
            runs = self.repeats(method, self.best(method))
            if not fits(1.0 if self.budget.unit == "runs" else 0.0) or available <= 0:
                return False
            made = sum(
                self._if_it_fits(run, self._typical(method) or 1.0, available, always=i == 0)
                for i, run in enumerate(runs)
            )
            if made < len(runs):
                self.left_out.append(f"{method}: {made} of {len(runs)} seeds")
            return True
        choices = self.candidates(method)
        one = self._cost_of_one(method, choices, available)
        if one is None or not fits(len(choices) * one + len(self.seeds) * self._repeat(one, True)):
            return False
        self._make_all(self.searches(method))
        self._make_all(self.repeats(method, self.best(method)))
        return True

    def _repeat(self, one: float, searched: bool) -> float:
        """What a run with a seed takes where one of the search takes `one`. In a cross-validation a search's
        run is three trainings on two thirds of the rows; one with a seed is a training on all of them, with
        the three before it where no search has decided for it."""
        return (
            one
            if not self.folds or self.budget is None or self.budget.unit == "runs"
            else one * (0.5 if searched else 1.5)
        )

    def _in_part(self, method: str, share: float) -> bool:
        """What fits of a method: short runs of all rates, the better half going on, or else its middle rate
        untried; whether anything did."""
        choices = self.candidates(method)
        one = self._cost_of_one(method, choices, share, asked=True)
        if one is None:
            return False
        repeat = self._repeat(one, False)
        if search_cost(len(choices)) * one + repeat <= share * (1 + 1e-9):
            best = self._halve(method, choices)
            self.left_out.append(
                f"{method}: rates compared in short runs, the better half going on to twice the length"
            )
        elif repeat <= share * (1 + 1e-9):
            best = middle(choices)
            self.left_out.append(f"{method}: no search, run at rate {best[1]:g} untried")
        else:
            return False
        repeats = self.repeats(method, best)
        made = sum(self._if_it_fits(run, repeat, share, always=i == 0) for i, run in enumerate(repeats))
        if made < len(repeats):
            self.left_out.append(f"{method}: {made} of {len(repeats)} seeds")
        return True

    def _cost_of_one(
        self, method: str, choices: Sequence[Choice], share: float, asked: bool = False
    ) -> float | None:
        """What a run of the search takes of the budget: by its shortest one; None where there is no room for
        that either.

        Args:
            asked: whether the short run is wanted for itself; else it must be a small part of the share, by
                what other methods took.
        """
        assert self.budget is not None
        if self.budget.unit == "runs":
            return 1.0
        if share <= 0:
            return None
        short = rungs(len(choices))[0][1] if len(choices) > 1 else 0.25
        run = self.search(method, choices[0], self.epochs * short)
        known = [
            r["total_seconds"] * self.epochs / r["epochs"]
            for r in self.done.values()
            if not METHODS[r["method"]].fitted and r["stage"] != "rows"
        ]
        if not asked and run.key not in self.done and known and min(known) * short > PROBE * share:
            return None
        self.make(run)
        return self.done[run.key]["total_seconds"] / short

    def _halve(self, method: str, choices: Sequence[Choice]) -> Choice | None:
        """Short runs of all, runs twice as long of the better half, and so on until one is left."""
        left = list(choices)
        for number, share in rungs(len(choices)):
            runs = [self.search(method, choice, self.epochs * share) for choice in left[:number]]
            self._make_all(runs)
            records = [self.done[run.key] for run in runs]
            if (best := self._best_of(records)) is None:
                return None
            left = [best]
            while len(left) < -(-number // 2) and (
                best := self._best_of([r for r in records if (r["size"], r["learning_rate"]) not in left])
            ):
                left.append(best)
        return left[0]

    def _if_it_fits(self, run: Run, cost: float, share: float, always: bool = False) -> bool:
        if run.key in self.done or always or self.spent(run.method) + cost <= share * (1 + 1e-9):
            self.make(run)
            return True
        return False

    def left_seconds(self) -> float | None:
        """Seconds to go, by what runs of the same method took; None while nothing is known."""
        times: dict[str, list[float]] = {}
        for record in self.done.values():
            times.setdefault(record["method"], []).append(
                record["total_seconds"] * self.epochs / record["epochs"] * self.rows / record["train_rows"]
            )
        known = {method: sum(values) / len(values) for method, values in times.items()}
        if not known:
            return None
        mean = sum(known.values()) / len(known)
        left = sum(
            known.get(run.method, mean) * run.epochs / self.epochs * run.train_rows / self.rows
            for run in self.missing()
        )
        if self.budget is None:
            return left
        room = self.budget.amount - sum(self.spent(method) for method in self.methods)
        return min(left, max(0.0, room) * (1.0 if self.budget.unit == "seconds" else mean))

    def missing(self) -> list[Run]:
        """Runs that are not there yet, as if there were no budget; a method whose best is open counts with as
        many as it will have."""
        found = []
        for method in self.methods:
            searches = [run for run in self.searches(method) if run.key not in self.done]
            best = self.candidates(method)[0] if searches else self.best(method)
            rest = [
                run
                for run in (*self.repeats(method, best), *self.curve(method, best))
                if searches or run.key not in self.done
            ]
            found += searches + rest
        return found

    def make(self, run: Run) -> None:
        """Run it unless it is done; a failure is a record that says so."""
        self.planned.append(run)
        if run.key in self.done:
            return
        count = None if self.budget else len(self.done) + len(self.missing())  # a budget decides as it goes
        left = {"done": len(self.done), "all": count, "left_seconds": self.left_seconds()}
        self.on_record({"kind": "begin", **_identity(run), **left})
        record = {"data": self.settings["data"], **_identity(run)}
        start = time.perf_counter()
        try:
            record |= self.bench.run(METHODS[run.method], run, self._decided(run))
        except Exception as error:  # whatever goes wrong in one method must not end the comparison
            record |= {
                "metric": self.metric,
                "error": _one_line(error),
                "total_seconds": round(time.perf_counter() - start, 3),
            }
        record |= {"versions": self.settings["versions"], "machine": self.settings["machine"]}
        write_json(self.folder / "runs" / f"{run.key}.json", record)
        self.done[run.key] = record
        self.on_record({"kind": "end", **record, "done": left["done"] + 1, "all": count})

    def _decided(self, run: Run) -> Record | None:
        """What the search's run of the same choice found in its cross-validation."""
        if run.stage != "seeds" or METHODS[run.method].fitted:
            return None
        return self.done.get(self.search(run.method, (run.size, run.learning_rate), run.epochs).key, {}).get(
            "decided"
        )

    def shown(self) -> list[str]:
        """Keys of the runs that the settings ask for, in the plan's order, each once."""
        return list(dict.fromkeys(run.key for run in self.planned))


def _identity(run: Run) -> Record:
    return {
        item.name: (dict(value) if isinstance(value := getattr(run, item.name), Mapping) else value)
        for item in fields(run)
    }


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 300 else text[:297] + "..."

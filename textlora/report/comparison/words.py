"""What a comparison shows in plain words, and how its numbers are written. Scores are times 100 where that is
usual."""

from collections.abc import Callable, Sequence

from textlora.metrics.paired import Difference
from textlora.report.comparison.across import Across, Pair, told_apart
from textlora.report.comparison.table import NOISE, OWN_UNIT, Comparison, Row
from textlora.report.numbers import NONE, metric_name, number, size, whole

__all__ = ["Scale", "p_text", "seconds", "sentences", "sentences_of_many", "stored", "verdict"]

FEW_TEST_ROWS = 200


class Scale:
    """Writes scores and differences of one metric: 87.3 and +1.2, or with four decimals in the metric's own
    unit."""

    def __init__(self, metric: str):
        self.own = metric in OWN_UNIT
        self.factor, self.name = (1.0, metric_name(metric)) if self.own else (100.0, metric_name(metric))

    def score(self, value: float | None) -> str:
        return NONE if value is None else self._text(value, "")

    def signed(self, value: float) -> str:
        return self._text(value, "+")

    def _text(self, value: float, plus: str) -> str:
        text = number(abs(value)) if self.own else f"{100 * abs(value):.1f}"
        rounded_to_nothing = not text.strip("0.")
        return text if rounded_to_nothing else f"{'−' if value < 0 else plus}{text}"

    def points(self, value: float) -> str:
        """A size without direction: 1.2 points."""
        text = self.score(abs(value))
        return text if self.own else f"{text} point{'s' * (text != '1.0')}"

    def interval(self, difference: Difference) -> str:
        return f"{self.signed(difference.low)} to {self.signed(difference.high)}"

    def mean(self, mean: float | None, half: float | None) -> str:
        return self.score(mean) + (f" ± {self.score(half)}" if half is not None else "")


def seconds(value: float | None) -> str:
    """Two decimals below a second, one above."""
    return NONE if value is None else f"{value:,.{1 if value >= 1 else 2}f}"


def stored(value: float | None) -> str:
    """Bytes as kB, MB or GB (powers of ten): what a small method keeps is less than 0.1 MB."""
    return f"{value / 1e3:,.1f} kB" if value is not None and value < 1e6 else size(value)


def p_text(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _names(found: Sequence[str]) -> str:
    """a, b and c."""
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def sentences(table: Comparison) -> list[str]:
    """What won, by how much, whether that is more than noise; what is cheap; what is steady; what failed."""
    best, scale = table.best, Scale(table.metric)
    failed = [row for row in table.rows if row.mean is None]
    if best is None:
        return ["No method has a score yet.", *_failures(failed)]
    return [*verdict(table), *_lora_and_full(table, scale), *_steady(table, scale), *_failures(failed)]


def verdict(table: Comparison) -> list[str]:
    """What to take away: what won, whether that is more than noise, how the defaults stand, and whether there
    are test rows enough to tell."""
    best, scale = table.best, Scale(table.metric)
    if best is None:
        return ["No method has a score yet."]
    return [
        _winner(table, best, scale),
        *_noise(table, best, scale),
        *_defaults(table, best, scale),
        *_few_rows(table, scale),
    ]


def _over(*rows: Row) -> str:
    """What an interval of a difference is over: it knows the luck of the seeds only where there are several."""
    return "over test rows and seeds" if any(len(row.scores) > 1 for row in rows) else "over test rows"


def _defaults(table: Comparison, best: Row, scale: Scale) -> list[str]:
    """How `textlora train` as it is stands beside what was tuned."""
    row = next((row for row in table.scored if row.method == "defaults"), None)
    if row is None or len(table.scored) == 1:
        return []
    if row is best:
        return ["Nothing that was tuned here is ahead of what textlora train does by default."]
    gap = scale.points(best.mean - row.mean)
    stand = "level with" if gap == scale.points(0.0) else f"{gap} behind"
    if row.difference is None:
        return [f"What textlora train does by default is {stand} {best.name}."]
    between = f"95 % interval {_over(best, row)} {scale.interval(row.difference)}"
    return [
        f"What textlora train does by default is {stand} {best.name} ({between}): {_verdict(row.p_holm < NOISE, best, row)}."
    ]


def _few_rows(table: Comparison, scale: Scale) -> list[str]:
    """Whether the test rows can tell the methods apart at all."""
    if table.split != "test" or not 0 < table.test_rows < FEW_TEST_ROWS or len(table.scored) < 2:
        return []
    halves = sorted(
        (row.difference.high - row.difference.low) / 2 for row in table.scored[1:] if row.difference
    )
    if not halves:
        return [f"{whole(table.test_rows)} test rows are few: more of them would say more."]
    reach = halves[len(halves) // 2]
    if reach <= 0 or (
        not scale.own and reach < 1 / table.test_rows
    ):  # answers that agree say little of those that were not asked
        return [f"{whole(table.test_rows)} test rows are few: more of them would say more."]
    return [
        f"{whole(table.test_rows)} test rows are few: the intervals of the differences reach about {scale.points(reach)} to either side, "
        "and methods that are closer than that cannot be told apart here, whichever is better."
    ]


def _winner(table: Comparison, best: Row, scale: Scale) -> str:
    seeds = (
        f", mean of {len(best.scores)} seeds"
        if len(best.scores) > 1
        else ", with one seed"
        if best.one_seed
        else ""
    )
    on = (
        f" on {whole(table.test_rows)} test rows"
        if table.split == "test" and table.test_rows
        else f" on the {table.split} rows"
    )
    text = f"{best.name} has the best {scale.name}: {scale.score(best.mean)}{on}{seeds}."
    second = next(iter(table.scored[1:]), None)
    if second is None:
        return text
    gap, between = scale.points(best.mean - second.mean), ""
    if second.difference is not None:
        between = f" (95 % interval {_over(best, second)} {scale.interval(second.difference)})"
    if gap == scale.points(0.0):
        return f"{text} {second.name} is level with it{between}."
    return f"{text} {second.name} is next, {gap} behind{between}" + (
        f", which is {_verdict(second.p_holm < NOISE, best, second)}." if between else "."
    )


def _verdict(clear: bool, *rows: Row) -> str:
    noise = "the noise of the test rows" if any(row.one_seed for row in rows) else "noise"
    return f"{'more' if clear else 'no more'} than {noise}"


def _noise(table: Comparison, best: Row, scale: Scale) -> list[str]:
    if table.split == "validation" or len(table.scored) == 1:
        return []
    others = [row for row in table.scored[1:] if row.p_holm is not None]
    if not others:
        return [
            f"{scale.name} cannot be tested from decisions alone, so whether differences are noise is not known."
        ]
    surely = [row for row in others if row.p_holm < NOISE]
    alike = [row for row in others if row.p_holm >= NOISE]
    text = []
    if surely:
        text.append(
            f"Behind {best.name} by more than noise: {_names([f'{row.name} ({scale.signed(row.difference.value)})' for row in surely])}."
        )
    if alike:
        text.append(
            f"Not told apart from {best.name}: {_names([row.name for row in alike])}."
            if surely
            else f"No method is told apart from {best.name}."
        )
        text.append(_cheapest([best, *alike]))
    single = [row.name for row in (best, *others) if row.one_seed]
    if single:
        text.append(f"The luck of the seed is not in the intervals of {_names(single)}: one seed only.")
    return text


def _cheapest(rows: Sequence[Row]) -> str:
    """Which of equally good methods is the cheapest, in each sense."""
    least: dict[str, list[str]] = {}
    ways: list[tuple[str, Callable[[Row], str]]] = [
        ("trainable_parameters", _fewest),
        ("train_seconds", lambda row: f"is the fastest ({seconds(row.train_seconds)} s)"),
        ("saved_bytes", lambda row: f"keeps the least per task ({stored(row.saved_bytes)})"),
    ]
    for fact, tell in ways:
        row = min(rows, key=lambda row: getattr(row, fact))
        least.setdefault(row.name, []).append(tell(row))
    return (
        f"Of these {len(rows)}, " + "; ".join(f"{name} {_names(told)}" for name, told in least.items()) + "."
    )


def _fewest(row: Row) -> str:
    if not row.trainable_parameters:
        return "trains no parameters of the encoder"
    return f"trains the fewest parameters ({whole(row.trainable_parameters)} without the head)"


def _lora_and_full(table: Comparison, scale: Scale) -> list[str]:
    """The question most readers come with."""
    full = next((row for row in table.scored if row.method == "full"), None)
    lora = next((row for row in table.scored if row.method.startswith("lora")), None)
    difference = table.difference(lora, full) if full and lora else None
    if difference is None or (
        table.best in (full, lora) and table.scored.index(full) + table.scored.index(lora) == 1
    ):
        return []  # said already
    inside = difference.low <= 0 <= difference.high
    side = (
        "level with"
        if scale.signed(difference.value) == scale.score(0.0)
        else "behind"
        if (difference.value < 0) == table.higher_is_better
        else "ahead of"
    )
    gap = "" if side == "level with" else f"{scale.points(difference.value)} "
    return [
        f"The best LoRA ({lora.name}) is {gap}{side} full fine-tuning (95 % interval {_over(lora, full)} {scale.interval(difference)}): "
        f"{_verdict(not inside, lora, full)}."
    ]


def _steady(table: Comparison, scale: Scale) -> list[str]:
    moved = sorted(
        (row for row in table.scored if row.rates and row.rates.width is not None),
        key=lambda row: row.rates.width,
    )
    text = []
    if len(moved) > 1:
        least, most = moved[0], moved[-1]
        text.append(
            f"Steadiness: over its learning rates {least.name} moves least ({scale.points(least.rates.width)} between its best and worst rate), "
            f"{most.name} most ({scale.points(most.rates.width)})."
        )
    return text


def _failures(failed: Sequence[Row]) -> list[str]:
    return [f"{row.name} has no score: {row.error}." for row in failed]


def sentences_of_many(found: Across) -> list[str]:
    """The same over several sets."""
    best = found.best
    if best is None:
        return ["No method has a score yet."]
    count = len(found.tables)
    over = f"the {count}" if len(best.rows) == count else f"{len(best.rows)} of {count}"
    text = [
        f"{best.name} has the best mean score over {over} sets: {Scale('accuracy').score(best.mean / 100)}."
    ]
    others = [average for average in found.averages if average.to_best]
    surely, alike = [a for a in others if told_apart(a)], [a for a in others if not told_apart(a)]
    if others:
        text[0] += (
            f" {others[0].name} is next: {_difference(others[0].to_best)}, {'more' if told_apart(others[0]) else 'no more'} than noise."
        )
    if surely:
        text.append(
            f"Behind {best.name} by more than noise: {_names([f'{a.name} ({_signed(a.to_best.mean)})' for a in surely])}."
        )
    if alike:
        text.append(
            f"Not told apart from {best.name} over the sets: {_names([f'{a.name} ({_signed(a.to_best.mean)})' for a in alike])}."
        )
    lora = next((a for a in found.averages if a.method.startswith("lora") and a.to_full), None)
    if lora:
        text.append(f"The best LoRA ({lora.name}) against full fine-tuning: {_difference(lora.to_full)}.")
    for average in found.averages:
        lacking = [table.data for table in found.tables if table.data not in average.rows]
        if lacking:
            text.append(f"{average.name} has no score on {_names(lacking)}, so its mean is over the others.")
    return text


def _difference(pair: Pair) -> str:
    between = (
        f" (95 % interval over the sets {_signed(pair.mean - pair.half)} to {_signed(pair.mean + pair.half)})"
        if pair.half is not None
        else ""
    )
    return f"{_signed(pair.mean)} points{between}"


def _signed(points: float) -> str:
    return Scale("accuracy").signed(points / 100)

"""Numbers for Prometheus. No label has more values than there are routes, statuses or reasons: adapter names
are not among them."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from textlora.inference.batcher import BatchFacts

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """One registry of one server.

    Args:
        bank_state: numbers of the adapter bank, read when somebody asks.
        waiting: rows in the queue.
    """

    def __init__(self, bank_state: Callable[[], dict[str, int]], waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        made = {"registry": self.registry}
        self.requests = Counter("textlora_requests_total", "HTTP requests.", ["route", "status"], **made)
        self.duration = Histogram(
            "textlora_request_duration_seconds",
            "From first byte to answer.",
            ["route"],
            buckets=_SECONDS,
            **made,
        )
        self.texts = Counter("textlora_texts_total", "Rows (text x adapter) answered.", **made)
        self.tokens = Counter(
            "textlora_tokens_total", "Tokens of rows answered, special tokens included.", **made
        )
        self.dropped = Counter(
            "textlora_dropped_requests_total", "Requests not answered.", ["reason"], **made
        )
        self.batch_rows = Histogram("textlora_batch_rows", "Rows of a batch.", buckets=_SIZES, **made)
        self.batch_tokens = Histogram(
            "textlora_batch_estimated_tokens",
            "Estimated tokens of a batch.",
            buckets=[16 * n for n in _SIZES],
            **made,
        )
        self.inference = Histogram(
            "textlora_batch_duration_seconds", "Time of a batch.", buckets=_SECONDS, **made
        )
        self.queued = Histogram(
            "textlora_queue_duration_seconds", "Time in the queue of a text.", buckets=_SECONDS, **made
        )
        self.loads = Histogram(
            "textlora_adapter_load_duration_seconds",
            "Reading and checking an adapter.",
            buckets=_SECONDS,
            **made,
        )
        waits = Gauge("textlora_queue_rows", "Rows that wait.", **made)
        waits.set_function(waiting)
        self.registry.register(_Bank(bank_state))
        for reason in ("queue_full", "deadline", "client_gone"):
            self.dropped.labels(reason)

    def batch(self, facts: BatchFacts) -> None:
        self.batch_rows.observe(facts.rows)
        self.batch_tokens.observe(facts.tokens)
        self.inference.observe(facts.seconds)
        for seconds in facts.queued:
            self.queued.observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class _Bank(Collector):
    def __init__(self, state: Callable[[], dict[str, int]]):
        self._state = state

    def collect(self):
        state = self._state()
        yield GaugeMetricFamily(
            "textlora_adapters_registered", "Adapters that have a name here.", value=state["registered"]
        )
        yield GaugeMetricFamily("textlora_adapters_resident", "Adapters in memory.", value=state["resident"])
        yield GaugeMetricFamily(
            "textlora_adapter_memory_bytes", "Memory of those.", value=state["resident_bytes"]
        )

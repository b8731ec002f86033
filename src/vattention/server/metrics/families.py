"""From a snapshot of the engine to Prometheus metrics, named as vLLM names its own, with `vattention:` before them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.utils import floatToGoString

from vattention.cache import CacheStats
from vattention.engine.histogram import Distribution
from vattention.engine.snapshot import Snapshot
from vattention.engine.tally import Totals

PREFIX = "vattention:"


def families(snapshot: Snapshot, model_name: str) -> Iterator[Metric]:
    """Every metric of the engine, each with the label `model_name`.

    What labels there are besides is known beforehand: nothing that a client sends becomes one.
    """
    make = _Make(model_name)
    yield make.gauge("num_requests_running", "Sequences that hold a slot.", snapshot.num_running)
    yield make.gauge("num_requests_waiting", "Sequences that wait for a slot.", snapshot.num_waiting)
    yield from _totals(make, snapshot.totals)
    yield from _spreads(make, snapshot.totals)
    yield from _memory(make, snapshot)
    yield from _driver(make, snapshot.cache)


def usage(cache: CacheStats) -> float:
    """The part of the budget, 0 to 1, that live requests hold: pages in use, less what a step could take back."""
    pages = cache.pages_free + cache.pages_in_use + cache.pages_quarantined
    if not pages:
        return 0.0
    return max(0.0, cache.created * cache.pages_in_use / pages - cache.reclaimable) / cache.budget


class _Make:
    def __init__(self, model_name: str) -> None:
        self._model = model_name

    def gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def counters(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model, key], value)
        return family

    def gauges(self, name: str, text: str, label: str, values: Mapping[str, float]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self._model, key], value)
        return family

    def histogram(self, name: str, text: str, spread: Distribution) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=["model_name"])
        bounds = [*map(floatToGoString, spread.bounds), "+Inf"]
        buckets = [(bound, float(count)) for bound, count in zip(bounds, accumulate(spread.counts), strict=True)]
        family.add_metric([self._model], buckets, spread.total)
        return family


def _totals(make: _Make, totals: Totals) -> Iterator[Metric]:
    yield make.counter("num_preemptions", "Times a sequence gave its slot back for lack of memory.", totals.preemptions)
    yield make.counter("prompt_tokens", "Tokens of computed prompts, each request's once.", totals.prompt_tokens)
    yield make.counter("generation_tokens", "Tokens generated.", totals.generated_tokens)
    yield make.counters("request_success", "Sequences that have ended.", "finished_reason", totals.ended)
    yield make.counter("forward_passes", "Forward passes of the model.", totals.passes)
    rows = {"prompt": totals.prompt_rows, "generation": totals.rows - totals.prompt_rows}
    yield make.counters("computed_tokens", "Tokens computed in forward passes, again where again.", "kind", rows)


def _spreads(make: _Make, totals: Totals) -> Iterator[Metric]:
    for name, text, spread in (
        ("time_to_first_token_seconds", "From arrival to the first token.", totals.time_to_first_token),
        ("inter_token_latency_seconds", "Between two tokens of a sequence.", totals.inter_token_latency),
        (
            "request_time_per_output_token_seconds",
            "Mean of a sequence's times between tokens.",
            totals.time_per_output_token,
        ),
        ("e2e_request_latency_seconds", "From arrival to the end.", totals.e2e_latency),
        ("request_queue_time_seconds", "From arrival to the first forward pass.", totals.queue_time),
        ("request_prefill_time_seconds", "From the first forward pass to the first token.", totals.prefill_time),
        ("request_decode_time_seconds", "From the first to the last token of a sequence.", totals.decode_time),
        ("request_prompt_tokens", "Tokens of a request's prompt.", totals.request_prompt_tokens),
        ("request_generation_tokens", "Tokens of a sequence.", totals.request_generation_tokens),
    ):
        yield make.histogram(name, text, spread)


def _memory(make: _Make, snapshot: Snapshot) -> Iterator[Metric]:
    cache = snapshot.cache
    yield make.gauge("kv_cache_usage_perc", "Part of the budget that live requests hold; 1 is all.", usage(cache))
    for name, text, value in (
        ("reserved", "Virtual addresses reserved.", cache.reserved),
        ("budget", "Physical memory that may be created.", cache.budget),
        ("created", "Physical memory created, each page once.", cache.created),
        ("mapped", "Pages behind live slots, at every place they are mapped.", cache.mapped),
        ("needed", "What the tokens of live slots take.", cache.needed),
        ("wasted", "Mapped less needed.", cache.wasted),
        ("reclaimable", "Created memory that others could take at once.", cache.reclaimable),
        ("shared", "Pages of live slots that are mapped elsewhere too.", sum(slot.shared for slot in snapshot.slots)),
    ):
        yield make.gauge(f"kv_cache_{name}_bytes", text, value)
    pages = {"free": cache.pages_free, "in_use": cache.pages_in_use, "quarantined": cache.pages_quarantined}
    yield make.gauges("kv_cache_pages", "Created pages by state.", "state", pages)
    yield make.gauge("kv_cache_slots", "Slots.", len(snapshot.slots))
    yield make.gauge("kv_cache_live_slots", "Slots in use.", cache.live_slots)
    yield make.counter("kv_cache_copied_bytes", "Copied from page to page.", cache.copied)


def _driver(make: _Make, cache: CacheStats) -> Iterator[Metric]:
    yield make.gauge("mappings", "Mappings to the kernel that the cache takes.", cache.mappings)
    if cache.mapping_limit is not None:
        yield make.gauge("mappings_limit", "Mappings the driver may use.", cache.mapping_limit)
    yield make.counters("driver_calls", "Calls of the memory driver.", "verb", cache.driver_calls)
    yield make.counter("driver_seconds", "Time in calls of the memory driver.", cache.driver_seconds)
    yield make.counter("prefetch_failures", "Growth in the background that failed.", cache.prefetch_failures)

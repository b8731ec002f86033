import pytest
import torch

from vattention.bench.replay import replay
from vattention.bench.trace import Lengths, draw_requests
from vattention.cache import KVCache, KVLayout
from vattention.errors import ConfigError

PAGE = 4096
LAYOUT = KVLayout(2, 2, 32, torch.bfloat16, 4, 1024)
TOKEN = LAYOUT.bytes_per_token
REQUESTS = draw_requests(40, 100, 30, seed=1)


def plain_lengths(requests: list[Lengths], slots: int) -> list[list[int]]:
    """What every live request's length is at each step, where memory is no matter."""
    waiting = [(request.prompt, request.stored) for request in requests]
    running: list[tuple[int, int]] = []
    steps = []
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(waiting.pop(0))
        steps.append([length for length, _ in running])
        running = [(length + 1, final) for length, final in running if length < final]
    return steps


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@pytest.mark.parametrize("prefetch", [True, False])
def test_every_number_is_that_of_a_plain_simulation(prefetch: bool) -> None:
    steps = plain_lengths(REQUESTS, LAYOUT.max_num_seqs)
    with KVCache(LAYOUT, memory="64MiB", page_size=PAGE) as cache:
        result = replay(cache, REQUESTS, prefetch=prefetch)
        stats = cache.stats()
    series = result.series
    assert series.live == [len(lengths) for lengths in steps]
    assert series.tokens == [sum(lengths) for lengths in steps]
    assert series.needed == [sum(lengths) * TOKEN for lengths in steps]
    assert series.paged_16 == [sum(up(n, 16) for n in lengths) * TOKEN for lengths in steps]
    assert series.paged_256 == [sum(up(n, 256) for n in lengths) * TOKEN for lengths in steps]
    assert series.static == [len(lengths) * 1024 * TOKEN for lengths in steps]
    # With alloc(tokens=prompt) no request inherits more than its prompt takes: what is mapped is rounding, by stream.
    streams = [stream.token_bytes for stream in LAYOUT.streams]
    assert series.mapped == [sum(up(n * size, PAGE) for n in lengths for size in streams) for lengths in steps]
    assert all(created >= mapped for created, mapped in zip(series.created, series.mapped, strict=True))
    assert result.preemptions == 0
    assert (stats.live_slots, stats.needed) == (0, 0)
    assert result.driver_calls == {**stats.driver_calls, "reserve": 0}
    assert (result.calls_here < sum(result.driver_calls.values())) == prefetch


def test_ratios_weigh_steps_by_what_they_need() -> None:
    with KVCache(LAYOUT, memory="64MiB", page_size=PAGE) as cache:
        series = replay(cache, REQUESTS).series
    total, worst, step = series.over_needed("mapped")
    assert total == sum(series.mapped) / sum(series.needed)
    assert worst == series.mapped[step] / series.needed[step]
    assert worst == max(mapped / needed for mapped, needed in zip(series.mapped, series.needed, strict=True))


def test_under_pressure_everybody_still_gets_to_the_end_within_the_budget() -> None:
    finished: list[int] = []

    class Watched(KVCache):
        def free(self, slot: int) -> None:  # type: ignore[override]
            finished.append(self.length(slot))
            super().free(slot)

    # All fit when they start, and two when they end.
    requests = [Lengths(20 + number, 300) for number in range(12)]
    budget = 2 * 4 * up(max(request.stored for request in requests) * TOKEN // 4, PAGE)
    with Watched(LAYOUT, memory=budget, page_size=PAGE) as cache:
        result = replay(cache, requests)
        assert cache.stats().live_slots == 0
    assert result.preemptions > 0
    assert max(result.series.created) <= budget
    assert len(finished) == len(requests) + result.preemptions
    # Each was freed at its full length, besides the times it was preempted on the way, and none overtook another.
    full = [request.stored for request in requests]
    assert [length for length in finished if length in full] == full


def test_a_request_that_cannot_be_served_is_named() -> None:
    with KVCache(LAYOUT, memory="64MiB", page_size=PAGE) as cache, pytest.raises(ConfigError, match="request 2 comes"):
        replay(cache, [Lengths(5, 5), Lengths(1000, 50)])
    with (
        KVCache(LAYOUT, memory=12 * PAGE, page_size=PAGE) as cache,
        pytest.raises(ConfigError, match="request 2 does not fit at 97 tokens though it is alone"),
    ):
        replay(cache, [Lengths(5, 5), Lengths(90, 50)])

import pytest

from vattention.bench.latency import Timing, ratios_of, timing
from vattention.bench.ratios import Spread, percentile, ratio, spread
from vattention.bench.throughput import Run, failures_of, lines_of
from vattention.bench.trace import Lengths
from vattention.bench.workload import Case

CASE = Case("two", (Lengths(300, 11), Lengths(100, 31)))


def test_a_ratio_is_taken_within_each_round() -> None:
    # The machine halves its speed in the second round: no ratio of medians would see 2, 2 and 4.
    assert ratio([200.0, 100.0, 400.0], [100.0, 50.0, 100.0]) == Spread(2.0, 2.0, 4.0)
    assert ratio([1.0, 2.0], [2.0, 8.0], faster_is_more=False) == Spread(3.0, 2.0, 4.0)
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


def test_a_spread_is_of_all_values() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)
    assert spread([3.0, 1.0, 2.0]).show(2) == "2.00 (1.00 .. 3.00)"


def test_percentiles() -> None:
    values = [float(n) for n in range(1, 101)]
    assert percentile(values, 0.99) == 99
    assert percentile(values, 1.0) == 100
    assert percentile([5.0], 0.99) == 5
    assert percentile([2.0, 1.0], 0.5) == 1


def test_rates_count_the_first_tokens_as_prefill() -> None:
    # 400 tokens in; 42 out, of which the prefill makes 2.
    assert Run(prefill=2.0, total=10.0).rates(CASE) == {"prefill": 200.0, "decode": 5.0, "output": 4.2}


def test_no_decoding_no_rate_of_it() -> None:
    one = Case("one", (Lengths(10, 1),))
    assert Run(1.0, 1.5).rates(one) == {"prefill": 10.0, "output": 1 / 1.5}
    assert "decode" not in Run(2.0, 1.9).rates(CASE)  # noise: the whole was faster than its part
    lines = lines_of(CASE, {"vattention": [Run(2.0, 10.0), Run(2.0, 1.9)], "x": [Run(2.0, 10.0), Run(2.0, 10.0)]})
    assert [line.metric for line in lines] == ["prefill", "output"]


def test_lines_and_bars() -> None:
    lines = lines_of(CASE, {"vattention": [Run(1.0, 5.0)], "x": [Run(2.0, 10.0)], "y": [Run(1.0, 3.0)]})
    assert [line.metric for line in lines] == ["prefill", "decode", "output"]
    assert {peer: found.median for peer, found in lines[1].ratios.items()} == {"x": 2.0, "y": 0.5}
    assert failures_of(lines, {"x.decode": 2.0, "prefill": 1.0}) == []
    assert failures_of(lines, {"decode": 1.5}) == ["two: decode is 0.50 x y, less than 1.5"]
    assert len(failures_of(lines, {"x.decode": 2.01, "y.prefill": 1.01})) == 2


def test_latencies() -> None:
    assert timing([0.5, 0.75, 1.5]) == Timing(0.5, (0.25, 0.75))
    assert timing([0.5, 0.75, 1.5]).each == 0.5
    ours, theirs = [[Timing(1.0, (0.1,))]], [[Timing(3.0, (0.05,)), Timing(1.0, (0.05,)), Timing(2.0, (0.05,))]]
    ratios = ratios_of({"vattention": ours, "x": theirs})
    assert ratios == {"x": {"first": Spread(2.0, 2.0, 2.0), "each": Spread(0.5, 0.5, 0.5)}}

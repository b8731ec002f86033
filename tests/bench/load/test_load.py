"""Requests, arrivals and figures, against a server that does as it is told."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from support.stand_in import stand_in
from vattention.bench.load.answer import Answer
from vattention.bench.load.arrivals import Arrivals, closed, poisson, traced
from vattention.bench.load.figures import figures_of
from vattention.bench.load.requests import Form, asks
from vattention.bench.load.target import overhead_of, run_load, target_of
from vattention.bench.trace import Lengths
from vattention.errors import ConfigError

LENGTHS = [Lengths(5, 3), Lengths(9, 2), Lengths(1, 1), Lengths(4, 6)]


def test_requests_have_the_lengths_asked_for() -> None:
    for form in (Form(), Form(prompts="text"), Form(endpoint="chat", prompts="text")):
        with stand_in() as server:
            server.template = 3
            target = target_of("x", server.url)
            lengths = [Lengths(each.prompt + 4, each.output) for each in LENGTHS]
            overhead = overhead_of(target, form, timeout=10)
            assert overhead == (3 if form.endpoint == "chat" else 0)
            found = run_load(
                target, asks(form, target.model, lengths, seed="0", overhead=overhead), closed(2), timeout=10
            )
            assert found.failures == {}
            assert found.prompt_tokens == sum(each.prompt for each in lengths)
            assert found.output_tokens == sum(each.output for each in lengths)
            assert found.prompt_range == (5, 13)
            assert server.most == 2
            last = server.seen[-1]
            assert last["stream"] is last["ignore_eos"] is True
            assert last["model"] == "stand-in"


def test_the_same_seed_gives_the_same_requests_and_another_one_others() -> None:
    for form in (Form(), Form(prompts="text")):
        one, same, other = (asks(form, "m", LENGTHS, seed=seed) for seed in ("1", "1", "2"))
        assert one == same
        assert all(a.body != b.body for a, b in zip(one, other, strict=True))
    ids = [json.loads(ask.body)["prompt"] for ask in asks(Form(vocab_size=7), "m", LENGTHS * 50, seed="0")]
    assert set(itertools.chain(*ids)) == set(range(7))
    body = json.loads(asks(Form(ignore_eos=False, body={"top_p": 0.5}), "m", LENGTHS, seed="0")[0].body)
    assert body["top_p"] == 0.5
    assert "ignore_eos" not in body


@pytest.mark.parametrize(
    ("how", "kind", "detail"),
    [
        ("busy", "HTTP 429", "too busy"),
        ("cut", "cut off", ""),
        ("error", "error in the stream", "it broke"),
        ("garbage", "not the protocol", "not json"),
        ("short", "wrong length", "5 tokens of 6"),
        ("uncounted", "not the protocol", "no usage"),
        ("wordless", "no text", "6 tokens"),
        ("silent", "timed out", "after 0.5 s"),
    ],
)
def test_failures_are_counted_by_kind_and_leave_the_others_alone(how: str, kind: str, detail: str) -> None:
    with stand_in(lambda number, body: how if number == 1 else "good") as server:
        target = target_of("x", server.url)
        found = run_load(target, asks(Form(), target.model, [Lengths(4, 6)] * 4, seed="0"), closed(1), timeout=0.5)
    assert found.failures == {kind: 1}
    assert found.example.startswith(kind)
    assert detail in found.example
    assert found.completed == 3
    assert found.output_tokens == 18


def test_no_server_and_no_key() -> None:
    with stand_in() as server:
        server.key = "secret"
        with pytest.raises(ConfigError, match="wants an API key"):
            target_of("x", server.url)
        target = target_of("x", server.url, api_key="secret")
        run_load(target, asks(Form(), target.model, LENGTHS, seed="0"), closed(4), timeout=10)
        assert {each["key"] for each in server.seen} == {"Bearer secret"}
    found = run_load(target, asks(Form(), target.model, LENGTHS, seed="0"), closed(4), timeout=10)
    assert found.failures == {"no connection": 4}
    with pytest.raises(ConfigError, match="no server answers"):
        target_of("x", server.url)


def test_arrivals() -> None:
    times = poisson(4000, 5.0, seed="a").times
    assert times is not None
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(0.2, rel=0.05)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance == pytest.approx(mean**2, rel=0.15)  # as those of exponential gaps are, and even ones are not
    assert poisson(10, 5.0, seed="a").times == times[:10]
    assert poisson(10, 5.0, seed="b").times != times[:10]
    with pytest.raises(ConfigError, match="--rate"):
        poisson(4, 0, seed="a")
    with pytest.raises(ConfigError, match="--concurrency"):
        closed(0)


def test_arrivals_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.5,3,4\n2023-11-16 18:15:47.7500000,3,4\n"
    )
    assert traced(str(path), 2, speed=2).times == pytest.approx([0, 0.625])
    path.write_text("arrived_at,num_prefill_tokens\n1.5,2\n4,5\n")
    assert traced(str(path), 2, speed=1).times == [0, 2.5]
    for content, problem in (
        ("num_prefill_tokens\n3\n", "no arrival times"),
        ("TIMESTAMP\nnever\n", "line 2: 'never'"),
        ("TIMESTAMP\n1\n", "1 arrivals, not 2"),
        ("TIMESTAMP\n2\n1\n", "not in order"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=problem):
            traced(str(path), 2, speed=1)


def test_requests_come_when_they_are_due_and_waiting_counts() -> None:
    arrivals = Arrivals("x", times=[0, 0, 0.4], at_once=1)
    with stand_in() as server:
        server.pause = 0.1
        target = target_of("x", server.url)
        found = run_load(target, asks(Form(), target.model, [Lengths(2, 3)] * 3, seed="0"), arrivals, timeout=10)
        assert server.most == 1
    # 0.3 s each: the second waits for the first, the third for what is left of the second.
    assert found.seconds > 0.85
    assert found.values["p99_ttft_ms"] > 350


def test_figures_are_those_of_the_times() -> None:
    answers = [
        Answer(due=10.0, wanted=3, texts=[10.5, 11.0, 11.5], ended=12.0, prompt_tokens=7, output_tokens=3),
        Answer(due=11.0, wanted=5, texts=[12.0, 14.0], ended=14.0, prompt_tokens=9, output_tokens=5),
        Answer(due=11.0, wanted=1, texts=[11.2], ended=11.2, prompt_tokens=9, output_tokens=1),
        Answer(due=11.0, wanted=5, ended=20.0, failure="HTTP 429", detail="x"),
    ]
    found = figures_of(answers)
    assert found.seconds == 10.0
    assert (found.completed, found.failures, found.example) == (3, {"HTTP 429": 1}, "HTTP 429: x")
    values = found.values
    assert values["output_throughput"] == pytest.approx(0.9)
    assert values["request_throughput"] == pytest.approx(0.3)
    assert values["mean_ttft_ms"] == pytest.approx((500 + 1000 + 200) / 3)
    assert values["p50_ttft_ms"] == pytest.approx(500)
    assert values["p99_ttft_ms"] == pytest.approx(1000)
    assert (values["p50_tpot_ms"], values["p99_tpot_ms"]) == pytest.approx((500, 500))  # 1 s / 2, and 2 s / 4
    assert values["p99_itl_ms"] == pytest.approx(2000)
    assert values["p50_e2el_ms"] == pytest.approx(2000)
    nothing: dict[str, Any] = figures_of(answers[3:]).values
    assert nothing == {"output_throughput": 0, "request_throughput": 0, "input_throughput": 0}

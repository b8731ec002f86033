"""The engine in its thread: everybody gets an answer, whatever happens, and nobody waits for anybody.

The engine is a real one around a stub model that checks what it is given (see support/remember.py). A `Gate` holds the
forward passes, so that what has to happen during a pass happens during a pass.
"""

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from asyncio import CancelledError
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.remember import Rememberer, engine_with, expected, nothing_is_left
from vattention.engine.engine import Engine
from vattention.engine.loop import EngineLoop, Ticket
from vattention.engine.outputs import RequestOutput
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import EngineError, InvalidRequest

LONG = 60.0
"""Seconds after which a test gives up: nothing waits that long."""


def greedy(tokens: int = 8) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens)


class Ear:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.news: list[RequestOutput | BaseException] = []
        self.threads: set[int] = set()
        self.begun, self.over = threading.Event(), threading.Event()

    def __call__(self, news: RequestOutput | BaseException) -> None:
        assert not self.over.is_set(), "nothing comes after the end"
        self.news.append(news)
        self.threads.add(threading.get_ident())
        self.begun.set()
        if not isinstance(news, RequestOutput) or news.finished:
            self.over.set()

    def last(self) -> Any:
        assert self.over.wait(LONG), "nobody told this listener how it ended"
        return self.news[-1]

    def tokens(self) -> list[int]:
        last = self.last()
        assert isinstance(last, RequestOutput), last
        return list(last.outputs[0].token_ids)


class Gate:
    """Stands before the model: each pass waits to be let through."""

    def __init__(self, runner: Rememberer) -> None:
        self._forward, runner.forward = runner.forward, self._gated  # type: ignore[method-assign]
        self._allowed = threading.Semaphore(0)
        self.waiting = threading.Semaphore(0)
        self.open = False

    def _gated(self, chunks: Any) -> Any:
        if not self.open:
            self.waiting.release()
            assert self._allowed.acquire(timeout=LONG)
        return self._forward(chunks)

    def reached(self) -> None:
        """Wait until a pass is at the gate."""
        assert self.waiting.acquire(timeout=LONG)

    def let_all(self) -> None:
        self.open = True
        self._allowed.release()


class Setup:
    def __init__(self, **options: Any) -> None:
        self.engine, self.runner, self.cache = engine_with(**options)
        self.gate: Gate | None = None
        self.loop = EngineLoop(self.engine)

    def hold(self) -> Gate:
        self.gate = Gate(self.runner)
        return self.gate

    def submit(self, token_ids: Any, params: Any = None, **options: Any) -> tuple[Ear, Ticket]:
        ear = Ear()
        return ear, self.loop.submit(token_ids, params or greedy(), ear, **options)

    def close(self) -> None:
        if self.gate is not None:
            self.gate.let_all()
        assert self.loop.close(timeout=LONG)
        nothing_is_left(self.engine, self.cache)
        assert not self.loop._tickets
        self.cache.close()


@pytest.fixture
def setup() -> Iterator[Setup]:
    setup = Setup()
    yield setup
    setup.close()


def test_outputs_come_as_they_grow_from_one_thread(setup: Setup) -> None:
    prompts = [[1, 2, 3], [4], [5] * 20]
    ears = [setup.submit(prompt, prompt=f"text {i}", request_id=f"r{i}")[0] for i, prompt in enumerate(prompts)]
    for i, (ear, prompt) in enumerate(zip(ears, prompts, strict=True)):
        assert ear.tokens() == expected(prompt, 8)
        outputs = [news for news in ear.news if isinstance(news, RequestOutput)]
        assert [list(output.outputs[0].token_ids) for output in outputs] == [expected(prompt, n) for n in range(1, 9)]
        assert [output.finished for output in outputs] == [False] * 7 + [True]
        assert {(output.prompt, output.request_id) for output in outputs} == {(f"text {i}", f"r{i}")}
    assert len(set().union(*(ear.threads for ear in ears))) == 1
    assert threading.get_ident() not in ears[0].threads


def test_all_samples_are_in_every_output(setup: Setup) -> None:
    ear, _ = setup.submit([1, 2], SamplingParams(temperature=1e-9, max_tokens=5, n=3))
    assert [list(sample.token_ids) for sample in ear.last().outputs] == [expected([1, 2], 5)] * 3
    assert all(len(news.outputs) == 3 for news in ear.news if isinstance(news, RequestOutput))


def test_many_threads_hand_in_and_take_out(setup: Setup) -> None:
    def client(number: int) -> None:
        for i in range(10):
            prompt = [number, i]
            ear, ticket = setup.submit(prompt, greedy(1 + (number + i) % 9))
            if (number + i) % 3 == 0:
                setup.loop.abort(ticket)
                reason = ear.last().outputs[0].finish_reason
                failures.extend([reason] if reason not in ("abort", "length") else [])
            elif ear.tokens() != expected(prompt, 1 + (number + i) % 9):
                failures.append(prompt)

    failures: list[Any] = []
    threads = [threading.Thread(target=client, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert not failures


@pytest.mark.parametrize(
    ("prompt", "params", "options", "error"),
    [
        ([], None, {}, InvalidRequest),
        ([1000], None, {}, InvalidRequest),
        ([1] * 64, None, {}, InvalidRequest),
        ("text", None, {}, TypeError),
        ([1], {"temperature": 0}, {}, TypeError),
        ([1], SamplingParams(stop="x"), {}, InvalidRequest),
        ([1], None, {"priority": "high"}, TypeError),
        ([1], None, {"priority": 2**64}, InvalidRequest),
    ],
)
def test_a_bad_request_is_its_own_listeners_matter(
    setup: Setup, prompt: Any, params: Any, options: Any, error: type[Exception]
) -> None:
    gate = setup.hold()
    good, _ = setup.submit([1, 2])
    gate.reached()
    bad, _ = setup.submit(prompt, params, **options)
    late, _ = setup.submit([3])
    gate.let_all()
    assert isinstance(bad.last(), error)
    assert good.tokens() == expected([1, 2], 8)
    assert late.tokens() == expected([3], 8)


def test_names(setup: Setup) -> None:
    gate = setup.hold()
    first, _ = setup.submit([1], request_id="mine")
    gate.reached()
    second, _ = setup.submit([2], request_id="mine")
    unnamed = [setup.submit([3])[0] for _ in range(3)]
    with pytest.raises(TypeError, match="request_id"):
        setup.submit([1], request_id=7)
    gate.let_all()
    assert isinstance(second.last(), InvalidRequest)
    assert "in use" in str(second.last())
    assert first.tokens() == expected([1], 8)
    assert len({ear.last().request_id for ear in unnamed}) == 3
    again, _ = setup.submit([4], request_id="mine")
    assert again.tokens() == expected([4], 8)


def test_names_of_others_are_not_those_the_engine_would_choose(setup: Setup) -> None:
    """A caller who takes "1" must not make a request fail that has no name."""
    gate = setup.hold()
    taken, _ = setup.submit([1], request_id="1")
    gate.reached()
    unnamed, _ = setup.submit([2])
    gate.let_all()
    assert unnamed.tokens() == expected([2], 8)
    assert taken.tokens() == expected([1], 8)


def test_an_abort_before_the_engine_has_seen_the_request(setup: Setup) -> None:
    gate = setup.hold()
    other, _ = setup.submit([1])
    gate.reached()
    ear, ticket = setup.submit([2] * 10)
    setup.loop.abort(ticket)
    assert not ear.begun.is_set(), "the engine is in a pass"
    gate.let_all()
    assert ear.last().outputs[0].finish_reason == "abort"
    assert ear.tokens() == []
    assert other.tokens() == expected([1], 8)
    assert setup.runner.rows == 1 + 7, "the aborted prompt was not computed"


def test_an_abort_takes_hold_with_the_next_step(setup: Setup) -> None:
    gate = setup.hold()
    other, _ = setup.submit([1], greedy(5))
    ear, ticket = setup.submit([2], greedy(50))
    gate.reached()
    setup.loop.abort(ticket)
    gate.let_all()
    assert ear.last().outputs[0].finish_reason == "abort"
    assert len(ear.tokens()) <= 1, "at most the token of the pass under way"
    assert other.tokens() == expected([1], 5)


def test_an_abort_after_the_end_does_not_hit_who_has_the_name_now(setup: Setup) -> None:
    first, ticket = setup.submit([1], request_id="name")
    first.last()
    gate = setup.hold()
    second, _ = setup.submit([2], request_id="name")
    gate.reached()
    for _ in range(3):
        setup.loop.abort(ticket)
    gate.let_all()
    assert second.tokens() == expected([2], 8)
    assert second.last().outputs[0].finish_reason == "length"


def test_abort_by_name(setup: Setup) -> None:
    gate = setup.hold()
    ear, _ = setup.submit([1], greedy(50), request_id="name")
    gate.reached()
    found, missing = setup.loop.abort_id("name"), setup.loop.abort_id("nobody")
    assert not found.done()
    gate.let_all()
    assert found.result(LONG) is True
    assert missing.result(LONG) is False
    assert ear.last().outputs[0].finish_reason == "abort"


def test_who_does_not_listen_is_not_served(setup: Setup) -> None:
    heard: list[Any] = []

    def listener(news: Any) -> bool:
        heard.append(news)
        return len(heard) < 3

    setup.loop.submit([1], greedy(50), listener)
    other, _ = setup.submit([2], greedy(20))
    assert other.tokens() == expected([2], 20)
    assert len(heard) == 3


@pytest.mark.parametrize("failure", [ZeroDivisionError, CancelledError])
def test_a_listener_that_fails_is_reported_and_harms_nobody(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", reported.append)
    calls: list[Any] = []

    def listener(news: Any) -> None:
        calls.append(news)
        raise failure

    setup.loop.submit([1], greedy(50), listener)
    other, _ = setup.submit([2], greedy(20))
    assert other.tokens() == expected([2], 20)
    assert len(calls) == len(reported) == 1
    assert reported[0].exc_type is failure


def test_priorities_reach_the_engine() -> None:
    setup = Setup(max_num_seqs=1)
    gate = setup.hold()
    order: list[str] = []

    def listener(news: Any) -> None:
        if news.finished:
            order.append(news.request_id)

    setup.loop.submit([1], greedy(3), listener, request_id="first")
    gate.reached()
    for name, priority in (("low", 5), ("middle", 0), ("high", -5), ("middle too", 0)):
        setup.loop.submit([2], greedy(3), listener, request_id=name, priority=priority)
    gate.let_all()
    assert setup.loop.close(drain=True, timeout=LONG)
    assert order == ["first", "high", "middle", "middle too", "low"]
    setup.close()


def fails_for(runner: Rememberer, token: int, error: BaseException) -> None:
    """Makes the model fail in every pass that has a request whose prompt begins with `token`."""
    forward = runner.forward

    def breaks(chunks: Any) -> Any:
        if any(chunk.request.prompt_token_ids[0] == token for chunk in chunks):
            raise error
        return forward(chunks)

    runner.forward = breaks  # type: ignore[method-assign]


def test_a_request_that_fails_fails_alone(setup: Setup) -> None:
    gate = setup.hold()
    fails_for(setup.runner, 13, error := RuntimeError("the model broke"))
    ears = [setup.submit([token])[0] for token in (1, 13, 2)]
    gate.let_all()
    assert ears[1].last() is error
    for ear, token in ((ears[0], 1), (ears[2], 2)):
        assert ear.tokens() == expected([token], 8)
    assert setup.loop.running
    after, _ = setup.submit([3])
    assert after.tokens() == expected([3], 8)


def test_a_step_that_fails_for_those_in_it_is_told_to_each(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an engine that ends those it cannot save and raises, as it does on the way out of something worse."""
    step, failing = setup.engine.step, threading.Event()

    def raises() -> Any:
        if failing.is_set() and "ill" in setup.engine._requests:
            setup.engine.abort("ill")
            setup.engine.abort("ill too")
            raise MemoryError("all gone")
        return step()

    monkeypatch.setattr(setup.engine, "step", raises)
    gate = setup.hold()
    well, _ = setup.submit([1])
    gate.reached()
    failing.set()
    ill = [setup.submit([2], request_id=name)[0] for name in ("ill", "ill too")]
    gate.let_all()
    errors = [ear.last() for ear in ill]
    assert [type(error) for error in errors] == [EngineError] * 2
    assert errors[0] is not errors[1]
    assert all(isinstance(error.__cause__, MemoryError) and "all gone" in str(error) for error in errors)
    assert well.tokens() == expected([1], 8)


def test_text_that_cannot_be_made_is_one_request_less(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    output = setup.engine.output

    def fails(request: Any, prompt: Any, seen: Any) -> Any:
        if request.prompt_token_ids[0] == 13 and len(request.output_token_ids) == 3:
            raise ValueError("no such character")
        return output(request, prompt, seen)

    monkeypatch.setattr(setup.engine, "output", fails)
    bad, _ = setup.submit([13], greedy(50))
    good, _ = setup.submit([1])
    assert isinstance(bad.last(), ValueError)
    assert good.tokens() == expected([1], 8)


@pytest.mark.parametrize("death", [SystemExit("end"), RuntimeError("nobody is to blame")], ids=repr)
def test_an_engine_that_dies_tells_everybody_and_says_why(
    death: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(max_num_seqs=2)
    gate = setup.hold()
    ears = [setup.submit([token])[0] for token in range(5)]
    gate.reached()

    def dies() -> Any:
        raise death

    monkeypatch.setattr(setup.engine, "step", dies)
    ears.append(setup.submit([9])[0])
    calls = setup.loop.call(lambda: "still alive")
    gate.let_all()
    for ear in ears:
        error = ear.last()
        assert isinstance(error, EngineError)
        assert str(death) in str(error)
        assert error.__cause__ is death
    assert len({id(ear.last()) for ear in ears}) == len(ears), "each caller raises an exception of its own"
    assert calls.result(LONG) == "still alive"
    for use in (lambda: setup.submit([1]), lambda: setup.loop.call(print)):
        with pytest.raises(EngineError, match=str(death)):
            use()
    assert not setup.loop.running
    setup.loop.abort(Ticket("x", None, [1], greedy(), 0, print))  # never fails
    setup.close()


def test_closing_cuts_off_what_runs_and_what_waits() -> None:
    setup = Setup(max_num_seqs=2)
    gate = setup.hold()
    ears = [setup.submit([token], greedy(50))[0] for token in range(5)]
    gate.reached()
    setup.loop.stop()
    gate.let_all()
    setup.close()
    for ear in ears:
        assert isinstance(ear.last(), EngineError)
        assert "closed" in str(ear.last())
        assert len(ear.news) <= 2, "one pass was under way"
    setup.loop.close()
    with pytest.raises(InvalidRequest, match="closed"):
        setup.loop.submit([1], greedy(), print)
    with pytest.raises(InvalidRequest, match="closed"):
        setup.loop.call(print)


def test_a_listener_that_fails_at_the_end_keeps_nobody_from_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    setup = Setup()
    gate = setup.hold()

    def listener(news: Any) -> None:
        raise CancelledError

    setup.loop.submit([1], greedy(50), listener)
    ear, _ = setup.submit([2], greedy(50))
    gate.reached()
    setup.loop.submit([1], greedy(50), listener)
    late, _ = setup.submit([2], greedy(50))
    setup.loop.stop()
    setup.close()
    assert isinstance(ear.last(), EngineError)
    assert isinstance(late.last(), EngineError)


def test_draining_finishes_what_was_taken() -> None:
    setup = Setup(max_num_seqs=2)
    gate = setup.hold()
    ears, tickets = map(list, zip(*(setup.submit([token], greedy(20)) for token in range(8)), strict=True))
    gate.reached()
    setup.loop.stop(drain=True)
    with pytest.raises(InvalidRequest, match="closed"):
        setup.submit([1])
    gone, ticket = ears.pop(), tickets[-1]
    assert not setup.loop.abort_id(ticket.request_id).done(), "who is leaving may still leave"
    assert not setup.loop.close(drain=True, timeout=0.01), "a pass is held"
    gate.let_all()
    assert setup.loop.close(drain=True, timeout=LONG)
    for token, ear in enumerate(ears):
        assert ear.tokens() == expected([token], 20)
    assert gone.last().outputs[0].finish_reason == "abort"
    setup.close()


def test_draining_can_be_cut_short() -> None:
    setup = Setup()
    gate = setup.hold()
    ear, _ = setup.submit([1], greedy(50))
    gate.reached()
    setup.loop.stop(drain=True)
    setup.loop.stop()
    gate.let_all()
    setup.close()
    assert isinstance(ear.last(), EngineError)


def test_a_listener_may_close() -> None:
    setup = Setup()
    ear = Ear()

    def listener(news: Any) -> None:
        ear(news)
        setup.loop.close()

    setup.loop.submit([1], greedy(50), listener)
    assert isinstance(ear.last(), EngineError)
    setup.close()


@pytest.mark.parametrize("drain", [False, True])
def test_who_hands_in_while_it_closes_is_told_or_refused(drain: bool) -> None:
    for _ in range(30):
        setup = Setup()
        ears: list[Ear] = []
        start = threading.Barrier(4)

        def client(setup: Setup = setup, ears: list[Ear] = ears, start: threading.Barrier = start) -> None:
            start.wait()
            try:
                while True:
                    ears.append(setup.submit([1], greedy(2))[0])
            except InvalidRequest:
                pass

        threads = [threading.Thread(target=client) for _ in range(3)]
        for thread in threads:
            thread.start()
        start.wait()
        setup.loop.close(drain=drain)
        for thread in threads:
            thread.join(LONG)
        for ear in ears:
            last = ear.last()
            assert isinstance(last, EngineError) or last.finished
        setup.close()


def test_a_message_that_comes_after_the_last_look_is_answered(setup: Setup) -> None:
    """The narrowest place: the loop was running when asked, and has ended before the message is there."""
    put = setup.loop._inbox.put

    class Slow:
        def put(self, message: Any) -> None:
            setup.loop._inbox = inbox
            assert setup.loop.close(timeout=LONG)
            put(message)

    inbox = setup.loop._inbox
    setup.loop._inbox = Slow()  # type: ignore[assignment]
    ear, _ = setup.submit([1])
    assert isinstance(ear.last(), EngineError)


def test_calls_are_made_between_steps_and_errors_come_back(setup: Setup) -> None:
    gate = setup.hold()
    ear, _ = setup.submit([1])
    gate.reached()
    where = setup.loop.call(threading.get_ident)
    wrong = setup.loop.call(lambda: 1 // 0)
    never: list[int] = []
    cancelled = setup.loop.call(lambda: never.append(1))
    assert cancelled.cancel()
    assert not where.done()
    gate.let_all()
    with pytest.raises(ZeroDivisionError):
        wrong.result(LONG)
    assert ear.tokens() == expected([1], 8)
    assert ear.threads == {where.result(LONG)}
    assert not never


def test_it_sleeps_while_nobody_is_there(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def unfinished(engine: Engine) -> int:
        nonlocal looks
        looks += 1
        return len(engine._requests)

    monkeypatch.setattr(Engine, "unfinished", property(unfinished))
    ear, _ = setup.submit([1])
    ear.last()
    setup.loop.call(int).result(LONG)
    for _ in range(20):  # it goes back to sleep, on a busy machine later
        before = looks
        time.sleep(0.2)
        if looks == before:
            break
    assert looks == before > 0


def test_a_flood_does_not_keep_it_from_its_steps(setup: Setup) -> None:
    ear, _ = setup.submit([1], greedy(30))

    def again() -> None:
        """Puts itself back for ever: an inbox that is never empty."""
        if not ear.over.is_set():
            setup.loop.call(again)
            setup.loop.call(again) if setup.loop._inbox.qsize() < 100 else None

    setup.loop.call(again)
    assert ear.tokens() == expected([1], 30)


def test_a_child_process_cannot_use_it(setup: Setup) -> None:
    ear, ticket = setup.submit([1])
    ear.last()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                setup.submit([1])
            except InvalidRequest as error:
                setup.loop.abort(ticket)
                setup.loop.close()
                code = 0 if "parent" in str(error) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    again, _ = setup.submit([2])
    assert again.tokens() == expected([2], 8)


def test_a_closed_loop_keeps_nothing_alive() -> None:
    setup = Setup()
    setup.submit([1])[0].last()
    thread = setup.loop._thread
    left = [weakref.ref(thing) for thing in (setup.loop, setup.engine, setup.cache)]
    setup.loop.stop()
    thread.join(LONG)
    del setup
    gc.collect()
    assert [thing() for thing in left] == [None] * 3


EXIT = """
import threading
import torch
from support.remember import engine_with
from vattention.engine.loop import EngineLoop
from vattention.engine.sampling_params import SamplingParams

engine, runner, cache = engine_with()
forward, matrix = runner.forward, torch.rand(400, 400)

def slow(chunks):
    for _ in range(30):
        matrix @ matrix
    return forward(chunks)

runner.forward = slow
begun = threading.Event()
EngineLoop(engine).submit([1, 2, 3], SamplingParams(max_tokens=None), lambda news: begun.set())
begun.wait()
print("leaving with", engine.unfinished, flush=True)
"""


def test_the_interpreter_can_leave_while_it_computes() -> None:
    tests = str(Path(__file__).parents[1])
    paths = os.pathsep.join([tests, *(path for path in [os.environ.get("PYTHONPATH")] if path)])
    done = subprocess.run(
        [sys.executable, "-c", EXIT],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving with 1\n", "")

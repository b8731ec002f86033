"""The asynchronous front door: streams that come, go and are cut off at any moment, and what is left of them: nothing.

Tokens are compared with those of each prompt alone, in float32: company must not show.
"""

import asyncio
import contextlib
import gc
import random
import re
import threading
import warnings
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.models import demo_model, loaded, prompts_of, tiny_model
from vattention import LLM, AsyncLLM, RequestOutput, RequestOutputKind, SamplingParams
from vattention.engine.answer import joined
from vattention.engine.loading import LoadedModel
from vattention.errors import ConfigError, EngineError, InvalidRequest

LONG = 60.0
"""Seconds after which a test gives up: nothing waits that long."""

SHORT = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
ENDLESS = SamplingParams(temperature=1, max_tokens=None, ignore_eos=True, seed=1)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return demo_model()


@pytest.fixture(scope="module")
def tiny(demo: LoadedModel) -> LoadedModel:
    return loaded(tiny_model(vocab_size=demo.geometry.vocab_size, hidden_size=24), demo.tokenizer)


@pytest.fixture(scope="module")
def small() -> LoadedModel:
    """Without a tokenizer, and quick."""
    return loaded(tiny_model())


def open_llm(model: LoadedModel, **options: Any) -> AsyncLLM:
    return AsyncLLM(model, **{"max_num_seqs": 4, "kv_cache_memory": "4MiB", "max_model_len": 128, **options})


@pytest.fixture
def llm(tiny: LoadedModel) -> Iterator[AsyncLLM]:
    llm = open_llm(tiny)
    yield llm
    run(nothing_is_left(llm))
    llm.close()
    assert not llm._loop._thread.is_alive()


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run` that gives up in the end, and looks for tasks that are left."""

    async def main() -> Any:
        result = await asyncio.wait_for(coroutine, LONG)
        await settled(tasks=1)
        return result

    return asyncio.run(main())


async def settled(tasks: int = 2) -> None:
    """Wait until generators that were dropped have been closed, and no more than these many tasks are left."""
    await asyncio.sleep(0)  # by a task that the event loop starts in its next round
    while len(asyncio.all_tasks()) > tasks:
        await asyncio.sleep(0)


async def nothing_is_left(llm: AsyncLLM) -> None:
    """Aborts are on their way to the engine by now, and what is called comes after them."""
    left = await asyncio.wrap_future(llm._loop.call(lambda: (llm._engine.unfinished, dict(llm._loop._tickets))))
    assert left == (0, {})
    assert not llm._engine.scheduler.running
    assert not llm._engine.scheduler.waiting
    stats = llm.stats()
    assert (stats.live_slots, stats.needed, stats.mapped) == (0, 0, 0)
    await asyncio.wrap_future(llm._loop.call(llm._cache.trim))
    assert llm.stats().created == 0


async def last_of(outputs: AsyncGenerator[RequestOutput, None]) -> RequestOutput:
    seen: list[RequestOutput] = []
    async for output in outputs:
        assert not seen or not seen[-1].finished
        for old, new in zip(seen[-1].outputs if seen else (), output.outputs, strict=False):
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
        seen.append(output)
    assert seen[-1].finished
    return seen[-1]


def ids(output: RequestOutput) -> tuple[int, ...]:
    return output.outputs[0].token_ids


class Gate:
    """Stands before the model: each pass waits to be let through."""

    def __init__(self, llm: AsyncLLM) -> None:
        runner = llm._engine._runner
        self._forward, runner.forward = runner.forward, self._gated  # type: ignore[method-assign]
        self._opened, self._reached = threading.Event(), threading.Event()

    def _gated(self, chunks: Any) -> Any:
        self._reached.set()
        assert self._opened.wait(LONG)
        return self._forward(chunks)

    async def reached(self) -> None:
        assert await asyncio.to_thread(self._reached.wait, LONG)

    def open(self) -> None:
        self._opened.set()


# -- what comes out -----------------------------------------------------------------------------------------------

PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(n=3, seed=1, max_tokens=8, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    SamplingParams(seed=3, max_tokens=12, stop=["a", "e"], ignore_eos=True),
    SamplingParams(seed=4, max_tokens=5, detokenize=False),
]


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_the_last_output_is_that_of_llm(tiny: LoadedModel, llm: AsyncLLM, params: SamplingParams) -> None:
    with LLM(tiny, kv_cache_memory="4MiB", max_model_len=128) as offline:
        (expected,) = offline.generate("Hello, how are you?", params, use_tqdm=False)
    got = run(last_of(llm.generate("Hello, how are you?", params)))
    for name in ("prompt", "prompt_token_ids", "outputs", "finished", "prompt_logprobs"):
        assert getattr(got, name) == getattr(expected, name)


@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_deltas_make_up_the_whole(llm: AsyncLLM, params: SamplingParams) -> None:
    whole = run(last_of(llm.generate("Hello, how are you?", params)))

    async def main(pause: float) -> list[RequestOutput]:
        pieces = []
        deltas = replace(params, output_kind=RequestOutputKind.DELTA)
        async with aclosing(llm.generate("Hello, how are you?", deltas)) as outputs:
            async for output in outputs:
                pieces.append(output)
                await asyncio.sleep(pause)
        return pieces

    for pause in (0.0, 0.02):  # a reader that is quicker, and one that is slower than the engine
        pieces = run(main(pause))
        assert pieces[-1].finished
        got = joined(pieces)
        for sample, expected in zip(got.outputs, whole.outputs, strict=True):
            for name in ("index", "text", "token_ids", "logprobs", "finish_reason", "stop_reason"):
                assert getattr(sample, name) == getattr(expected, name)
            assert sample.cumulative_logprob == pytest.approx(expected.cumulative_logprob)
        assert (got.prompt_logprobs, got.prompt) == (whole.prompt_logprobs, whole.prompt)
        assert [len(times) for times in got.metrics.token_times] == [len(each.token_ids) for each in got.outputs]
        for piece in pieces:
            assert all(each.token_ids or each.finish_reason for each in piece.outputs), "nothing is told twice"


@pytest.mark.parametrize("params", PARAMS[:2], ids=range(2))
def test_the_last_output_alone(llm: AsyncLLM, params: SamplingParams) -> None:
    whole = run(last_of(llm.generate("Hello", params)))

    async def main() -> list[RequestOutput]:
        last = replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
        return [output async for output in llm.generate("Hello", last)]

    (output,) = run(main())
    assert output.finished
    assert output.outputs == whole.outputs


def test_deltas_that_nobody_reads_are_few(tiny: LoadedModel) -> None:
    llm = open_llm(tiny)

    async def main() -> None:
        long = replace(ENDLESS, output_kind=RequestOutputKind.DELTA, max_tokens=120)
        outputs = llm.generate({"prompt_token_ids": [1, 2]}, long)
        first = await anext(outputs)
        mailbox = outputs.ag_frame.f_locals["mailbox"]  # type: ignore[attr-defined]
        while await asyncio.wrap_future(llm._loop.call(lambda: llm._engine.unfinished)):
            await asyncio.sleep(0.01)
        assert len(mailbox._news) <= 65
        second = await anext(outputs)
        assert len(ids(first)) + len(ids(second)) == 120
        assert second.finished
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    run(main())
    llm.close()


def test_deltas_come_before_the_error(tiny: LoadedModel) -> None:
    llm = open_llm(tiny)
    output = llm._engine.output

    def breaks(request: Any, prompt: Any, seen: Any) -> Any:
        if len(request.output_token_ids) == 5:
            raise ValueError("no such character")
        return output(request, prompt, seen)

    llm._engine.output = breaks  # type: ignore[method-assign]

    async def main() -> None:
        seen = 0
        outputs = llm.generate("Hello", replace(ENDLESS, output_kind=RequestOutputKind.DELTA))
        while seen < 4:
            seen += len(ids(await anext(outputs)))
            await asyncio.sleep(0.05)  # by the end of the first the error has come
        assert seen == 4
        with pytest.raises(ValueError, match="no such character"):
            await anext(outputs)

    run(main())
    llm.close()


def test_every_form_of_a_prompt_and_the_defaults(llm: AsyncLLM) -> None:
    async def main() -> None:
        token_ids = llm.tokenizer("Hello").input_ids  # type: ignore[misc]
        forms: list[Any] = ["Hello", {"prompt": "Hello"}, {"prompt_token_ids": token_ids}]
        outputs = [await last_of(llm.generate(form, SHORT)) for form in forms]
        assert len({ids(output) for output in outputs}) == 1
        assert [output.prompt for output in outputs] == ["Hello", "Hello", None]
        assert len(ids(await last_of(llm.generate("Hello")))) == 16
        assert (await last_of(llm.generate("Hello", SHORT, "my name"))).request_id == "my name"

    run(main())


def test_chat_is_that_of_llm(tiny: LoadedModel, llm: AsyncLLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    options: list[dict[str, Any]] = [
        {},
        {"add_generation_prompt": False},
        {"chat_template": "{{ messages[1].content }}{{ more }}", "more": "!"},
    ]
    with LLM(tiny, kv_cache_memory="4MiB", max_model_len=128) as offline:
        for option in options:
            (expected,) = offline.chat(messages, SHORT, use_tqdm=False, **option)
            got = run(last_of(llm.chat(messages, SHORT, "name", **option)))
            assert (got.prompt, got.outputs, got.request_id) == (expected.prompt, expected.outputs, "name")


def test_priorities_reach_the_engine(tiny: LoadedModel) -> None:
    llm = open_llm(tiny, max_num_seqs=1)

    async def main() -> list[str]:
        order: list[str] = []
        gate = Gate(llm)

        async def read(name: str, priority: int) -> None:
            await last_of(llm.generate(name, SHORT, name, priority=priority))
            order.append(name)

        tasks = [asyncio.create_task(read("first", 0))]
        await gate.reached()
        tasks += [asyncio.create_task(read(name, number)) for name, number in (("low", 9), ("mid", 5), ("high", -2))]
        while llm._loop._inbox.qsize() < 3:
            await asyncio.sleep(0.001)
        gate.open()
        await asyncio.gather(*tasks)
        return order

    assert run(main()) == ["first", "high", "mid", "low"]
    llm.close()


def test_priority_of_llm_is_one_for_all_or_one_for_each(tiny: LoadedModel) -> None:
    with LLM(tiny, max_num_seqs=1, kv_cache_memory="4MiB", max_model_len=128) as offline:
        outputs = offline.generate(["a", "b", "c"], SHORT, use_tqdm=False, priority=[3, 2, 1])
        first = [output.metrics.queue_time for output in outputs]
        assert first[0] > first[1] > first[2]  # type: ignore[operator]
        assert len(offline.generate(["a", "b"], SHORT, use_tqdm=False, priority=7)) == 2
        assert len(offline.chat([{"role": "user", "content": "a"}], SHORT, use_tqdm=False, priority=7)) == 1
        with pytest.raises(InvalidRequest, match="2 prompts and 1 priority"):
            offline.generate(["a", "b"], SHORT, priority=[1])
        for wrong in ("high", 1.5, ["x", "y"], True):
            with pytest.raises(TypeError, match="priority"):
                offline.generate(["a", "b"], SHORT, use_tqdm=False, priority=wrong)  # type: ignore[arg-type]
        assert offline.engine.unfinished == 0


def test_the_example_of_the_documentation(
    demo: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    (example,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "AsyncLLM" in block)
    monkeypatch.setattr("vattention.engine.opening.load_model", lambda *_, **__: demo)
    exec(compile(example, "docs/architecture.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    assert len(lines[0]) < len(lines[-1])


# -- the bar ------------------------------------------------------------------------------------------------------


async def reader(llm: AsyncLLM, prompt: Any, params: SamplingParams, how: str, chance: random.Random) -> Any:
    """Read to the end, or leave in one of many ways. Returns the tokens of those who stayed, None of those who left."""
    outputs = llm.generate(prompt, params)
    if how == "stay":
        return ids(await last_of(outputs))
    enough = chance.choice([0, 0, 1, 2, 5])
    if how == "aclose":
        for _ in range(enough):
            await anext(outputs)
        await outputs.aclose()
    elif how == "break":
        seen = 0
        async for _ in outputs:
            seen += 1
            if seen > enough:
                break
    elif how == "timeout":
        with contextlib.suppress(TimeoutError):
            while True:
                await asyncio.wait_for(anext(outputs), chance.choice([0, 0.001, 0.01]))
    elif how == "cancel":
        task = asyncio.create_task(last_of(outputs))
        await asyncio.sleep(chance.choice([0, 0, 0.001, 0.01, 0.05, 0.2]))
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    return None


async def storm(llm: AsyncLLM, work: list[tuple[Any, SamplingParams, Any]], seed: int) -> int:
    """Everybody at once, a third of them leaving. Returns how many stayed."""
    chance = random.Random(seed)
    ways = [chance.choice(["aclose", "break", "timeout", "cancel"]) if i % 3 == 0 else "stay" for i in range(len(work))]
    chance.shuffle(ways)
    endless = SamplingParams(temperature=1, max_tokens=100, ignore_eos=True)
    tasks = []
    for (prompt, params, _), way in zip(work, ways, strict=True):
        wanted = params if way == "stay" else endless  # none of those who leave ends by itself before
        tasks.append(asyncio.create_task(reader(llm, prompt, wanted, way, random.Random(chance.random()))))
        if chance.random() < 0.2:
            await asyncio.sleep(chance.random() * 0.01)
    for (_, _, expected), task, way in zip(work, tasks, ways, strict=True):
        assert await task == (expected if way == "stay" else None)
    del tasks
    gc.collect()
    await settled()
    await nothing_is_left(llm)
    return ways.count("stay")


def mixed(count: int, longest: int) -> list[SamplingParams]:
    """Greedy and sampled, each sampled one with a seed of its own."""
    chance = random.Random(5)
    return [
        SamplingParams(temperature=i % 2, seed=i, max_tokens=chance.randint(1, longest), ignore_eos=True)
        for i in range(count)
    ]


def test_200_streams_with_a_third_cancelled(small: LoadedModel, full_size: bool) -> None:
    """Under memory pressure, too: about a quarter of what the requests would take together."""
    chance = random.Random(1)
    prompts = [{"prompt_token_ids": p} for p in prompts_of(*(chance.randint(1, 60) for _ in range(200)))]
    params = mixed(200, 16)
    with LLM(small, max_num_seqs=1, kv_cache_memory="8MiB", max_model_len=256) as offline:
        alone = [ids(output) for output in offline.generate(prompts, params, use_tqdm=False)]
    work = list(zip(prompts, params, alone, strict=True))
    llm = AsyncLLM(small, max_num_seqs=32, kv_cache_memory="384KiB", page_size=4096, poison=True)
    others = set(threading.enumerate())
    for seed in range(50 if full_size else 3):
        assert run(storm(llm, work, seed)) == 133
        # The executor of the event loop has gone with it.
        assert not [thread.name for thread in set(threading.enumerate()) - others if thread.name.startswith("asyncio")]
    assert llm._engine.scheduler.preemptions > 0, "no pressure, no test"
    llm.close()
    assert not llm._loop._thread.is_alive()


def test_streams_of_the_demo_model_with_a_third_cancelled(demo: LoadedModel, full_size: bool) -> None:
    count = 60 if full_size else 9
    texts = [f"{i} {'and then ' * (i % 5)}" for i in range(count)]
    params = mixed(count, 6)
    with LLM(demo, max_num_seqs=1, kv_cache_memory="64MiB", max_model_len=128) as offline:
        alone = [ids(output) for output in offline.generate(texts, params, use_tqdm=False)]
    llm = open_llm(demo, max_num_seqs=8, kv_cache_memory="64MiB")
    assert run(storm(llm, list(zip(texts, params, alone, strict=True)), 7)) == count * 2 // 3
    llm.close()


# -- leaving ------------------------------------------------------------------------------------------------------


def leave_by_break(llm: AsyncLLM) -> Coroutine[Any, Any, None]:
    async def leave() -> None:
        async for _ in llm.generate("a", ENDLESS):
            break

    return leave()


def leave_by_error(llm: AsyncLLM) -> Coroutine[Any, Any, None]:
    async def leave() -> None:
        with contextlib.suppress(ZeroDivisionError):
            async for _ in llm.generate("a", ENDLESS):
                _ = 1 // 0

    return leave()


def leave_by_aclose(llm: AsyncLLM) -> Coroutine[Any, Any, None]:
    async def leave() -> None:
        async with aclosing(llm.generate("a", ENDLESS)) as outputs:
            await anext(outputs)
        await outputs.aclose()  # twice
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    return leave()


def leave_by_cancelling_inside_the_loop(llm: AsyncLLM) -> Coroutine[Any, Any, None]:
    async def read(there: asyncio.Event) -> None:
        async for _ in llm.generate("a", ENDLESS):
            there.set()
            await asyncio.sleep(LONG)

    async def leave() -> None:
        there = asyncio.Event()
        task = asyncio.create_task(read(there))
        await there.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    return leave()


@pytest.mark.parametrize(
    "leave", [leave_by_break, leave_by_error, leave_by_aclose, leave_by_cancelling_inside_the_loop]
)
def test_leaving_aborts(llm: AsyncLLM, leave: Callable[[AsyncLLM], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await leave(llm)
        await settled()
        await nothing_is_left(llm)

    run(main())


def test_the_end_of_asyncio_run_leaves(llm: AsyncLLM) -> None:
    async def main() -> AsyncGenerator[RequestOutput, None]:
        reading = asyncio.create_task(last_of(llm.generate("Hello", ENDLESS)))
        suspended = llm.generate("Hello", ENDLESS)
        await anext(suspended)
        assert not reading.done()
        return suspended

    suspended = asyncio.run(main())
    run(nothing_is_left(llm))
    del suspended


def test_leaving_takes_hold_with_the_next_step(llm: AsyncLLM) -> None:
    async def main() -> None:
        outputs = llm.generate("Hello", ENDLESS)
        await anext(outputs)
        gate = Gate(llm)
        await gate.reached()
        (request,) = llm._engine._requests.values()
        had = len(request.output_token_ids)
        await outputs.aclose()  # returns though a pass is under way
        assert len(request.output_token_ids) == had
        gate.open()
        await nothing_is_left(llm)
        assert len(request.output_token_ids) <= had + 1

    run(main())


def test_a_generator_that_was_never_read_asks_for_nothing(llm: AsyncLLM) -> None:
    async def main() -> None:
        outputs = llm.generate("Hello", ENDLESS)
        await outputs.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)

    run(main())
    llm.generate("Hello")  # outside any event loop
    assert not llm._loop._tickets
    assert llm.stats().driver_calls.get("create", 0) == 0


def test_leaving_while_the_prompt_is_made_into_tokens(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    check = llm._engine.check

    def slow(*given: Any) -> Any:
        begun.set()
        assert go_on.wait(LONG)
        return check(*given)

    async def main() -> None:
        with monkeypatch.context() as patched:
            patched.setattr(llm._engine, "check", slow)
            task = asyncio.create_task(last_of(llm.generate("Hello " * 400, ENDLESS)))
            assert await asyncio.to_thread(begun.wait, LONG)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            go_on.set()
        assert ids(await last_of(llm.generate("Hello", SHORT, "0")))

    run(main())
    assert llm._engine._added == 1


def test_leaving_after_the_end_harms_nobody(llm: AsyncLLM) -> None:
    async def main() -> None:
        first = llm.generate("Hello", SHORT, "name")
        while not (await anext(first)).finished:
            pass
        second = llm.generate("Hello", ENDLESS, "name")
        await anext(second)
        await first.aclose()
        assert not (await anext(second)).finished
        await second.aclose()

    run(main())


def test_abort_by_name(llm: AsyncLLM) -> None:
    async def main() -> None:
        task = asyncio.create_task(last_of(llm.generate("Hello", ENDLESS, "name")))
        while not await llm.abort("name"):
            await asyncio.sleep(0.001)
        output = await task
        assert output.outputs[0].finish_reason == "abort"
        assert not await llm.abort("name")

    run(main())


@pytest.mark.parametrize("ringing", [False, True])
def test_an_event_loop_that_is_gone_takes_its_requests_along(llm: AsyncLLM, ringing: bool) -> None:
    """Closed by hand, without what asyncio.run does at its end: the reader cannot even be told."""
    loop = asyncio.new_event_loop()
    outputs = llm.generate("Hello", ENDLESS)
    loop.run_until_complete(anext(outputs))  # type: ignore[arg-type]
    gate = Gate(llm)
    loop.run_until_complete(gate.reached())
    (request,) = llm._engine._requests.values()
    (ticket,) = llm._loop._tickets.values()
    ticket.listener.__self__._ringing = ringing  # type: ignore[attr-defined]
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()
    gate.open()
    while llm._loop.call(lambda: llm._engine.unfinished).result(LONG):
        pass
    assert request.finish_reason == "abort"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a generator that its event loop has left behind
        del outputs
        gc.collect()


# -- slow readers, busy loops -------------------------------------------------------------------------------------


def test_a_slow_reader_gets_the_newest(llm: AsyncLLM) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        rings = 0
        call_soon_threadsafe = loop.call_soon_threadsafe

        def counting(callback: Any, *args: Any, **options: Any) -> Any:
            nonlocal rings
            rings += getattr(callback, "__name__", "") == "_ring"
            return call_soon_threadsafe(callback, *args, **options)

        loop.call_soon_threadsafe = counting  # type: ignore[method-assign]
        expected = await last_of(llm.generate("Hello", SamplingParams(seed=1, max_tokens=50, ignore_eos=True)))
        outputs = llm.generate("Hello", SamplingParams(seed=1, max_tokens=50, ignore_eos=True))
        first = await anext(outputs)
        before = rings
        # The event loop itself is busy until the engine has done everything.
        while llm._loop.call(lambda: llm._engine.unfinished).result(LONG):
            pass
        assert len(ids(first)) < 40
        assert rings - before <= 1, "what a busy event loop is sent must not pile up"
        rest = [output async for output in outputs]
        assert [output.finished for output in rest] in ([True], [False, True])
        assert ids(rest[-1]) == ids(expected)

    run(main())


def test_the_event_loop_goes_on_during_a_pass(llm: AsyncLLM) -> None:
    """With a pass held, everything that an event loop does returns: the test would not come to its end otherwise."""

    async def main() -> None:
        gate = Gate(llm)
        first = asyncio.create_task(last_of(llm.generate("Hello", SHORT)))
        await gate.reached()
        second = asyncio.create_task(last_of(llm.generate("Hello again", SHORT)))
        third = llm.generate("Hello", ENDLESS)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(third), 0.05)
        await third.aclose()
        assert llm.stats().live_slots == 1
        aborting = asyncio.create_task(llm.abort("nobody"))
        with pytest.raises(InvalidRequest):
            await anext(llm.generate({"prompt_token_ids": []}))
        assert not first.done()
        gate.open()
        await asyncio.gather(first, second)
        assert not await aborting

    run(main())


def test_many_event_loops_in_many_threads(tiny: LoadedModel, llm: AsyncLLM) -> None:
    texts = [f"Number {i}" for i in range(24)]
    with LLM(tiny, kv_cache_memory="4MiB", max_model_len=128) as offline:
        expected = [ids(output) for output in offline.generate(texts, SHORT, use_tqdm=False)]
    got: dict[int, tuple[int, ...]] = {}

    def client(mine: range) -> None:
        async def all_of_mine() -> None:
            outputs = await asyncio.gather(*(last_of(llm.generate(texts[i], SHORT)) for i in mine))
            got.update({i: ids(output) for i, output in zip(mine, outputs, strict=True)})

        asyncio.run(all_of_mine())

    for _ in range(2):  # and one event loop after the other
        got.clear()
        threads = [threading.Thread(target=client, args=(range(i, 24, 6),)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        assert [got[i] for i in range(24)] == expected


def test_two_may_share_a_model(small: LoadedModel) -> None:
    prompts = [{"prompt_token_ids": prompt} for prompt in prompts_of(*range(1, 25))]
    params = mixed(24, 16)
    with LLM(small, kv_cache_memory="8MiB") as offline:
        expected = [ids(output) for output in offline.generate(prompts, params, use_tqdm=False)]

    async def main() -> None:
        async with open_llm(small) as one, open_llm(small, head_major=True, max_num_seqs=7) as two:
            readers = [last_of(llm.generate(*each)) for each in zip(prompts, params, strict=True) for llm in (one, two)]
            outputs = [ids(output) for output in await asyncio.gather(*readers)]
            assert outputs[::2] == outputs[1::2] == expected

    run(main())


# -- errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (("",), InvalidRequest, "empty"),
        ((None,), TypeError, "NoneType"),
        ((["a", "b"],), TypeError, "list"),
        (({"prompt_token_ids": [10**6]},), InvalidRequest, "token id"),
        (({"prompt_token_ids": iter([1])},), TypeError, "sequence"),
        (({"prompt_token_ids": [1] * 128},), InvalidRequest, "max_model_len"),
        (("word " * 50_000,), InvalidRequest, "max_model_len"),
        (({"text": "a"},), InvalidRequest, "one key"),
        (("a", {"temperature": 0}), TypeError, "SamplingParams"),
        (("a", [SHORT]), TypeError, "SamplingParams"),
        (("a", SamplingParams(stop_token_ids=[10**6])), InvalidRequest, "stop_token_ids"),
        (("a", SHORT, 5), TypeError, "request_id"),
        (("a", SHORT, "in use"), InvalidRequest, "in use"),
    ],
)
def test_bad_input_costs_its_caller_only(llm: AsyncLLM, given: Any, error: type[Exception], message: str) -> None:
    async def main() -> None:
        good = asyncio.create_task(last_of(llm.generate("Hello", SamplingParams(max_tokens=40), "in use")))
        while not llm._loop._tickets:
            await asyncio.sleep(0.001)
        outputs = llm.generate(*given)
        with pytest.raises(error, match=message):
            await anext(outputs)
        with pytest.raises(StopAsyncIteration):
            await anext(outputs)
        assert len(ids(await good)) > 0

    run(main())


@pytest.mark.parametrize(
    ("messages", "error"), [("Hello", TypeError), ([], InvalidRequest), ([{"content": "x"}], InvalidRequest)]
)
def test_what_is_no_conversation(llm: AsyncLLM, messages: Any, error: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(error, match="message"):
            await anext(llm.chat(messages, SHORT))
        with pytest.raises(TypeError, match="priority"):
            await anext(llm.generate("a", SHORT, priority="high"))  # type: ignore[arg-type]

    run(main())


def test_a_request_that_fails_fails_alone(llm: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, bad = llm._engine._runner, llm.tokenizer("Bad").input_ids[0]  # type: ignore[misc]
    forward, error = runner.forward, RuntimeError("the model broke")

    def breaks(chunks: Any) -> Any:
        if any(chunk.request.prompt_token_ids[0] == bad for chunk in chunks):
            raise error
        return forward(chunks)

    async def main() -> None:
        texts = ["Hello", "Bad", "Why", "Bad again"]
        before = [await last_of(llm.generate(text, SHORT)) for text in texts[::2]]
        monkeypatch.setattr(runner, "forward", breaks)
        results = await asyncio.gather(*(last_of(llm.generate(t, SHORT)) for t in texts), return_exceptions=True)
        assert results[1] is error
        assert results[3] is error
        assert [ids(result) for result in results[::2]] == [ids(output) for output in before]  # type: ignore[arg-type]
        await nothing_is_left(llm)

    run(main())


def test_an_engine_that_dies_is_an_error_for_all_and_nobody_hangs(tiny: LoadedModel) -> None:
    llm = open_llm(tiny)

    async def main() -> None:
        def dies() -> Any:
            raise SystemExit("pulled the plug")

        readers = [asyncio.create_task(last_of(llm.generate("Hello", ENDLESS))) for _ in range(6)]
        await anext(llm.generate("Hello", ENDLESS))
        await asyncio.wrap_future(llm._loop.call(lambda: setattr(llm._engine, "step", dies)))
        for result in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(result, EngineError)
            assert isinstance(result.__cause__, SystemExit)
        for late in (anext(llm.generate("Hello")), llm.abort("x"), llm.warmup()):
            with pytest.raises(EngineError, match="pulled the plug"):
                await late

    run(main())
    assert llm.stats().live_slots == 0
    llm.close()


# -- opening and closing ------------------------------------------------------------------------------------------


def test_closing_ends_every_stream_with_an_error(tiny: LoadedModel) -> None:
    async def main() -> None:
        async with open_llm(tiny) as llm:
            readers = [asyncio.create_task(last_of(llm.generate("Hello", ENDLESS))) for _ in range(10)]
            suspended = llm.generate("Hello", ENDLESS)
            await anext(suspended)
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert {type(result) for result in results} == {EngineError}
        assert all("closed" in str(result) for result in results)
        with pytest.raises(EngineError, match="closed"):
            await last_of(suspended)
        llm.close()
        uses: list[Callable[[], Any]] = [lambda: anext(llm.generate("Hello")), llm.warmup, lambda: llm.abort("x")]
        for use in uses:
            with pytest.raises(InvalidRequest, match="closed"):
                await use()
        with pytest.raises(InvalidRequest, match="closed"):
            llm.stats()
        assert llm.tokenizer is not None
        assert not llm._loop._thread.is_alive()

    run(main())


def test_closing_from_several_threads_at_once(tiny: LoadedModel) -> None:
    llm = open_llm(tiny)
    run(last_of(llm.generate("Hello", SHORT)))
    threads = [threading.Thread(target=llm.close) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
    assert llm._cache.closed
    assert not llm._loop._thread.is_alive()


def test_one_that_is_dropped_gives_everything_back(small: LoadedModel) -> None:
    async def main(llm: AsyncLLM) -> None:
        await last_of(llm.generate({"prompt_token_ids": [1]}, SHORT))
        async for _ in llm.generate({"prompt_token_ids": [1]}, ENDLESS):
            break

    llm = open_llm(small)
    run(main(llm))
    thread, left = llm._loop._thread, [weakref.ref(llm._cache), weakref.ref(llm._engine)]
    del llm
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive()
    gc.collect()
    assert [thing() for thing in left] == [None, None]


def test_warmup(llm: AsyncLLM) -> None:
    async def main() -> None:
        await llm.warmup()
        assert llm.stats().live_slots == 0
        outputs = llm.generate("Hello", ENDLESS)
        await anext(outputs)
        with pytest.raises(InvalidRequest, match="before requests"):
            await llm.warmup()
        await outputs.aclose()

    run(main())


def test_options_are_those_of_llm(tiny: LoadedModel) -> None:
    before = set(threading.enumerate())
    for options, error in (
        ({"max_num_seqs": 0}, ConfigError),
        ({"cache": "static"}, ConfigError),
        ({"seed": "1"}, TypeError),
        ({"max_model_length": 5}, TypeError),
    ):
        messages = []
        for door in (LLM, AsyncLLM):
            with pytest.raises(error) as caught:
                door(tiny, **options)  # type: ignore[arg-type]
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert set(threading.enumerate()) <= before


def test_a_snapshot_shows_who_runs_while_they_do(llm: AsyncLLM) -> None:
    async def main() -> None:
        outputs = llm.generate("Hello", ENDLESS, "mine")
        first = await anext(outputs)
        snapshot = await llm.snapshot()
        (running,) = snapshot.running
        assert running.request_id == "mine"
        assert running.output_tokens >= len(first.outputs[0].token_ids)
        assert snapshot.slots[running.slot].live
        assert snapshot.totals.generated_tokens == running.output_tokens
        await outputs.aclose()
        snapshot = await llm.snapshot()
        assert snapshot.running == ()
        assert snapshot.totals.ended["abort"] == 1

    run(main())


def test_a_closed_one_has_no_snapshot(small: LoadedModel) -> None:
    async def main() -> None:
        async with open_llm(small) as llm:
            assert (await llm.snapshot()).num_running == 0
        with pytest.raises(InvalidRequest):
            await llm.snapshot()

    run(main())


def test_readers_are_woken_once_a_step(small: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call into an event loop interrupts the engine: one for each reader of a step would be four times as many."""
    with contextlib.closing(open_llm(small)) as llm:
        steps = calls = 0
        step = llm._engine.step

        def counted_step() -> Any:
            nonlocal steps
            steps += 1
            return step()

        monkeypatch.setattr(llm._engine, "step", counted_step)

        async def read() -> int:
            params = replace(SHORT, max_tokens=40, output_kind=RequestOutputKind.DELTA)
            outputs = [output async for output in llm.generate({"prompt_token_ids": [1, 2, 3]}, params)]
            return sum(len(output.outputs[0].token_ids) for output in outputs if output.outputs)

        async def main() -> list[int]:
            loop = asyncio.get_running_loop()
            call_soon = loop.call_soon_threadsafe

            def counted(*args: Any, **more: Any) -> Any:
                nonlocal calls
                calls += threading.current_thread().name == "vattention-engine"
                return call_soon(*args, **more)

            monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
            return await asyncio.gather(*(read() for _ in range(4)))

        assert run(main()) == [40] * 4
        assert 0 < calls <= steps < 120

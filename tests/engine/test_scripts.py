"""Random scripts of add, abort, priority, pressure and failure: everybody ends once, and everything comes back.

Most scripts run on a model that remembers (support/remember.py), the others on a real one, so small that a pass takes
a millisecond. What may happen in a script is drawn first, see `Trouble`; what must hold after it is in `Script.check`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from support.faults import Fault, FaultyDriver
from support.models import engine_for, loaded, prompts_of, run, tiny_model
from support.remember import VOCABULARY, Rememberer, count_forks, expected, nothing_is_left
from vattention.cache import KVCache, KVLayout
from vattention.engine import reading, scheduler
from vattention.engine.engine import Engine
from vattention.engine.loading import LoadedModel
from vattention.engine.request import Chunk, Request
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import DriverError, OutOfPages
from vattention.memory import HostDriver, PagePool

TEST_ALL = os.environ.get("VATTENTION_TEST_ALL") == "1"
REMEMBERED = 9_400 if TEST_ALL else 470
REAL = 600 if TEST_ALL else 30
PAGE = 4096
LIMIT = 20_000  # steps; many where every pass of several fails, and each token is computed from its prompt
SEEN: Counter[str] = Counter()
"""What has happened in all scripts together."""


class Broken(Exception):
    """What fails on purpose."""


@dataclasses.dataclass
class Trouble:
    """What goes wrong in one script.

    Attributes:
        poison: requests whose passes fail.
        spoiled: requests whose tokens cannot be drawn.
        passes: how often a pass fails for no reason, and draws: how often drawing does; probabilities.
        company: passes of several requests fail.
        interrupt: number of the pass in which the user loses patience.
        driver: which calls of the driver fail.
        memory: share of the budget that the machine has.
    """

    poison: float = 0.0
    spoiled: float = 0.0
    passes: float = 0.0
    draws: float = 0.0
    company: bool = False
    interrupt: int | None = None
    driver: Fault | None = None
    memory: float | None = None

    @classmethod
    def draw(cls, dice: random.Random) -> Trouble:
        trouble = cls()
        for kind in dice.sample([field.name for field in dataclasses.fields(cls)], dice.choice([0, 0, 1, 1, 2])):
            match kind:
                case "company":
                    trouble.company = True
                case "interrupt":
                    trouble.interrupt = dice.randint(1, 30)
                case "driver":
                    trouble.driver = Fault(
                        dice.randint(3, 150), dice.random() < 0.2, dice.random() < 0.3, dice.random() < 0.3
                    )
                case "memory":
                    trouble.memory = dice.uniform(0.3, 0.9)
                case _:
                    setattr(trouble, kind, dice.uniform(0.02, 0.3))
        return trouble

    @property
    def honest(self) -> bool:
        """Whether the cache can do what `fits` says."""
        return self.driver is None and self.memory is None


@dataclasses.dataclass
class Wish:
    """A request to be made, and what each sample of it says when nobody disturbs it, however long."""

    prompt: Sequence[int]
    params: SamplingParams
    says: Callable[[int, int], list[int]]  # sample, tokens


class Script:
    """One engine, from its first request to the last thing checked."""

    def __init__(
        self,
        dice: random.Random,
        engine: Engine,
        trouble: Trouble,
        driver: FaultyDriver,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.dice, self.engine, self.trouble, self.driver = dice, engine, trouble, driver
        self.monkeypatch = monkeypatch
        self.cache = engine._cache
        self.made: dict[Request, Wish] = {}
        self.poisoned: set[Request] = set()
        self.spoiled: set[Request] = set()
        self.blamed: set[Request] = set()  # who must end with an error
        self.failed: set[tuple[Request, int]] = set()  # who shared a failing pass, with how many tokens
        self.aborted: set[Request] = set()
        self.returned: Counter[Request] = Counter()  # with a finish_reason
        self.overtaken: Counter[Request] = Counter()
        self.older: Counter[Request] = Counter()  # admissions of older ones while it waits, and its own
        self.passes = 0
        self._watch()

    def _watch(self) -> None:
        """Stand between the engine and its model, and count who is admitted past whom."""
        forward, admit, draw = self.engine._runner.forward, self.engine.scheduler._admit, reading._draw_all

        def breaking(chunks: Sequence[Chunk]) -> torch.Tensor:
            self.passes += 1
            assert sum(chunk.end - chunk.start for chunk in chunks) <= self.engine.scheduler._max_num_batched_tokens
            late = self.dice.random() < 0.5  # K and V are written, or not
            logits = forward(chunks) if late else None
            if self.passes == self.trouble.interrupt:
                raise KeyboardInterrupt
            fails = self.dice.random() < self.trouble.passes or (self.trouble.company and len(chunks) > 1)
            if fails or any(chunk.request.family[0] in self.poisoned for chunk in chunks):
                SEEN["a pass failed"] += 1
                if len(chunks) == 1:
                    self.blamed.add(chunks[0].request.family[0])
                else:
                    now = {(chunk.request, len(chunk.request.output_token_ids)) for chunk in chunks}
                    assert not now & self.failed, "between two failing passes that it shares, a request gets a token"
                    self.failed |= now
                raise Broken
            return logits if logits is not None else forward(chunks)

        def drawing(samples: Sequence[Request], logits: torch.Tensor, text_of: Any) -> list[reading.New]:
            leaders = {sample.family[0] for sample in samples}
            late = self.dice.random() < 0.5
            new = draw(samples, logits, text_of) if late else None
            if leaders & self.spoiled or self.dice.random() < self.trouble.draws:
                SEEN["drawing failed"] += 1
                if len(samples) == 1:
                    self.blamed |= leaders
                raise Broken
            return new if new is not None else draw(samples, logits, text_of)

        def admitting(request: Request) -> bool:
            if not admit(request):
                return False
            self.older[request] += 1  # itself: it has waited once
            for other in self.engine.scheduler.waiting:
                if (other.number, other.sample) < (request.number, request.sample):
                    self.overtaken[other] += 1
                    most = scheduler.MAX_PASSED * (1 + self.older[other])
                    assert self.overtaken[other] <= most
                    SEEN["overtaken as often as may be"] += self.overtaken[other] == most
                else:
                    self.older[other] += 1
            return True

        self.engine._runner.forward = breaking  # type: ignore[method-assign]
        self.engine.scheduler._admit = admitting  # type: ignore[method-assign]
        self.monkeypatch.setattr(reading, "_draw_all", drawing)

    def add(self, wish: Wish, priority: int) -> None:
        request = self.engine.add_request(wish.prompt, wish.params, f"r{len(self.made)}", priority=priority)
        self.made[request] = wish
        if self.dice.random() < self.trouble.poison:
            self.poisoned.add(request)
        if self.dice.random() < self.trouble.spoiled:
            self.spoiled.add(request)

    def abort(self) -> None:
        """Of anybody, whatever became of it; twice, as once is enough."""
        if not self.made:
            return
        request = self.dice.choice(list(self.made))
        left = [sample for sample in request.family if not sample.finished]
        if any(sample.slot is not None for sample in left):
            SEEN["aborted, running"] += 1
        elif left:
            SEEN["aborted, " + ("preempted" if any(s.preemptions for s in left) else "waiting")] += 1
        SEEN["aborted, not yet branched"] += bool(left) and request.unbranched and len(left) > 1
        SEEN["aborted, suspect"] += any(sample.suspect for sample in left)
        assert self.engine.abort(request.request_id) == bool(left)
        assert not self.engine.abort(request.request_id)
        assert all(sample.finish_reason == "abort" for sample in left)
        self.aborted.update(left)

    def step(self) -> None:
        before = [sample for leader in self.made for sample in leader.family if not sample.finished]
        try:
            moved = self.engine.step()
        except KeyboardInterrupt:
            SEEN["interrupted"] += 1
            harmed = [sample for sample in before if sample.finished]
            for sample in harmed:
                if sample.finish_reason == "abort":
                    self.aborted.add(sample)
                else:  # it had ended before, in the same step
                    self.returned[sample] += 1
            assert self.cache.stats().live_slots == 0
            return
        assert len(set(moved)) == len(moved)
        ended = {sample for sample in moved if sample.finished}
        assert ended == {sample for sample in before if sample.finished}, "who ends is returned, then and only then"
        self.returned.update(ended)
        assert self.cache.stats().live_slots == len(self.engine.scheduler.running)

    def play(self, wishes: Callable[[], Wish], arrivals: int) -> None:
        """Let requests come while others run, now and then with an abort, until nobody is left."""
        dice = self.dice
        mixed, rate, aborts = dice.random() < 0.7, dice.choice([0.2, 0.7, 3.0]), dice.choice([0.0, 0.05])
        for _ in range(LIMIT):
            while arrivals and dice.random() < rate / (1 + rate):
                self.add(wishes(), dice.choice([-1, 0, 0, 5]) if mixed else 0)
                arrivals -= 1
            if dice.random() < aborts:
                self.abort()
            if not arrivals and not self.engine.unfinished:
                return
            self.step()
        raise AssertionError("somebody waits for ever")

    def check(self) -> None:
        SEEN["scripts"] += 1
        SEEN["preemptions"] += self.engine.scheduler.preemptions
        SEEN["driver failures"] += self.driver.failures
        most = scheduler.MAX_PREEMPTIONS + (not self.trouble.honest)
        capacity = self.cache.capacity()
        for leader, wish in self.made.items():
            for sample in leader.family:
                reason, output = sample.finish_reason, sample.output_token_ids
                SEEN[str(reason)] += 1
                assert reason in ("stop", "length", "abort", "error")
                assert (reason == "abort") == (sample in self.aborted)
                assert self.returned[sample] == (reason != "abort")
                assert sample.preemptions <= most
                SEEN["preempted as often as may be"] += sample.preemptions == scheduler.MAX_PREEMPTIONS
                full = wish.says(sample.sample, len(leader.prompt_token_ids))
                assert output == full[: len(output)]
                if reason == "stop":
                    assert len(output) == len(full)
                elif reason == "length" and self.trouble.honest:
                    assert len(output) in (len(full), capacity + 1 - len(leader.prompt_token_ids))
                elif reason == "error":
                    assert isinstance(leader.error, (Broken, DriverError, OutOfPages))
                assert leader.error is sample.error
                self._check_numbers(leader, sample)
            if self.trouble.honest:
                assert (leader.error is not None) == (leader in self.blamed), "who fails alone ends, and nobody else"
        self.driver.repair()
        self.driver.memory = None
        nothing_is_left(self.engine, self.cache)

    def _check_numbers(self, leader: Request, sample: Request) -> None:
        times, output = sample.token_times, sample.output_token_ids
        assert len(times) == len(output)
        assert times == sorted(times)
        if sample.params.logprobs is not None:
            assert [next(iter(entry)) for entry in sample.logprobs] == output
        if output:
            assert sample.scheduled is not None
            assert leader.arrival <= sample.scheduled <= times[0]
            if leader.params.prompt_logprobs is not None:
                assert len(leader.prompt_logprobs) == len(leader.prompt_token_ids)
        metrics = self.engine.output(leader).metrics
        assert metrics.preemptions == sum(each.preemptions for each in leader.family)


def bounds(dice: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones are reached, and hold for the same reasons as large ones."""
    monkeypatch.setattr(scheduler, "MAX_PREEMPTIONS", dice.choice([1, 2, 3]))
    monkeypatch.setattr(scheduler, "MAX_PASSED", dice.choice([1, 2, 4]))


def pool_of(pages: int, trouble: Trouble) -> tuple[PagePool, FaultyDriver]:
    memory = None if trouble.memory is None else int(pages * trouble.memory) * PAGE
    driver = FaultyDriver(HostDriver(), trouble.driver, memory)
    return PagePool(driver, PAGE, pages * PAGE), driver


# -- a model that remembers -------------------------------------------------------------------------------------------


def a_wish(dice: random.Random, capacity: int) -> Wish:
    prompt = [dice.randrange(VOCABULARY) for _ in range(dice.randint(1, min(40, capacity - 1)))]
    tokens = dice.choice([1, 3, dice.randint(1, 20), None])
    n = dice.choice([1, 1, 2, 3])
    # Several samples must not be greedy: next to nothing is left to chance.
    params = SamplingParams(temperature=0 if n == 1 else 1e-9, max_tokens=tokens, n=n)
    most = 64 - len(prompt)
    return Wish(prompt, params, lambda sample, length: expected(prompt, most if tokens is None else min(tokens, most)))


def remembered(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    bounds(dice, monkeypatch)
    trouble = Trouble.draw(dice)
    slots = dice.randint(1, 6)
    rows = slots + dice.randint(0, 30)
    pool, driver = pool_of(dice.choice([8, 10, 14, 20, 30, 60]), trouble)
    layout = KVLayout(1, 1, 128, torch.float32, slots, 64)  # 8 tokens a page, two streams
    with KVCache(layout, pool=pool, poison=True) as cache:
        runner = Rememberer(cache, rows)
        engine = Engine(
            runner,  # type: ignore[arg-type]
            cache,
            vocab_size=VOCABULARY,
            max_num_seqs=slots,
            max_num_batched_tokens=rows,
            max_model_len=64,
        )
        runner.engine = engine
        count_forks(cache, runner)
        script = Script(dice, engine, trouble, driver, monkeypatch)
        script.play(functools.partial(a_wish, dice, cache.capacity()), dice.randint(3, 12))
        script.check()
    driver.close()


@pytest.mark.parametrize("part", range(10))
def test_everybody_ends_once_and_everything_comes_back(part: int) -> None:
    for seed in range(part, REMEMBERED, 10):
        with pytest.MonkeyPatch.context() as monkeypatch:
            try:
                remembered(seed, monkeypatch)
            except BaseException:
                print("script", seed)
                raise


# -- a real model -----------------------------------------------------------------------------------------------------

PROMPTS = prompts_of(1, 3, 17, 40, 64, 65, 100, 30)
ASKED: list[dict[str, Any]] = [
    {"temperature": 0},
    {"n": 3},
    {"top_p": 0.9, "logprobs": 2, "prompt_logprobs": 1},
    {"n": 2, "repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"stop_token_ids": list(range(0, 60, 3))},
    {"min_tokens": 9, "stop_token_ids": list(range(0, 200, 3)), "n": 2},
    {"top_k": 20, "logit_bias": {7: 4.0}},
    {"frequency_penalty": -1.0},
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model(num_hidden_layers=1))


@pytest.fixture(scope="module")
def wishes(model: LoadedModel) -> list[Wish]:
    """With what each says alone, in float32."""
    result = []
    for i, (prompt, asked) in enumerate(zip(PROMPTS, ASKED, strict=True)):
        params = SamplingParams(**{"temperature": 1.0, "max_tokens": 24, "seed": i, **asked})
        (alone,) = run(engine_for(model, max_num_seqs=1, max_num_batched_tokens=128), [prompt], params)
        texts = [sample.output_token_ids for sample in alone.family]
        result.append(Wish(prompt, params, lambda sample, length, texts=texts: texts[sample]))  # type: ignore[misc]
    return result


def real(seed: int, model: LoadedModel, wishes: list[Wish], monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)
    bounds(dice, monkeypatch)
    trouble = Trouble.draw(dice)
    slots = dice.randint(1, 6)
    pool, driver = pool_of(dice.choice([6, 8, 10, 14, 40]), trouble)  # 64 tokens a page, two streams
    engine = engine_for(
        model,
        max_num_seqs=slots,
        max_num_batched_tokens=slots + dice.randint(8, 60),
        memory=None,
        pool=pool,
        poison=True,
    )
    with engine._cache as cache:
        script = Script(dice, engine, trouble, driver, monkeypatch)
        fitting = [wish for wish in wishes if len(wish.prompt) < cache.capacity()]
        script.play(lambda: dice.choice(fitting), dice.randint(3, 12))
        script.check()
    driver.close()


@pytest.mark.parametrize("part", range(4))
def test_the_same_with_a_real_model(part: int, model: LoadedModel, wishes: list[Wish]) -> None:
    """What is said is what each says alone, at temperature 1 in float32, whatever was preempted or tried again."""
    for seed in range(part, REAL, 4):
        with pytest.MonkeyPatch.context() as monkeypatch:
            try:
                real(seed, model, wishes, monkeypatch)
            except BaseException:
                print("script", seed)
                raise


def test_the_scripts_saw_everything() -> None:
    """The control: what the scripts are about has happened in them, and bounds were reached."""
    if SEEN["scripts"] < REMEMBERED + REAL:
        pytest.skip("some of the scripts were left out")
    print(SEEN)
    assert SEEN.keys() >= {"stop", "length", "abort", "error"}
    for what in (
        *("preemptions", "preempted as often as may be", "overtaken as often as may be"),
        *("a pass failed", "drawing failed", "driver failures", "interrupted"),
        *("aborted, running", "aborted, waiting", "aborted, preempted", "aborted, not yet branched"),
    ):
        assert SEEN[what] >= 5, what
    assert SEEN["aborted, suspect"] > 0

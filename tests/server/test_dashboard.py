"""The page: its data, its policy, and what a browser makes of both while an engine works."""

import asyncio
import contextlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from support.models import loaded, prompts_of, tiny_model
from support.servers import serving
from vattention import AsyncLLM, SamplingParams
from vattention.engine.loading import LoadedModel
from vattention.server.app import create_app
from vattention.server.dashboard.data import MOST_REQUESTS, MOST_SLOTS, page_data
from vattention.server.dashboard.history import POINTS, History
from vattention.server.settings import ServerSettings

LONG = 60.0
PAGE = 4096


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return loaded(tiny_model())


def open_llm(model: LoadedModel, **options: Any) -> AsyncLLM:
    options = {"max_num_seqs": 4, "kv_cache_memory": "4MiB", "max_model_len": 256, "page_size": PAGE, **options}
    return AsyncLLM(model, compile=False, **options)


def endless(**more: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": None, "ignore_eos": True, "seed": 1, **more})


def new_app(llm: AsyncLLM, **settings: Any) -> FastAPI:
    return create_app(llm, ServerSettings(served_model_names=("tiny",), **settings))


def column(data: dict[str, Any], name: str) -> list[Any]:
    return [point[data["columns"].index(name)] for point in data["points"]]


# -- the data


def test_the_points_say_what_was_done_in_between(model):
    async def main() -> dict[str, Any]:
        async with open_llm(model) as llm:
            history = History(llm)
            assert page_data(history, "tiny", 0)["now"] is None
            await history.take()
            async for _ in llm.generate({"prompt_token_ids": list(prompts_of(20)[0])}, endless(max_tokens=50)):
                pass
            await history.take()
            first, second = (snapshot.totals for snapshot in history._snapshots)
            assert second.generated_tokens - first.generated_tokens == 50
            return page_data(history, "tiny", 0)

    data = asyncio.run(main())
    seconds = column(data, "time")[1] - column(data, "time")[0]
    assert column(data, "output") == [0, pytest.approx(50 / seconds, rel=0.01)]
    assert column(data, "prompt") == [0, pytest.approx(20 / seconds, rel=0.01)]
    assert column(data, "first_token")[0] is None
    assert 0 < column(data, "first_token")[1] <= column(data, "first_token_p99")[1] < LONG
    assert 0 < column(data, "next_token")[1] <= column(data, "next_token_p99")[1] < LONG
    assert data["now"]["ended"] == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_a_reader_gets_only_what_is_new_and_points_do_not_pile_up(model):
    async def main() -> None:
        async with open_llm(model) as llm:
            history = History(llm)
            for _ in range(POINTS + 20):
                await history.take()
            assert column(page_data(history, "tiny", 0), "number") == list(range(20, POINTS + 20))
            assert column(page_data(history, "tiny", POINTS + 18), "number") == [POINTS + 18, POINTS + 19]
            assert page_data(history, "tiny", 10**9)["points"] == []

    asyncio.run(main())


def test_the_data_are_bounded_however_many_slots_and_requests_there_are(model):
    async def main() -> None:
        async with open_llm(model, max_num_seqs=100, max_model_len=64, max_num_batched_tokens=100) as llm:
            readers = [
                asyncio.create_task(collect(llm, (1, 2, 3), endless(max_tokens=40), f"{'x' * 300}{number}"))
                for number in range(150)
            ]
            history = History(llm)
            while not (history.latest and history.latest.num_running > MOST_SLOTS):
                await history.take()
            now = page_data(history, "tiny", 0)["now"]
            assert (len(now["slots"]), now["num_slots"]) == (MOST_SLOTS, 100)
            assert len(now["requests"]) == MOST_REQUESTS
            assert max(len(request[0]) for request in now["requests"]) <= 64
            assert now["running"] > MOST_SLOTS
            assert len(json.dumps(now)) < 20_000
            await asyncio.gather(*readers)

    asyncio.run(main())


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, name: str | None = None) -> Any:
    return [output async for output in llm.generate({"prompt_token_ids": list(prompt)}, params, name)][-1]


def test_the_parts_of_the_budget_add_up(model):
    async def main() -> None:
        async with open_llm(model) as llm:
            history = History(llm)
            generator = llm.generate({"prompt_token_ids": list(prompts_of(150)[0])}, endless(n=3))
            await collect(llm, prompts_of(100)[0], endless(max_tokens=5))
            await anext(generator)
            await history.take()
            now = page_data(history, "tiny", 0)["now"]
            memory = now["memory"]
            assert sum(memory[name] for name in ("live", "kept", "free", "broken")) == memory["created"]
            assert 0 < memory["live"] < memory["mapped"]  # shared pages count once, and at each place
            assert memory["created"] <= memory["budget"]
            live = [slot for slot in now["slots"] if slot[0]]
            assert len(live) == 3
            assert all(0 < slot[4] <= slot[2] for slot in live)
            assert sum(slot[2] for slot in live) == memory["mapped"]
            await generator.aclose()

    asyncio.run(main())


def test_an_engine_that_has_stopped_is_said_to_have(model):
    async def main() -> None:
        llm = open_llm(model)
        history = History(llm)
        await history.take()
        await asyncio.to_thread(llm.close)
        await asyncio.wait_for(history.run(), LONG)
        data = page_data(history, "tiny", 0)
        assert data["up"] is False
        assert data["now"]["running"] == 0  # the last that is known

    asyncio.run(main())


# -- the page


class Outside(HTMLParser):
    """Finds whatever a page would load, and scripts or styles that the policy would stop."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if (name in ("src", "srcset", "href") and not (value or "").startswith("data:")) or name == "style":
                self.found.append(f"{tag} {name}={value}")
            if name.startswith("on"):
                self.found.append(f"{tag} {name}")


def test_the_page_is_one_piece_and_its_policy_allows_just_that(model):
    async def main() -> httpx.Response:
        async with open_llm(model) as llm:
            transport = httpx.ASGITransport(new_app(llm))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for wrong in ("x", "-1", "1e400"):
                    assert (await client.get("/dashboard/data", params={"after": wrong})).status_code == 400
                assert (await client.get("/dashboard/data")).json()["points"] == []
                return await client.get("/dashboard")

    response = asyncio.run(main())
    assert response.headers["content-type"].startswith("text/html")
    policy = dict(part.split(" ", 1) for part in response.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)
    parser = Outside()
    parser.feed(response.text)
    assert parser.found == []
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", response.text)
    assert "/* page" not in response.text


def test_it_can_be_left_out(model):
    async def main() -> None:
        async with open_llm(model) as llm:
            transport = httpx.ASGITransport(new_app(llm, enable_dashboard=False, enable_metrics=False))
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                for path in ("/dashboard", "/dashboard/data", "/metrics"):
                    assert (await client.get(path)).status_code == 404

    asyncio.run(main())


# -- in a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Load:
    """Requests that go on until they are told to stop, in a thread of their own."""

    def __init__(self, llm: AsyncLLM, *prompts: tuple[int, ...], n: int) -> None:
        self._llm = llm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(prompts, n)))

    async def _run(self, prompts: tuple[tuple[int, ...], ...], n: int) -> None:
        await asyncio.gather(*(self._again(prompt, n) for prompt in prompts))

    async def _again(self, prompt: tuple[int, ...], n: int) -> None:
        while not self._stop.is_set():
            await collect(self._llm, prompt, endless(n=n))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(LONG)


def eventually(condition: Callable[[], Any]) -> Any:
    """What it gives as soon as that is true."""
    deadline = time.monotonic() + LONG
    while not (found := condition()):
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
    return found


def metric(url: str, name: str) -> float:
    (found,) = re.findall(rf"^vattention:{name}{{[^}}]*}} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize(("width", "height", "scheme"), [(1280, 800, "light"), (390, 844, "dark")])
def test_a_browser_shows_what_the_engine_does(model, browser, width, height, scheme):
    complaints: list[str] = []
    asked: set[str] = set()
    with open_engine(model) as llm, serving(new_app(llm)) as url:
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.add(request.url.split("?")[0]))
        with Load(llm, *prompts_of(150, 150), n=2):
            page.goto(f"{url}/dashboard")
            eventually(lambda: page.inner_text("#status") == "live")

            def shown(of: str) -> str:
                text: str = page.inner_text(of)
                return text

            eventually(lambda: shown("#running") == "4")
            before = eventually(lambda: shown("#requests-text"))
            eventually(lambda: shown("#requests-text") != before)  # it moves
            output = "figure[data-line=output] .value"
            eventually(lambda: shown(output) not in ("–", "0"))
            eventually(lambda: shown("figure[data-line=next_token] .value") != "–")
            assert eventually(lambda: page.locator("#request-list tr").count() == 2)
            eventually(lambda: shown("#shared") != "0 B")
            assert page.locator(".slot").count() == 4
            assert page.locator(".slot:not(.idle) .shared").count() > 0
            assert page.get_by_role("img", name=re.compile(r"^Slot 3: ")).count() == 1
            wide = page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert wide <= 0, f"{wide} pixels to scroll sideways"
            assert metric(url, "num_requests_running") > 0
        # When it is over both say the same, to the last token.
        tokens = eventually(lambda: metric(url, "num_requests_running") == 0 and metric(url, "generation_tokens_total"))
        eventually(lambda: f"{tokens:,.0f} tokens generated" in shown("#requests-text"))
        eventually(lambda: shown("#running") == shown("#waiting") == "0")
        eventually(lambda: page.locator("#no-requests").is_visible())
        assert shown("#live") == "0 B"
        assert shown("#needed") == "0 B"
        page.close()
    assert complaints == []
    assert asked == {f"{url}/dashboard", f"{url}/dashboard/data"}


@contextlib.contextmanager
def open_engine(model: LoadedModel) -> Iterator[AsyncLLM]:
    llm = open_llm(model)
    try:
        yield llm
    finally:
        llm.close()


def test_a_browser_says_when_the_server_does_not_answer_any_more(model, browser):
    with open_engine(model) as llm:
        with serving(new_app(llm)) as url:
            page = browser.new_page()
            page.goto(f"{url}/dashboard")
            eventually(lambda: page.inner_text("#status") == "live")
            llm.close()
            eventually(lambda: page.inner_text("#status") == "the engine has stopped")
        eventually(lambda: page.inner_text("#status") == "no answer")
        page.close()


def test_with_api_keys_a_browser_needs_one_as_a_password(model, browser):
    with open_engine(model) as llm, serving(new_app(llm, api_keys=("correct-horse",))) as url:
        for path in ("/dashboard", "/dashboard/data", "/metrics"):
            assert httpx.get(url + path).status_code == 401
            assert httpx.get(url + path, headers={"authorization": "Bearer correct-horse"}).status_code == 200
        context = browser.new_context(http_credentials={"username": "anybody", "password": "correct-horse"})
        page = context.new_page()
        page.goto(f"{url}/dashboard")
        eventually(lambda: page.inner_text("#status") == "live")
        assert page.locator(".slot").count() == 4
        assert "correct-horse" not in page.content()
        context.close()

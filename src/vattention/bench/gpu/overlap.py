"""What mapping costs while decoding: in the background, between two steps, or done before (the paper, figure 10)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from vattention.bench.gpu.clock import Deadline
from vattention.bench.gpu.model import random_model
from vattention.bench.gpu.report import Panel, Report, Setting
from vattention.bench.gpu.work import Sizes, decode_steps, engine, prompts, sizes
from vattention.bench.table import table
from vattention.engine.loading import LoadedModel
from vattention.llm import LLM

SIDES = ("in the background", "between two steps", "mapped before")
_MOST = 6  # rounds of each side


def overlap(setting: Setting, *, model: LoadedModel | None = None) -> Report:
    """Seconds of each decode step of the three sides, in rounds that alternate, the median of the rounds."""
    model = model or random_model(sizes(setting, 0).shape, setting.device, setting.dtype, seed=setting.seed)
    wanted = sizes(setting, model.weight_bytes)
    rounds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    deadline = Deadline(setting.seconds)
    with engine(model, wanted, **_growing(setting)) as llm:
        chosen = str(llm.layout)
        batch = max(wanted.batches)
        assert llm.layout is not None
        lengths = crossing(llm.layout.tokens_per_page, batch, wanted)
        tokens = prompts(setting, lengths, model.geometry.vocab_size)
        decode_steps(llm, tokens, 6)  # what is made at first use
        here, elsewhere = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
        while not deadline.over or not rounds[SIDES[-1]]:
            for side in SIDES:
                _fresh(llm)
                with _without_prefetch(llm, side == "between two steps"):
                    steps = decode_steps(llm, tokens, wanted.output, ahead=side == "mapped before")
                here[side] += steps.calls_here
                elsewhere[side] += steps.calls_elsewhere
                rounds[side].append(steps.seconds)
            if len(rounds[SIDES[0]]) >= _MOST:
                break
    return _report(rounds, here, elsewhere, batch, wanted, chosen)


def _growing(setting: Setting) -> dict[str, Any]:
    """On a device what is chosen; tiny, pages so small that there is something to map."""
    return {"page_size": "4KiB"} if setting.tiny else {}


def _fresh(llm: LLM) -> None:
    """Nothing is left mapped or created by the round before."""
    llm.engine._cache.trim()


def crossing(tokens_per_page: int, batch: int, wanted: Sizes) -> list[int]:
    """Prompts of about `wanted.prompt` tokens whose decodes need new pages, one request after the other."""
    edge = max(1, round(wanted.prompt / tokens_per_page)) * tokens_per_page
    span = max(1, min(wanted.output, edge) - 6)
    return [max(1, edge - 3 - number * span // batch) for number in range(batch)]


@contextmanager
def _without_prefetch(llm: LLM, off: bool) -> Iterator[None]:
    """Let steps map what they need themselves."""
    scheduler: Any = llm.engine.scheduler
    if off:
        scheduler.prefetch = lambda chunks: None
    try:
        yield
    finally:
        if off:
            del scheduler.prefetch


def _report(
    rounds: dict[str, list[list[float]]],
    here: dict[str, int],
    elsewhere: dict[str, int],
    batch: int,
    wanted: Sizes,
    chosen: str,
) -> Report:
    # Pages are needed at the same steps in every round: the median over rounds keeps that and loses the rest.
    typical = {side: [median(times) for times in zip(*each, strict=True)] for side, each in rounds.items()}
    middle = {side: median(steps) for side, steps in typical.items()}
    rows = [
        [
            side,
            f"{middle[side] * 1e3:.2f}",
            f"{max(steps) * 1e3:.2f}",
            f"{max(steps) / middle[side]:.2f}",
            f"{sum(steps) / sum(typical[SIDES[-1]]):.4f}",
            len(rounds[side]),
            here[side],
            elsewhere[side],
        ]
        for side, steps in typical.items()
    ]
    head = [
        "pages are mapped",
        "median ms",
        "worst ms",
        "worst/median",
        "sum/mapped before",
        "rounds",
        "calls by the engine",
        "by others",
    ]
    text = (
        f"{batch} requests of about {wanted.prompt} tokens decode together, {wanted.output} tokens each; {chosen}\n"
        f"{table(head, rows)}"
    )
    series = {side: [(float(n), step * 1e3) for n, step in enumerate(steps)] for side, steps in typical.items()}
    samples = {
        "rounds": rounds,
        "calls_by_the_engine": here,
        "calls_by_others": elsewhere,
        "requests": batch,
        "layout": chosen,
    }
    return Report(samples, text, [Panel("decode steps, median of the rounds", "step", "ms", series)])

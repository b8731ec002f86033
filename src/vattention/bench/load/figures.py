"""From the answers of one run to its figures. Their names are those of vLLM's load generator where it has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from vattention.bench.load.answer import Answer
from vattention.bench.ratios import percentile

TIMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "from text to text",
    "e2el": "whole answer",
}
"""Each in milliseconds: until the first text; the mean of an answer after it, a token; between two pieces of text, of
all answers; until the answer has ended."""

STATISTICS = ("mean", "p50", "p90", "p99")
RATES = {
    "output_throughput": "output tokens/s",
    "request_throughput": "requests/s",
    "input_throughput": "prompt tokens/s",
}


@dataclass(frozen=True)
class Figures:
    """One run.

    Attributes:
        seconds: from the first request to the end of the last answer.
        completed: answers without a failure; all other figures are of those.
        failures: kind -> how many.
        example: what was said of the first failure.
        prompt_tokens, output_tokens: of all answers, as the server counts them.
        prompt_range: the shortest and the longest prompt, as the server counts.
        values: "output_throughput" and the other `RATES`, and "p99_ttft_ms" and its kind where there are any.
        client_cpu: seconds of CPU time that this generator used.
    """

    seconds: float
    completed: int
    failures: dict[str, int]
    example: str
    prompt_tokens: int
    output_tokens: int
    prompt_range: tuple[int, int]
    values: dict[str, float]
    client_cpu: float = 0.0


def figures_of(answers: Sequence[Answer], *, client_cpu: float = 0.0) -> Figures:
    """Of at least one answer."""
    good = [answer for answer in answers if answer.failure is None]
    bad = [answer for answer in answers if answer.failure is not None]
    seconds = max(answer.ended for answer in answers) - min(answer.due for answer in answers)
    prompt, output = sum(a.prompt_tokens for a in good), sum(a.output_tokens for a in good)
    values = {
        "output_throughput": output / seconds,
        "request_throughput": len(good) / seconds,
        "input_throughput": prompt / seconds,
    }
    for name, times in (
        ("ttft", [answer.first for answer in good]),
        ("tpot", [answer.each for answer in good if answer.each is not None]),
        ("itl", [gap for answer in good for gap in answer.gaps]),
        ("e2el", [answer.whole for answer in good]),
    ):
        if times:
            ms = [seconds * 1e3 for seconds in times]
            shares = {f"p{share}": percentile(ms, share / 100) for share in (50, 90, 99)}
            values |= {f"{which}_{name}_ms": v for which, v in {"mean": sum(ms) / len(ms), **shares}.items()}
    lengths = [answer.prompt_tokens for answer in good] or [0]
    return Figures(
        seconds=seconds,
        completed=len(good),
        failures=dict(Counter(str(answer.failure) for answer in bad)),
        example=f"{bad[0].failure}: {bad[0].detail}" if bad else "",
        prompt_tokens=prompt,
        output_tokens=output,
        prompt_range=(min(lengths), max(lengths)),
        values=values,
        client_cpu=client_cpu,
    )

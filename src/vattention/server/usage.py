"""Counting tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vattention.server.protocol.sampling import SamplingFields


@dataclass(eq=False)
class UsageCount:
    """Tokens of a request so far: each prompt counts once, and all samples do."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, Any]:
        """In OpenAI's shape."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def usage_in_chunks(request: SamplingFields, count: UsageCount) -> dict[str, Any]:
    """What each chunk of a stream says about usage: nothing, null before the end, or all so far."""
    options = request.stream_options
    if options is None or not options.include_usage:
        return {}
    return {"usage": count.body() if options.continuous_usage_stats else None}


def usage_at_end(request: SamplingFields, head: dict[str, Any], count: UsageCount) -> dict[str, Any] | None:
    """The chunk that ends a stream, where it was asked for."""
    options = request.stream_options
    return None if options is None or not options.include_usage else {**head, "choices": [], "usage": count.body()}

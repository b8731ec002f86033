"""What the KV cache took, in words."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from vattention.cache import CacheStats
    from vattention.llm import LLM


class Fullest:
    """What the cache of `llm` holds when it needs most, while this context is open.

    Afterwards every slot is free and nothing is needed. Before each forward pass the slots have what it needs: that is
    when it is looked at.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self.stats: CacheStats = llm.stats()

    def __enter__(self) -> Self:
        self._hook = self._llm.model.register_forward_pre_hook(self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hook.remove()

    def _look(self, *_: object) -> None:
        self.stats = max(self._llm.stats(), self.stats, key=lambda stats: stats.needed)

    def __str__(self) -> str:
        return in_words(self.stats)


def in_words(stats: CacheStats) -> str:
    """The four sizes that matter, on one line."""
    from vattention.memory.sizes import format_size

    sizes = (("reserved", stats.reserved), ("created", stats.created), ("mapped", stats.mapped))
    return ", ".join(f"{format_size(size)} {name}" for name, size in (*sizes, ("needed", stats.needed)))

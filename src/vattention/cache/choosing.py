"""Which layout, and which page, when nobody says: arithmetic on the model's shape and the machine, with the reason.

A request takes whole pages of every stream, so it wastes half a page of each on average. Fewer streams (K and V
together, several layers in one) waste less, and spread what a kernel reads over more pages; more streams (a stream for
each head) let kernels read densely, and waste more. Larger pages cost fewer calls, and waste more. Section 8 of the
paper (arXiv 2405.04437) is about the same trade. docs/decisions.md says which of the rules here are measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from vattention.cache.layout import KVLayout
from vattention.cache.page_size import choose_page_size
from vattention.errors import ConfigError
from vattention.memory.sizes import format_size

HEAD_MAJOR_FROM = 1024
"""Expected tokens from which on a CPU decodes noticeably faster head by head; at half as many it is 4%."""

WASTE = 0.05
"""Share of a typical request that may be wasted for the sake of speed."""

LARGE_PAGE_WASTE = 0.01
"""The same for the sake of fewer calls, to a device."""

FIRST_PAGES = 4
"""The first pages of all slots together take at most the budget over this: requests may be shorter than expected."""

_LARGEST_PAGE = 16 << 20
_MAPPINGS_A_STREAM = 2  # of a slot: what is mapped, and the rest

Auto = Literal["auto"]


@dataclass(frozen=True)
class Place:
    """Where a cache is to be.

    Attributes:
        device: "cpu" or "cuda".
        budget: physical memory for it, in bytes.
        granularity: bytes of the smallest page.
        mappings: that may still be made; None without a limit.
    """

    device: str
    budget: int
    granularity: int
    mappings: int | None = None


@dataclass(frozen=True)
class Given:
    """What the user has decided; "auto", and None for the page, is left to `choose`. Meanings as in `KVLayout`."""

    head_major: bool | Auto = "auto"
    layers_per_stream: int | Auto | None = "auto"
    kv_together: bool | Auto = "auto"
    page_size: int | None = None

    @property
    def whole_layout(self) -> bool:
        """Whether at most a page is left to choose."""
        return "auto" not in (self.head_major, self.layers_per_stream, self.kv_together)


@dataclass(frozen=True)
class Choice:
    """A layout and a page for it.

    Attributes:
        layout, page_size: for `KVCache`; page_size in bytes.
        expected_tokens: of a typical request, as it was assumed.
        expected_waste: bytes mapped for it that it does not need, as a share of what it needs.
        most_waste: bytes that a request of any length wastes at most, surplus of an earlier one in its slot left out.
        tokens_per_page: whole tokens that a page of the widest stream holds.
        reason: why, in one sentence.
    """

    layout: KVLayout
    page_size: int
    expected_tokens: int
    reason: str

    @property
    def expected_waste(self) -> float:
        """See above: half a page of each stream, or what a request shorter than a page leaves of it."""
        lost = sum(
            max(self.page_size / 2, self.page_size - self.expected_tokens * stream.token_bytes)
            for stream in self.layout.streams
        )
        return lost / (self.expected_tokens * self.layout.bytes_per_token)

    @property
    def most_waste(self) -> int:
        """See above."""
        return len(self.layout.streams) * self.page_size

    @property
    def tokens_per_page(self) -> int:
        """See above. 0 where a token takes more than a page."""
        return self.page_size // max(stream.token_bytes for stream in self.layout.streams)

    def __str__(self) -> str:
        """All of it, in one line."""
        return (
            f"{self.layout.name}; {format_size(self.page_size)} pages of {self.tokens_per_page} tokens; a request of"
            f" {self.expected_tokens} tokens wastes about {self.expected_waste:.1%}: {self.reason}"
        )


def choose(layout: KVLayout, place: Place, *, expected_tokens: int | None = None, given: Given | None = None) -> Choice:
    """The layout for a model, and the page.

    Args:
        layout: any layout of the model and of the numbers of the cache; only how its streams lie is chosen anew.
        place: the machine.
        expected_tokens: of a typical request at its end; None: `layout.max_model_len`.
        given: what is not to be chosen.

    Raises:
        ConfigError: no layout of these numbers can be, or none of those left by `given`.
    """
    given = given or Given()
    expected = min(expected_tokens or layout.max_model_len, layout.max_model_len)
    choices: list[Choice] = []
    problem: ConfigError | None = None
    for kind in _kinds(layout, given, expected, place):
        try:
            choices.append(_with_page(dataclasses.replace(layout, **kind), place, expected, given))
        except ConfigError as error:  # more addresses than there are, or heads that differ
            problem = problem or error
    if not choices:
        assert problem is not None
        raise problem
    if given.whole_layout:
        return _because(choices[0], "as asked for")
    return _for_cpu(choices, place, given) if place.device == "cpu" else _for_device(choices, place)


def _kinds(layout: KVLayout, given: Given, expected: int, place: Place) -> Iterator[dict[str, Any]]:
    """Layouts, as arguments of `KVLayout`; those which kernels read most densely come first."""
    groups = _groups(layout) if given.layers_per_stream == "auto" else [given.layers_per_stream]
    if _asks_for_heads(layout, given, expected, place):
        together = given.kv_together is True
        yield {"head_major": True, "layers_per_stream": groups[0], "kv_together": together}
    major = False if given.head_major == "auto" else given.head_major
    for group in groups:
        both = [False, True] if given.kv_together == "auto" else [given.kv_together]
        if given.kv_together == given.layers_per_stream == "auto" and group != 1:
            both = [True]  # a layer's keys are as far from each other as apart, in half the streams
        for together in both:
            yield {"head_major": major, "layers_per_stream": group, "kv_together": together}


def _asks_for_heads(layout: KVLayout, given: Given, expected: int, place: Place) -> bool:
    """Whether a stream for each head is worth a look."""
    return (
        given.head_major == "auto" and place.device == "cpu" and expected >= HEAD_MAJOR_FROM and layout.num_kv_heads > 1
    )


def _groups(layout: KVLayout) -> list[int | None]:
    return [*(1 << power for power in range((layout.num_layers - 1).bit_length())), layout.num_layers]


def _with_page(layout: KVLayout, place: Place, expected: int, given: Given) -> Choice:
    """The layout with the page that is given, or else the smallest that will do, or on a device a larger one."""
    if given.page_size is not None:
        return _paged(layout, given.page_size, expected)
    useful = min(place.budget, layout.max_num_seqs * layout.max_model_len * layout.bytes_per_token)
    choice = _paged(layout, choose_page_size(layout, useful, place.granularity, place.mappings), expected)
    while place.device != "cpu" and choice.page_size < _LARGEST_PAGE:
        larger = _paged(layout, 2 * choice.page_size, expected)
        if larger.expected_waste > LARGE_PAGE_WASTE or not _roomy(larger, place):
            break
        choice = larger
    return choice


def _paged(layout: KVLayout, page: int, expected: int) -> Choice:
    """The layout with this page; its streams end where pages do."""
    return Choice(dataclasses.replace(layout, alignment=max(page, layout.alignment)), page, expected, "")


def _opens(choice: Choice, place: Place) -> bool:
    """Whether one request of a token fits, and all slots at once stay within the mapping limit."""
    streams = len(choice.layout.streams)
    mappings = _MAPPINGS_A_STREAM * streams * choice.layout.max_num_seqs
    return choice.most_waste <= place.budget and (place.mappings is None or mappings <= place.mappings)


def _roomy(choice: Choice, place: Place) -> bool:
    """Whether the first pages of all slots leave the most of the budget."""
    return choice.most_waste * choice.layout.max_num_seqs * FIRST_PAGES <= place.budget


def _cheap(choice: Choice, place: Place) -> bool:
    return choice.expected_waste <= WASTE and _roomy(choice, place)


def _for_cpu(choices: list[Choice], place: Place, given: Given) -> Choice:
    """Head by head where that is worth it, else plainly; sliced only where nothing else opens: it is slow there."""
    heads = choices[0] if given.head_major == "auto" and choices[0].layout.head_major else None
    if heads is not None and _opens(heads, place) and _cheap(heads, place):
        return _because(heads, f"from {HEAD_MAJOR_FROM} tokens on, decoding is faster with each head's keys together")
    plain = [choice for choice in choices if choice is not heads]
    for choice in plain:
        if _opens(choice, place):
            if choice is not plain[0]:
                return _because(choice, "the most streams that the budget and the mapping limit allow")
            return _because(choice, _why_plain(choice, heads, place, given))
    return _fewest_streams(plain)


def _why_plain(plain: Choice, heads: Choice | None, place: Place, given: Given) -> str:
    if given.head_major != "auto":
        return "as asked for"
    if plain.layout.num_kv_heads == 1:
        return "there is one KV head, so its keys are together in any layout"
    if plain.expected_tokens < HEAD_MAJOR_FROM:
        return f"under {HEAD_MAJOR_FROM} tokens a stream for each head brings little"
    if heads is None:
        return "layers that differ in heads cannot have a stream for each"
    if not _opens(heads, place):
        return "a stream for each head would take more mappings or memory than there are"
    if heads.expected_waste > WASTE:
        return f"a stream for each head would waste {heads.expected_waste:.0%}"
    return "with a stream for each head, short requests in all slots would take most of the budget"


def _for_device(choices: list[Choice], place: Place) -> Choice:
    """The densest layout that is cheap; where none is, the least wasteful that opens."""
    opening = [choice for choice in choices if _opens(choice, place)]
    for choice in opening:
        if _cheap(choice, place):
            return _because(choice, f"the densest layout that wastes at most {WASTE:.0%}, with room for all slots")
    if not opening:
        return _fewest_streams(choices)
    least = min(opening, key=lambda choice: choice.most_waste)
    return _because(least, f"none wastes at most {WASTE:.0%}, with room for all slots; this wastes least")


def _fewest_streams(choices: list[Choice]) -> Choice:
    return _because(min(choices, key=lambda choice: choice.most_waste), "the smallest: the budget holds little")


def _because(choice: Choice, reason: str) -> Choice:
    return dataclasses.replace(choice, reason=reason)

"""Text in pieces is the text of the whole, whatever the tokenizer; and a piece once given is never taken back."""

import itertools
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from support import tokenizers
from support.tokenizers import spell
from vattention.engine.detokenizer import Detokenizer, Vocabulary
from vattention.engine.generated_text import GeneratedText, beginning_of_stop, first_stop
from vattention.engine.sampling_params import SamplingParams

KINDS = {
    "byte-level": tokenizers.byte_level(),
    "byte-fallback": tokenizers.byte_fallback(),
    "word-piece": tokenizers.word_piece(),
    "metaspace": tokenizers.metaspace(),
}
LEVEL, FALLBACK = KINDS["byte-level"], KINDS["byte-fallback"]


def pieces(tokenizer: Any, tokens: list[int], cuts: list[int], *, skip: bool = True) -> list[str]:
    """What is given out at each of the cuts, and at the end."""
    detokenizer = Detokenizer(Vocabulary(tokenizer), skip_special_tokens=skip)
    borders = [0, *sorted({cut % (len(tokens) + 1) for cut in cuts}), len(tokens)]
    given = [detokenizer.feed(tokens[a:b]) for a, b in itertools.pairwise(borders)]
    return [*given, detokenizer.feed([], last=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_the_whole(kind: str) -> None:
    tokenizer = KINDS[kind]
    size = len(tokenizer)

    @settings(max_examples=400)
    @given(
        tokens=st.lists(st.one_of(st.integers(0, size - 1), st.integers(max(0, size - 60), size - 1)), max_size=60),
        cuts=st.one_of(st.just(list(range(61))), st.lists(st.integers(0, 60), max_size=8)),
        skip=st.booleans(),
    )
    @example(tokens=[size - 1, size - 3, size - 2, 5], cuts=list(range(9)), skip=True)
    def check(tokens: list[int], cuts: list[int], skip: bool) -> None:
        whole = tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert "".join(pieces(tokenizer, tokens, cuts, skip=skip)) == whole

    check()


@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_characters_come_whole(kind: str) -> None:
    tokenizer = KINDS[kind]
    text = "a é世🙂👩‍👩‍👧‍👦b"
    given = pieces(tokenizer, spell(tokenizer, text), list(range(100)))
    assert "".join(given) == text
    assert "\ufffd" not in "".join(given[:-1])
    if kind == "byte-level":
        assert [piece for piece in given if piece] == list(text), "each character as soon as it is complete"


def test_bytes_that_never_make_a_character_are_shown_and_cost_no_more_and_more() -> None:
    """A confused model's continuation bytes: they come out at once, and the window that is decoded stays short."""
    (broken,) = LEVEL.convert_tokens_to_ids(["Ŀ"])  # a continuation byte without a beginning
    vocabulary = Vocabulary(LEVEL)
    longest, decode = 0, vocabulary.decode

    def watched(tokens: Any) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    vocabulary.decode = watched  # type: ignore[method-assign]
    detokenizer = Detokenizer(vocabulary, skip_special_tokens=True)
    text = ""
    for count in range(1, 2000):
        text += detokenizer.feed([broken])
        assert text == "\ufffd" * (count - 1)
    assert longest < 40
    assert detokenizer.feed([], last=True) == "\ufffd"


def test_a_token_costs_the_same_at_the_end_of_a_long_text() -> None:
    tokens = spell(LEVEL, "some wörds and 🙂. ") * 200
    vocabulary = Vocabulary(LEVEL)
    decoded, decode = 0, vocabulary.decode

    def counted(ids: Any) -> str:
        nonlocal decoded
        decoded += len(ids)
        return decode(ids)

    vocabulary.decode = counted  # type: ignore[method-assign]
    text = GeneratedText(vocabulary, SamplingParams(stop=["never there"]))
    start = time.perf_counter()
    for count in range(len(tokens)):
        text.update(tokens[: count + 1])
    assert time.perf_counter() - start < 5
    assert decoded < 6 * len(tokens)
    assert text.text == "some wörds and 🙂. " * 200


def test_what_is_new_costs_no_more_at_the_end_of_a_long_text() -> None:
    tokens = spell(LEVEL, "some words. ") * 500
    text = GeneratedText(Vocabulary(LEVEL), SamplingParams(stop=["never there"]))
    pieces, shown, read = [], 0, 0

    class Counted(list[str]):
        def __getitem__(self, index: Any) -> Any:
            nonlocal read
            read += 1
            return super().__getitem__(index)

    for count in range(len(tokens)):
        text.update(tokens[: count + 1], last=count + 1 == len(tokens))
        text._parts = Counted(text._parts) if count == 0 else text._parts
        pieces.append(text.since(shown))
        shown += len(pieces[-1])
    assert "".join(pieces) == "some words. " * 500
    assert read < 3 * len(tokens)


# -- stop strings -----------------------------------------------------------------------------------------------------


def reference(text: str, stops: list[str], *, include: bool) -> tuple[str, str | None]:
    """Read character by character; of the stop strings that are complete, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


small_text = st.text("ab🙂é", max_size=30)


@settings(max_examples=600)
@given(
    text=small_text,
    stops=st.lists(st.text("ab🙂é", min_size=1, max_size=5), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 4), max_size=40),
    include=st.booleans(),
    fallback=st.booleans(),
)
def test_stop_strings_are_found_wherever_tokens_end(
    text: str, stops: list[str], sizes: list[int], include: bool, fallback: bool
) -> None:
    tokenizer = FALLBACK if fallback else LEVEL
    tokens = spell(tokenizer, text)
    generated = GeneratedText(Vocabulary(tokenizer), SamplingParams(stop=stops, include_stop_str_in_output=include))
    expected, stop = reference(text, stops, include=include)
    fed, shown, found = 0, "", None
    for size in [*sizes, len(tokens)]:
        fed = min(fed + size, len(tokens))
        found = generated.update(tokens[:fed], last=fed == len(tokens))
        assert generated.text.startswith(shown), "what was shown is never taken back"
        assert generated.since(len(shown)) == generated.text[len(shown) :], "what is new, without reading it all"
        shown = generated.text
        assert expected.startswith(shown), "nothing of the stop string is shown"
        assert (generated.shown, generated.since(len(shown))) == (len(shown), "")
        if found or fed == len(tokens):
            break
    assert (shown, found) == (expected, stop)
    assert generated.update(tokens, last=True) is None, "the end is the end"
    assert generated.text == expected


def test_text_is_held_back_only_while_a_stop_string_may_be_beginning() -> None:
    generated = GeneratedText(Vocabulary(LEVEL), SamplingParams(stop=["stop here", "\n\n"]))
    shown = []
    tokens: list[int] = []
    for piece in ("I", " st", "op", " it", "\n", "x", " stop", " he", "re", "!"):
        tokens += spell(LEVEL, piece)
        found = generated.update(tokens)
        shown.append(generated.text)
        if found:
            break
    assert shown == ["I", "I ", "I ", "I stop it", "I stop it", "I stop it\nx", *["I stop it\nx "] * 3]
    assert found == "stop here"


@pytest.mark.parametrize(("min_tokens", "expected"), [(0, "a"), (2, "a"), (3, "abbaa"), (6, "abbaa"), (7, "abbaabb")])
def test_a_stop_string_does_not_count_before_min_tokens(min_tokens: int, expected: str) -> None:
    """It is complete with the third token and with the seventh: the fourth is the first after three."""
    tokens = spell(LEVEL, "abbaabb")
    generated = GeneratedText(Vocabulary(LEVEL), SamplingParams(stop="bb", min_tokens=min_tokens))
    for count in range(1, 8):
        if generated.update(tokens[:count], last=count == 7):
            break
    assert generated.text == expected


@pytest.mark.parametrize(
    ("text", "old", "found"),
    [
        ("xabcd", 0, (2, 4, "bc")),
        ("xabcd", 4, (1, 5, "abcd")),
        ("xabcd", 5, None),
        ("abab", 2, (2, 4, "ab")),
        ("bcbc", 2, (2, 4, "bc")),
        ("zz", 0, None),
    ],
)
def test_the_stop_string_that_is_complete_first(text: str, old: int, found: Any) -> None:
    assert first_stop(text, ["abcd", "bc", "ab"] if "x" not in text else ["abcd", "bc"], old) == found


@pytest.mark.parametrize(
    ("text", "held"), [("", 0), ("a", 1), ("ba", 1), ("aab", 2), ("abc", 0), ("ababa", 3), ("x#", 1), ("x##", 2)]
)
def test_how_much_may_be_a_beginning(text: str, held: int) -> None:
    assert beginning_of_stop(text, ["abac", "abb", "###"]) == held


@pytest.mark.parametrize("make", [tokenizers.byte_level, tokenizers.byte_fallback])
def test_what_a_vocabulary_knows(make: Callable[[], Any]) -> None:
    tokenizer = make()
    vocabulary = Vocabulary(tokenizer)
    eos, tool = tokenizer.convert_tokens_to_ids(["<eos>", "<tool>"])
    assert eos in vocabulary.special
    assert tool not in vocabulary.special
    assert vocabulary.text_of(eos) == "<eos>"
    assert [vocabulary.text_of(tool)] * 2 == [tokenizer.decode([tool]), vocabulary.text_of(tool)]
    byte = tokenizer.get_vocab().get("<0x41>")
    assert (byte is not None) == (make is tokenizers.byte_fallback)
    if byte is not None:
        assert vocabulary.is_byte(byte)
    assert not vocabulary.is_byte(eos)

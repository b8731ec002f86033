"""From the form of an answer to something that says which tokens may come next.

llguidance (https://github.com/guidance-ai/llguidance) does the work: it reads schemas, regular expressions and
grammars, and walks the vocabulary as a tree of bytes. What it may spend is bounded, by limits of its own and by those
of `StructuredOutput`.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from vattention.engine.structured import StructuredOutput
from vattention.errors import InvalidRequest

_KEPT = 128
"""Grammars kept at most, those last used: as a rule a few kilobytes each."""

_LIMITS: dict[str, Any] = {
    "max_lexer_states": 50_000,  # 1 to 2 kB each; schemas that people use need some hundred
    "step_lexer_fuel": 100_000,  # some 7 ms of one mask
    "verbose_errors": False,  # would repeat the schema
}

_TOKENS_AS_THEY_COME = '%llguidance {"no_forcing": true}'
"""Where the text is certain, llguidance would take the tokens that the tokenizer makes of it. Not all tokenizers make
of a text what their tokens say; so nothing is asked of them but the bytes of each token, and the model chooses."""

_LINES = re.compile(r"\n\s+1 \| ")
"""Where a message begins to repeat the grammar."""

_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: |(?=invalid regex))")
"""Where in a grammar that we have written."""

_META = frozenset("\\.+*?()|[]{}^$#&-~/")


@dataclass(frozen=True, eq=False)
class Grammar:
    """A form that was read for one vocabulary.

    Attributes:
        start: llguidance's `LLMatcher` before the first token. It is only ever copied, which is cheap.
        eos: the tokens with which llguidance says that the text may end here.
        vocab_size: tokens of the model.
    """

    start: Any
    eos: tuple[int, ...]
    vocab_size: int


class Grammars:
    """Reads forms for one tokenizer, and keeps what it has read. Any thread may use it.

    Args:
        tokenizer: of transformers, or None.
        vocab_size: of the model.
        eos_token_ids: of the model; may be none.
    """

    def __init__(self, tokenizer: Any | None, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._bytes: Any = None  # llguidance's tokenizer, made when first asked for: some tenths of a second
        self._kept: OrderedDict[StructuredOutput, Grammar] = OrderedDict()
        self._lock = threading.Lock()  # of what is kept: held for no more than a look-up
        self._reading = threading.Lock()  # one at a time, and none twice

    def read(self, form: StructuredOutput) -> Grammar:
        """The grammar of a form. The first time takes milliseconds to tenths of a second: not for the engine's thread.

        Raises:
            InvalidRequest: a schema, regular expression or grammar that is not valid, not supported, too complex, or
                that no text has; a model without a tokenizer, or with one whose tokens are not known as bytes;
                llguidance is not installed.
        """
        grammar = self._find(form)
        if grammar is None:
            with self._reading:
                grammar = self._find(form) or self._read(form)
                with self._lock:
                    self._kept[form] = grammar
                    while len(self._kept) > _KEPT:
                        self._kept.popitem(last=False)
        return grammar

    def _find(self, form: StructuredOutput) -> Grammar | None:
        with self._lock:
            grammar = self._kept.get(form)
            if grammar is not None:
                self._kept.move_to_end(form)
            return grammar

    def _read(self, form: StructuredOutput) -> Grammar:
        tokens = self._tokens()
        from llguidance import LLMatcher, LLParserLimits

        start = LLMatcher(tokens, _written_out(form), log_level=0, limits=LLParserLimits(**_LIMITS))
        _check(start)
        # What costs much often does so at the first mask, and copies have what was found out for it.
        start.compute_bitmask()
        _check(start)
        return Grammar(start, tuple(tokens.eos_tokens), self._vocab_size)

    def _tokens(self) -> Any:
        """The vocabulary as llguidance knows it. Only one thread at a time."""
        if self._bytes is None:
            self._bytes = _tokens(self._tokenizer, self._vocab_size, self._eos)
        return self._bytes


def _tokens(tokenizer: Any | None, vocab_size: int, eos: list[int]) -> Any:
    if tokenizer is None:
        raise InvalidRequest("structured output needs a tokenizer, and this model came without")
    try:
        from llguidance.hf import from_tokenizer
    except ImportError:
        raise InvalidRequest('structured output needs llguidance: pip install "vattention[server]"') from None
    known = [token for token in eos if token < vocab_size]
    if not known:
        known = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        # Added tokens may go beyond the model's vocabulary, and the other way round.
        return from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=known or None)
    except Exception as error:  # noqa: BLE001  of several kinds, from a library in Rust
        raise InvalidRequest(f"structured output does not know this model's tokenizer: {error}") from None


def _check(matcher: Any) -> None:
    if matcher.is_error():
        raise InvalidRequest(f"structured output: {plain(matcher.get_error())}")


def plain(message: str) -> str:
    """An error of llguidance, without what is there for its developers."""
    text = message.replace("<non-verbose/>", "").strip()
    text = _LINES.split(text, maxsplit=1)[0]
    text = _PLACE.sub("", text)
    if text == "NoExtensionBias":
        return "no token can continue the text"
    return text if len(text) <= 500 else text[:500] + " ..."


def _written_out(form: StructuredOutput) -> str:
    """A form in llguidance's notation."""
    return f"{_rules(form)}\n{_TOKENS_AS_THEY_COME}\n"


def _rules(form: StructuredOutput) -> str:
    if form.grammar is not None:
        return form.grammar
    if form.regex is not None:
        return f"start: {regex_rule(form.regex)}"
    if form.choice is not None:
        return f"start: {regex_rule('|'.join(map(_literally, form.choice)))}"
    return f"start: {json_rule(form)}"


def regex_rule(regex: str) -> str:
    """A regular expression as a part of a rule."""
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(regex)}/"


def json_rule(form: StructuredOutput, *, lenient: bool = False) -> str:
    """A JSON answer as a part of a rule, for grammars with more around it.

    Args:
        form: of a JSON schema, or of any object.
        lenient: leave out of account what of the schema cannot be kept to, instead of refusing it.
    """
    schema = json.loads(form.schema_text)
    own = schema.get("x-guidance")
    # Over what the schema itself says there: no answer may be spaces without end.
    spaces = {"whitespace_pattern": None if form.compact else "[ ]", "whitespace_flexible": False}
    separators = {"item_separator": ",", "key_separator": ":"}
    options = {**(own if isinstance(own, dict) else {}), **spaces, **separators}
    schema["x-guidance"] = options | ({"lenient": True} if lenient else {})
    return f"%json {json.dumps(schema)}"


def _literally(text: str) -> str:
    return "".join(f"\\{char}" if char in _META else char for char in text)

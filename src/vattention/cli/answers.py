"""Where the answers of a conversation come from."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vattention.cli.figures import Fullest, in_words
from vattention.cli.prompts import chat_ids, check_template
from vattention.errors import EngineError, VAttentionError

if TYPE_CHECKING:
    from vattention.engine.sampling_params import SamplingParams
    from vattention.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What has come since the piece before.

    Attributes:
        text: new text, which may be none.
        prompt_tokens: of the conversation up to this answer.
        tokens: of this answer so far.
        finish_reason: "stop", "length", or None while more is to come.
    """

    text: str
    prompt_tokens: int
    tokens: int
    finish_reason: str | None


class Answers(Protocol):
    """Answers conversations. The loop of the conversation knows no more about an engine than this."""

    def stream(self, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """The answer to `messages`, piece by piece and often, so that it can be stopped: by closing the generator.

        Raises:
            VAttentionError: it cannot be answered, or not to its end.
        """
        ...

    def memory(self) -> str:
        """What the KV cache took for the last answer."""
        ...


class EngineAnswers:
    """Answers from an engine in this process.

    Raises:
        ConfigError: a model that came without a chat template.
    """

    def __init__(self, llm: LLM) -> None:
        check_template(llm.tokenizer)
        self._llm = llm
        self._fullest: Fullest | None = None
        self._tokens = 0

    def stream(self, messages: Sequence[Mapping[str, str]], params: SamplingParams) -> Generator[Piece, None, None]:
        """See `Answers`. A piece comes after every pass of the engine, with text or without."""
        engine = self._llm.engine
        request = engine.add_request(chat_ids(self._llm.tokenizer, messages), params)
        prompt, shown = len(request.prompt_token_ids), 0
        try:
            with Fullest(self._llm) as self._fullest:
                while not request.finished:
                    engine.step()
                    if isinstance(request.error, VAttentionError):
                        raise request.error
                    if request.error is not None:
                        what = f"{type(request.error).__name__}: {request.error}"
                        raise EngineError(f"the engine failed while it computed this answer: {what}") from request.error
                    sample = engine.output(request).outputs[0]
                    self._tokens = prompt + len(sample.token_ids)
                    yield Piece(
                        text=sample.text[shown:],
                        prompt_tokens=prompt,
                        tokens=len(sample.token_ids),
                        finish_reason=sample.finish_reason,
                    )
                    shown = len(sample.text)
        finally:
            engine.abort(request.request_id)

    def memory(self) -> str:
        """See `Answers`; and what it holds between answers."""
        from vattention.memory.sizes import format_size

        now = self._llm.stats()
        room = f"the budget is {format_size(now.budget)}"
        if self._fullest is None:
            return f"nothing is computed yet; {room}\n{in_words(now)}"
        return (
            f"last answer: {self._tokens} tokens with all that came before; {room}\n"
            f"when it ended: {in_words(self._fullest.stats)}\n"
            f"now: {format_size(now.created)} created, {format_size(now.reclaimable)} of it kept for what comes next"
        )

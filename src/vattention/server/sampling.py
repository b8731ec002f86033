"""From the fields of a request to `SamplingParams`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vattention.engine.sampling_params import RequestOutputKind, SamplingParams
from vattention.errors import InvalidRequest
from vattention.server.admission import hold
from vattention.server.errors import ApiError
from vattention.server.protocol.sampling import SamplingFields
from vattention.server.state import ServerState

_PASSED_ON = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "stop",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "include_stop_str_in_output",
    "skip_special_tokens",
)


def sampling_params(request: SamplingFields, *, max_tokens: int | None, **more: Any) -> SamplingParams:
    """What the engine is told.

    Args:
        request: fields that are null keep the engine's default.
        max_tokens: see `answer_limit`.
        more: what else the endpoint knows, such as `n`, `logprobs` and `structured`; None: the default.

    Raises:
        ApiError: 400, for values that exclude each other.
    """
    given = {name: getattr(request, name) for name in _PASSED_ON} | more
    if request.seed is not None:
        given["seed"] = request.seed % 2**64
    if request.logit_bias:
        given["logit_bias"] = {int(token): bias for token, bias in request.logit_bias.items()}
    given["output_kind"] = RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY
    try:
        return SamplingParams(
            max_tokens=max_tokens, **{name: value for name, value in given.items() if value is not None}
        )
    except (InvalidRequest, TypeError) as error:
        raise ApiError(400, str(error)) from None


def answer_limit(state: ServerState, prompt_tokens: int, asked: int | None, param: str = "max_tokens") -> int | None:
    """The most tokens that an answer may have; None: whatever fits the model.

    Args:
        prompt_tokens: of the prompt.
        asked: what the request says.
        param: the field that says so.

    Raises:
        ApiError: 400 with OpenAI's code `context_length_exceeded`, where the prompt and what is asked for are longer
            than the model serves.
    """
    longest = state.llm.max_model_len
    if prompt_tokens + max(asked or 0, 1) > longest:
        wanted = "" if asked is None else f" and {asked} in the answer ({param})"
        raise ApiError(
            400,
            f"this model's maximum context length is {longest} tokens, and the request asks for more: {prompt_tokens}"
            f" in the prompt{wanted}",
            param="prompt" if prompt_tokens >= longest else param,
            code="context_length_exceeded",
        )
    limits = [limit for limit in (asked, state.settings.max_tokens) if limit is not None]
    return min(limits, default=None)


def check_text(state: ServerState, texts: Iterable[str]) -> None:
    """Refuse texts that are too long whatever their tokens are, before they are read. Raises ApiError, 400."""
    longest = state.longest_text
    characters = max(map(len, texts), default=0)
    if longest is not None and characters > longest:
        raise ApiError(
            400,
            f"this model's maximum context length is {state.llm.max_model_len} tokens, and a text of {characters}"
            " characters has more",
            param="prompt",
            code="context_length_exceeded",
        )


def check_samples(state: ServerState, prompts: int, samples: int) -> None:
    """Refuse a request that is several too many, and take the places of one that is not.

    Raises:
        ApiError: 400. Overloaded: there is no room for it now.
    """
    most = state.settings.max_samples
    if prompts * samples > most:
        raise ApiError(
            400,
            f"{prompts} prompts with {samples} answers each are more than this server's {most} answers a request",
            param="prompt" if prompts > most else "n",
        )
    hold(prompts * samples)

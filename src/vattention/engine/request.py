"""One request on its way through the engine, and its share of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from vattention.engine.outputs import FinishReason
from vattention.engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it. Only the engine changes it.

    Attributes:
        prompt_token_ids: at least one.
        seed: of its random numbers, 64 bits.
        output_token_ids: kept through preemption.
        slot: where its K and V are, or None while it waits.
        computed: tokens whose K and V are in the slot.
        finish_reason: None while it waits or runs.
        preemptions: how often it had to give its slot back.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    output_token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far, prompt and output."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 while decoding."""
        return self.num_tokens - self.computed

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids at positions `[start, end)`."""
        prompt = len(self.prompt_token_ids)
        output = self.output_token_ids[max(0, start - prompt) : max(0, end - prompt)]
        return [*self.prompt_token_ids[start:end], *output]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next tokens of one request, to be computed in one forward pass: positions `[start, end)`."""

    request: Request
    slot: int
    start: int
    end: int

    @property
    def samples(self) -> bool:
        """Whether this pass reaches the last known token, so that the next one can be sampled."""
        return self.end == self.request.num_tokens

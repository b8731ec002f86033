"""One sample of a request on its way through the engine, and its share of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from vattention.engine.adjustment import Adjuster
from vattention.engine.constraint import Constraint
from vattention.engine.generated_text import GeneratedText
from vattention.engine.outputs import FinishReason, Logprob
from vattention.engine.sampling_params import SamplingParams


@dataclass(eq=False)
class Request:
    """A prompt and what has been generated for it. Only the engine changes it.

    A request for n samples is n of these, which share the prompt, the id and the seed. Sample 0 leads: it alone is
    queued, and the others branch off when its prompt is computed.

    Attributes:
        prompt_token_ids: at least one.
        seed: of its random numbers, 64 bits.
        sample: which of the samples it is.
        family: all samples of the request in order, itself included.
        number: of its request in order of arrival.
        unbranched: of the leader: the others still wait for its prompt.
        ends: tokens that end the text.
        output_token_ids: kept through preemption.
        slot: where its K and V are, or None while it waits.
        computed: tokens whose K and V are in the slot.
        priority: requests with a lower number are served earlier, equal ones in order of arrival.
        finish_reason: None while it waits or runs.
        error: why the request failed, the same in all its samples; None unless it did. Samples that had not finished
            by then end with finish_reason "error".
        stop_reason: see `CompletionOutput`.
        preemptions: how often it had to give its slot back for lack of memory.
        suspect: a pass that it was in has failed: it is computed alone until its next token.
        text: None where nobody has asked for it yet.
        adjuster: what changes its logits, or None.
        constraint: which form its text has, or None; like the adjuster's, its state follows from `output_token_ids`.
        logprobs: one for each output token, where asked for.
        prompt_logprobs: of the leader: one for each prompt token scored so far, None for the first.
        arrival: when it was added, on `time.monotonic`. arrival_time: the same since the epoch.
        scheduled: when its first pass began, or None. token_times: when each token came. Both on `time.monotonic`.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    sample: int = 0
    ends: frozenset[int] = frozenset()
    number: int = 0
    priority: int = 0
    family: list[Request] = field(default_factory=list)
    unbranched: bool = False
    output_token_ids: list[int] = field(default_factory=list)
    slot: int | None = None
    computed: int = 0
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    stop_reason: int | str | None = None
    preemptions: int = 0
    suspect: bool = False
    text: GeneratedText | None = None
    adjuster: Adjuster | None = None
    constraint: Constraint | None = None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=lambda: [None])
    arrival: float = 0.0
    arrival_time: float = 0.0
    scheduled: float | None = None
    token_times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.family.append(self)  # the list is shared by all of them

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
        """Whether nothing more will come of this sample."""
        return self.finish_reason is not None

    @property
    def all_finished(self) -> bool:
        """Whether nothing more will come of any sample of the request."""
        return all(sample.finished for sample in self.family)

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

    @property
    def scored(self) -> range:
        """Positions whose logits say how likely the prompt's next token is, where that is asked for and not known."""
        request = self.request
        if request.params.prompt_logprobs is None or request.sample:
            return range(0)
        return range(
            max(self.start, len(request.prompt_logprobs) - 1), min(self.end, len(request.prompt_token_ids) - 1)
        )

    @property
    def wanted(self) -> list[int]:
        """Positions whose logits are wanted, in order: those scored, and the last one if the next token is sampled."""
        return [*self.scored, *([self.end - 1] if self.samples else [])]

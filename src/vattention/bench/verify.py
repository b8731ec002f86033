"""`vattention verify`: greedy tokens and logits of our engine against transformers' own generate, prompt by prompt.

All prompts go through the engine together, so batches mix requests of every length. The weights are loaded once and
both sides compute with them; the reference answers once, for however many combinations of options.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any

import torch

from vattention.bench.machine import check_writable, write_json
from vattention.bench.prompts import TestPrompt, make_prompts, spread
from vattention.bench.reference import Answer, Reference
from vattention.bench.setup import EngineOptions, open_cache, open_engine, step
from vattention.bench.table import table
from vattention.cache import KVCache
from vattention.engine.loading import LoadedModel, load_model
from vattention.engine.request import Chunk
from vattention.engine.runner import Runner
from vattention.engine.sampling_params import SamplingParams
from vattention.errors import ConfigError, VAttentionError
from vattention.memory.sizes import format_size

TIE_GAP, LOGIT_ERROR = 2e-4, 1e-3
"""What float32 is held to: the reference's own logits of two tokens that count as a tie, and the largest difference of
logits over their standard deviation. Rounding across batch shapes stays well below; a mistake is far above."""

LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "token-major": {},
    "head-major": {"head_major": True},
    "sliced": {"layers_per_stream": None},
    "sliced-together": {"layers_per_stream": None, "kv_together": True},
    "head-major-sliced": {"head_major": True, "layers_per_stream": None, "kv_together": True},
}
"""Name -> arguments of KVLayout. Sliced: all layers share a stream; together: so do K and V."""

WHOLE = 0
"""As a chunk: prompts are computed whole."""


@dataclass(frozen=True)
class Verify:
    """The options of the command.

    Attributes:
        prompt_tokens: lengths; None: `prompts` of them, from 1 to `longest`.
        chunks: tokens in one forward pass, WHOLE for enough to hold every prompt.
        layouts: names in LAYOUTS; None: the layout of `engine`.
        page_sizes: None: what the cache chooses.
        engine: the options that all combinations share.
        tie_gap, logit_error: see TIE_GAP, LOGIT_ERROR; None: these, which float32 alone can be held to.
        attention: of the reference.
    """

    model: str | None = None
    dtype: str = "float32"
    trust_remote_code: bool = False
    prompts: int = 20
    longest: int = 3000
    prompt_tokens: Sequence[int] | None = None
    max_tokens: int = 32
    seed: int = 0
    chunks: Sequence[int] = (512,)
    max_num_seqs: Sequence[int] = (16,)
    layouts: Sequence[str] | None = None
    page_sizes: Sequence[str] | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    tie_gap: float | None = None
    logit_error: float | None = None
    attention: str = "sdpa"
    json: str | None = None
    command: str = ""


@dataclass(frozen=True)
class Combination:
    """One way to set up the engine."""

    layout: str
    chunk: int
    options: EngineOptions

    def __str__(self) -> str:
        chunk = "whole prompts" if self.chunk == WHOLE else f"{self.chunk} tokens a pass"
        page = self.options.page_size or "default"
        return f"{self.layout}, {page} pages, {chunk}, {self.options.max_num_seqs} slots"


@dataclass(frozen=True)
class Verdict:
    """How one prompt fared.

    Attributes:
        same: tokens before the first difference.
        tokens: tokens that the reference has.
        gaps: at each of our tokens, the reference's largest logit after the same tokens, less that of our token: 0
            where we agree. Past a difference the reference is taught our tokens: each is judged on its own.
        logit_difference: largest absolute difference of logits. logit_error: the same over their standard deviation.
        differs: what makes this more than a tie, or None.
    """

    same: int
    tokens: int
    gaps: tuple[float, ...]
    logit_difference: float
    logit_error: float
    differs: str | None

    @property
    def identical(self) -> bool:
        """Whether every token is the reference's, and the logits are close."""
        return self.differs is None and self.same == self.tokens

    @property
    def result(self) -> str:
        """For the table; tokens are counted from 1."""
        if self.differs:
            return f"DIFFERENT: {self.differs}"
        if self.identical:
            return "identical"
        return f"tie at token {self.same + 1}, {self.gaps[self.same]:.1e} apart"


class RecordingRunner(Runner):
    """A runner that keeps the logits each token was chosen from: request id -> position -> `[vocabulary]` float32."""

    def __init__(self, model: torch.nn.Module, cache: KVCache) -> None:
        super().__init__(model, cache)
        self.logits: dict[str, dict[int, torch.Tensor]] = {}

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """As `Runner.forward`."""
        logits = super().forward(chunks)
        sampling = (chunk for chunk in chunks if chunk.samples)
        for chunk, row in zip(sampling, logits, strict=True):
            self.logits.setdefault(chunk.request.request_id, {})[chunk.end] = row.float().clone().cpu()
        return logits


def run(options: Verify) -> int:
    """Answer, compare, print. Returns the exit code: 1 if anything but ties differs.

    Raises:
        ConfigError: options that cannot be run, or none of several combinations that can.
    """
    check_writable(options.json)
    lengths = list(options.prompt_tokens or spread(options.prompts, options.longest))
    engine = options.engine
    loaded = load_model(
        options.model,
        dtype=options.dtype,
        device=engine.place,
        max_model_len=engine.max_model_len,
        trust_remote_code=options.trust_remote_code,
    )
    tie_gap, logit_error = _tolerances(options, loaded.dtype)
    longest = loaded.geometry.longest_request(engine.max_model_len) - options.max_tokens
    if options.prompt_tokens is None:
        lengths = [min(length, longest) for length in lengths]
    if not lengths or max(lengths) > longest or options.max_tokens < 1:
        raise ConfigError(f"prompts must leave room for {options.max_tokens} tokens: {longest} tokens at most")
    prompts = make_prompts(lengths, loaded.geometry.vocab_size, loaded.tokenizer, seed=options.seed)
    combinations = _combinations(options, sum(lengths))

    start = time.perf_counter()
    reference = Reference(loaded, options.attention)
    answers = [reference.generate(prompt.token_ids, options.max_tokens) for prompt in prompts]
    print(
        f"{loaded.name}, {str(loaded.dtype).removeprefix('torch.')}: {len(prompts)} prompts of {min(lengths)} to"
        f" {max(lengths)} tokens, {options.max_tokens} greedy tokens each; transformers' generate with"
        f" {options.attention} attention took {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    results: list[dict[str, Any]] = []
    for number, combination in enumerate(combinations, start=1):
        title = f"[{number}/{len(combinations)}] {combination}: "
        start = time.perf_counter()
        try:
            ours, page_size = _answers(loaded, combination, prompts, options.max_tokens)
        except VAttentionError as error:
            if len(combinations) == 1:
                raise
            print(f"{title}skipped: {error}", flush=True)
            results.append({"combination": str(combination), "skipped": str(error)})
            continue
        seconds = time.perf_counter() - start
        verdicts = [
            judge(reference, prompt.token_ids, answer, given, tie_gap=tie_gap, logit_error=logit_error)
            for prompt, answer, given in zip(prompts, answers, ours, strict=True)
        ]
        print(f"{title}{_summary(verdicts)}, {seconds:.1f} s, pages of {format_size(page_size)}", flush=True)
        if len(combinations) == 1 or any(verdict.differs for verdict in verdicts):
            print("\n" + _table(prompts, verdicts) + "\n", flush=True)
        results.append(_record(combination, page_size, seconds, verdicts))
    ran = [result for result in results if "skipped" not in result]
    if not ran:
        raise ConfigError("none of the combinations could be run: raise --kv-cache-memory, or lower --longest")
    failed = [result for result in ran if not result["passed"]]
    print(_verdict(len(ran), len(failed), len(results) - len(ran)))
    write_json(
        options.json,
        options.command,
        {
            "model": loaded.name,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "tie_gap": tie_gap,
            "logit_error": logit_error,
            "prompts": [{"kind": prompt.kind, "tokens": len(prompt.token_ids)} for prompt in prompts],
            "max_tokens": options.max_tokens,
            "passed": not failed,
            "combinations": results,
        },
    )
    return 1 if failed else 0


def judge(
    reference: Reference,
    prompt: Sequence[int],
    answer: Answer,
    ours: Answer,
    *,
    tie_gap: float,
    logit_error: float,
) -> Verdict:
    """Compare our answer with the reference's. Where the tokens part, the reference is taught ours."""
    count = min(len(answer.tokens), len(ours.tokens))
    same = next((i for i in range(count) if answer.tokens[i] != ours.tokens[i]), count)
    if not count:
        return Verdict(0, len(answer.tokens), (), 0.0, 0.0, "no tokens")
    logits = answer.logits[:count]
    if same < count:
        taught = reference.teacher_forced(prompt, ours.tokens[:count])
        logits = torch.cat((logits[: same + 1], taught[same + 1 :]))
    chosen = torch.tensor(ours.tokens[:count])
    gaps = logits.max(dim=-1).values - logits.gather(1, chosen[:, None])[:, 0]
    difference = float((ours.logits[:count] - logits).abs().max())
    error = difference / float(logits.std())
    worst = next((i for i, gap in enumerate(gaps.tolist()) if not gap <= tie_gap), None)  # so that NaN is found
    differs = None
    if len(ours.tokens) != len(answer.tokens):
        differs = f"{len(ours.tokens)} tokens for {len(answer.tokens)}"
    elif worst is not None:
        differs = f"token {worst + 1}, {float(gaps[worst]):.1e} apart"
    elif not error <= logit_error:
        differs = f"logits, by more than {logit_error:.1e} of their spread"
    return Verdict(same, len(answer.tokens), tuple(gaps.tolist()), difference, error, differs)


def _tolerances(options: Verify, dtype: torch.dtype) -> tuple[float, float]:
    if dtype != torch.float32 and (options.tie_gap is None or options.logit_error is None):
        raise ConfigError(
            f"in {str(dtype).removeprefix('torch.')} the rounding of other batch shapes changes logits and so tokens,"
            " in every engine: verify in float32, or say what to accept with --tie-gap and --logit-error"
        )
    tie_gap = TIE_GAP if options.tie_gap is None else options.tie_gap
    return tie_gap, LOGIT_ERROR if options.logit_error is None else options.logit_error


def _combinations(options: Verify, tokens: int) -> list[Combination]:
    """Every combination of the lists in `options`. `tokens`: of all prompts together."""
    given = options.engine
    layouts = {name: LAYOUTS[name] for name in options.layouts} if options.layouts else {_name(given): {}}
    pages = options.page_sizes or (given.page_size,)
    return [
        Combination(
            name,
            chunk,
            replace(
                given,
                **layout,
                page_size=page,
                max_num_seqs=slots,
                max_num_batched_tokens=tokens + slots if chunk == WHOLE else chunk,
            ),
        )
        for (name, layout), page, chunk, slots in product(layouts.items(), pages, options.chunks, options.max_num_seqs)
    ]


def _name(options: EngineOptions) -> str:
    shape = (options.head_major, options.layers_per_stream, options.kv_together)
    for name, layout in LAYOUTS.items():
        plain = EngineOptions(**layout)
        if shape == (plain.head_major, plain.layers_per_stream, plain.kv_together):
            return name
    together = ", K and V together" if options.kv_together else ""
    major = "head-major" if options.head_major else "token-major"
    return f"{major}, {options.layers_per_stream or 'all'} layers a stream{together}"


def _answers(
    loaded: LoadedModel, combination: Combination, prompts: Sequence[TestPrompt], max_tokens: int
) -> tuple[list[Answer], int]:
    """What our engine says to all prompts at once, and the page size the cache has.

    Raises:
        ConfigError: the budget does not hold the longest request. Whatever opening the cache raises.
    """
    options = combination.options
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with open_cache(loaded, options) as cache:
        longest = max(len(prompt.token_ids) for prompt in prompts) + max_tokens
        if cache.capacity() < longest:
            raise ConfigError(
                f"the budget of {format_size(cache.stats().budget)} holds {cache.capacity()} tokens in pages of"
                f" {format_size(cache.pool.page_size)}, the longest request has {longest}"
            )
        runner = RecordingRunner(loaded.model, cache)
        engine = open_engine(loaded, cache, runner, options)
        requests = [engine.add_request(prompt.token_ids, params) for prompt in prompts]
        while engine.unfinished:
            step(engine)
        answers = []
        for request in requests:
            rows = runner.logits[request.request_id]
            logits = torch.stack([rows[position] for position in sorted(rows)])
            answers.append(Answer(tuple(request.output_token_ids), logits))
        return answers, cache.pool.page_size


# -- the report -----------------------------------------------------------------------------------------------------


def _summary(verdicts: Sequence[Verdict]) -> str:
    different = sum(verdict.differs is not None for verdict in verdicts)
    identical = sum(verdict.identical for verdict in verdicts)
    error = max(verdict.logit_error for verdict in verdicts)
    counts = f"{identical} identical, {len(verdicts) - identical - different} ties, {different} different"
    return f"{counts}, logits within {error:.1e} of their spread"


def _table(prompts: Sequence[TestPrompt], verdicts: Sequence[Verdict]) -> str:
    header = ("prompt", "kind", "tokens", "generated", "logits differ by", "over spread", "result")
    rows = [
        (
            number,
            prompt.kind,
            len(prompt.token_ids),
            verdict.tokens,
            f"{verdict.logit_difference:.1e}",
            f"{verdict.logit_error:.1e}",
            verdict.result,
        )
        for number, (prompt, verdict) in enumerate(zip(prompts, verdicts, strict=True), start=1)
    ]
    return table(header, rows, left=0)


def _verdict(run: int, failed: int, skipped: int) -> str:
    """The last line: of `run` combinations that were run, `failed` failed."""
    words = "tokens or logits differ by more than rounding" if failed else "the same greedy tokens as transformers"
    where = f", in {failed or run} of {run} combinations" if run + skipped > 1 else ""
    left_out = f"; {skipped} skipped" if skipped else ""
    return f"{'FAIL' if failed else 'PASS'}: {words}{where}{left_out}"


def _record(combination: Combination, page_size: int, seconds: float, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "combination": str(combination),
        "options": {**asdict(combination.options), "page_size": page_size},
        "seconds": seconds,
        "passed": not any(verdict.differs for verdict in verdicts),
        "prompts": [
            {
                "result": verdict.result,
                "same": verdict.same,
                "tokens": verdict.tokens,
                "largest_gap": max(verdict.gaps, default=0.0),
                "logit_difference": verdict.logit_difference,
                "logit_error": verdict.logit_error,
            }
            for verdict in verdicts
        ],
    }

"""Requests as JSON lines, answered in order: as many as the engine likes are under way, however long the input is.

A line that cannot be served is answered with an error, alone. An answer is written as soon as those before it are, so
whatever happens later, it is there.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vattention.cli.figures import Fullest
from vattention.cli.json_lines import LineReader, LineWriter, parse
from vattention.cli.options import FAILED, open_llm
from vattention.cli.prompts import chat_ids, has_template, prompt_ids, sampling_params
from vattention.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from vattention.engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from vattention.engine.request import Request
    from vattention.llm import LLM

PROMPTS = ("prompt", "prompt_token_ids", "messages")
IDS = ("id", "custom_id")
_NULL = ("max_tokens", "logprobs", "prompt_logprobs", "logit_bias", "stop")  # where null is a value
_HELD = 4096  # requests that wait for one before them, at most


@dataclass(frozen=True)
class Item:
    """A line of input: its number from 1, and what it asks for, or the error that it is."""

    number: int
    fields: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def name(self) -> dict[str, Any]:
        """What its answer is called: the id that it came with, or its number."""
        for key in IDS:
            if _is_id(self.fields.get(key)):
                return {key: self.fields[key]}
        return {"id": self.number}


class Source:
    """The items of a `LineReader`, or those that there are."""

    def __init__(self, reader: LineReader | None, items: Iterable[Item] = ()) -> None:
        self._reader = reader
        self._items = iter(items)

    def next(self, *, wait: bool) -> Item | None:
        """The next item; None where there is none, or where `wait` is False and none has come yet."""
        if self._reader is None:
            return next(self._items, None)
        line = self._reader.next(wait=wait)
        if line is None:
            return None
        try:
            return Item(line[0], parse(*line))
        except InvalidRequest as error:
            return Item(line[0], error=str(error))


def of_prompts(prompts: Sequence[str]) -> list[Item]:
    """Items for prompts that came as options."""
    return [Item(number, {"prompt": text}) for number, text in enumerate(prompts, start=1)]


def run(args: argparse.Namespace, items: Sequence[Item] | None, sampling: Mapping[str, Any], chat: bool | None) -> int:
    """Answer `items`, or the lines of `args.input`, on `args.output`.

    Args:
        sampling: what a request that does not say otherwise gets.
        chat: put prompts into the chat template; None: if there is one.

    Returns:
        The exit code: 1 if some could not be served.
    """
    if args.resume and args.output is None:
        raise ConfigError("--resume goes on with a file: name it with --output")
    if items is None and args.output is not None and _same_file(args.input, args.output):
        raise ConfigError(f"--input and --output are the same file, {args.output}")
    reader = LineReader(args.input) if items is None else None
    with closing(reader) if reader else nullcontext():
        done = _done(args.output) if args.resume else frozenset()
        with closing(LineWriter(args.output, resume=args.resume)) as writer, open_llm(args, seed=args.seed) as llm:
            chat = has_template(llm.tokenizer) if chat is None else chat
            if chat and not has_template(llm.tokenizer):
                raise ConfigError("this model has no chat template: leave --chat out")
            batch = Batch(llm, writer, sampling, chat=chat, seed=args.seed, done=done, ahead=_ahead(args))
            with Fullest(llm) as fullest:
                batch.run(Source(reader, items or ()), show=sys.stderr.isatty() and not args.quiet)
    if not args.quiet:
        print(_summary(batch), file=sys.stderr)
        print(f"KV cache at its fullest: {fullest}", file=sys.stderr)
    return FAILED if batch.failed else 0


@dataclass(eq=False)
class _Job:
    """An item on its way. `answer` is there when it is done."""

    item: Item
    request: Request | None = None
    prompt: str | None = None
    answer: dict[str, Any] | None = None


class Batch:
    """Keeps the engine busy, and the answers in order.

    Args:
        sampling: of requests that do not say otherwise.
        chat: put prompts into the chat template.
        seed: of requests that have none.
        done: ids to leave out.
        ahead: requests in the engine at once.

    Attributes:
        served, failed, skipped: how many items.
    """

    def __init__(
        self,
        llm: LLM,
        writer: LineWriter,
        sampling: Mapping[str, Any],
        *,
        chat: bool = False,
        seed: int = 0,
        done: frozenset[str | int] = frozenset(),
        ahead: int = 32,
    ) -> None:
        self.served = self.failed = self.skipped = 0
        self._llm = llm
        self._writer = writer
        self._sampling = dict(sampling)
        self._chat = chat
        self._seed = seed
        self._done = done
        self._ahead = ahead
        self._jobs: deque[_Job] = deque()  # in order, and none before the first is unwritten
        self._tokens = 0

    def run(self, source: Source, *, show: bool = False) -> None:
        """Answer everything. Whatever ends it early, what is finished is written."""
        from tqdm.auto import tqdm

        engine = self._llm.engine
        try:
            with tqdm(desc="Requests", unit="request", disable=not show) as bar:
                while self._fill(source) or self._jobs:
                    self._write()
                    if engine.unfinished:
                        self._step()
                    self._write()
                    bar.set_postfix_str(f"{self._tokens} tokens", refresh=False)
                    bar.update(self.served + self.failed - bar.n)
        except (ConfigError, BrokenPipeError):  # nothing can be read, or written, any more
            raise
        except BaseException:
            for job in self._jobs:
                if job.answer is not None:
                    self._write_one(job)
            raise

    def _fill(self, source: Source) -> bool:
        """Take items while the engine has room for more. False when there are none."""
        came = False
        while self._llm.engine.unfinished < self._ahead and len(self._jobs) < _HELD:
            # With nothing to do there is time to wait for a slow writer.
            item = source.next(wait=not self._jobs)
            if item is None:
                break
            came = True
            if next(iter(item.name.values())) in self._done:
                self.skipped += 1
                continue
            self._jobs.append(self._started(item))
            self._write()
        return came

    def _started(self, item: Item) -> _Job:
        job = _Job(item)
        try:
            if item.error is not None:
                raise InvalidRequest(item.error)
            tokens, values = self._prompt(item, job)
            job.request = self._llm.engine.add_request(tokens, sampling_params(values))
        except (InvalidRequest, TypeError) as error:
            where = "" if item.error is not None else f"line {item.number}: "
            job.answer = {**item.name, "error": f"{where}{error}"}
        return job

    def _prompt(self, item: Item, job: _Job) -> tuple[Sequence[int], dict[str, Any]]:
        """The token ids of an item's prompt, and its sampling parameters."""
        from vattention.engine.randomness import random_bits

        given = {key: value for key, value in item.fields.items() if key not in IDS}
        kinds = [key for key in PROMPTS if key in given]
        if len(kinds) != 1:
            raise InvalidRequest(f"one of {', '.join(PROMPTS)} is needed, and there are {len(kinds)}")
        for key in IDS:
            if item.fields.get(key) is not None and not _is_id(item.fields[key]):
                raise InvalidRequest(f"{key} must be a string or a whole number")
        prompt = given.pop(kinds[0])
        if unknown := sorted(set(given) - _known()):
            raise InvalidRequest(f"unknown: {', '.join(unknown)}")
        # Its own random numbers, whatever else is in the file and whatever was done before.
        values = {"seed": int(random_bits([self._seed], [0], [item.number])[0]), **self._sampling}
        values |= {key: value for key, value in given.items() if value is not None or key in _NULL}
        tokenizer = self._llm.tokenizer
        if kinds[0] == "messages":
            return chat_ids(tokenizer, prompt), values
        if kinds[0] == "prompt_token_ids":
            return prompt, values
        if self._chat:
            return chat_ids(tokenizer, [{"role": "user", "content": prompt}]), values
        ids = prompt_ids(tokenizer, prompt)
        job.prompt = prompt
        return ids, values

    def _step(self) -> None:
        engine = self._llm.engine
        self._tokens += len(engine.step())
        for job in self._jobs:
            if job.request is None or not job.request.all_finished:
                continue
            if job.request.error is not None:
                job.answer = {**job.item.name, "error": f"line {job.item.number}: {job.request.error}"}
            else:
                job.answer = {**job.item.name, **answer(engine.output(job.request, job.prompt))}
            job.request = None

    def _write(self) -> None:
        while self._jobs and self._jobs[0].answer is not None:
            self._write_one(self._jobs[0])
            self._jobs.popleft()  # after an interrupt between the two there are two lines, which is better than none

    def _write_one(self, job: _Job) -> None:
        assert job.answer is not None
        self._writer.write(job.answer)
        if "error" in job.answer:
            self.failed += 1
        else:
            self.served += 1


def answer(output: RequestOutput) -> dict[str, Any]:
    """What a line of the output says about a finished request."""
    said: dict[str, Any] = {"prompt_tokens": len(output.prompt_token_ids)}
    said["outputs"] = [_sample(sample) for sample in output.outputs]
    if output.prompt_logprobs is not None:
        said["prompt_logprobs"] = [None if entry is None else _entry(entry) for entry in output.prompt_logprobs]
    said["metrics"] = _metrics(output.metrics)
    return said


def _sample(sample: CompletionOutput) -> dict[str, Any]:
    said: dict[str, Any] = {
        "index": sample.index,
        "text": sample.text,
        "token_ids": list(sample.token_ids),
        "finish_reason": sample.finish_reason,
        "stop_reason": sample.stop_reason,
    }
    if sample.logprobs is not None:
        said["cumulative_logprob"] = _finite(sample.cumulative_logprob)
        said["logprobs"] = [_entry(entry) for entry in sample.logprobs]
    return said


def _entry(entry: Mapping[int, Logprob]) -> list[dict[str, Any]]:
    return [
        {"token_id": token, "token": said.decoded_token, "logprob": _finite(said.logprob), "rank": said.rank}
        for token, said in entry.items()
    ]


def _metrics(metrics: RequestMetrics) -> dict[str, Any]:
    return {
        "arrival_time": metrics.arrival_time,
        "queue_time": metrics.queue_time,
        "prefill_time": metrics.prefill_time,
        "time_to_first_token": metrics.time_to_first_token,
        "time": max((times[-1] for times in metrics.token_times if times), default=None),
        "preemptions": metrics.preemptions,
    }


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that cannot come has null."""
    return value if value is not None and math.isfinite(value) else None


def _ahead(args: argparse.Namespace) -> int:
    """Requests in the engine: more than it computes at once, so that there is always one to go on with."""
    slots: int = getattr(args, "max_num_seqs", 16)
    return 2 * slots


def _is_id(value: object) -> bool:
    return isinstance(value, (str, int)) and not isinstance(value, bool)


def _known() -> frozenset[str]:
    from dataclasses import fields

    from vattention.engine.sampling_params import SamplingParams

    return frozenset(each.name for each in fields(SamplingParams))


def _done(path: str) -> frozenset[str | int]:
    """Ids that the output has answers to; those with an error are tried again."""
    if not os.path.exists(path):
        return frozenset()
    return frozenset(_answered(path))


def _answered(path: str) -> Iterator[str | int]:
    with closing(LineReader(path)) as reader:
        while (line := reader.next(wait=True)) is not None:
            try:
                value = parse(*line)
            except InvalidRequest as error:
                if reader.ended:  # written by halves when the last run ended
                    return
                raise ConfigError(f"cannot go on with {path}: {error}") from None
            if "outputs" in value:
                yield next(iter(Item(line[0], value).name.values()))


def _same_file(one: str, other: str) -> bool:
    return one != "-" and os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _summary(batch: Batch) -> str:
    skipped = f", {batch.skipped} there already" if batch.skipped else ""
    return f"{batch.served} answered, {batch.failed} failed{skipped}"

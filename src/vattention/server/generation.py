"""The one door from the routes to the engine: every request that generates goes through here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from vattention.engine.outputs import RequestOutput
from vattention.engine.sampling_params import SamplingParams
from vattention.server.errors import ApiError
from vattention.server.middleware import current_record
from vattention.server.state import ServerState


@dataclass(frozen=True)
class Job:
    """One prompt to be continued.

    Attributes:
        request_id: its name in the engine.
        token_ids: the prompt.
        params: how.
        priority: lower numbers are served earlier.
    """

    request_id: str
    token_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0


async def answers(state: ServerState, jobs: Sequence[Job]) -> list[RequestOutput]:
    """The last output of each job, in order. When one fails, the others are aborted."""

    async def last(job: Job) -> RequestOutput:
        async with aclosing(_outputs(state, job)) as outputs:
            return [output async for output in outputs][-1]

    tasks = [asyncio.ensure_future(last(job)) for job in jobs]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _cancel(tasks)


async def deltas(state: ServerState, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """What the engine says about each job, as it comes: the job's place in `jobs`, and the output.

    A reader that is slower than the engine gets larger pieces, not more of them. When one job fails, this raises its
    error and the others are aborted; so are all when the generator is closed.
    """
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(_outputs(state, job))) for job in jobs]
        if len(streams) == 1:
            async for output in streams[0]:
                yield 0, output
            return
        next_of = {asyncio.ensure_future(anext(stream)): place for place, stream in enumerate(streams)}
        try:
            while next_of:
                done, _ = await asyncio.wait(next_of, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=next_of.__getitem__):
                    place = next_of.pop(task)
                    output = task.result()
                    if not output.finished:
                        next_of[asyncio.ensure_future(anext(streams[place]))] = place
                    yield place, output
        finally:
            await _cancel(list(next_of))


async def _outputs(state: ServerState, job: Job) -> AsyncGenerator[RequestOutput, None]:
    record = current_record()
    record.prompt_tokens += len(job.token_ids)
    if not state.llm.running:
        raise ApiError(503, "the engine has stopped: this server has to be started again", code="engine")
    prompt = {"prompt_token_ids": job.token_ids}
    async with aclosing(state.llm.generate(prompt, job.params, job.request_id, priority=job.priority)) as outputs:
        async for output in outputs:
            for each in output.outputs:
                record.completion_tokens += len(each.token_ids)
                if each.finish_reason is not None:
                    record.finish.append(each.finish_reason)
            yield output


async def _cancel(tasks: Collection[asyncio.Future[RequestOutput]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

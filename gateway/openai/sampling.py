"""Carrying out a plan: the samples of all its prompts at once, as pieces in the order in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial

from engines.messages import SampleDelta
from engines.operations import SampleResult
from gateway.errors import EngineLost
from gateway.openai.backend import Backend, SampleEvent
from gateway.openai.continuation import Continuation, Echo, Piece
from gateway.openai.plan import Plan, off_loop


@dataclass
class Usage:
    """Tokens of a request, counted as they come: each prompt once, every generated token that is answered with."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0


async def carry_out(backend: Backend, plan: Plan, usage: Usage) -> AsyncGenerator[Piece, None]:
    """The pieces of all choices; `usage` is complete when the last one has come.

    Closing the generator cancels what is under way. Raises what `Backend.sample` raises.
    """
    usage.prompt = sum(len(prompt.tokens) for prompt in plan.prompts)
    prompts = await off_loop(usage.prompt if plan.echo else 0, _progress, plan)
    opening = [piece for progress in prompts for piece in progress.opening()]
    streams = [backend.sample(plan.target, sample, stream=plan.token_by_token) for sample in plan.samples]
    async with aclosing(_merged(streams)) as events:
        async for index, event in events:
            # Nothing is shown before the engine has taken the samples up.
            shown, opening = [*opening, *await prompts[index].pieces(event)], []
            for piece in shown:
                usage.completion += len(piece.tokens) - piece.prompt_tokens
                yield piece
            if isinstance(event, SampleResult):
                usage.cached += event.prompt_cache_hit_tokens


def _progress(plan: Plan) -> list[_Progress]:
    return [_Progress(plan, index) for index in range(len(plan.prompts))]


class _Progress:
    """The choices of one prompt while they grow."""

    def __init__(self, plan: Plan, index: int) -> None:
        self._plan = plan
        self._echo = Echo(plan, index) if plan.echo else None
        offset = len(self._echo.text) if self._echo else 0
        self._choices = range(index * plan.n, (index + 1) * plan.n)
        self._growing = [Continuation(plan, choice, offset) for choice in self._choices]

    def opening(self) -> list[Piece]:
        """What stands before everything that is sampled."""
        if self._echo is None or not self._plan.token_by_token:
            return []
        return [self._echo.piece(choice, None) for choice in self._choices]

    async def pieces(self, event: SampleEvent) -> list[Piece]:
        """What an event adds."""
        if isinstance(event, SampleDelta):
            choice = self._growing[event.sequence]
            return [choice.feed(event.tokens, event.logprobs, event.top_logprobs, event.stop_reason)]
        size = sum(sequence.tokens.shape[0] for sequence in event.sequences)
        return await off_loop(size, self._rest, event)

    def _rest(self, result: SampleResult) -> list[Piece]:
        pieces: list[Piece] = []
        if self._echo is not None and not self._plan.token_by_token:
            pieces += [self._echo.piece(choice, result) for choice in self._choices]
        if not self._plan.generate:
            return [replace(piece, finish="length") for piece in pieces]
        for choice, sequence in zip(self._growing, result.sequences, strict=True):
            if not choice.finished:
                pieces.append(choice.rest(sequence))
        return pieces


async def _merged(
    streams: Sequence[AsyncGenerator[SampleEvent, None]],
) -> AsyncGenerator[tuple[int, SampleEvent], None]:
    """Events of all streams with their stream's number, as they come; the first failure ends them all."""
    arrived: asyncio.Queue[tuple[int, SampleEvent | None]] = asyncio.Queue()
    readers = [asyncio.create_task(_read(index, stream, arrived)) for index, stream in enumerate(streams)]
    for index, reader in enumerate(readers):
        reader.add_done_callback(partial(_ended, index, arrived))
    under_way = len(readers)
    try:
        while under_way:
            index, event = await arrived.get()
            if event is None:
                readers[index].result()  # raises what broke this stream
                under_way -= 1
            else:
                yield index, event
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


def _ended(
    index: int, arrived: asyncio.Queue[tuple[int, SampleEvent | None]], reader: asyncio.Task[None]
) -> None:
    arrived.put_nowait((index, None))


async def _read(
    index: int,
    stream: AsyncGenerator[SampleEvent, None],
    arrived: asyncio.Queue[tuple[int, SampleEvent | None]],
) -> None:
    complete = False
    async with aclosing(stream):
        async for event in stream:
            arrived.put_nowait((index, event))
            complete = isinstance(event, SampleResult)
    if not complete:
        raise EngineLost("The sample ended without a result; send the request again.")

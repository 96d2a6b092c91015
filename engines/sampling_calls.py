"""Samples in the engine process: from a request's bytes to tokens and results on the socket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import msgspec

from engines.interface import Engine, EngineInfo, SampleEnd, SampleEvent, SampleStep, UserError
from engines.messages import Failure, FromEngine, Sample, Sampled, SampleDelta
from engines.operations import decode_sample, encode
from engines.performing import failure_of_engine, refused
from engines.sample_checks import check_sample

Send = Callable[..., None]
"""Sends a message and its payload frames: `send(message, *payloads)`."""


class SamplingCalls:
    """The samples under way in one engine, and which of them are streamed."""

    def __init__(self, engine: Engine, info: EngineInfo, send: Send) -> None:
        self._engine = engine
        self._info = info
        self._send = send
        self._streamed: dict[int, bool] = {}
        self._prompts: dict[int, int] = {}

    def start(self, call: Sample, body: bytes) -> None:
        """Have the engine queue a sample; one that it refuses is answered at once."""
        try:
            request = decode_sample(body)
            check_sample(request, self._info)
            self._engine.start_sample(call.call_id, request, call.party)
            self._streamed[call.call_id] = call.stream
            self._prompts[call.call_id] = request.prompt.shape[0]
        except msgspec.DecodeError as error:
            self._fail(call.call_id, Failure("user", f"the input is no sample request: {error}"))
        except UserError as error:
            self._fail(call.call_id, refused(error, f"sample {call.call_id}"))
        except (
            Exception
        ) as error:  # the process boundary: a plugin may raise anything, and other samples go on
            self._fail(
                call.call_id, failure_of_engine(error, "this sample", f"the start of sample {call.call_id}")
            )
            self._engine.cancel_sample(call.call_id)

    def cancel(self, call_id: int) -> None:
        """Forget a sample; an unknown one is no error, it may have ended meanwhile."""
        self._streamed.pop(call_id, None)
        self._prompts.pop(call_id, None)
        self._engine.cancel_sample(call_id)

    def advance(self) -> None:
        """One decoding step, and what is to be told about it. Raises RuntimeError if the engine is stuck."""
        try:
            events = self._engine.advance()
        except (
            Exception
        ) as error:  # the process boundary: which sample the engine failed at is not known, so all fail
            self._fail_all(
                failure_of_engine(error, "this sample", f"a step of samples {sorted(self._streamed)}")
            )
            return
        self._tell(events)

    def _tell(self, events: Sequence[SampleEvent]) -> None:
        steps = [
            event for event in events if isinstance(event, SampleStep) and self._streamed.get(event.call_id)
        ]
        steps.sort(key=_sequence)  # stable, so that each sequence's tokens keep their order
        for _, own in groupby(steps, key=_sequence):
            self._send(_delta(list(own)))
        for event in events:
            if isinstance(event, SampleEnd) and self._streamed.pop(event.call_id, None) is not None:
                self._end(event)

    def _end(self, event: SampleEnd) -> None:
        prompt_tokens = self._prompts.pop(event.call_id)
        if isinstance(event.result, UserError):
            self._fail(event.call_id, refused(event.result, f"sample {event.call_id}"))
            return
        if isinstance(event.result, Exception):
            where = f"sample {event.call_id}"
            self._fail(event.call_id, failure_of_engine(event.result, "this sample", where))
            return
        answer = Sampled(
            event.call_id,
            prompt_tokens=prompt_tokens,
            cached_tokens=event.result.prompt_cache_hit_tokens,
            sampled_tokens=sum(sequence.tokens.shape[0] for sequence in event.result.sequences),
        )
        self._send(answer, encode(event.result))

    def _fail(self, call_id: int, failure: Failure) -> None:
        answer: FromEngine = Sampled(call_id, failure)
        self._send(answer)

    def _fail_all(self, failure: Failure) -> None:
        """Answer every sample under way with the failure and have the engine forget them."""
        for call_id in list(self._streamed):
            self._fail(call_id, failure)
            self.cancel(call_id)
        if self._engine.sampling:
            raise RuntimeError(
                "the engine still has samples after all were cancelled; only a new process helps"
            )


def _sequence(step: SampleStep) -> tuple[int, int]:
    return step.call_id, step.sequence


def _delta(steps: Sequence[SampleStep]) -> SampleDelta:
    """The steps of one sequence as one message; alternatives for every token, or for none."""
    tops = [list(step.token.top) for step in steps]
    return SampleDelta(
        call_id=steps[0].call_id,
        sequence=steps[0].sequence,
        tokens=[step.token.token for step in steps],
        logprobs=[step.token.logprob for step in steps],
        top_logprobs=tops if any(tops) else [],
        stop_reason=steps[-1].stop_reason,
    )

"""vLLM's outputs as pieces: the few attributes of `vllm.outputs.RequestOutput` that are read, without importing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from engines.sampling import Best
from engines.vllm.asking import Piece, Scores


class Logprob(Protocol):
    """Of `vllm.logprobs`."""

    logprob: float


Position = Mapping[int, Logprob]


class Completion(Protocol):
    """Of `vllm.outputs.CompletionOutput`; with `RequestOutputKind.DELTA` what is new."""

    token_ids: Sequence[int]
    logprobs: Sequence[Position] | None


class Output(Protocol):
    """Of `vllm.outputs.RequestOutput`."""

    prompt_logprobs: Sequence[Position | None] | None
    outputs: Sequence[Completion]
    finished: bool
    num_cached_tokens: int | None


def piece_of(output: Output, top: int) -> Piece:
    """What an output says; `top` of the best tokens were asked for."""
    [completion] = output.outputs
    tokens = list(completion.token_ids)
    positions = list(completion.logprobs or [])
    if len(positions) != len(tokens):
        raise RuntimeError(f"vLLM told {len(positions)} log-probs of {len(tokens)} tokens")
    prompt = output.prompt_logprobs
    return Piece(
        tokens=tokens,
        logprobs=[position[token].logprob for token, position in zip(tokens, positions, strict=True)],
        tops=[best_of(_scores(position), top) if top else () for position in positions],
        ended=output.finished,
        cached_tokens=output.num_cached_tokens or 0,
        prompt=None if not prompt else [None if each is None else _scores(each) for each in prompt],
    )


def best_of(scores: Scores, count: int) -> Best:
    """The best tokens of a position, best first; vLLM adds the token that stands there to them."""
    return tuple(sorted(scores.items(), key=lambda pair: -pair[1])[:count])


def _scores(position: Position) -> Scores:
    return {token: found.logprob for token, found in position.items()}

"""Pieces of choices as answers: whole, or as the events of a stream, in the forms of the two routes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from gateway.openai.continuation import Alternatives, Finish, Piece
from gateway.openai.plan import Plan
from gateway.openai.reasoning import Thinking
from gateway.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatReply,
    CompletionChoice,
    CompletionLogprobs,
    CompletionReply,
    Identity,
    TokenLogprob,
    TopLogprob,
    UsageReply,
)
from gateway.openai.sampling import Usage
from gateway.text import TextCodec

LOWEST = -9999.0
"""Stands for log-probs that JSON cannot express, as OpenAI's does."""

T = TypeVar("T")


class Rendering(Protocol):
    """How the answers of one route look."""

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> msgspec.Struct:
        """The answer to a request without `stream`."""

    def opening(self) -> list[msgspec.Struct]:
        """The events before anything has been sampled."""

    def event(self, piece: Piece) -> msgspec.Struct | None:
        """The event that a piece makes; None when there is nothing to tell."""

    def closing(self, usage: Usage) -> msgspec.Struct:
        """The event with the counts of tokens."""


class CompletionRendering:
    """`text_completion` objects."""

    def __init__(self, plan: Plan, identity: Identity, *, include_usage: bool) -> None:
        self._plan = plan
        self._identity = identity
        self._no_usage: UnsetType | None = None if include_usage else UNSET

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> CompletionReply:
        choices = [self._choice(_joined(parts)) for parts in _by_choice(self._plan, pieces)]
        return self._reply(choices, UsageReply.of(usage))

    def opening(self) -> list[msgspec.Struct]:
        return []

    def event(self, piece: Piece) -> CompletionReply | None:
        if not _tells(self._plan, piece):
            return None
        return self._reply([self._choice(piece)], self._no_usage)

    def closing(self, usage: Usage) -> CompletionReply:
        return self._reply([], UsageReply.of(usage))

    def _reply(
        self, choices: list[CompletionChoice], usage: UsageReply | UnsetType | None
    ) -> CompletionReply:
        of = self._identity
        return CompletionReply(of.id, of.created, of.model, of.system_fingerprint, choices, usage)

    def _choice(self, piece: Piece) -> CompletionChoice:
        ids, prompt_ids = self._token_ids(piece)
        return CompletionChoice(
            index=piece.choice,
            text=piece.text,
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish,
            token_ids=ids,
            prompt_token_ids=prompt_ids,
        )

    def _token_ids(self, piece: Piece) -> tuple[list[int] | UnsetType, list[int] | UnsetType]:
        if not self._plan.return_token_ids:
            return UNSET, UNSET
        prompt = self._plan.prompts[piece.choice // self._plan.n].tokens if piece.finish else UNSET
        return piece.tokens[piece.prompt_tokens :], prompt

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if self._plan.top is None:
            return None
        text = self._plan.target.text
        return CompletionLogprobs(
            tokens=[_spelled(text, token, "bytes:") for token in piece.tokens],
            token_logprobs=[None if value is None else _finite(value) for value in piece.logprobs],
            top_logprobs=[self._top(piece, position) for position in range(len(piece.tokens))],
            text_offset=piece.offsets,
        )

    def _top(self, piece: Piece, position: int) -> dict[str, float] | None:
        """The best alternatives by their text, and the token itself when it is not among them."""
        own = piece.logprobs[position]
        if own is None:
            return None
        best = piece.top[position] if piece.top else ()
        found: dict[str, float] = {}
        for token, value in (*best[: self._plan.top], (piece.tokens[position], own)):
            found.setdefault(_spelled(self._plan.target.text, token, "bytes:"), _finite(value))
        return found


class ChatRendering:
    """`chat.completion` objects, and `chat.completion.chunk` objects in a stream."""

    def __init__(self, plan: Plan, identity: Identity, *, include_usage: bool) -> None:
        self._plan = plan
        self._identity = identity
        self._no_usage: UnsetType | None = None if include_usage else UNSET
        self._prompt_ids = plan.prompts[0].tokens if plan.return_token_ids else UNSET

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> ChatReply:
        choices = [
            ChatChoice(
                piece.choice,
                AssistantMessage(piece.text, self._reasoning(piece)),
                self._logprobs(piece),
                piece.finish,
                self._token_ids(piece),
            )
            for piece in map(_joined, _by_choice(self._plan, pieces))
        ]
        of = self._identity
        return ChatReply(
            of.id,
            of.created,
            of.model,
            of.system_fingerprint,
            choices,
            UsageReply.of(usage),
            self._prompt_ids,
        )

    def opening(self) -> list[msgspec.Struct]:
        """Who speaks, once for each choice; the first event also has the prompt's tokens, if they are asked for."""
        first: list[msgspec.Struct] = []
        for choice in range(self._plan.n):
            says = ChatChunkChoice(choice, ChatDelta(role="assistant", content=""))
            first.append(self._chunk([says], self._no_usage, UNSET if choice else self._prompt_ids))
        return first

    def event(self, piece: Piece) -> ChatChunk | None:
        if not _tells(self._plan, piece):
            return None
        delta = ChatDelta(content=piece.text or UNSET, reasoning_content=piece.reasoning or UNSET)
        choice = ChatChunkChoice(
            piece.choice, delta, self._logprobs(piece), piece.finish, self._token_ids(piece)
        )
        return self._chunk([choice], self._no_usage)

    def closing(self, usage: Usage) -> ChatChunk:
        return self._chunk([], UsageReply.of(usage))

    def _chunk(
        self,
        choices: list[ChatChunkChoice],
        usage: UsageReply | UnsetType | None,
        prompt_ids: list[int] | UnsetType = UNSET,
    ) -> ChatChunk:
        of = self._identity
        return ChatChunk(of.id, of.created, of.model, of.system_fingerprint, choices, usage, prompt_ids)

    def _reasoning(self, piece: Piece) -> str | UnsetType | None:
        """Left out for models that know no thinking."""
        return UNSET if self._plan.thinking is Thinking.NEVER else piece.reasoning or None

    def _token_ids(self, piece: Piece) -> list[int] | UnsetType:
        return piece.tokens if self._plan.return_token_ids else UNSET

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._plan.top is None:
            return None
        text = self._plan.target.text
        content = []
        for position, token in enumerate(piece.tokens):
            value = piece.logprobs[position]
            content.append(
                TokenLogprob(
                    token=_spelled(text, token, ""),
                    logprob=None if value is None else _finite(value),
                    bytes=list(text.token_bytes(token)),
                    top_logprobs=_top(text, piece.top[position][: self._plan.top] if piece.top else ()),
                )
            )
        return ChatLogprobs(content)


def _top(text: TextCodec, best: Alternatives) -> list[TopLogprob]:
    return [
        TopLogprob(_spelled(text, token, ""), _finite(value), list(text.token_bytes(token)))
        for token, value in best
    ]


def _tells(plan: Plan, piece: Piece) -> bool:
    """Whether a client would see anything of this piece in a stream."""
    shows_tokens = plan.top is not None or plan.return_token_ids
    return bool(piece.text or piece.reasoning or piece.finish or (shows_tokens and piece.tokens))


def _by_choice(plan: Plan, pieces: Sequence[Piece]) -> list[list[Piece]]:
    found: list[list[Piece]] = [[] for _ in range(len(plan.prompts) * plan.n)]
    for piece in pieces:
        found[piece.choice].append(piece)
    return found


def _joined(parts: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    finish: Finish | None = parts[-1].finish
    return Piece(
        choice=parts[0].choice,
        text="".join(part.text for part in parts),
        tokens=_flat([part.tokens for part in parts]),
        logprobs=_flat([part.logprobs for part in parts]),
        offsets=_flat([part.offsets for part in parts]),
        top=_flat([part.top for part in parts]),
        finish=finish,
        prompt_tokens=parts[0].prompt_tokens,
        reasoning="".join(part.reasoning for part in parts),
    )


def _flat(lists: Sequence[list[T]]) -> list[T]:
    return [item for part in lists for item in part]


def _finite(value: float) -> float:
    return LOWEST if math.isnan(value) else max(value, LOWEST)


def _spelled(text: TextCodec, token: int, prefix: str) -> str:
    """A token as text; one that is not valid UTF-8 on its own as its bytes, in hexadecimal escapes."""
    data = text.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)

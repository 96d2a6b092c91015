"""The bodies of answers, as OpenAI's clients read them. UNSET fields are left out; None is sent as null."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.openai.backend import Target
from gateway.openai.sampling import Usage

Finish = Literal["stop", "length"] | None


class PromptDetails(msgspec.Struct, frozen=True):
    """`cached_tokens` of the prompt were not computed again."""

    cached_tokens: int


class UsageReply(msgspec.Struct, frozen=True):
    """Tokens; a prompt counts once, however many choices continue it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails

    @classmethod
    def of(cls, usage: Usage) -> UsageReply:
        """The counts as they are sent."""
        total = usage.prompt + usage.completion
        return cls(usage.prompt, usage.completion, total, PromptDetails(usage.cached))


class ModelReply(msgspec.Struct, frozen=True):
    """One model. `max_model_len` is its context in tokens, `ready` whether its engine answers now."""

    id: str
    created: int
    max_model_len: int | None
    ready: bool
    object: Literal["model"] = "model"
    owned_by: str = "tandem"


class ModelList(msgspec.Struct, frozen=True):
    """Answer to `GET /models`."""

    data: list[ModelReply]
    object: Literal["list"] = "list"


# ---------------------------------------------------------------------------- completions


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Four lists of one length. A token that is not valid UTF-8 on its own is shown as `bytes:\\xe2\\x80`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    """One continuation, or the next part of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionReply(msgspec.Struct, frozen=True):
    """Answer to `POST /completions`, and each event of its stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: UsageReply | UnsetType | None = UNSET
    object: Literal["text_completion"] = "text_completion"


# ---------------------------------------------------------------------------- chat


class TopLogprob(msgspec.Struct, frozen=True):
    """One alternative; `bytes` are the token's own, not always valid UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One token of the answer with the best alternatives at its place."""

    token: str
    logprob: float | None
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log-probs of all tokens, also of those that ended the answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    """What the model said, and what it thought before, if it is one that thinks."""

    content: str
    reasoning_content: str | UnsetType | None = UNSET
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatChoice(msgspec.Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Finish
    token_ids: list[int] | UnsetType = UNSET


class ChatReply(msgspec.Struct, frozen=True):
    """Answer to `POST /chat/completions`."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: UsageReply
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion"] = "chat.completion"


class ChatDelta(msgspec.Struct, frozen=True):
    """What is new in an answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    """The next part of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish = None
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True):
    """An event of a chat's stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: UsageReply | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"


# ---------------------------------------------------------------------------- what all events of an answer share


@dataclass(frozen=True)
class Identity:
    """Of one answer. The fingerprint changes with whatever its numbers depend on: model, adapter, device, versions."""

    id: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, target: Target) -> Identity:
        """A fresh id for an answer by this target."""
        info = target.info
        versions: Mapping[str, str] = info.versions
        adapter = target.adapter.adapter_id if target.adapter else ""
        depends_on = [info.base_model, adapter, info.device, info.dtype, sorted(versions.items())]
        digest = hashlib.sha256(msgspec.json.encode(depends_on)).hexdigest()
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, f"fp_{digest[:10]}")

"""The bodies of requests: which fields there are, which values they take, and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

MAX_BODY_BYTES = 16 * 1024 * 1024
"""64 prompts of 32,768 token ids each fit; JSON of this size is read in about 0.1 s."""

MAX_CHOICES = 128
MAX_PROMPTS = 64
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 512

Temperature = Annotated[float, Meta(ge=0, le=2, description="0 is greedy.")]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=-1, description="Draw from that many best tokens only; -1 and 0 are off.")]
MinP = Annotated[
    float,
    Meta(ge=0, le=1, description="Draw from tokens with at least that share of the best one's probability."),
]
Penalty = Annotated[float, Meta(ge=-2, le=2, description="Of tokens that the answer holds already.")]
Repetition = Annotated[
    float, Meta(ge=0.01, le=100, description="Of tokens that the prompt or the answer holds; 1 is off.")
]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES, description="Choices for each prompt.")]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1, description="The same request gives the same tokens.")]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """With `include_usage` a last event carries the counts of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Sampling(msgspec.Struct, frozen=True, kw_only=True):
    model: Annotated[
        str, Meta(min_length=1, description="A base model, or the `tinker://` path of a checkpoint.")
    ]
    n: Choices = 1
    seed: Seed | None = None
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Repetition = 1.0
    logit_bias: Annotated[
        dict[str, Annotated[float, Meta(ge=-100, le=100)]],
        Meta(max_length=1024, description="What is added to the logits of tokens, by their ids."),
    ] = {}
    ignore_eos: Annotated[
        bool, Meta(description="Whether to go on behind an end-of-sequence token; not OpenAI's.")
    ] = False
    skip_special_tokens: Annotated[
        bool, Meta(description="Whether special tokens are left out of the text; not OpenAI's.")
    ] = True
    return_token_ids: Annotated[
        bool, Meta(description="Whether the answer holds `prompt_token_ids` and `token_ids`; not OpenAI's.")
    ] = False

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, always as a sequence."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class CompletionRequest(_Sampling, frozen=True, kw_only=True):
    """`POST /completions`. A prompt is text or token ids; several prompts are a list of either."""

    prompt: str | list[str | int | list[int]]
    max_tokens: (
        Annotated[int, Meta(ge=0, description="0, together with `echo`, only scores the prompt.")] | None
    ) = None
    logprobs: (
        Annotated[int, Meta(ge=0, le=5, description="That many alternatives at each position.")] | None
    ) = None
    echo: bool = False
    best_of: int | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a conversation. Text parts of a content are joined as they are. What becomes of the thoughts of
    an earlier answer is for the chat template to say."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]
    name: str | None = None
    reasoning_content: str | None = None


class ChatRequest(_Sampling, frozen=True, kw_only=True):
    """`POST /chat/completions`. The model's chat template makes the prompt."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, description="Up to the context's end when absent.")] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, description="The same as `max_tokens`.")] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20, description="Needs `logprobs`.")] | None = None
    chat_template_kwargs: Annotated[
        dict[str, Any], Meta(description="Variables for the chat template; not OpenAI's.")
    ] = {}


AnyRequest = CompletionRequest | ChatRequest
R = TypeVar("R", CompletionRequest, ChatRequest)

HARMLESS = frozenset(
    {
        "user",
        "metadata",
        "parallel_tool_calls",
        "safety_identifier",
        "prompt_cache_key",
    }
)
"""Fields that ask for nothing here: they are accepted whatever they hold."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "suffix": ("",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "reasoning_effort": ("none",),
    "use_beam_search": (False,),
    "stop_token_ids": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_stop_str_in_output": (False,),
}
"""Fields that cannot be honoured, with the values that ask for nothing and are accepted."""

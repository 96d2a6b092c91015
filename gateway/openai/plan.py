"""What a request comes to: prompts as tokens, one sample for each, and what the answer shows of them."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ParamSpec, TypeVar, cast

import numpy as np

from engines.operations import SampleRequest
from engines.tensors import Tensor
from gateway.openai.backend import Target
from gateway.openai.errors import ContextLengthExceeded, InvalidValue, UnsupportedParameter
from gateway.openai.parse import check_choices, parse_messages, text_of
from gateway.openai.reasoning import Thinking
from gateway.openai.requests import MAX_PROMPTS, ChatMessage, ChatRequest, CompletionRequest

P = ParamSpec("P")
T = TypeVar("T")

LARGE = 16_384
"""Characters or tokens from which work on them is done in a thread; below, it takes a few milliseconds at most."""

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for completions."""


@dataclass(frozen=True)
class Prompt:
    """Token ids, N >= 1, and the text that they came from, if it was sent as text."""

    tokens: list[int]
    text: str | None


@dataclass(frozen=True)
class Plan:
    """One sample for each prompt; choice number `i * n + j` is the j-th continuation of prompt i.

    `top` is how many alternatives the answer shows at each position, None for no log-probs at all. `generate` is
    False when the continuation (an engine draws at least one token) is thrown away. `thinking` says how to part
    thoughts from the answer.
    """

    target: Target
    prompts: list[Prompt]
    samples: list[SampleRequest]
    n: int
    stops: tuple[str, ...]
    top: int | None
    echo: bool
    generate: bool
    stream: bool
    skip_special_tokens: bool
    return_token_ids: bool
    thinking: Thinking = Thinking.NEVER

    @property
    def token_by_token(self) -> bool:
        """Whether tokens are asked for as they come. A prompt's log-probs come only with the whole result."""
        return self.stream and self.generate and not (self.echo and self.top is not None)


async def off_loop(size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do it here when it is small, else in a thread, so that the event loop goes on."""
    if size < LARGE:
        return work(*args, **kwargs)
    return await asyncio.to_thread(work, *args, **kwargs)


async def plan_completion(target: Target, request: CompletionRequest) -> Plan:
    """Raises InvalidValue, or ContextLengthExceeded, before anything is sampled."""
    sent = _prompts_sent(request.prompt)
    if not 1 <= len(sent) <= MAX_PROMPTS:
        raise InvalidValue(
            f"'prompt' holds {len(sent)} prompts; 1 to {MAX_PROMPTS} are allowed.", param="prompt"
        )
    check_choices(len(sent), request.n)
    _check_top(target, request.logprobs, "logprobs")
    prompts = [await _prompt(target, prompt) for prompt in sent]
    room = _room(target, prompts, request.max_tokens)
    wanted = min(DEFAULT_MAX_TOKENS, room) if request.max_tokens is None else max(1, request.max_tokens)
    scored = request.echo and request.logprobs is not None
    return _plan(
        target,
        request,
        prompts,
        max_tokens=wanted,
        top=request.logprobs,
        prompt_logprobs=scored,
        echo=request.echo,
        generate=request.max_tokens != 0,
    )


async def plan_chat(target: Target, request: ChatRequest) -> Plan:
    """Raises InvalidValue, UnsupportedParameter, ContextLengthExceeded, or BadRequest when the template refuses."""
    messages = parse_messages(request.messages)
    top = (request.top_logprobs or 0) if request.logprobs else None
    _check_top(target, top, "top_logprobs")
    size = sum(len(text_of(message)) for message in messages)
    rendered = await off_loop(size, _render, target, messages, request)
    prompt = Prompt(await off_loop(len(rendered), _chat_tokens, target, rendered), None)
    asked = request.max_completion_tokens or request.max_tokens
    _room(target, [prompt], asked)
    plan = _plan(target, request, [prompt], max_tokens=asked, top=top)
    return replace(plan, thinking=Thinking.of(target.text.chat_template.source, rendered))


def _plan(
    target: Target,
    request: CompletionRequest | ChatRequest,
    prompts: list[Prompt],
    *,
    max_tokens: int | None,
    top: int | None,
    prompt_logprobs: bool = False,
    echo: bool = False,
    generate: bool = True,
) -> Plan:
    bias = _biases(target, request.logit_bias)
    samples = [
        SampleRequest(
            prompt=Tensor.of(np.asarray(prompt.tokens, dtype=np.int32)),
            num_samples=request.n,
            seed=secrets.randbits(63) if request.seed is None else request.seed % 2**63,
            max_tokens=max_tokens,
            temperature=request.temperature,
            top_k=request.top_k or -1,
            top_p=request.top_p,
            stop_strings=request.stops,
            stop_at_eos=not request.ignore_eos,
            prompt_logprobs=prompt_logprobs,
            topk_prompt_logprobs=top or 0 if prompt_logprobs else 0,
            topk_sample_logprobs=top or 0,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            logit_bias=bias,
            adapter=target.adapter,
        )
        for prompt in prompts
    ]
    return Plan(
        target=target,
        prompts=prompts,
        samples=samples,
        n=request.n,
        stops=request.stops,
        top=top,
        echo=echo,
        generate=generate,
        stream=request.stream,
        skip_special_tokens=request.skip_special_tokens,
        return_token_ids=request.return_token_ids,
    )


def _biases(target: Target, sent: dict[str, float]) -> dict[int, float]:
    """The bias of each token; JSON has their ids as texts."""
    vocabulary = target.info.vocab_size
    found: dict[int, float] = {}
    for token, bias in sent.items():
        if not (
            token.isascii() and token.isdecimal() and str(int(token[:9])) == token and int(token) < vocabulary
        ):
            raise InvalidValue(
                f"'logit_bias' holds {token[:20]!r}; its keys are token ids of this model, 0 to {vocabulary - 1}.",
                param="logit_bias",
            )
        found[int(token)] = bias
    return found


def _prompts_sent(prompt: str | list[str | int | list[int]]) -> Sequence[str | list[int]]:
    """The prompts of a request, each a text or a list of ids."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(part) for part in prompt}
    if kinds == {int}:
        return [cast(list[int], prompt)]
    if len(kinds) > 1:
        raise InvalidValue(
            "'prompt' mixes texts, token ids and lists of ids; send a text, a list of texts, a list of token ids, or "
            "a list of such lists.",
            param="prompt",
        )
    return cast(list[str | list[int]], prompt)


async def _prompt(target: Target, sent: str | list[int]) -> Prompt:
    if isinstance(sent, str):
        prompt = Prompt(await off_loop(len(sent), target.text.encode, sent), sent)
    else:
        prompt = Prompt(sent, None)
    if not prompt.tokens:
        raise InvalidValue("A prompt has no tokens; it must have at least one.", param="prompt")
    vocabulary = target.info.vocab_size
    if not 0 <= min(prompt.tokens) <= max(prompt.tokens) < vocabulary:
        wrong = next(token for token in prompt.tokens if not 0 <= token < vocabulary)
        raise InvalidValue(
            f"'prompt' holds the token id {wrong}; ids of this model are 0 to {vocabulary - 1}.",
            param="prompt",
        )
    return prompt


def _render(target: Target, messages: list[ChatMessage], request: ChatRequest) -> str:
    """A conversation in the form of the model's chat template."""
    # `developer` is the newer name of `system`; few templates know it.
    template = target.text.chat_template
    renamed = {} if "developer" in template.source else {"developer": "system"}
    shown = [
        {
            "role": renamed.get(message.role, message.role),
            "content": text_of(message),
            "name": message.name,
            "reasoning_content": message.reasoning_content,
        }
        for message in messages
    ]
    variables = request.chat_template_kwargs
    rendered = target.text.render_chat(shown, variables=variables)
    for name, value in variables.items():
        if value and name not in template.reads:
            raise UnsupportedParameter(
                f"'chat_template_kwargs' has {name[:80]!r}, which the chat template of this model does not read. "
                "Leave it out.",
                param="chat_template_kwargs",
            )
    named = [index for index, message in enumerate(messages) if message.name]
    if named and rendered == target.text.render_chat(
        [{**message, "name": None} for message in shown], variables=variables
    ):
        raise UnsupportedParameter(
            f"'messages[{named[0]}].name' does not appear in the prompts of this model's chat template. Leave it out, "
            "or say in the content who speaks.",
            param=f"messages[{named[0]}].name",
        )
    return rendered


def _chat_tokens(target: Target, rendered: str) -> list[int]:
    tokens = target.text.encode(rendered, add_special_tokens=False)
    if not tokens:
        raise InvalidValue(
            "The chat template of this model made an empty prompt of these messages.", param="messages"
        )
    return tokens


def _check_top(target: Target, top: int | None, param: str) -> None:
    if top is not None and top > target.info.max_top_logprobs:
        raise InvalidValue(
            f"'{param}' is {top}; this model gives at most {target.info.max_top_logprobs} alternatives.",
            param=param,
        )


def _room(target: Target, prompts: list[Prompt], max_tokens: int | None) -> int:
    """How many tokens every prompt leaves room for; raises ContextLengthExceeded when that is not enough."""
    context = target.info.max_context
    longest = max(len(prompt.tokens) for prompt in prompts)
    wanted = max(1, max_tokens or 1)
    if longest + wanted > context:
        raise ContextLengthExceeded(
            f"The model's context holds {context} tokens; the prompt has {longest} tokens and the continuation may "
            f"have {wanted}, together {longest + wanted}. Shorten the prompt or lower max_tokens.",
            param="max_tokens" if longest < context else "prompt",
        )
    return context - longest

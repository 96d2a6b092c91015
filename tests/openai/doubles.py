"""A tokenizer made on the spot, and a backend that says what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engines.interface import EngineInfo
from engines.messages import SampleDelta
from engines.operations import AdapterRef, SampledSequence, SampleRequest, SampleResult, TopLogprobs
from engines.tensors import Tensor
from gateway.errors import EngineUnavailable, NotFound
from gateway.openai import ServedModel, Target
from gateway.openai.backend import SampleEvent
from gateway.openai.passing_on import Passage
from gateway.text import TextCodec

BOS, EOS, TURN, END = "<s>", "</s>", "<|turn|>", "<|end|>"
SAMPLE_TEXT = (
    "The quick brown fox jumps over the lazy dog. Hello world, hello there! STOP and go on. "
    "naïve café ünïcode 漢字 テスト 🎉👩‍👩‍👧 مرحبا  12 345\n\nsystem user assistant content "
)
CHAT_TEMPLATE = """{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('no such role: ' + message['role']) }}
    {%- endif %}
    {{- '<|turn|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '(no thinking)\\n' }}{%- endif %}
{%- endif %}
"""


def byte_level_tokenizer() -> Tokenizer:
    """Byte-level BPE with special tokens 0 to 3, which puts BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[BOS, EOS, TURN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE_TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


def tokenizer_files(chat_template: str | None = CHAT_TEMPLATE) -> dict[str, bytes]:
    """What an engine hands over for that tokenizer."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    files = {
        "tokenizer.json": byte_level_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    if chat_template is not None:
        files["chat_template.jinja"] = chat_template.encode()
    return files


@dataclass
class Script:
    """One continuation: its tokens and why it ended."""

    tokens: list[int]
    reason: Literal["stop", "length"] = "length"


def logprob(token: int, position: int) -> float:
    """The log-prob of a drawn token: exact in binary, different for every token and position."""
    return -(token * 64 + position + 1) / 1024


def prompt_logprob(token: int, position: int) -> float:
    """The log-prob of a prompt's token."""
    return -(token * 64 + position + 1) / 2048


def best(token: int, k: int) -> list[tuple[int, float]]:
    """The k best alternatives at a position: the token itself first when it is even, else never."""
    first = [token] if token % 2 == 0 else []
    others = [10 + (token + i) % 200 * 2 + 1 for i in range(k)]
    return [(other, -(i + 1) / 8) for i, other in enumerate((first + others)[:k])]


def _tensor(values: list[int], dtype: type[np.generic] = np.int32) -> Tensor:
    return Tensor.of(np.asarray(values, dtype=dtype))


def _top(tokens: list[int], k: int, *, prompt: bool = False) -> TopLogprobs | None:
    if not k:
        return None
    rows = [best(token, k) for token in tokens]
    if prompt:
        rows[0] = [(0, float("nan"))] * k
    return TopLogprobs(
        Tensor.of(np.asarray([[token for token, _ in row] for row in rows], dtype=np.int32).reshape(-1, k)),
        Tensor.of(np.asarray([[value for _, value in row] for row in rows], dtype=np.float32).reshape(-1, k)),
    )


@dataclass
class ScriptedBackend:
    """Serves `tiny/base` and `tinker://run/sampler_weights/a`; `script` says what each sequence becomes.

    `burst` tokens come in each delta. `fail_after` events `failure` is raised. `hang_after` events nothing comes
    any more. `requests` and `cancelled` record what happened.
    """

    script: Callable[[SampleRequest, int], Script]
    chat_template: str | None = CHAT_TEMPLATE
    burst: int = 1
    fail_after: int = 0
    failure: Exception | None = None
    hang_after: int | None = None
    ready: bool = True
    requests: list[SampleRequest] = field(default_factory=list)
    streamed: list[bool] = field(default_factory=list)
    cancelled: int = 0
    hanging: asyncio.Event = field(default_factory=asyncio.Event)
    passage: Passage = field(default_factory=Passage)

    def __post_init__(self) -> None:
        self.text = TextCodec.from_files(tokenizer_files(self.chat_template))
        self.info = EngineInfo(
            base_model="tiny/base",
            architecture="scripted",
            roles=("sample",),
            vocab_size=420,
            max_context=256,
            losses=(),
            max_rank=8,
            eos_tokens=(1,),
            max_top_logprobs=8,
            device="cpu",
            dtype="float32",
            deterministic=True,
            versions={},
        )

    async def models(self, owner: str) -> list[ServedModel]:
        return [ServedModel("tiny/base", 1_700_000_000, self.ready, 256 if self.ready else None)]

    async def resolve(self, owner: str, model: str) -> Target:
        adapters = {"tinker://run/sampler_weights/a": AdapterRef("a-1", "checkpoints/a")}
        if model != "tiny/base" and model not in adapters:
            raise NotFound(f"there is no model {model!r}", param="model")
        if not self.ready:
            raise EngineUnavailable("the engine of tiny/base is starting")
        return Target(owner, "tiny/base", adapters.get(model), self.text, self.info, engine="engine-1")

    async def sample(
        self, target: Target, request: SampleRequest, *, stream: bool
    ) -> AsyncGenerator[SampleEvent, None]:
        assert target.engine == "engine-1"
        self.requests.append(request)
        self.streamed.append(stream)
        done = False
        try:
            async for event in self._events(request, stream):
                yield event
            done = True
        finally:
            self.cancelled += not done

    async def _events(self, request: SampleRequest, stream: bool) -> AsyncGenerator[SampleEvent, None]:
        scripts = [self.script(request, index) for index in range(request.num_samples)]
        events: list[SampleEvent] = [
            *(self._deltas(scripts, request) if stream else []),
            self._result(scripts, request),
        ]
        for count, event in enumerate(events):
            await asyncio.sleep(0)
            if self.failure is not None and count == self.fail_after:
                raise self.failure
            if count == self.hang_after:
                self.hanging.set()
                await asyncio.Event().wait()
            yield event

    def _deltas(self, scripts: list[Script], request: SampleRequest) -> list[SampleDelta]:
        """All sequences' tokens, in turn, as a decoding batch makes them."""
        deltas = []
        for start in range(0, max(len(script.tokens) for script in scripts), self.burst):
            for index, script in enumerate(scripts):
                tokens = script.tokens[start : start + self.burst]
                if not tokens:
                    continue
                last = start + self.burst >= len(script.tokens)
                k = request.topk_sample_logprobs
                deltas.append(
                    SampleDelta(
                        call_id=1,
                        sequence=index,
                        tokens=tokens,
                        logprobs=[logprob(token, start + i) for i, token in enumerate(tokens)],
                        top_logprobs=[best(token, k) for token in tokens] if k else [],
                        stop_reason=script.reason if last else None,
                    )
                )
        return deltas

    def _result(self, scripts: list[Script], request: SampleRequest) -> SampleResult:
        prompt = request.prompt.array().tolist()
        scores = [prompt_logprob(token, i) if i else float("nan") for i, token in enumerate(prompt)]
        sequences = [
            SampledSequence(
                _tensor(script.tokens),
                Tensor.of(np.asarray([logprob(t, i) for i, t in enumerate(script.tokens)], dtype=np.float32)),
                script.reason,
                _top(script.tokens, request.topk_sample_logprobs),
            )
            for script in scripts
        ]
        return SampleResult(
            sequences,
            prompt_logprobs=Tensor.of(np.asarray(scores, dtype=np.float32))
            if request.prompt_logprobs
            else None,
            topk_prompt_logprobs=_top(prompt, request.topk_prompt_logprobs, prompt=True),
            prompt_cache_hit_tokens=3,
        )

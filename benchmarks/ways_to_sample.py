"""Ways of continuing prompts, each as a function that does it once and gives tokens per second."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tinker

from benchmarks.plain import PlainProcess

Prompts = Sequence[list[int]]
Continued = dict[int, list[int]]
"""New tokens by the prompt's number."""


class ThroughGateway:
    """All prompts at once through the official SDK, prompt i with sampler i modulo their count."""

    def __init__(self, samplers: Sequence[tinker.SamplingClient], asked: Prompts, new_tokens: int) -> None:
        self.samplers = samplers
        self.prompts = [tinker.ModelInput.from_ints(prompt) for prompt in asked]
        self.params = tinker.SamplingParams(max_tokens=new_tokens, temperature=0.0, stop=[])
        self.tokens: Continued = {}

    def rate(self) -> float:
        """New tokens per second."""
        started = time.perf_counter()
        futures = [
            self.samplers[number % len(self.samplers)].sample(
                prompt, num_samples=1, sampling_params=self.params
            )
            for number, prompt in enumerate(self.prompts)
        ]
        answers = [future.result(timeout=300).sequences[0].tokens for future in futures]
        seconds = time.perf_counter() - started
        self.tokens = {number: list(tokens) for number, tokens in enumerate(answers)}
        return sum(map(len, answers)) / seconds


class EngineAlone:
    """The same work handed to an engine in this process; adapters are folders of its storage."""

    def __init__(self, engine: Any, asked: Prompts, new_tokens: int, adapters: Sequence[str] = ()) -> None:
        import numpy as np

        from engines.operations import AdapterRef, SampleRequest
        from engines.tensors import Tensor

        refs: list[AdapterRef | None] = [AdapterRef(folder, folder) for folder in adapters]
        refs = refs or [None]
        self.engine = engine
        self.requests = [
            SampleRequest(
                Tensor.of(np.array(prompt, dtype=np.int32)),
                num_samples=1,
                seed=number,
                max_tokens=new_tokens,
                temperature=0.0,
                stop_at_eos=False,
                adapter=refs[number % len(refs)],
            )
            for number, prompt in enumerate(asked)
        ]
        self.tokens: Continued = {}

    def rate(self) -> float:
        """New tokens per second."""
        started = time.perf_counter()
        found = self.continued(range(len(self.requests)))
        seconds = time.perf_counter() - started
        self.tokens = found
        return sum(map(len, found.values())) / seconds

    def continued(self, which: Sequence[int]) -> Continued:
        """The new tokens of some of the prompts, decoded together."""
        from engines.interface import SampleEnd

        found: Continued = {}
        for number in which:
            self.engine.start_sample(number, self.requests[number])
        while self.engine.sampling:
            for event in self.engine.advance():
                if isinstance(event, SampleEnd):
                    if isinstance(event.result, Exception):
                        raise event.result
                    found[event.call_id] = event.result.sequences[0].tokens.array().tolist()
        return found


class Generated:
    """Transformers on the base model: `one by one`, in one padded `batch`, or its `continuous` batching.

    A repeat continues a part of the prompts, every `share`-th, another one each time.
    """

    def __init__(self, plain: PlainProcess, way: str, count: int, share: int = 1) -> None:
        self.plain = plain
        self.way = way
        self.parts = [list(range(first, count, share)) for first in range(share)]
        self.done = 0
        self.tokens: Continued = {}

    def rate(self) -> float:
        """New tokens per second."""
        which = self.parts[self.done % len(self.parts)]
        self.done += 1
        answer = self.plain.order(way=self.way, which=which)
        self.tokens.update(zip(which, answer["tokens"], strict=True))
        return sum(map(len, answer["tokens"])) / float(answer["seconds"])


def with_peft(plain: PlainProcess, adapters: Sequence[Path], each: int) -> Continued:
    """The first `each` prompts of each adapter, one by one, through PEFT."""
    found: Continued = {}
    for first, adapter in enumerate(adapters):
        which = [first + turn * len(adapters) for turn in range(each)]
        answer = plain.order(way="one by one", which=which, adapter=str(adapter))
        found.update(zip(which, answer["tokens"], strict=True))
    return found


def agreement(ours: Mapping[int, list[int]], theirs: Mapping[int, list[int]]) -> float:
    """Share of the prompts known to the other side that both continue with the same tokens."""
    return sum(ours[number] == tokens for number, tokens in theirs.items()) / len(theirs)

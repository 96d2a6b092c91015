"""The engine interface on vLLM: samples wait in a line, vLLM draws their sequences, pieces become events."""

from __future__ import annotations

import itertools
from collections import Counter

from tokenizers import Tokenizer

from engines.interface import (
    EngineBroken,
    EngineConfig,
    EngineInfo,
    LoadError,
    SampleEnd,
    SampleEvent,
    UserError,
)
from engines.line import Line
from engines.operations import SampleRequest
from engines.sampling_only import SamplingEngine
from engines.storage import FolderStorage
from engines.vllm.adapters import AdapterPlaces
from engines.vllm.asking import Facts, LlmDied, Piece, SleepyLlm
from engines.vllm.builds import installed_build
from engines.vllm.loop import Key, VllmLoop
from engines.vllm.options import VllmOptions, read_options
from engines.vllm.samples import Sample
from engines.vllm.sleeping import Sleeper

GUEST_SLOTS = 16
"""Slots beyond the limit for parties that have no sequence under way, one for each: somebody's long samples in all
other slots do not keep another's first one waiting."""
MAX_TOP_LOGPROBS = 256
_PATIENCE_S = 1.0
"""How long `advance` waits for something to tell, when it is called without `news`."""


class VllmEngine(SamplingEngine):
    """Adapters come from storage folders; a sequence is a request to vLLM, so that samples share its batch."""

    def __init__(
        self, config: EngineConfig, options: VllmOptions, llm: SleepyLlm, files: dict[str, bytes]
    ) -> None:
        self._config = config
        self._options = options
        self._files = files
        self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        self._llm = Sleeper(llm, options.sleep_after_s)
        self._loop = VllmLoop(self._llm)
        self._info = _describe(config, options, self._loop.start())
        self._adapters = AdapterPlaces(
            FolderStorage.of(config), options.adapters, options.max_rank, self._loop.drop_adapter
        )
        self._line: Line[Sample] = Line()
        self._samples: dict[int, Sample] = {}
        self._running: Counter[str] = Counter()
        self._numbers = itertools.count(1)

    @classmethod
    def load(cls, config: EngineConfig) -> VllmEngine:
        options = read_options(config.options)
        if config.roles != ("sample",):
            raise LoadError(
                f"the plugin vllm samples and does not train: the roles of {config.name} are "
                f'{", ".join(config.roles)}, set roles = ["sample"] and have another engine train {config.base_model}'
            )
        build = installed_build()
        # Only now: what these import is not there without vLLM, and the sentence above says more than an ImportError.
        from engines.tokenizer_files import read_tokenizer_files
        from engines.vllm.llm import AsyncVllm

        return cls(config, options, AsyncVllm(config, options, build), read_tokenizer_files(config.model))

    def info(self) -> EngineInfo:
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        return self._files

    def close(self) -> None:
        self._loop.close()

    # ------------------------------------------------------------------ sampling

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        if request.adapter is not None:
            self._adapters.require(request.adapter.folder)
        sample = Sample(call_id, f"{next(self._numbers)}", request, self._info, self._decode, party)
        self._samples[call_id] = sample
        self._line.add(sample)
        self._fill()

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False)

    def advance(self) -> list[SampleEvent]:
        events: list[SampleEvent] = []
        for (call_id, index), came in self._loop.take(_PATIENCE_S if self._samples else 0):
            if isinstance(came, LlmDied):
                raise EngineBroken(str(came)) from came
            sample = self._samples.get(call_id)
            if sample is not None:
                events += self._take(sample, index, came)
        self._fill()
        return events

    def _take(self, sample: Sample, index: int, came: Piece | Exception) -> list[SampleEvent]:
        if isinstance(came, Exception):
            self.cancel_sample(sample.call_id)
            return [SampleEnd(sample.call_id, came)]
        steps = sample.take(index, came)
        if steps and steps[-1].stop_reason is not None:
            self._ended((sample.call_id, index), sample.party, at_once=not came.ended)
        events: list[SampleEvent] = [*steps]
        if sample.complete:
            self._forget(sample)
            events.append(SampleEnd(sample.call_id, sample.result()))
        return events

    def cancel_sample(self, call_id: int) -> None:
        sample = self._samples.get(call_id)
        if sample is not None:
            self._line.remove(call_id)
            for index in sample.drawn:
                self._ended((call_id, index), sample.party, at_once=True)
            self._forget(sample)
            self._fill()

    @property
    def sampling(self) -> bool:
        return bool(self._samples)

    @property
    def news(self) -> int:
        return self._loop.news

    @property
    def passes(self) -> int:
        return self._loop.passes

    def stats(self) -> dict[str, float]:
        return {
            "resident_runs": 0,
            "resident_adapters": len(self._adapters),
            "adapter_places": self._options.adapters,
            "active_samples": len(self._samples),
            "active_sequences": self._running.total(),
            "asleep": float(self._llm.asleep),
            "sleeps": self._llm.sleeps,
        }

    # ------------------------------------------------------------------ places

    def _fill(self) -> None:
        """Begin what there is room for: whose party has the fewest sequences under way is next."""
        while (party := self._line.next_party(self._running)) is not None and self._has_slot(party):
            sample = self._line.take(party)
            try:
                begun = self._begin(sample)
            except UserError as error:  # its adapter has gone while it waited
                self._loop.tell((sample.call_id, 0), error)
                continue
            if sample.waiting:
                self._line.put_back([sample])
            if not begun:  # its adapter needs a place: nobody overtakes it, or it would never get one
                break

    def _has_slot(self, party: str) -> bool:
        running, slots = self._running.total(), self._options.sample_slots
        return running < slots or (not self._running[party] and running < slots + GUEST_SLOTS)

    def _begin(self, sample: Sample) -> bool:
        """Begin the next sequence of a sample; False while there is no place for its adapter."""
        adapter = sample.request.adapter
        if adapter is not None and sample.place is None:
            sample.place = self._adapters.take(adapter.folder)
            if sample.place is None:
                return False
        index, ask = sample.next()
        self._running[sample.party] += 1
        after = sample.place.ready if sample.place is not None else None
        self._loop.begin((sample.call_id, index), ask, after)
        return True

    def _ended(self, key: Key, party: str, *, at_once: bool) -> None:
        """A sequence needs no slot any more; `at_once` if vLLM does not know yet."""
        if at_once:
            self._loop.cancel(key)
        self._running[party] -= 1
        if not self._running[party]:
            del self._running[party]

    def _forget(self, sample: Sample) -> None:
        del self._samples[sample.call_id]
        if sample.place is not None and sample.request.adapter is not None:
            self._adapters.give_back(sample.request.adapter.folder)


def _describe(config: EngineConfig, options: VllmOptions, facts: Facts) -> EngineInfo:
    return EngineInfo(
        base_model=config.base_model,
        architecture=facts.architecture,
        roles=config.roles,
        vocab_size=facts.vocab_size,
        max_context=facts.max_context,
        losses=(),
        max_rank=options.max_rank,
        eos_tokens=facts.eos_tokens,
        max_top_logprobs=min(MAX_TOP_LOGPROBS, facts.vocab_size),
        device=facts.device,
        dtype=facts.dtype,
        deterministic=False,
        versions=facts.versions,
        train_unembed=False,
        any_prompt_token=False,
    )

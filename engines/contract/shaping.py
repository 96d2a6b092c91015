"""The contract of bias, penalties and cuts: every token is the one that the definitions, written out again, give."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest

from engines.contract.material import Array, Caller, Reference, drawn, log_softmax, request, text
from engines.interface import Engine, EngineInfo
from engines.operations import SampleRequest
from engines.sampling import uniforms

SETTINGS: list[dict[str, Any]] = [
    {"repetition_penalty": 2.0},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 2.0, "temperature": 0.3},
    {"frequency_penalty": 1.5, "temperature": 0.3},
    {"frequency_penalty": -2.0},
    {"min_p": 0.3},
    {"min_p": 0.05, "top_k": 20, "top_p": 0.8, "temperature": 1.3},
    {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.7,
        "min_p": 0.02,
        "top_p": 0.9,
        "temperature": 0.8,
    },
]


class ShapingContract:
    """Tokens are compared exactly; log-probs within `shaping_tolerance`."""

    shaping_tolerance = 1e-4

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_tokens_are_those_of_the_definitions(
        self, engine: Engine, reference: Reference, settings: dict[str, Any]
    ) -> None:
        """Also greedily; and the settings matter."""
        caller = Caller(engine)
        asked = request(_prompt(caller.info), num_samples=2, max_tokens=12, seed=3, **settings)
        greedy = msgspec.structs.replace(asked, temperature=0.0)
        found = [drawn(result) for result in caller.sample(asked, greedy)]
        assert found[0] == [_by_definition(asked, index, reference)[0] for index in range(2)]
        assert found[1] == [_by_definition(greedy, 0, reference)[0]] * 2
        plain = request(_prompt(caller.info), num_samples=2, max_tokens=12, seed=3)
        plain = msgspec.structs.replace(plain, temperature=asked.temperature)
        assert drawn(caller.sample(plain)[0]) != found[0]

    def test_biased_tokens_are_preferred_or_never_come(self, engine: Engine, reference: Reference) -> None:
        caller = Caller(engine)
        prompt = _prompt(caller.info)
        likely = int(reference(prompt)[-1].argmax())
        wanted, unwanted = text(caller.info, 2, seed=4)
        bias = {wanted: 6.5, unwanted: -3.0, likely: -100.0}
        asked = request(prompt, num_samples=3, max_tokens=12, logit_bias=bias, presence_penalty=1.0)
        found = drawn(caller.sample(asked)[0])
        assert found == [_by_definition(asked, index, reference)[0] for index in range(3)]
        tokens = [token for tokens in found for token in tokens]
        assert wanted in tokens and likely not in tokens

    def test_log_probs_do_not_know_of_them(self, engine: Engine, reference: Reference) -> None:
        """They are the model's after temperature, of the drawn tokens and of the best ones."""
        caller = Caller(engine)
        settings = {"repetition_penalty": 1.8, "frequency_penalty": 1.0, "min_p": 0.1, "temperature": 0.7}
        for asked in (
            request(_prompt(caller.info), max_tokens=8, topk_sample_logprobs=2, **settings),
            request(
                _prompt(caller.info), max_tokens=8, topk_sample_logprobs=2, **settings | {"temperature": 0.0}
            ),
        ):
            sequence = caller.sample(asked)[0].sequences[0]
            _, expected = _by_definition(asked, 0, reference)
            found = sequence.logprobs.array()
            assert np.abs(np.subtract(found, expected, dtype=np.float64)).max() < self.shaping_tolerance
            assert sequence.top_logprobs is not None
            whole = [*_prompt(caller.info), *sequence.tokens.array().tolist()]
            rows = log_softmax(reference(whole)[-9:-1] / (asked.temperature or 1.0))
            best = sequence.top_logprobs.logprobs.array()
            assert np.abs(np.sort(rows, axis=1)[:, :-3:-1] - best).max() < self.shaping_tolerance

    def test_each_sample_of_a_batch_has_its_own(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = [
            request(_prompt(caller.info), seed=seed, max_tokens=10, num_samples=1 + seed % 2, **settings)
            for seed, settings in enumerate([{}, *SETTINGS, {"logit_bias": {1: 4.0}}])
        ]
        together = caller.sample(*asked)
        for one, result in zip(asked, together, strict=True):
            assert drawn(result) == drawn(caller.sample(one)[0])


def _prompt(info: EngineInfo) -> list[int]:
    """A few tokens, some of them twice."""
    tokens = text(info, 12)
    return [*tokens, *tokens[:4]]


def _by_definition(asked: SampleRequest, index: int, reference: Reference) -> tuple[list[int], list[float]]:
    """The tokens of one sequence and their log-probs, from the reference's logits alone."""
    prompt: list[int] = asked.prompt.array().tolist()
    tokens: list[int] = []
    scores: list[float] = []
    for position in range(asked.max_tokens or 0):
        logits = reference(prompt + tokens)[-1].astype(np.float64)
        temperature = asked.temperature or 1.0
        changed = _changed(logits, asked, prompt, tokens)
        if asked.temperature == 0:
            token = int(changed.argmax())
        else:
            token = _drawn(
                np.exp(log_softmax(changed / temperature)), asked, uniforms(asked.seed, index, position)
            )
        scores.append(float(log_softmax(logits / temperature)[token]))
        tokens.append(token)
    return tokens, scores


def _changed(logits: Array, asked: SampleRequest, prompt: list[int], tokens: list[int]) -> Array:
    changed = logits.copy()
    for token in range(len(changed)):
        value = changed[token] + asked.logit_bias.get(token, 0.0)
        if token in prompt or token in tokens:
            value = value / asked.repetition_penalty if value > 0 else value * asked.repetition_penalty
        value -= asked.frequency_penalty * tokens.count(token)
        value -= asked.presence_penalty * (token in tokens)
        changed[token] = value
    return changed


def _drawn(probabilities: Array, asked: SampleRequest, uniform: float) -> int:
    """By inversion: in the order of ids, or best first when something is cut."""
    cuts = asked.min_p > 0 or asked.top_k > 0 or asked.top_p < 1
    order = np.argsort(-probabilities, kind="stable") if cuts else np.arange(len(probabilities))
    left = probabilities[order].copy()
    if cuts:
        left[left < asked.min_p * left[0]] = 0.0
        left[asked.top_k if asked.top_k > 0 else len(left) :] = 0.0
        before, total = 0.0, math.fsum(left)
        for place, share in enumerate(left.tolist()):
            if before >= asked.top_p * total:
                left[place] = 0.0
            before += share
    cumulative = left.cumsum()
    return int(order[np.searchsorted(cumulative, uniform * cumulative[-1], side="right")])

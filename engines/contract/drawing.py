"""The contract of drawing tokens: randomness, distributions, where a sequence ends."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from tokenizers import Tokenizer

from engines.contract.material import (
    Caller,
    alternatives,
    distance,
    drawn,
    request,
    sequence_logprobs,
    supervised,
    text,
)
from engines.interface import Engine, SampleEnd
from engines.operations import SampleRequest, SampleResult


class DrawingContract:
    """Tokens are compared exactly; log-probs of two passes within `sampling_tolerance`."""

    sampling_tolerance = 1e-4

    # ------------------------------------------------------------------ randomness

    def test_the_same_request_gives_the_same_tokens(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = request(text(caller.info, 5), num_samples=3, max_tokens=12)
        first, second = (caller.sample(asked)[0] for _ in range(2))
        assert drawn(first) == drawn(second)
        assert all(len(tokens) == 12 for tokens in drawn(first))
        assert all(sequence.stop_reason == "length" for sequence in first.sequences)

    def test_another_seed_gives_other_tokens(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        results = caller.sample(
            *(request(prompt, seed=seed, max_tokens=16, temperature=2.0) for seed in range(4))
        )
        assert len({tuple(drawn(result)[0]) for result in results}) == 4

    def test_the_sequences_of_a_request_differ(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = request(text(caller.info, 5), num_samples=6, max_tokens=16, temperature=2.0)
        assert len({tuple(tokens) for tokens in drawn(caller.sample(asked)[0])}) == 6

    def test_a_sequence_does_not_depend_on_how_many_there_are(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        one, four = (caller.sample(request(prompt, num_samples=n, max_tokens=10))[0] for n in (1, 4))
        assert drawn(one)[0] == drawn(four)[0]

    def test_a_sample_does_not_depend_on_its_company(self, engine: Engine) -> None:
        """Neither when all start together nor when they join and leave a running batch."""
        caller = Caller(engine)
        asked = [
            request(text(caller.info, 3 + 4 * i, i), num_samples=1 + i % 2, seed=i, max_tokens=4 + 5 * i)
            for i in range(5)
        ]
        alone = [caller.sample(one)[0] for one in asked]
        together = caller.sample(*asked)
        joining = self._sample_staggered(caller, asked)
        for expected, *found in zip(alone, together, joining, strict=True):
            for result in found:
                assert drawn(result) == drawn(expected)
                ours, theirs = (sequence_logprobs(each.sequences) for each in (result, expected))
                assert distance(ours, theirs) < self.sampling_tolerance

    def _sample_staggered(self, caller: Caller, asked: list[SampleRequest]) -> list[SampleResult]:
        """Start one request, and another after every two steps."""
        events = []
        for call_id, one in enumerate(asked):
            caller.engine.start_sample(call_id, one)
            events += caller.engine.advance() + caller.engine.advance()
        events += caller.drain()
        ends = {event.call_id: event.result for event in events if isinstance(event, SampleEnd)}
        results = [ends[call_id] for call_id in range(len(asked))]
        return [result for result in results if not isinstance(result, Exception)]

    # ------------------------------------------------------------------ distributions

    def test_greedy_takes_the_best_whatever_the_seed(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        greedy = request(prompt, temperature=0.0, max_tokens=8, topk_sample_logprobs=2)
        first, other = caller.sample(greedy, request(prompt, temperature=0.0, max_tokens=8, seed=99))
        assert drawn(first) == drawn(other)
        best = alternatives(first.sequences[0].top_logprobs)
        assert [pairs[0][0] for pairs in best] == drawn(first)[0]

    @pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-6}])
    def test_a_cut_that_leaves_one_token_is_greedy(self, engine: Engine, settings: dict[str, float]) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        greedy, cut = caller.sample(
            request(prompt, temperature=0.0, max_tokens=8),
            request(prompt, max_tokens=8, num_samples=3, **settings),
        )
        assert drawn(cut) == drawn(greedy) * 3

    def test_frequencies_are_the_probabilities(self, engine: Engine) -> None:
        """The first token of many sequences, within four standard deviations."""
        caller = Caller(engine)
        probabilities = self._first_probabilities(caller, 1.0)
        self._assert_frequencies(caller, dict(probabilities[:3]))

    def test_top_k_draws_from_the_k_best_alone(self, engine: Engine) -> None:
        caller = Caller(engine)
        kept = self._first_probabilities(caller, 1.0)[:3]
        total = sum(probability for _, probability in kept)
        expected = {token: probability / total for token, probability in kept}
        assert self._assert_frequencies(caller, expected, top_k=3) == expected.keys()

    def test_top_p_draws_from_the_smallest_set_that_reaches_p(self, engine: Engine) -> None:
        caller = Caller(engine)
        ordered = self._first_probabilities(caller, 1.0)
        kept = ordered[:3]
        reached = ordered[0][1] + ordered[1][1] + ordered[2][1] / 2
        total = sum(probability for _, probability in kept)
        expected = {token: probability / total for token, probability in kept}
        assert self._assert_frequencies(caller, expected, top_p=reached) == expected.keys()

    def test_log_probs_are_tempered(self, engine: Engine) -> None:
        """log p_T(i) - log p_T(j) = (log p_1(i) - log p_1(j)) / T, for the drawn token and its alternatives."""
        caller = Caller(engine)
        plain = dict(self._first_logprobs(caller, 1.0))
        for temperature in (0.5, 3.0):
            tempered = dict(self._first_logprobs(caller, temperature))
            tokens = sorted(plain.keys() & tempered.keys())
            assert len(tokens) > 1
            found = np.array([tempered[token] - tempered[tokens[0]] for token in tokens])
            expected = np.array([plain[token] - plain[tokens[0]] for token in tokens]) / temperature
            np.testing.assert_allclose(found, expected, atol=self.sampling_tolerance)

    def test_log_probs_are_those_before_the_cut(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = request(text(caller.info, 4), max_tokens=1, topk_sample_logprobs=2)
        plain, cut = (
            dict(alternatives(result.sequences[0].top_logprobs)[0])
            for result in caller.sample(asked, msgspec.structs.replace(asked, top_k=2))
        )
        assert cut == pytest.approx(plain, abs=self.sampling_tolerance)

    def test_the_drawn_token_has_the_log_prob_of_its_alternative(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = request(text(caller.info, 4), top_k=2, temperature=1.5, topk_sample_logprobs=3)
        sequence = caller.sample(asked)[0].sequences[0]
        pairs = zip(sequence.tokens.array().tolist(), sequence.logprobs.array().tolist(), strict=True)
        for (token, logprob), best in zip(pairs, alternatives(sequence.top_logprobs), strict=True):
            values = [value for _, value in best]
            assert values == sorted(values, reverse=True)
            assert dict(best)[token] == pytest.approx(logprob, abs=self.sampling_tolerance)

    def _first_logprobs(self, caller: Caller, temperature: float) -> list[tuple[int, float]]:
        """The best alternatives of the first token, best first."""
        count = min(caller.info.max_top_logprobs, 8)
        asked = request(
            text(caller.info, 4), max_tokens=1, temperature=temperature, topk_sample_logprobs=count
        )
        return alternatives(caller.sample(asked)[0].sequences[0].top_logprobs)[0]

    def _first_probabilities(self, caller: Caller, temperature: float) -> list[tuple[int, float]]:
        return [(token, math.exp(score)) for token, score in self._first_logprobs(caller, temperature)]

    def _assert_frequencies(self, caller: Caller, expected: dict[int, float], **settings: float) -> set[int]:
        """Draw 800 first tokens; gives those that came."""
        draws = 800
        asked = request(text(caller.info, 4), num_samples=draws // 8, max_tokens=1, **settings)
        results = caller.sample(*(msgspec.structs.replace(asked, seed=seed) for seed in range(8)))
        tokens = [sequence[0] for result in results for sequence in drawn(result)]
        for token, probability in expected.items():
            deviation = math.sqrt(draws * probability * (1 - probability))
            assert abs(tokens.count(token) - draws * probability) < 4 * deviation + 1
        return set(tokens)

    # ------------------------------------------------------------------ stopping

    def test_max_tokens_none_goes_to_the_end_of_the_context(self, engine: Engine) -> None:
        caller = Caller(engine)
        longest = caller.info.max_context
        prompt = (text(caller.info, 64) * (longest // 64 + 1))[: longest - 3]
        open_ended, exact = caller.sample(request(prompt, max_tokens=None), request(prompt, max_tokens=3))
        assert len(drawn(open_ended)[0]) == 3
        assert open_ended.sequences[0].stop_reason == "length"
        assert drawn(exact) == drawn(open_ended)

    def test_a_stop_token_ends_a_sequence_and_stays(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        free = caller.sample(request(prompt, max_tokens=20))[0].sequences[0]
        tokens = free.tokens.array().tolist()
        stop = tokens[7]
        cut = tokens[: tokens.index(stop) + 1]
        asked = request(
            prompt, max_tokens=20, stop_tokens=(_absent(caller, tokens), stop), topk_sample_logprobs=2
        )
        sequence = caller.sample(asked)[0].sequences[0]
        assert sequence.tokens.array().tolist() == cut
        assert sequence.stop_reason == "stop"
        assert sequence.logprobs.shape == (len(cut),)
        assert (
            distance([sequence.logprobs.array()], [free.logprobs.array()[: len(cut)]])
            < self.sampling_tolerance
        )
        assert len(alternatives(sequence.top_logprobs)) == len(cut)

    def test_each_sequence_stops_for_itself(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        free = drawn(caller.sample(request(prompt, num_samples=4, max_tokens=16, temperature=2.0))[0])
        stop = free[1][3]
        asked = request(prompt, num_samples=4, max_tokens=16, temperature=2.0, stop_tokens=(stop,))
        result = caller.sample(asked)[0]
        expected = [tokens[: tokens.index(stop) + 1] if stop in tokens else tokens for tokens in free]
        assert drawn(result) == expected
        reasons = ["stop" if stop in tokens else "length" for tokens in free]
        assert [sequence.stop_reason for sequence in result.sequences] == reasons

    def test_the_last_allowed_token_may_be_the_stop(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        tokens = drawn(caller.sample(request(prompt, max_tokens=20))[0])[0]
        length = next(i for i in range(4, 20) if tokens[i] not in tokens[:i]) + 1
        asked = request(prompt, max_tokens=length, stop_tokens=(tokens[length - 1],))
        assert caller.sample(asked)[0].sequences[0].stop_reason == "stop"

    def test_end_of_sequence_stops_unless_told_not_to(self, engine: Engine) -> None:
        caller = Caller(engine)
        if not caller.info.eos_tokens:
            pytest.skip("the model has no end-of-sequence token")
        eos = caller.info.eos_tokens[-1]
        prompt = text(caller.info, 4)
        caller.create(rank=8)
        caller.train([supervised(prompt + [eos] * 3, prompt[1:] + [eos] * 4)], 40, learning_rate=2e-2)
        adapter = caller.snapshot("checkpoints/ends")
        stopping, going_on = caller.sample(
            *(request(prompt, temperature=0.0, adapter=adapter, stop_at_eos=stops) for stops in (True, False))
        )
        assert drawn(stopping) == [[eos]]
        assert stopping.sequences[0].stop_reason == "stop"
        assert drawn(going_on)[0][:3] == [eos] * 3
        assert len(drawn(going_on)[0]) == 6
        assert going_on.sequences[0].stop_reason == "length"

    def test_a_stop_string_ends_a_sequence_with_the_token_that_completes_it(self, engine: Engine) -> None:
        caller = Caller(engine)
        tokenizer = Tokenizer.from_str(engine.tokenizer_files()["tokenizer.json"].decode())
        prompt = text(caller.info, 5)
        found = 0
        for seed in range(8):
            asked = request(prompt, seed=seed, max_tokens=40, temperature=1.5)
            tokens = drawn(caller.sample(asked)[0])[0]
            texts = [tokenizer.decode(tokens[: i + 1], skip_special_tokens=False) for i in range(len(tokens))]
            for string in _visible_pieces(texts[-1]):
                length = next(i for i, whole in enumerate(texts) if string in whole) + 1
                stopping = msgspec.structs.replace(asked, stop_strings=("no such text\n\n", string))
                sequence = caller.sample(stopping)[0].sequences[0]
                assert sequence.tokens.array().tolist() == tokens[:length], string
                assert sequence.stop_reason == "stop"
                found += 1
        assert found > 0


def _absent(caller: Caller, tokens: list[int]) -> int:
    """A token that is not among these."""
    return next(token for token in range(caller.info.vocab_size) if token not in tokens)


def _visible_pieces(whole: str) -> list[str]:
    """Strings of one and of several characters that a text holds, without replacement characters."""
    pieces = [piece for piece in whole.split("\ufffd") if piece]
    return [part for piece in pieces[:4] for part in (piece[-1], piece[:5])]

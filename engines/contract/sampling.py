"""The contract of sampling: log-probs that are the trainer's, immutable adapters, samples under way."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from engines.contract.material import (
    Caller,
    EngineFactory,
    alternatives,
    batch,
    distance,
    drawn,
    prompt_scores,
    request,
    same,
    sequence_logprobs,
    steps_of,
    supervised,
    text,
)
from engines.interface import Engine, SampleEnd, UserError
from engines.operations import AdapterRef


class SamplingContract:
    """Log-probs of two passes are compared within `sampling_tolerance`, tokens exactly."""

    sampling_tolerance = 1e-4

    # ------------------------------------------------------------------ log-probs of trainer and sampler

    def test_log_probs_are_the_trainers(self, engine: Engine) -> None:
        """Of drawn tokens at temperature 1, and of the prompt's own tokens."""
        caller = Caller(engine)
        adapter = self._adapter(caller)
        prompt = text(caller.info, 6)
        asked = request(prompt, max_tokens=10, num_samples=2, adapter=adapter, prompt_logprobs=True)
        result = caller.sample(asked)[0]
        for tokens, sequence in zip(drawn(result), result.sequences, strict=True):
            expected = caller.score(prompt + tokens)
            assert distance([sequence.logprobs.array()], [expected[5:]]) < self.sampling_tolerance
        assert result.prompt_logprobs is not None
        scores = result.prompt_logprobs.array()
        assert np.isnan(scores[0])
        assert distance([scores[1:]], [caller.score(prompt)]) < self.sampling_tolerance

    def test_every_step_is_counted_as_a_pass(self, engine: Engine) -> None:
        caller = Caller(engine)
        engine.start_sample(1, request(text(caller.info, 6), max_tokens=4))
        seen = [engine.passes]
        while engine.sampling:
            engine.advance()
            seen.append(engine.passes)
        assert len(seen) >= 4
        assert seen == sorted(set(seen))

    def test_prompt_log_probs_are_not_tempered(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 6)
        asked = [
            request(prompt, temperature=t, top_k=k, prompt_logprobs=True) for t, k in ((1.0, -1), (0.3, 2))
        ]
        plain, hot = (prompt_scores(result.prompt_logprobs) for result in caller.sample(*asked))
        assert distance([hot], [plain]) < self.sampling_tolerance

    def test_the_best_alternatives_of_a_prompt(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 6)
        asked = request(
            prompt, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3, topk_sample_logprobs=3
        )
        result = caller.sample(asked)[0]
        best = alternatives(result.topk_prompt_logprobs)
        assert best[0][0][0] == 0
        assert all(math.isnan(score) for _, score in best[0])
        assert len(best) == 6
        for token, score, pairs in zip(
            prompt[1:], prompt_scores(result.prompt_logprobs), best[1:], strict=True
        ):
            scores = [value for _, value in pairs]
            assert scores == sorted(scores, reverse=True)
            assert scores[0] >= score - self.sampling_tolerance
            assert dict(pairs).get(token, score) == pytest.approx(score, abs=self.sampling_tolerance)
        caller.create()
        wanted = supervised(prompt[:-1], np.array([[token for token, _ in pairs] for pairs in best[1:]]))
        found = np.array([[score for _, score in pairs] for pairs in best[1:]])
        assert distance([found], caller.logprobs([wanted])) < self.sampling_tolerance

    def test_nothing_is_told_that_was_not_asked_for(self, engine: Engine) -> None:
        caller = Caller(engine)
        result = caller.sample(request(text(caller.info, 4)))[0]
        assert result.prompt_logprobs is None
        assert result.topk_prompt_logprobs is None
        assert result.sequences[0].top_logprobs is None

    def test_a_prompt_of_one_token(self, engine: Engine) -> None:
        caller = Caller(engine)
        asked = request(text(caller.info, 1), prompt_logprobs=True, topk_prompt_logprobs=2)
        result = caller.sample(asked)[0]
        assert result.prompt_logprobs is not None
        assert result.prompt_logprobs.shape == (1,)
        assert math.isnan(result.prompt_logprobs.array()[0])
        assert len(drawn(result)[0]) == 6

    # ------------------------------------------------------------------ adapters

    def test_a_fresh_adapter_samples_like_the_base_model(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        adapter = caller.snapshot("checkpoints/fresh")
        prompt = text(caller.info, 6)
        base, fresh = caller.sample(
            *(request(prompt, num_samples=2, prompt_logprobs=True, adapter=own) for own in (None, adapter))
        )
        assert drawn(fresh) == drawn(base)
        assert distance(sequence_logprobs(fresh.sequences), sequence_logprobs(base.sequences)) < 1e-6
        assert distance([prompt_scores(fresh.prompt_logprobs)], [prompt_scores(base.prompt_logprobs)]) < 1e-6
        assert (
            distance([prompt_scores(base.prompt_logprobs)], [caller.score(prompt)]) < self.sampling_tolerance
        )

    def test_an_adapter_does_not_follow_its_run(self, engine: Engine) -> None:
        caller = Caller(engine)
        first = self._adapter(caller)
        prompt = text(caller.info, 6)
        asked = request(prompt, prompt_logprobs=True, adapter=first)
        before = caller.sample(asked)[0]
        caller.train(batch(caller.info), 5)
        second = caller.snapshot("checkpoints/second")
        after, newer = caller.sample(asked, msgspec.structs.replace(asked, adapter=second))
        assert drawn(after) == drawn(before)
        scores = [prompt_scores(result.prompt_logprobs) for result in (before, after, newer)]
        assert distance([scores[1]], [scores[0]]) < self.sampling_tolerance
        assert distance([scores[2]], [scores[0]]) > 10 * self.sampling_tolerance
        caller.engine.drop_run("run")
        assert drawn(caller.sample(asked)[0]) == drawn(before)

    def test_adapters_and_base_model_in_one_batch(self, engine: Engine) -> None:
        caller = Caller(engine)
        first = self._adapter(caller)
        caller.train(batch(caller.info), 5)
        second = caller.snapshot("checkpoints/second")
        prompt = text(caller.info, 6)
        asked = [
            request(prompt, prompt_logprobs=True, adapter=adapter) for adapter in (first, None, second, first)
        ]
        alone = [caller.sample(one)[0] for one in asked]
        together = caller.sample(*asked)
        for found, expected in zip(together, alone, strict=True):
            assert drawn(found) == drawn(expected)
            scores = [prompt_scores(result.prompt_logprobs) for result in (found, expected)]
            assert distance(scores[:1], scores[1:]) < self.sampling_tolerance
        assert (
            distance([prompt_scores(alone[0].prompt_logprobs)], [prompt_scores(alone[1].prompt_logprobs)])
            > 1e-3
        )

    def test_another_engine_samples_a_stored_adapter(self, engine_factory: EngineFactory) -> None:
        caller = Caller(engine_factory())
        adapter = self._adapter(caller)
        caller.save("checkpoints/with-optimizer", optimizer_state=True)
        prompt = text(caller.info, 6)
        asked = request(prompt, num_samples=2, max_tokens=10, adapter=adapter)
        expected = caller.sample(asked)[0]
        training = AdapterRef("from-training", "checkpoints/with-optimizer")
        other = Caller(engine_factory())
        for found in other.sample(asked, msgspec.structs.replace(asked, adapter=training)):
            assert drawn(found) == drawn(expected)
            scores = (sequence_logprobs(result.sequences) for result in (found, expected))
            assert distance(*scores) < self.sampling_tolerance

    def test_a_missing_adapter_is_refused(self, engine: Engine) -> None:
        caller = Caller(engine)
        adapter = AdapterRef("none", "checkpoints/never-saved")
        with pytest.raises(UserError, match="stored weights are not there"):
            engine.start_sample(1, request(text(caller.info, 3), adapter=adapter))
        assert not engine.sampling
        assert len(drawn(caller.sample(request(text(caller.info, 3)))[0])) == 1

    def _adapter(self, caller: Caller) -> AdapterRef:
        """A trained adapter of the run `run`."""
        caller.create()
        caller.train(batch(caller.info), 5)
        return caller.snapshot("checkpoints/first")

    # ------------------------------------------------------------------ under way

    def test_steps_come_in_order_and_make_up_the_result(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        engine.start_sample(7, request(prompt, num_samples=3, max_tokens=5, topk_sample_logprobs=2))
        engine.start_sample(8, request(prompt, max_tokens=9))
        assert engine.stats()["active_samples"] == 2
        events = caller.drain()
        assert engine.stats()["active_samples"] == 0
        ends = [event for event in events if isinstance(event, SampleEnd)]
        assert sorted(event.call_id for event in ends) == [7, 8]
        for end in ends:
            assert not isinstance(end.result, Exception)
            for index, sequence in enumerate(end.result.sequences):
                steps = steps_of(events, end.call_id, index)
                assert all(events.index(step) < events.index(end) for step in steps)
                assert [step.token.token for step in steps] == sequence.tokens.array().tolist()
                logprobs = np.array([step.token.logprob for step in steps], dtype=np.float32)
                assert same([logprobs], [sequence.logprobs.array()])
                assert [step.stop_reason for step in steps[:-1]] == [None] * (len(steps) - 1)
                assert steps[-1].stop_reason == sequence.stop_reason
                assert {len(step.token.top) for step in steps} == {2 if end.call_id == 7 else 0}

    def test_a_cancelled_sample_is_forgotten_and_no_other(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 5)
        kept = request(prompt, max_tokens=8)
        expected = caller.sample(kept)[0]
        engine.start_sample(1, request(prompt, seed=1, max_tokens=30, num_samples=2))
        engine.start_sample(2, kept)
        engine.advance()
        engine.cancel_sample(1)
        engine.cancel_sample(99)
        events = caller.drain()
        assert {event.call_id for event in events} == {2}
        (end,) = (event for event in events if isinstance(event, SampleEnd))
        assert not isinstance(end.result, Exception)
        assert drawn(end.result) == drawn(expected)

    def test_cancelling_the_last_sample_leaves_nothing_to_do(self, engine: Engine) -> None:
        caller = Caller(engine)
        engine.start_sample(1, request(text(caller.info, 3), max_tokens=30))
        engine.advance()
        engine.cancel_sample(1)
        assert not engine.sampling
        assert engine.advance() == []

    def test_training_between_the_steps_of_a_sample_changes_nothing(self, engine: Engine) -> None:
        caller = Caller(engine)
        adapter = self._adapter(caller)
        data = batch(caller.info)
        asked = request(text(caller.info, 5), num_samples=2, max_tokens=8, adapter=adapter)
        expected = caller.sample(asked)[0]
        caller.create("plain", seed=9)
        losses = caller.train(data, 3, "plain")
        caller.create("between", seed=9)
        engine.start_sample(1, asked)
        events = []
        for loss in losses:
            events += engine.advance()
            assert caller.train(data, 1, "between") == [loss]
        events += caller.drain()
        (end,) = (event for event in events if isinstance(event, SampleEnd))
        assert not isinstance(end.result, Exception)
        assert drawn(end.result) == drawn(expected)

    def test_a_party_with_nothing_under_way_begins_whatever_others_do(self, engine: Engine) -> None:
        caller = Caller(engine)
        prompt = text(caller.info, 3)
        for call_id in range(8):
            engine.start_sample(
                call_id, request(prompt, num_samples=16, max_tokens=40, stop_at_eos=False), "many"
            )
        engine.advance()
        asked = request(prompt, seed=3, max_tokens=1)
        engine.start_sample(99, asked, "one")
        events = [event for _ in range(3) for event in engine.advance()]
        (end,) = (event for event in events if isinstance(event, SampleEnd))
        assert end.call_id == 99
        for call_id in range(8):
            engine.cancel_sample(call_id)
        assert not isinstance(end.result, Exception)
        assert drawn(end.result) == drawn(caller.sample(asked)[0])

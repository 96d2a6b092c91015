"""The contract of what is told about a prompt: against log-probs of an independent computation, `reference`."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from numpy.typing import ArrayLike

from engines.contract.material import (
    Array,
    Caller,
    Reference,
    alternatives,
    batch,
    drawn,
    log_softmax,
    prompt_scores,
    request,
    same,
    text,
)
from engines.interface import Engine
from engines.operations import PromptAlternatives, SampleResult
from engines.tensors import Matrix, Tensor


class PromptContract:
    """Log-probs of one token differ from the reference's by at most `logprob_tolerance`.

    An engine that does not tell of tokens beside the prompt's own (`any_prompt_token`) is not asked for them.
    """

    logprob_tolerance = 1e-4

    def test_scores_are_those_of_the_full_distribution(self, engine: Engine, reference: Reference) -> None:
        """The prompt's own tokens, the best ones, named ones and drawn ones, all in one request."""
        caller = Caller(engine)
        prompt = text(caller.info, 9)
        expected = log_softmax(reference(prompt))[:-1]
        cells = _cells(caller, rows=8, columns=3)
        others = {"target_prompt_tokens": _dense(cells), "prompt_alternatives": 4}
        more = others if caller.info.any_prompt_token else {}
        asked = request(prompt, max_tokens=1, prompt_logprobs=True, topk_prompt_logprobs=3, **more)
        result = caller.sample(asked)[0]
        self._assert_close(prompt_scores(result.prompt_logprobs), expected[np.arange(8), prompt[1:]])
        best = alternatives(result.topk_prompt_logprobs)[1:]
        for row, pairs in zip(expected, best, strict=True):
            self._assert_close([score for _, score in pairs], np.sort(row)[::-1][:3])
            self._assert_close([score for _, score in pairs], row[[token for token, _ in pairs]])
        if not caller.info.any_prompt_token:
            return
        wanted = np.where(cells >= 0, np.take_along_axis(expected, np.maximum(cells, 0), 1), 0.0)
        found = result.target_prompt_logprobs
        assert found is not None and (found.shape, found.values.shape, found.crow) == ((8, 3), (8, 3), None)
        self._assert_close(found.values.array(), wanted)
        assert not np.asarray(found.values.array())[cells < 0].any()
        tokens, scores = _drawn(result)
        self._assert_close(scores, np.take_along_axis(expected, tokens, 1))

    def test_named_tokens_in_a_sparse_matrix_come_back_in_it(
        self, engine: Engine, reference: Reference
    ) -> None:
        caller = _any_token(engine)
        prompt = text(caller.info, 7)
        expected = log_softmax(reference(prompt))
        asked = Matrix(
            (6, 50),
            Tensor.of(np.array([5, 9, -1, 7], dtype=np.int64)),
            Tensor.of(np.array([0, 0, 2, 2, 2, 4, 4], dtype=np.int64)),
            Tensor.of(np.array([3, 49, 0, 1], dtype=np.int64)),
        )
        found = caller.sample(request(prompt, target_prompt_tokens=asked))[0].target_prompt_logprobs
        assert found is not None
        assert (found.shape, found.crow, found.col) == (asked.shape, asked.crow, asked.col)
        self._assert_close(found.values.array(), [expected[1, 5], expected[1, 9], 0.0, expected[4, 7]])

    def test_named_tokens_are_scored_with_the_adapter(self, engine: Engine) -> None:
        """As the trainer scores them, which takes K targets for each token too."""
        caller = _any_token(engine)
        caller.create()
        caller.train(batch(caller.info), 5)
        adapter = caller.snapshot("checkpoints/named")
        prompt = text(caller.info, 6)
        cells = np.abs(_cells(caller, rows=5, columns=4))
        asked = request(prompt, target_prompt_tokens=_dense(cells), prompt_alternatives=2)
        adapted, plain = caller.sample(msgspec.structs.replace(asked, adapter=adapter), asked)
        assert adapted.target_prompt_logprobs is not None and plain.target_prompt_logprobs is not None
        expected = caller.score_tokens(prompt[:-1], cells)
        self._assert_close(adapted.target_prompt_logprobs.values.array(), expected)
        assert np.abs(plain.target_prompt_logprobs.values.array() - expected).max() > 1e-2
        tokens, scores = _drawn(adapted)
        self._assert_close(scores, caller.score_tokens(prompt[:-1], tokens))

    def test_only_the_last_tokens_are_scored(self, engine: Engine) -> None:
        """Named and drawn tokens are not affected."""
        caller = Caller(engine)
        prompt = text(caller.info, 8)
        others = {
            "target_prompt_tokens": _dense(_cells(caller, rows=7, columns=2)),
            "prompt_alternatives": 2,
        }
        more = others if caller.info.any_prompt_token else {}
        asked = request(prompt, prompt_logprobs=True, topk_prompt_logprobs=2, **more)
        whole = caller.sample(asked)[0]
        for last in (1, 3, 7):
            found = caller.sample(msgspec.structs.replace(asked, prompt_logprobs_last_n=last))[0]
            scores, expected = prompt_scores(found.prompt_logprobs), prompt_scores(whole.prompt_logprobs)
            assert np.isnan(scores[: 7 - last]).all()
            self._assert_close(scores[7 - last :], expected[7 - last :])
            best, all_best = (alternatives(each.topk_prompt_logprobs) for each in (found, whole))
            for pairs in best[: 8 - last]:
                assert pairs[0][0] == 0 and all(math.isnan(score) for _, score in pairs)
            for pairs, known in zip(best[8 - last :], all_best[8 - last :], strict=True):
                assert [token for token, _ in pairs] == [token for token, _ in known]
            if not caller.info.any_prompt_token:
                continue
            assert same([_drawn(found)[0]], [_drawn(whole)[0]])
            assert found.target_prompt_logprobs is not None and whole.target_prompt_logprobs is not None
            self._assert_close(
                found.target_prompt_logprobs.values.array(), whole.target_prompt_logprobs.values.array()
            )

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_alternatives_are_drawn_at_the_temperature(
        self, engine: Engine, reference: Reference, temperature: float
    ) -> None:
        """The share of the most likely token, over many seeds, and the log-probs, which are not tempered."""
        caller = _any_token(engine)
        prompt = text(caller.info, 4)
        expected = log_softmax(reference(prompt))[:-1]
        tempered = np.exp(log_softmax(expected / temperature))
        count = min(caller.info.max_top_logprobs, 20)
        asked = request(prompt, max_tokens=1, temperature=temperature, prompt_alternatives=count, top_k=1)
        seeds = range(40)
        results = caller.sample(*(msgspec.structs.replace(asked, seed=seed) for seed in seeds))
        tokens = np.concatenate([_drawn(result)[0] for result in results], axis=1)
        draws = count * len(seeds)
        for row, likely in enumerate(tempered.argmax(axis=1).tolist()):
            share = tempered[row, likely]
            deviation = math.sqrt(draws * share * (1 - share))
            assert abs((tokens[row] == likely).sum() - draws * share) < 4 * deviation + 1
        scores = np.concatenate([_drawn(result)[1] for result in results], axis=1)
        self._assert_close(scores, np.take_along_axis(expected, tokens, 1))

    def test_alternatives_at_temperature_zero_are_the_best(
        self, engine: Engine, reference: Reference
    ) -> None:
        caller = _any_token(engine)
        prompt = text(caller.info, 5)
        asked = request(prompt, max_tokens=1, temperature=0.0, prompt_alternatives=2)
        tokens, _ = _drawn(caller.sample(asked)[0])
        best = reference(prompt)[:-1].argmax(axis=1)
        assert tokens.tolist() == [[token, token] for token in best.tolist()]

    def test_alternatives_depend_on_the_seed_and_the_place_alone(self, engine: Engine) -> None:
        caller = _any_token(engine)
        prompt = text(caller.info, 6)
        asked = request(prompt, temperature=2.0, prompt_alternatives=4)
        again, fewer, other, company = caller.sample(
            asked,
            msgspec.structs.replace(asked, prompt_alternatives=2, num_samples=3),
            msgspec.structs.replace(asked, seed=6),
            request(text(caller.info, 9), prompt_alternatives=3),
        )
        alone = _drawn(caller.sample(asked)[0])[0]
        assert same([_drawn(again)[0]], [alone])
        assert same([_drawn(fewer)[0]], [alone[:, :2]])
        assert not same([_drawn(other)[0]], [alone])
        assert _drawn(company)[0].shape == (8, 3)

    def test_a_prompt_that_was_seen_before_gives_the_same_numbers(self, engine: Engine) -> None:
        """Whatever an engine reuses within a session, and it tells how much; of another session it knows nothing."""
        caller = Caller(engine)
        prompt = text(caller.info, 40)
        asked = request(prompt, num_samples=2, session="mine", prompt_logprobs=True, prompt_logprobs_last_n=3)
        first = caller.sample(asked)[0]
        again, other = caller.sample(asked, msgspec.structs.replace(asked, session="other"))
        assert first.prompt_cache_hit_tokens == other.prompt_cache_hit_tokens == 0
        assert 0 <= again.prompt_cache_hit_tokens < len(prompt) - 3
        for result in (again, other):
            assert drawn(result) == drawn(first)
            self._assert_close(
                prompt_scores(result.prompt_logprobs)[-3:], prompt_scores(first.prompt_logprobs)[-3:]
            )

    def test_a_prompt_of_one_token_has_no_alternatives(self, engine: Engine) -> None:
        caller = _any_token(engine)
        tokens, scores = _drawn(caller.sample(request(text(caller.info, 1), prompt_alternatives=3))[0])
        assert tokens.shape == scores.shape == (0, 3)

    def _assert_close(self, found: ArrayLike, expected: ArrayLike) -> None:
        difference = np.abs(np.subtract(found, expected, dtype=np.float64))
        assert difference.max(initial=0.0) <= self.logprob_tolerance


def _any_token(engine: Engine) -> Caller:
    caller = Caller(engine)
    if not caller.info.any_prompt_token:
        pytest.skip("the engine tells of the prompt's own tokens and the best ones alone")
    return caller


def _cells(caller: Caller, rows: int, columns: int) -> Array:
    """Tokens to score; in the first row none, elsewhere -1 in places."""
    rng = np.random.default_rng(rows)
    cells = rng.integers(0, caller.info.vocab_size, (rows, columns))
    cells[rng.random(cells.shape) < 0.3] = -1
    cells[0], cells[-1] = -1, 1
    return cells


def _dense(cells: Array) -> Matrix:
    rows, columns = cells.shape
    return Matrix((rows, columns), Tensor.of(cells.astype(np.int64)))


def _drawn(result: SampleResult) -> tuple[Array, Array]:
    """Alternatives and their log-probs."""
    drawn = result.prompt_alternatives
    assert isinstance(drawn, PromptAlternatives)
    assert (drawn.tokens.dtype, drawn.logprobs.dtype) == ("int64", "float32")
    return drawn.tokens.array(), drawn.logprobs.array()

"""The vLLM engine over a fake vLLM: places, adapters, ends, errors."""

from __future__ import annotations

import json
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engines.interface import (
    DamagedWeights,
    EngineBroken,
    EngineConfig,
    RunOperation,
    SampleEnd,
    SampleEvent,
    SampleStep,
    UserError,
)
from engines.operations import AdapterRef, CreateRun, LoraSpec, SampleRequest, SampleResult, decode_sample
from engines.storage import seal
from engines.tensors import Tensor
from engines.vllm.engine import GUEST_SLOTS, VllmEngine
from engines.vllm.options import VllmOptions
from tests.vllm.fake_llm import VOCABULARY, FakeLlm

PATIENCE_S = 30.0
SLOTS = 4


def tokenizer() -> bytes:
    letters = {chr(ord("a") + i): i for i in range(VOCABULARY)}
    return Tokenizer(models.WordLevel(letters, unk_token="a")).to_str().encode()


class Made:
    """An engine and the fake below it."""

    def __init__(self, storage: Path, *, eager: bool = True, **options: Any) -> None:
        self.llm = FakeLlm(eager=eager)
        self.storage = storage
        config = EngineConfig("v", "vllm", "m", "m", ("sample",), str(storage), 1)
        chosen = VllmOptions(**{"sample_slots": SLOTS, "adapters": 2, "max_rank": 8, **options})
        self.engine = VllmEngine(config, chosen, self.llm, {"tokenizer.json": tokenizer()})
        self.events: list[SampleEvent] = []

    def adapter(self, name: str, **config: Any) -> AdapterRef:
        folder = self.storage / name
        folder.mkdir(parents=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps({"r": 4, "target_modules": ["q_proj"], **config}))
        (folder / ADAPTER_WEIGHTS).write_bytes(b"")
        return AdapterRef(name, name)

    def start(
        self, call_id: int, party: str = "", *, prompt: tuple[int, ...] = (1, 2, 3), **more: Any
    ) -> None:
        defaults = {"num_samples": 1, "seed": 1, "max_tokens": 3, "stop_at_eos": False}
        tokens = Tensor.of(np.array(prompt, dtype=np.int32))
        self.engine.start_sample(call_id, SampleRequest(prompt=tokens, **{**defaults, **more}), party)

    def step(self, count: int = 1) -> None:
        self.engine._loop.wait_for(self._step(count))

    async def _step(self, count: int) -> None:
        self.llm.step(count)

    def drain(self) -> dict[int, SampleResult | Exception]:
        deadline = time.monotonic() + PATIENCE_S
        while self.engine.sampling:
            assert time.monotonic() < deadline
            self.events += self.engine.advance()
        return {event.call_id: event.result for event in self.events if isinstance(event, SampleEnd)}

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            time.sleep(0.005)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Made]:
    one = Made(tmp_path)
    yield one
    one.engine.close()
    assert one.llm.closed


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Made]:
    one = Made(tmp_path, eager=False)
    yield one
    one.engine.close()


def tokens(result: SampleResult | Exception) -> list[list[int]]:
    assert isinstance(result, SampleResult), result
    return [each.tokens.array().tolist() for each in result.sequences]


def test_a_sample_is_one_request_for_each_sequence(made: Made) -> None:
    made.start(7, num_samples=3, topk_sample_logprobs=2, session="s", seed=11)
    result = made.drain()[7]
    assert tokens(result) == [[4, 5, 6]] * 3
    assert isinstance(result, SampleResult)
    assert result.prompt_cache_hit_tokens == 3
    top = result.sequences[0].top_logprobs
    assert top is not None and top.tokens.array().tolist() == [[0, 1]] * 3
    assert [ask.sequence for ask in made.llm.asked] == [0, 1, 2]
    assert {ask.salt for ask in made.llm.asked} == {"s"}
    assert len({ask.name for ask in made.llm.asked}) == 3
    how = decode_sample(made.llm.asked[0].request)
    assert (how.seed, how.prompt.shape, how.adapter, how.session) == (11, (0,), None, "")
    steps = [event for event in made.events if isinstance(event, SampleStep) and event.sequence == 1]
    assert [step.stop_reason for step in steps] == [None, None, "length"]


def test_without_a_session_nothing_is_shared(made: Made) -> None:
    made.start(1)
    made.start(2)
    made.drain()
    assert len({ask.salt for ask in made.llm.asked}) == 2


def test_the_first_sequence_scores_the_prompt(made: Made) -> None:
    made.start(
        1, prompt=(9, 1, 8, 0), num_samples=2, prompt_logprobs=True, topk_prompt_logprobs=2,
        prompt_logprobs_last_n=2,
    )  # fmt: skip
    result = made.drain()[1]
    assert isinstance(result, SampleResult)
    assert [ask.prompt_logprobs for ask in made.llm.asked] == [2, None]
    assert result.prompt_logprobs is not None and result.topk_prompt_logprobs is not None
    np.testing.assert_array_equal(
        result.prompt_logprobs.array(), np.array([np.nan, np.nan, -9, -1], dtype=np.float32)
    )
    assert result.topk_prompt_logprobs.tokens.array().tolist() == [[0, 0], [0, 0], [0, 1], [0, 1]]


def test_stop_tokens_and_strings_stay_and_end_it(slow: Made) -> None:
    """vLLM knows of the tokens, and is told when a text has come."""
    slow.start(1, max_tokens=20, stop_tokens=(6,))
    slow.start(2, max_tokens=20, stop_strings=("h",))  # the text of token 7
    slow.step(7)
    results = slow.drain()
    assert (tokens(results[1]), tokens(results[2])) == ([[4, 5, 6]], [[4, 5, 6, 7]])
    for result in results.values():
        assert isinstance(result, SampleResult) and result.sequences[0].stop_reason == "stop"
    slow.until(lambda: slow.llm.ends == {"done": 1, "aborted": 1})


def test_the_end_of_sequence_stops_unless_told_not_to(made: Made) -> None:
    made.start(1, prompt=(47,), max_tokens=5, stop_at_eos=True)
    made.start(2, prompt=(47,), max_tokens=5)
    results = made.drain()
    assert (tokens(results[1]), tokens(results[2])) == ([[48, 49, 0]], [[48, 49, 0, 1, 2]])


def test_none_means_to_the_end_of_the_context(made: Made) -> None:
    made.start(1, max_tokens=None)
    assert len(tokens(made.drain()[1])[0]) == 37


def test_slots_are_shared_among_parties(slow: Made) -> None:
    slow.start(1, "many", num_samples=SLOTS + 5)
    slow.until(lambda: len(slow.llm.drawing) == SLOTS)
    assert slow.engine.stats()["active_sequences"] == SLOTS
    slow.start(2, "many")
    slow.start(3, "one", num_samples=2)
    slow.until(lambda: len(slow.llm.drawing) == SLOTS + 1)  # a guest: the party had none
    assert slow.llm.asked[-1].name.startswith("3-")
    for party in range(GUEST_SLOTS):
        slow.start(10 + party, f"p{party}")
    slow.until(lambda: len(slow.llm.drawing) == SLOTS + GUEST_SLOTS)
    slow.step(1000)
    results = slow.drain()
    assert len(results) == 3 + GUEST_SLOTS
    assert not [result for result in results.values() if isinstance(result, Exception)]


def test_cancelling_frees_the_slot(slow: Made) -> None:
    slow.start(1, num_samples=SLOTS)
    slow.until(lambda: len(slow.llm.drawing) == SLOTS)
    slow.start(2)
    slow.engine.cancel_sample(1)
    slow.engine.cancel_sample(99)
    slow.until(lambda: slow.llm.drawing == {"2-0"})
    assert slow.llm.ends == {"aborted": SLOTS}
    slow.step(10)
    assert list(slow.drain()) == [2]


def test_news_is_readable_while_there_is_something_to_tell(slow: Made) -> None:
    def readable(timeout_s: float) -> bool:
        return bool(select.select([slow.engine.news], [], [], timeout_s)[0])

    slow.start(1, max_tokens=1)
    assert not readable(0.05)
    slow.step()
    assert readable(PATIENCE_S)
    slow.drain()
    assert not readable(0)
    assert slow.engine.advance() == []


# ---------------------------------------------------------------------------- adapters


def test_a_folder_gets_a_new_name_and_number_whenever_it_is_loaded(made: Made) -> None:
    refs = [made.adapter(f"a{i}") for i in range(3)]
    seen = []
    for i, ref in enumerate([*refs, refs[0]]):
        made.start(i, adapter=ref)
        made.drain()
        adapter = made.llm.asked[-1].adapter
        assert adapter is not None
        seen.append((adapter.name, adapter.number, Path(adapter.path).name))
    assert len({name for name, _, _ in seen}) == len({number for _, number, _ in seen}) == 4
    assert [path for _, _, path in seen] == ["a0", "a1", "a2", "a0"]
    assert made.llm.most_loaded == 2
    made.start(9, adapter=refs[0])
    made.drain()
    assert made.llm.asked[-1].adapter == made.llm.asked[-2].adapter


def test_adapters_in_use_stay_and_nobody_overtakes_the_one_that_waits(slow: Made) -> None:
    refs = [slow.adapter(f"a{i}") for i in range(3)]
    slow.start(0, adapter=refs[0], max_tokens=2)
    slow.start(1, adapter=refs[1], max_tokens=2)
    slow.start(2, adapter=refs[2], num_samples=2)
    slow.start(3, adapter=refs[0])
    slow.until(lambda: len(slow.llm.drawing) == 2)
    assert slow.engine.stats()["resident_adapters"] == 2
    slow.step(1000)
    results = slow.drain()
    assert set(results) == {0, 1, 2, 3}
    assert slow.llm.most_loaded == 2
    assert [ask.name for ask in slow.llm.asked][2:] == ["3-0", "3-1", "4-0"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 9}, "rank 9"),
        ({"target_modules": ["q_proj", "lm_head"]}, "train_unembed=False"),
        ({"r": "4"}, "does not tell rank"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(made: Made, config: dict[str, Any], words: str) -> None:
    ref = made.adapter("odd", **config)
    with pytest.raises(UserError, match=words):
        made.start(1, adapter=ref)
    assert not made.engine.sampling


def test_a_damaged_configuration_is_refused(made: Made) -> None:
    ref = made.adapter("damaged")
    for text, words in (("{", "cannot be read"), ("[]", "no table"), ("", "cannot be read")):
        (made.storage / "damaged" / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(UserError, match=words):
            made.start(1, adapter=ref)
    with pytest.raises(DamagedWeights, match="not there"):
        made.start(1, adapter=AdapterRef("nowhere", "nowhere"))


def test_an_adapter_that_goes_while_its_sample_waits_fails_that_sample(slow: Made) -> None:
    busy, gone = slow.adapter("busy"), slow.adapter("gone")
    slow.start(1, num_samples=SLOTS, adapter=busy, max_tokens=1)
    slow.start(2, adapter=gone, max_tokens=1)
    (slow.storage / "gone" / ADAPTER_WEIGHTS).unlink()
    slow.step(1000)
    results = slow.drain()
    assert isinstance(results[1], SampleResult)
    assert isinstance(results[2], DamagedWeights)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
def test_vllm_is_not_given_a_damaged_adapter(made: Made, name: str) -> None:
    ref = made.adapter("sealed")
    folder = made.storage / "sealed"
    (folder / ADAPTER_WEIGHTS).write_bytes(b"weights")
    seal(folder)
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for call_id in (1, 2):
        try:
            made.start(call_id, adapter=ref)
            error: Any = made.drain()[call_id]
        except UserError as raised:
            error = raised
        assert isinstance(error, DamagedWeights) and name in str(error)
        path.unlink(missing_ok=True)
    assert not made.llm.asked
    path.write_bytes(whole)
    made.start(3, adapter=ref)
    assert isinstance(made.drain()[3], SampleResult)


# ---------------------------------------------------------------------------- errors


def test_an_error_of_one_sequence_fails_its_sample_alone(slow: Made) -> None:
    slow.start(1, num_samples=2)
    slow.until(lambda: len(slow.llm.drawing) == 2)
    slow.llm.broken = RuntimeError("odd")
    slow.step()
    slow.until(lambda: len(slow.llm.drawing) == 1)
    slow.llm.broken = None
    slow.start(2)
    slow.step(100)
    results = slow.drain()
    assert str(results[1]) == "odd" and isinstance(results[2], SampleResult)
    assert slow.engine.stats()["active_sequences"] == 0


def test_the_death_of_vllm_ends_the_process(slow: Made) -> None:
    slow.start(1)
    slow.llm.dead = True
    slow.step()
    with pytest.raises(EngineBroken, match="killed"):
        slow.drain()


def test_its_death_is_told_without_a_sample_too(made: Made) -> None:
    assert made.engine.advance() == []
    made.llm.dead = True
    assert select.select([made.engine.news], [], [], PATIENCE_S)[0]
    with pytest.raises(EngineBroken, match="killed"):
        made.engine.advance()


def test_it_trains_nothing(made: Made) -> None:
    [refused] = made.engine.create_runs([RunOperation("r", CreateRun(LoraSpec(4, 1)))])
    assert isinstance(refused, UserError) and "does not train" in str(refused)
    with pytest.raises(UserError):
        made.engine.snapshot("r")
    made.engine.drop_run("r")


def test_what_it_says_of_itself(made: Made) -> None:
    info = made.engine.info()
    assert (info.max_rank, info.max_context, info.eos_tokens, info.vocab_size) == (8, 40, (0,), VOCABULARY)
    assert (info.train_unembed, info.any_prompt_token, info.losses) == (False, False, ())

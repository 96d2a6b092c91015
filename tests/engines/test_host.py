"""The engine process, as its owner sees it: a real process, a real socket, the fake engine inside."""

from __future__ import annotations

import platform
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engines.fake import FakeEngine
from engines.host import EXIT_LOAD_FAILED, EXIT_STOPPED
from engines.interface import RunOperation
from engines.messages import (
    EXIT_OWNER_GONE,
    PROTOCOL,
    Cancel,
    DropRun,
    Failure,
    FromEngine,
    Hello,
    Load,
    LoadFailed,
    Perform,
    Performed,
    Ping,
    Pong,
    Ready,
    RunAddress,
    Sample,
    Sampled,
    SampleDelta,
    Stop,
)
from engines.operations import ForwardResult, Operation, SampleResult, SaveWeights, decode_result, encode
from tests.engines.material import CREATE, STEP, learn, look, sample
from tests.engines.owner import Owner


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """The owner of a loaded engine."""
    with Owner(tmp_path / "storage") as loaded:
        loaded.load()
        yield loaded


def result_of(owner: Owner) -> SampleResult:
    """What the payload of a `Sampled` holds."""
    result = decode_result(owner.payloads[0])
    assert isinstance(result, SampleResult)
    return result


def forward_of(payload: bytes) -> ForwardResult:
    result = decode_result(payload)
    assert isinstance(result, ForwardResult)
    return result


# ---------------------------------------------------------------------------- greeting


def test_a_process_says_who_it_is_and_what_it_loaded(tmp_path: Path) -> None:
    with Owner(tmp_path) as owner:
        hello = owner.receive(Hello)
        assert hello == Hello(PROTOCOL, owner.process.pid, platform.python_version())
        owner.send(Ping())  # an owner gives signs of life before it has said what to load
        owner.send(Load(owner.config))
        ready = owner.receive(Ready)
        engine = FakeEngine.load(owner.config)
        assert ready.info == engine.info()
        assert dict(zip(ready.tokenizer_files, owner.payloads, strict=True)) == engine.tokenizer_files()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"plugin": "no-such"}, "no engine plugin 'no-such'"),
        ({"options": {"delay": 1.0}}, "unknown field `delay`"),
        ({"options": {"delay_s": -1.0}}, "delay_s is -1.0"),
    ],
)
def test_what_cannot_be_loaded_is_answered_with_the_reason(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    with Owner(tmp_path, **settings) as owner:
        owner.receive(Hello)
        owner.send(Load(owner.config))
        assert words in owner.receive(LoadFailed).message
        assert owner.exit_status() == EXIT_LOAD_FAILED


# ---------------------------------------------------------------------------- performing


def test_operations_give_the_numbers_that_the_engine_computes(owner: Owner, tmp_path: Path) -> None:
    direct = FakeEngine.load(owner.config)
    direct.create_runs([RunOperation("a", CREATE)])
    expected = direct.forward_backward([RunOperation("a", learn())])[0]
    assert isinstance(expected, ForwardResult)

    created = owner.perform(("a", 0, CREATE), ("b", 0, CREATE))
    assert [outcome.failure for outcome in created.outcomes] == [None, None]
    performed = owner.perform(("a", 1, learn()), ("b", 1, learn("another text")))
    assert forward_of(owner.payloads[0]) == expected
    assert forward_of(owner.payloads[1]) != expected
    assert performed.lost_runs == []
    summary = performed.outcomes[0].summary
    assert summary["loss"] == expected.metrics["loss:sum"]
    assert summary["tokens"] == len("hello, world") - 1
    assert 0 < summary["seconds"] < 10

    norm = direct.optim_step([RunOperation("a", STEP)])[0].metrics  # type: ignore[union-attr]
    stepped = owner.perform(("a", 2, STEP)).outcomes[0].summary
    assert stepped["grad_norm"] == norm["unclipped_grad_l2:mean"] > 0
    assert stepped["learning_rate"] == STEP.learning_rate

    owner.perform(("a", 3, SaveWeights("saved/a")))
    assert (tmp_path / "storage/saved/a/adapter_model.safetensors").is_file()


def test_a_replay_applies_and_sends_nothing_back(owner: Owner) -> None:
    owner.perform(("first", 0, CREATE))
    owner.perform(("first", 1, learn()))
    owner.perform(("first", 2, STEP))
    owner.perform(("first", 3, look()))
    expected = forward_of(owner.payloads[0])
    log: list[Operation] = [CREATE, learn(), STEP]
    for seq_id, operation in enumerate(log):
        performed = owner.perform(("again", seq_id, operation), replay=True)
        assert performed.outcomes[0].failure is None
        assert owner.payloads == []
    owner.perform(("again", 3, look()))
    assert forward_of(owner.payloads[0]) == expected


def test_what_was_applied_is_not_applied_again(owner: Owner) -> None:
    owner.perform(("a", 0, CREATE))
    owner.perform(("a", 1, learn()))
    owner.perform(("a", 2, STEP))
    owner.perform(("a", 3, look()))
    before = forward_of(owner.payloads[0])
    for seq_id in (1, 2, 3):
        failure = owner.failure(("a", seq_id, STEP))
        assert failure.category == "server"
        assert f"operation {seq_id} of run a came after operation 3" in failure.message
    owner.perform(("a", 4, look()))
    assert forward_of(owner.payloads[0]) == before


def test_a_run_that_is_created_again_begins_anew(owner: Owner) -> None:
    owner.perform(("a", 0, CREATE))
    owner.perform(("a", 1, learn()))
    fresh = forward_of(owner.payloads[0])
    owner.perform(("a", 2, STEP))
    owner.perform(("a", 0, CREATE))
    owner.perform(("a", 1, learn()))
    assert forward_of(owner.payloads[0]) == fresh


def test_an_earlier_owner_changes_nothing(owner: Owner) -> None:
    owner.perform(("a", 0, CREATE), epoch=6)
    failure = owner.failure(("a", 1, learn()), epoch=5)
    assert failure.category == "server"
    assert "epoch 5, now 6" in failure.message
    assert owner.perform(("a", 1, learn()), epoch=6).outcomes[0].failure is None
    assert owner.failure(("new", 0, CREATE), epoch=4).category == "server"


def test_one_bad_operation_fails_alone(owner: Owner) -> None:
    owner.perform(("a", 0, CREATE), ("b", 0, CREATE), ("c", 0, CREATE))
    call = Perform(9, 5, "forward_backward", [RunAddress(run_id, 1) for run_id in "abc"])
    unknown = learn().__class__(learn().data, "no_such_loss")
    owner.send(call, encode(learn()), b"\xc1 no message", encode(unknown))
    performed = owner.receive(Performed)
    assert performed.call_id == 9
    good, broken, wrong = (outcome.failure for outcome in performed.outcomes)
    assert good is None
    assert broken is not None and broken.category == "user" and "no operation" in broken.message
    assert wrong is not None and wrong.category == "user" and "no_such_loss" in wrong.message
    assert len(owner.payloads) == 1
    assert performed.lost_runs == []
    # What failed was not applied: its number can come again, as in a replay that skips it.
    assert owner.perform(("b", 1, learn()), ("c", 1, learn())).outcomes[1].failure is None


def test_when_the_engine_breaks_the_runs_of_that_call_are_lost_and_others_go_on(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"fail_on_token": ord("!")}) as owner:
        owner.load()
        owner.perform(("a", 0, CREATE), ("b", 0, CREATE), ("c", 0, CREATE))
        performed = owner.perform(("a", 1, learn()), ("b", 1, learn("wrong! so wrong")))
        assert owner.payloads == []
        assert sorted(performed.lost_runs) == ["a", "b"]
        failures = [outcome.failure for outcome in performed.outcomes]
        assert failures[0] == failures[1]
        failure = failures[0]
        assert failure is not None and failure.category == "server" and failure.error_id
        assert (
            failure.message
            == f"the engine failed at this operation; its log says why under {failure.error_id}"
        )
        assert "not in this engine's memory" in owner.failure(("a", 2, learn())).message
        assert owner.perform(("c", 1, learn())).outcomes[0].failure is None
        owner.perform(("a", 0, CREATE), replay=True)
        assert owner.perform(("a", 2, learn())).outcomes[0].failure is None
        assert f"error {failure.error_id}" in owner.log()
        assert "RuntimeError: token 33 was met" in owner.log()
        assert "engine tested" in owner.log()


def test_a_run_that_is_not_here_is_named_so_that_it_is_restored(owner: Owner) -> None:
    performed = owner.perform(("nobody", 3, learn()))
    assert performed.lost_runs == ["nobody"]
    failure = performed.outcomes[0].failure
    assert failure is not None and failure.category == "server"


def test_a_dropped_run_is_gone_and_dropping_an_unknown_one_is_no_error(owner: Owner) -> None:
    owner.perform(("a", 0, CREATE))
    owner.send(DropRun("a"))
    owner.send(DropRun("never"))
    assert owner.perform(("a", 1, learn())).lost_runs == ["a"]
    owner.send(Ping())
    assert owner.receive(Pong).stats["resident_runs"] == 0


def test_an_engine_that_dies_takes_the_process_with_it(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"crash_on_token": ord("!")}) as owner:
        owner.load()
        owner.perform(("a", 0, CREATE))
        owner.ask(2, [("a", 1, learn("bang!!"))])
        assert owner.exit_status() == 70


# ---------------------------------------------------------------------------- sampling


def test_a_sample_is_what_the_engine_draws(owner: Owner) -> None:
    direct = FakeEngine.load(owner.config)
    direct.start_sample(1, sample(num_samples=2))
    events = [event for _ in range(8) for event in direct.advance()]
    owner.send(Sample(4), encode(sample(num_samples=2)))
    assert owner.receive(Sampled) == Sampled(4, prompt_tokens=5, sampled_tokens=2 * 8)
    assert result_of(owner) == events[-1].result  # type: ignore[union-attr]


def test_streamed_deltas_add_up_to_the_result(owner: Owner) -> None:
    owner.send(Sample(4, stream=True), encode(sample(num_samples=2, topk_sample_logprobs=2)))
    deltas: list[SampleDelta] = []
    while isinstance(message := owner.next(), SampleDelta):
        deltas.append(message)
    assert message == Sampled(4, prompt_tokens=5, sampled_tokens=2 * 8)
    for index, sequence in enumerate(result_of(owner).sequences):
        own = [delta for delta in deltas if delta.sequence == index]
        assert [len(delta.tokens) for delta in own] == [1] * 8
        assert [token for delta in own for token in delta.tokens] == sequence.tokens.array().tolist()
        assert [value for delta in own for value in delta.logprobs] == sequence.logprobs.array().tolist()
        assert [delta.stop_reason for delta in own] == [None] * 7 + ["length"]
        assert sequence.top_logprobs is not None
        best = [[pair[0] for pair in delta.top_logprobs[0]] for delta in own]
        assert best == sequence.top_logprobs.tokens.array().tolist()


def test_samples_that_are_not_streamed_say_nothing_before_their_end(owner: Owner) -> None:
    owner.send(Sample(1), encode(sample(max_tokens=20)))
    owner.send(Sample(2, stream=True), encode(sample(max_tokens=20)))
    messages = [owner.next() for _ in range(22)]
    assert {message.call_id for message in messages if isinstance(message, SampleDelta)} == {2}
    assert {message.call_id for message in messages if isinstance(message, Sampled)} == {1, 2}


def test_a_refused_sample_fails_alone(owner: Owner) -> None:
    owner.send(Sample(1), b"\xc1")
    refused = owner.receive(Sampled)
    assert refused.failure is not None and refused.failure.category == "user"
    owner.send(Sample(2), encode(sample(temperature=-1.0)))
    refused = owner.receive(Sampled)
    assert refused.call_id == 2
    assert refused.failure is not None and "temperature" in refused.failure.message
    owner.send(Sample(3), encode(sample()))
    assert owner.receive(Sampled).failure is None


def test_a_sample_that_the_engine_breaks_at_fails_alone(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"fail_on_token": ord("!")}) as owner:
        owner.load()
        owner.send(Sample(1), encode(sample(max_tokens=200)))
        owner.send(Sample(2), encode(sample("oh!")))
        ends = [owner.receive(Sampled) for _ in range(2)]
        failures: dict[int, Failure | None] = {end.call_id: end.failure for end in ends}
        assert failures[1] is None
        failed = failures[2]
        assert failed is not None and failed.category == "server" and failed.error_id
        assert failed.error_id in owner.log()


def test_a_cancelled_sample_is_not_answered(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 0.01}) as owner:
        owner.load()
        owner.send(Sample(1, stream=True), encode(sample(max_tokens=4000)))
        owner.receive(SampleDelta)
        owner.send(Cancel(1))
        owner.send(Cancel(77))
        owner.send(Ping())
        while isinstance(message := owner.next(), SampleDelta):
            pass
        assert isinstance(message, Pong)
        assert message.stats["active_samples"] == 0
        assert owner.silent_for(0.1)


def test_training_and_sampling_take_turns(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 0.02}) as owner:
        owner.load()
        owner.perform(("a", 0, CREATE))
        owner.send(Sample(100, stream=True), encode(sample(max_tokens=4000)))
        owner.receive(SampleDelta)
        for seq_id in (1, 2, 3, 4):
            owner.ask(seq_id, [("a", seq_id, learn())])
        messages: list[FromEngine] = []
        while not (isinstance(message := owner.next(), Performed) and message.call_id == 4):
            messages.append(message)
        calls = [i for i, message in enumerate(messages) if isinstance(message, Performed)]
        assert [message.call_id for message in messages if isinstance(message, Performed)] == [1, 2, 3]
        between = [after - before - 1 for before, after in pairwise(calls)]
        assert sum(between) >= 1, (
            "a step takes as long as a call here, so they alternate as far as clocks allow"
        )


# ---------------------------------------------------------------------------- the end


def test_stop_ends_the_process_after_the_call_at_hand(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 0.5}) as owner:
        owner.load()
        owner.ask(1, [("a", 0, CREATE)])
        time.sleep(0.2)
        owner.send(Stop())
        assert owner.receive(Performed).call_id == 1
        assert owner.exit_status() == EXIT_STOPPED
        assert "Traceback" not in owner.log()


def test_a_process_whose_owner_died_ends_at_once_even_in_a_call(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 60.0}) as owner:
        owner.load()
        owner.ask(1, [("a", 0, CREATE)])
        time.sleep(0.2)
        assert owner.process.stdin is not None
        owner.process.stdin.close()
        assert owner.exit_status(10) == EXIT_OWNER_GONE
        assert "its gateway has gone" in owner.log()


def test_a_process_whose_owner_died_before_loading_ends_too(tmp_path: Path) -> None:
    with Owner(tmp_path) as owner:
        owner.receive(Hello)
        assert owner.process.stdin is not None
        owner.process.stdin.close()
        assert owner.exit_status(10) == EXIT_OWNER_GONE


def test_a_process_whose_owner_is_silent_ends(tmp_path: Path) -> None:
    with Owner(tmp_path, owner_timeout_s=1.0) as owner:
        owner.load()
        for _ in range(6):
            time.sleep(0.25)
            owner.send(Ping())
            owner.receive(Pong)
        began = time.monotonic()
        assert owner.exit_status(10) == EXIT_OWNER_GONE
        assert time.monotonic() - began > 0.6
        assert "silent" in owner.log()


def test_a_busy_process_notices_silence_too(tmp_path: Path) -> None:
    with Owner(tmp_path, owner_timeout_s=0.5, options={"delay_s": 0.01}) as owner:
        owner.load()
        owner.send(Sample(1), encode(sample(max_tokens=8000)))
        assert owner.exit_status(10) == EXIT_OWNER_GONE


def test_a_process_whose_owner_is_silent_ends_in_the_middle_of_a_call(tmp_path: Path) -> None:
    """An owner that is stopped keeps its end of the pipe open and says nothing."""
    options = {"delay_s": 60.0}
    with Owner(tmp_path, owner_timeout_s=60.0, options=options, arguments=("--owner-timeout", "1")) as owner:
        owner.load()
        owner.ask(1, [("a", 0, CREATE)])
        assert owner.process.stdin is not None
        for _ in range(10):
            owner.process.stdin.write(b".")
            owner.process.stdin.flush()
            time.sleep(0.2)
        assert owner.process.poll() is None
        assert owner.exit_status(10) == EXIT_OWNER_GONE
        assert "silent" in owner.log()


def test_a_long_call_is_not_taken_for_silence(tmp_path: Path) -> None:
    with Owner(tmp_path, owner_timeout_s=0.6, options={"delay_s": 1.5}) as owner:
        owner.load()
        owner.ask(1, [("a", 0, CREATE)])
        for _ in range(6):
            time.sleep(0.2)
            owner.send(Ping())
        owner.receive(Performed)
        owner.receive(Pong)
        assert owner.process.poll() is None


def test_an_interrupt_is_the_owners_business_and_termination_is_not(owner: Owner) -> None:
    owner.process.send_signal(signal.SIGINT)
    owner.send(Ping())
    owner.receive(Pong)
    owner.process.send_signal(signal.SIGTERM)
    assert owner.exit_status(10) == -signal.SIGTERM

"""The page of vital signs: what the owner of an engine process reads in it, also when nothing answers any more."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.messages import Performed, Sample
from engines.operations import encode
from engines.vitals import BEAT_S, Doing, Heart, Signs, Vitals
from tests.engines.material import CREATE, learn, sample
from tests.engines.owner import Owner

FATAL, STUCK = ord("!"), ord("?")


@pytest.fixture
def vitals() -> Iterator[Vitals]:
    page = Vitals.create()
    yield page
    page.close()


def comes_to(owner: Owner, doing: Doing) -> Signs:
    """The first signs that say so."""
    deadline = time.monotonic() + 20
    while (signs := owner.vitals.read()).doing is not doing:
        assert time.monotonic() < deadline, f"it says {signs} for too long"
        time.sleep(0.005)
    return signs


def test_a_page_says_what_is_being_done_and_nothing_afterwards(vitals: Vitals) -> None:
    assert vitals.read() == Signs(0, (0, 0), Doing.NOTHING, 0)
    with vitals.during(Doing.TRAINING, 7):
        assert vitals.read() == Signs(0, (1, 0), Doing.TRAINING, 7)
    assert vitals.read().doing is Doing.NOTHING
    with vitals.during(Doing.SAMPLING):
        vitals.beat(5)
        assert vitals.read() == Signs(1, (2, 5), Doing.SAMPLING, 0)


def test_who_shares_the_descriptor_sees_the_same_page_also_after_the_other_has_let_go(vitals: Vitals) -> None:
    other = Vitals(os.dup(vitals.descriptor))
    other.beat(3)
    other.close()
    other.close()
    assert vitals.read() == Signs(1, (0, 3), Doing.NOTHING, 0)


def test_what_raises_is_still_said(vitals: Vitals) -> None:
    """Nothing comes after it but the end of the process, which it explains."""
    with pytest.raises(RuntimeError), vitals.during(Doing.SAMPLING):
        raise RuntimeError
    assert vitals.read().doing is Doing.SAMPLING


def test_the_heart_stands_still_while_the_interpreter_does() -> None:
    vitals = Vitals.create()  # never closed: the heart beats until the process ends
    heart = Heart(vitals)
    heart.passes = lambda: 9
    heart.start()
    time.sleep(5 * BEAT_S)
    beating = vitals.read()
    assert beating.beats >= 2
    assert beating.progress == (0, 9)
    ctypes.PyDLL(None).usleep(int(5e6 * BEAT_S))  # keeps the interpreter's lock
    assert vitals.read().beats <= beating.beats + 1


def test_a_process_beats_in_a_long_call_and_says_which_it_is(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 0.6}) as owner:
        owner.load()
        owner.ask(1, [("a", 0, CREATE)])
        owner.ask(2, [("a", 3, learn())])
        owner.receive(Performed)
        begun = comes_to(owner, Doing.TRAINING)
        assert begun.seq_id == 3
        time.sleep(0.4)
        later = owner.vitals.read()
        assert later.doing is Doing.TRAINING
        assert later.beats >= begun.beats + 2
        assert later.progress == begun.progress
        owner.receive(Performed)
        owner.ask(3, [("b", 0, CREATE)], replay=True)
        assert comes_to(owner, Doing.REPLAYING).progress > later.progress


def test_passes_show_in_the_middle_of_a_decoding_step(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"delay_s": 0.05}) as owner:
        owner.load()
        owner.send(Sample(1), encode(sample(max_tokens=200)))
        first = comes_to(owner, Doing.SAMPLING)
        time.sleep(1)
        assert owner.vitals.read().progress[1] >= first.progress[1] + 5


def test_a_stopped_process_gives_no_sign_and_goes_on_when_it_is_let(tmp_path: Path) -> None:
    with Owner(tmp_path) as owner:
        owner.load()
        owner.process.send_signal(signal.SIGSTOP)
        time.sleep(2 * BEAT_S)
        stopped = owner.vitals.read()
        time.sleep(5 * BEAT_S)
        assert owner.vitals.read() == stopped
        owner.process.send_signal(signal.SIGCONT)
        time.sleep(5 * BEAT_S)
        assert owner.vitals.read().beats > stopped.beats


@pytest.mark.parametrize(("text", "status"), [("bang!!", 70), ("what??", -signal.SIGKILL)])
def test_the_last_words_of_a_process_that_died_in_a_call(tmp_path: Path, text: str, status: int) -> None:
    with Owner(tmp_path, options={"crash_on_token": FATAL, "hang_on_token": STUCK}) as owner:
        owner.load()
        owner.perform(("a", 0, CREATE))
        owner.ask(2, [("a", 4, learn(text))])
        if status < 0:
            comes_to(owner, Doing.TRAINING)
            owner.process.kill()
        assert owner.exit_status() == status
        last = owner.vitals.read()
        assert (last.doing, last.seq_id) == (Doing.TRAINING, 4)


def test_the_last_words_of_a_process_that_died_taking_a_sample_in(tmp_path: Path) -> None:
    with Owner(tmp_path, options={"crash_on_token": FATAL}) as owner:
        owner.load()
        owner.send(Sample(1), encode(sample("oh!")))
        assert owner.exit_status() == 70
        assert owner.vitals.read().doing is Doing.SAMPLING


def test_one_that_is_killed_between_two_calls_says_nothing(tmp_path: Path) -> None:
    with Owner(tmp_path) as owner:
        owner.load()
        owner.perform(("a", 0, CREATE))
        owner.process.kill()
        owner.exit_status()
        assert owner.vitals.read().doing is Doing.NOTHING


def test_a_page_elsewhere_says_what_this_one_says() -> None:
    near, far = Vitals.create(), Vitals.create()
    far.beat(7)
    with far.during(Doing.TRAINING, 4):
        near.paste(far.copy())
    assert near.read() == (1, (1, 7), Doing.TRAINING, 4)
    assert far.read().doing is Doing.NOTHING
    with pytest.raises(ValueError, match="40 bytes, not 3"):
        near.paste(b"abc")
    near.close()
    far.close()

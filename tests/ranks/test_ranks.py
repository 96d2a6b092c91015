"""Groups of real processes; each test starts one of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from engines.interface import EngineBroken
from engines.ranks.leading import Leader
from tests.ranks.echo import answer, lead
from tests.served import has_ended

pytestmark = pytest.mark.slow

LOOPBACK = "0100007F"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@contextmanager
def leading(timeout_s: float = 30.0) -> Iterator[Leader]:
    leader = lead(timeout_s)
    try:
        yield leader
    finally:
        leader.close()


def asked(leader: Leader, word: bytes) -> list[bytes]:
    return leader.call(word, lambda: answer(leader.world, word))


def test_every_rank_hears_what_all_say() -> None:
    with leading() as leader:
        for word in (b"a", b"some words", bytes(100_000), b"b"):
            assert asked(leader, word) == [b"", word, word * 2]
        leader.check()
        children = leader.children
        assert not any(has_ended(child) for child in children)
    assert all(has_ended(child) for child in children)


def test_ranks_listen_where_nobody_else_reaches_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before when the test is over
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    with leading() as leader:
        for process in (os.getpid(), *leader.children):
            addresses = listening(process)
            assert addresses and {address.rpartition(":")[0] for address in addresses} == {LOOPBACK}
    # The machine's name may be one of the loopback interface, and then that alone says nothing.
    assert os.environ["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


def listening(process: int) -> list[str]:
    """Addresses at which a process listens, as /proc has them."""
    own = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with suppress(OSError):  # it has been closed meanwhile
            own.add(str(entry.readlink()))
    rows = [line.split() for line in Path(f"/proc/{process}/net/tcp").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]


@pytest.mark.parametrize("word", [b"die", b"raise"])
def test_a_rank_that_ends_in_a_call_ends_all(word: bytes) -> None:
    with leading() as leader:
        with pytest.raises(EngineBroken):
            asked(leader, word)
        until(lambda: all(has_ended(child) for child in leader.children))
        with pytest.raises(EngineBroken):
            leader.check()


def test_a_rank_that_hangs_is_noticed() -> None:
    """A stopped process answers nothing and closes nothing."""
    with leading(timeout_s=5.0) as leader:
        with pytest.raises(EngineBroken):
            asked(leader, b"stop")
        until(lambda: all(has_ended(child) for child in leader.children))


def test_a_rank_that_stalls_before_it_has_joined_is_a_start_that_may_be_tried_again() -> None:
    """Not a LoadError, which would say that something is to be changed first. In a process of its own: torch counts the
    groups of one that could not begin too, and the next would wait for ranks by another name."""
    before = set(processes("tests.ranks.stalling"))
    code = (
        "import torch; from engines.ranks.leading import Leader; "
        "Leader('tests.ranks.stalling', 2, 30.0, [torch.device('cpu')] * 2, 2.0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 1
    assert "EngineBroken: the 2 ranks did not find each other within 2 s" in done.stderr
    until(lambda: set(processes("tests.ranks.stalling")) == before)


def test_a_rank_that_stalls_while_it_loads_is_noticed() -> None:
    with leading(timeout_s=100.0) as leader:
        leader.world.start_bound = timedelta(seconds=2)
        with pytest.raises(EngineBroken, match="the ranks fell apart"):
            leader.call(b"stall", leader.world.meet)
        until(lambda: all(has_ended(child) for child in leader.children))


def processes(module: str) -> Iterator[int]:
    """Those that run a module."""
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and module in (entry / "cmdline").read_text().split("\0"):
                yield int(entry.name)


def test_a_rank_that_hangs_while_nobody_calls_is_noticed_by_the_next_call() -> None:
    """It is rank 0 that waits then, until all have heard the call."""
    with leading(timeout_s=3.0) as leader:
        asked(leader, b"a")
        os.kill(leader.children[1], signal.SIGSTOP)
        with pytest.raises(EngineBroken):
            asked(leader, b"a")
        until(lambda: all(has_ended(child) for child in leader.children))


def test_a_rank_that_ends_while_nobody_calls_is_noticed() -> None:
    with leading() as leader:
        os.kill(leader.children[1], signal.SIGKILL)

        def noticed() -> bool:
            try:
                leader.check()
            except EngineBroken as error:
                return "rank 2 has ended with status -9" in str(error)
            return False

        until(noticed)
        with pytest.raises(EngineBroken, match="rank 2 has ended"):
            asked(leader, b"a")


def test_whatever_goes_wrong_on_rank_0_ends_all() -> None:
    def fails() -> None:
        raise ValueError("on rank 0 only")

    with leading() as leader:
        with pytest.raises(EngineBroken, match="on rank 0 only"):
            leader.call(b"a", fails)
        until(lambda: all(has_ended(child) for child in leader.children))


def test_ranks_whose_leader_is_killed_end() -> None:
    command = [sys.executable, "-m", "tests.ranks.echo", "--lead"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        children = [int(word) for word in process.stdout.readline().split()]
        assert len(children) == 2 and not any(has_ended(child) for child in children)
        process.kill()
        until(lambda: all(has_ended(child) for child in children))

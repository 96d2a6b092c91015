"""Two or more ways of doing the same work, measured in turn, so that whatever else the machine does meets them all.

Threads that work together wait for the slowest, so a machine that does something else as well shows how ways bear
being disturbed and not how fast they are. Rounds in which other processes were busy are therefore measured again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measuring import median, processor_seconds

CALM = 0.05
"""Largest share of the machine that other processes may use in a round that counts as undisturbed."""
_TICKS = os.sysconf("SC_CLK_TCK")
_LOOK_S = 0.5


@dataclass(frozen=True)
class Side:
    """One way. `work` does it once and gives tokens per second; `processes` are those whose processor time it costs."""

    work: Callable[[], float]
    processes: Mapping[str, int]


@dataclass(frozen=True)
class Turn:
    """One time: tokens per second, processor seconds of each process, share of the machine that others used."""

    rate: float
    spent: Mapping[str, float]
    others: float


Round = Mapping[str, Turn]


def alternate(
    sides: Mapping[str, Side], repeats: int, patience_s: float, *, warm: bool = False
) -> list[Round]:
    """A B A B …, after a first round that does not count unless the sides are `warm` already.

    Gives as many undisturbed rounds as wanted, or, when `patience_s` is over, the least disturbed ones in their order.
    """
    own = {pid for side in sides.values() for pid in side.processes.values()}
    for side in () if warm else sides.values():
        side.work()
    rounds: list[Round] = []
    deadline = time.monotonic() + patience_s
    while sum(_others(done) < CALM for done in rounds) < repeats:
        _await_calm(deadline)
        rounds.append({name: _turn(side, own) for name, side in sides.items()})
        if len(rounds) >= repeats and time.monotonic() > deadline:
            break
    bound = sorted(_others(done) for done in rounds)[repeats - 1]
    return [done for done in rounds if _others(done) <= bound][:repeats]


def summary(turns: Iterable[Turn], units: int) -> dict[str, object]:
    """Tokens per second of each turn, and processor milliseconds per unit of work, `units` of them in each turn."""
    turns = list(turns)
    names = turns[0].spent
    return {
        "tokens_per_second": [round(turn.rate, 1) for turn in turns],
        "cpu_ms": {
            name: round(1e3 * median([turn.spent[name] for turn in turns]) / units, 3) for name in names
        },
    }


def ratios(rounds: Sequence[Round], ours: str, theirs: str) -> list[float]:
    """Of each round's two speeds; their median is what is claimed."""
    return [round(done[ours].rate / done[theirs].rate, 4) for done in rounds]


def disturbance(rounds: Sequence[Round]) -> list[float]:
    """Of each round the largest share of the machine that other processes used in one of its turns."""
    return [round(_others(done), 3) for done in rounds]


def engine_process(gateway: int) -> int:
    """The process id of the one engine that a gateway has started."""
    children = Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()
    (engine,) = (
        int(child) for child in children if b"engines.host" in Path(f"/proc/{child}/cmdline").read_bytes()
    )
    return engine


def busy_seconds() -> float:
    """Processor time that the whole machine has used, what its host took from it included."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = fields[:8]
    return (user + nice + system + interrupts + soft_interrupts + stolen) / _TICKS


def _turn(side: Side, own: Iterable[int]) -> Turn:
    before = {name: processor_seconds(pid) for name, pid in side.processes.items()}
    others, started = busy_seconds() - sum(map(processor_seconds, own)), time.perf_counter()
    rate = side.work()
    seconds = time.perf_counter() - started
    others = busy_seconds() - sum(map(processor_seconds, own)) - others
    spent = {name: processor_seconds(pid) - before[name] for name, pid in side.processes.items()}
    return Turn(rate, spent, max(0.0, others / (seconds * (os.cpu_count() or 1))))


def _await_calm(deadline: float) -> None:
    """Until the machine has nothing else to do, or the time is over."""
    share = 1.0
    while share > CALM and time.monotonic() < deadline:
        before, started = busy_seconds(), time.perf_counter()
        time.sleep(_LOOK_S)
        share = (busy_seconds() - before) / ((time.perf_counter() - started) * (os.cpu_count() or 1))


def _others(done: Round) -> float:
    return max(turn.others for turn in done.values())

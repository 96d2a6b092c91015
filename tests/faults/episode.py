"""One scene with faults, then the same courses where nothing is disturbed, and the difference."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.faults.breaking import faults_on
from tests.faults.comparison import Left, accounted, differences, left_behind
from tests.faults.proxy import FailOver
from tests.faults.scene import Kind, Scene, staged
from tests.faults.schedule import Happened, Schedule, Stuck, pauses
from tests.faults.workload import Clients, Course, Journal

Progress = Callable[[str], None]


@dataclass(slots=True)
class Episode:
    """What was found; `problems` is empty when everything is as it has to be."""

    kind: Kind
    happened: list[Happened]
    pauses: dict[str, list[float]]
    calls: Counter[str]
    courses: int
    seconds: float
    too_few: int
    """Faults for which there was no time."""
    problems: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Seen:
    """What came of all courses on one scene."""

    left: dict[tuple[int, int], Left]
    used: dict[str, int]
    problems: list[str]


class _Courses:
    """Courses for every client, one after the other, until it is enough."""

    def __init__(self, kind: Kind) -> None:
        self.enough = threading.Event()
        self._kind = kind

    def of(self, client: int) -> Iterator[Course]:
        """The courses of one client; a new one only while it is not enough."""
        number = 0
        while not (self.enough.is_set() and number):
            yield Course(client, number, self._kind.steps, self._kind.base_model)
            number += 1


def play(kind: Kind, count: int, seed: int, seconds: float, folder: Path, progress: Progress) -> Episode:
    """`count` faults, or as many as `seconds` allow, and what they changed. Logs and databases stay in the folder."""
    begun = time.monotonic()
    journal, courses = Journal(), _Courses(kind)
    with staged(kind, folder / "disturbed") as (scene, proxy):
        schedule = Schedule(scene, faults_on(kind.database), seed, journal, folder / "faults.jsonl")
        clients = Clients(proxy.url, journal, courses.of)
        clients.start()
        stuck = []
        try:
            schedule.run(count, begun + seconds, progress)
        except Stuck as error:
            stuck.append(f"{error}; after {len(schedule.happened)} faults, the last: {schedule.happened[-1]}")
        courses.enough.set()
        progress(f"{kind.name}: clients finish their courses")
        seen = _seen(scene, proxy, clients)
    expected = _undisturbed(kind, list(seen.left), folder / "undisturbed", progress)
    problems = stuck + seen.problems + expected.problems
    for key, left in seen.left.items():
        problems += differences(left, expected.left[key], kind.tolerance)
    if seen.used != expected.used:
        problems.append(f"counted as used: {seen.used}, undisturbed {expected.used}")
    calls = sum((left.calls for left in seen.left.values()), Counter[str]())
    return Episode(
        kind,
        schedule.happened,
        pauses(schedule.happened, journal),
        calls,
        len(seen.left),
        time.monotonic() - begun,
        count - len(schedule.happened),
        [f"{kind.name}: {problem}" for problem in problems],
    )


def _undisturbed(kind: Kind, keys: list[tuple[int, int]], folder: Path, progress: Progress) -> _Seen:
    """The same courses, on a scene with one gateway on SQLite to which nothing happens."""
    calm = replace(kind, database="sqlite", gateways=1, options={**kind.options, **_unhurried(kind)})
    wanted = sorted(keys)
    progress(f"{kind.name}: the same {len(wanted)} courses undisturbed")

    def of(client: int) -> Iterator[Course]:
        return (Course(*key, kind.steps, kind.base_model) for key in wanted if key[0] == client)

    with staged(calm, folder) as (scene, proxy):
        clients = Clients(proxy.url, Journal(), of)
        clients.start()
        return _seen(scene, proxy, clients)


def _unhurried(kind: Kind) -> dict[str, float]:
    """The numpy engine is slowed down only while there are faults to wait for."""
    return {"delay_s": 0.0} if kind.plugin == "fake" else {}


def _seen(scene: Scene, proxy: FailOver, clients: Clients) -> _Seen:
    """Wait for the clients, look at what they have left, and end the scene."""
    followed = clients.join(scene.folder / "stacks.txt")
    scene.wait_until_served()
    problems = [f"a client was answered: {refusal}" for refusal in proxy.refusals]
    left = left_behind(scene.sync_url, scene.folder / "storage", followed)
    used = accounted(scene.sync_url)
    statuses = scene.stop()
    if any(statuses):
        problems.append(f"stopped, the gateways exited with {statuses}")
    by_key = {(item.followed.course.client, item.followed.course.number): item for item in left}
    return _Seen(by_key, used, problems)

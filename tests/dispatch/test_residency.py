"""Who has a place in an engine's memory, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gateway.dispatch.residency import Change, Residency

SIZE = 10


class Engine:
    """Room for so many runs of one size; runs are named after their owner: `alice-1`."""

    def __init__(self, places: int = 2) -> None:
        self.now = 1000.0
        self.busy: set[str] = set()
        self.residency = Residency(lambda: self.now)
        self.residency.begin(places * SIZE)

    def arrive(self, *run_ids: str, size: int = SIZE) -> list[bool]:
        """Runs come with something to do; those that find a place are complete at once."""
        found = []
        for run_id in run_ids:
            self.busy.add(run_id)
            self.residency._sizes[run_id] = size
            found.append(self.residency.claim(run_id, run_id.partition("-")[0]))
            if found[-1]:
                self.residency.fill(run_id, size)
        return found

    def change(self, engine_idle: bool = False) -> Change | None:
        """The next change of places; the run that comes is complete at once."""
        change = self.residency.change(self.busy.__contains__, engine_idle)
        if change is not None:
            self.residency.fill(change.run_id, None)
        return change

    def rest(self, *run_ids: str) -> None:
        self.busy.difference_update(run_ids)

    def inside(self, run_ids: Iterable[str]) -> list[str]:
        return [run_id for run_id in run_ids if self.residency.holds(run_id)]


def test_runs_come_in_while_there_is_room() -> None:
    engine = Engine(places=2)
    assert engine.arrive("a-1", "a-2", "a-3") == [True, True, False]
    assert (len(engine.residency), engine.residency.used, engine.residency.waiting) == (2, 20, 1)
    assert engine.residency.leave("a-1")
    assert not engine.residency.leave("a-1")
    assert engine.change() == Change("a-3", [])
    assert engine.residency.evictions == 0


def test_without_a_limit_nobody_waits() -> None:
    residency = Residency()
    residency.begin(0)
    assert all(residency.claim(f"a-{i}", "a") for i in range(100))


def test_nobody_overtakes_who_waits() -> None:
    engine = Engine(places=2)
    engine.arrive("a-1", "a-2")
    engine.arrive("b-1", size=2 * SIZE)
    engine.residency.leave("a-1")
    assert engine.arrive("c-1") == [False]
    engine.residency.leave("a-2")
    assert engine.change() == Change("b-1", [])


def test_the_least_recently_used_run_of_those_at_rest_leaves_first() -> None:
    engine = Engine(places=3)
    engine.arrive("a-1", "a-2", "a-3")
    for run_id in ("a-1", "a-3", "a-2", "a-1"):
        engine.now += 1
        engine.residency.use(run_id, "forward")
    engine.rest("a-1", "a-2", "a-3")
    engine.now += 10
    leaving = []
    for newcomer in ("b-1", "b-2", "b-3"):
        engine.arrive(newcomer)
        change = engine.change()
        assert change is not None
        leaving += change.leaving
    assert leaving == ["a-3", "a-2", "a-1"]
    assert engine.residency.evictions == 3


def test_a_large_run_takes_the_places_of_several() -> None:
    engine = Engine(places=3)
    engine.arrive("a-1", "a-2", "a-3")
    engine.rest("a-1", "a-2", "a-3")
    engine.now += 10
    engine.arrive("b-1", size=2 * SIZE)
    assert engine.change() == Change("b-1", ["a-1", "a-2"])
    assert engine.residency.used == 3 * SIZE


def test_nobody_leaves_for_a_run_that_would_not_fit_even_then() -> None:
    engine = Engine(places=2)
    engine.arrive("a-1", "a-2")
    engine.rest("a-1")
    engine.residency.use("a-2", "forward_backward")
    engine.arrive("b-1", size=2 * SIZE)
    assert engine.change() is None  # a-2 is in the middle of a step
    assert engine.inside(["a-1", "a-2"]) == ["a-1", "a-2"]


def test_a_run_on_its_way_does_not_leave() -> None:
    engine = Engine(places=1)
    assert engine.residency.claim("a-1", "a")
    engine.residency._sizes["a-1"] = SIZE
    engine.residency.leave("a-1")
    assert engine.residency.claim("a-1", "a")
    engine.now += 100
    engine.arrive("b-1")
    assert engine.change() is None
    engine.residency.fill("a-1", SIZE)
    engine.now += 100
    assert engine.change() == Change("b-1", ["a-1"])


def test_a_pause_of_a_moment_is_no_rest_while_the_engine_works() -> None:
    """A client that has read its result and is about to send the next step."""
    engine = Engine(places=2)
    engine.arrive("a-1", "a-2", "b-1")
    engine.change()
    engine.arrive("a-1", "c-1")
    engine.rest("a-2")
    engine.residency.use("b-1", "optim_step")
    engine.now += 0.03
    assert engine.change() is None
    assert (
        engine.change(engine_idle=True) is not None
    )  # but an engine that has nothing else to do does not wait


def test_an_idle_engine_waits_as_long_as_a_change_takes() -> None:
    engine = Engine(places=1)
    engine.arrive("a-1")
    engine.residency.restored("a-1", SIZE, 1.0, pending=False)
    engine.rest("a-1")
    engine.residency._changed_at = engine.now
    engine.arrive("b-1")
    engine.now += 0.2
    assert engine.change(engine_idle=True) is None
    engine.now += 0.2
    assert engine.change(engine_idle=True) == Change("b-1", ["a-1"])


def test_who_all_have_work_take_turns_and_nobody_starves() -> None:
    engine = Engine(places=3)
    runs = [f"owner{i}-{i}" for i in range(10)]
    engine.arrive(*runs)
    seconds = dict.fromkeys(runs, 0.0)
    for _ in range(4000):
        engine.now += 0.01
        change = engine.change()
        for run_id in change.leaving if change else ():
            engine.arrive(run_id)
        for run_id in engine.inside(runs):
            seconds[run_id] += 0.01
    assert max(seconds.values()) < 1.3 * min(seconds.values())
    assert sum(seconds.values()) == pytest.approx(3 * 4000 * 0.01)


@pytest.mark.parametrize("change_s", [0.02, 0.5])
def test_changes_of_places_take_a_tenth_of_the_time(change_s: float) -> None:
    engine = Engine(places=2)
    runs = [f"a-{i}" for i in range(6)]
    engine.arrive(*runs)
    begun, changing_s = engine.now, 0.0
    for _ in range(100_000):
        engine.now += 0.005
        change = engine.residency.change(engine.busy.__contains__, False)
        if change is None:
            continue
        engine.now += change_s
        changing_s += change_s
        engine.residency.restored(change.run_id, SIZE, change_s, pending=False)
        engine.arrive(*change.leaving)
    assert changing_s / (engine.now - begun) == pytest.approx(0.1, rel=0.25)


def test_a_turn_ends_however_long_changes_take() -> None:
    engine = Engine(places=1)
    engine.arrive("a-1", "b-1")
    assert engine.change() is not None
    for _ in range(50):
        engine.residency.restored("b-1", SIZE, 1000.0, pending=False)
    engine.arrive("a-1")
    engine.now += 29
    assert engine.change() is None
    engine.now += 2
    assert engine.change() == Change("a-1", ["b-1"])


def test_between_two_steps_before_in_the_middle_of_one() -> None:
    engine = Engine(places=2)
    engine.arrive("a-1", "b-1")
    engine.residency.use("a-1", "forward_backward")
    engine.residency.use("b-1", "forward_backward")
    engine.residency.use("b-1", "optim_step")
    engine.now += 1
    engine.arrive("c-1")
    assert engine.change() == Change("c-1", ["b-1"])
    for kind in ("forward", "save_weights"):
        engine.residency.use("a-1", kind)
    engine.residency.use("c-1", "forward_backward")
    engine.arrive("b-1")
    engine.now += 0.27  # its turn has come, but both are in the middle of a step
    assert engine.change() is None
    engine.now += 0.2
    change = engine.change()
    assert change is not None and change.leaving == ["a-1"]


def test_an_owner_with_nothing_in_memory_does_not_wait_for_one_with_many() -> None:
    engine = Engine(places=3)
    engine.arrive("a-1", "a-2", "a-3", "a-4", "a-5")
    first = engine.change()
    assert first is not None  # from now on nobody leaves for a while
    engine.arrive("b-1")
    change = engine.change()
    assert change is not None and change.run_id == "b-1"
    engine.arrive("c-1")
    change = engine.change()
    assert change is not None and change.run_id == "c-1"
    assert change.leaving[0].startswith("a")
    engine.arrive("d-1")  # all have one now
    assert engine.change() is None


def test_owners_who_wait_take_turns() -> None:
    engine = Engine(places=1)
    engine.arrive("z-1", *(f"a-{i}" for i in range(5)), "b-1", "c-1")
    order = []
    for _ in range(7):
        engine.now += 100
        change = engine.change()
        assert change is not None
        order.append(change.run_id)
    assert order == ["a-0", "b-1", "c-1", "a-1", "a-2", "a-3", "a-4"]


def test_what_an_engine_refuses_waits_until_others_have_left() -> None:
    """The size of a run that was never here is told by the engine."""
    engine = Engine(places=1)
    engine.arrive("a-1")
    assert engine.residency.claim("b-1", "b")  # an attempt: nothing is known of its size
    assert engine.residency.refused("b-1", SIZE)
    assert not engine.residency.claim("b-1", "b")
    engine.now += 1
    assert engine.change() == Change("b-1", ["a-1"])


def test_an_engine_that_has_less_than_it_thought_is_believed() -> None:
    engine = Engine(places=4)
    engine.arrive("a-1", "a-2")
    assert engine.residency.claim("b-1", "b")
    assert engine.residency.refused("b-1", SIZE)  # out of memory, though four should fit
    assert engine.residency.limit == 3 * SIZE - 1
    assert not engine.residency.claim("b-1", "b")
    engine.now += 1
    assert engine.change() == Change("b-1", ["a-1"])
    assert engine.residency.used == 2 * SIZE


def test_a_run_that_does_not_fit_alone_has_no_hope() -> None:
    engine = Engine(places=1)
    assert engine.residency.claim("a-1", "a")
    assert not engine.residency.refused("a-1", SIZE)


def test_after_a_reset_the_engine_is_told_what_to_drop() -> None:
    engine = Engine(places=2)
    engine.arrive("a-1", "b-1", "c-1")
    engine.residency.reset()
    assert (len(engine.residency), engine.residency.used, engine.residency.waiting) == (0, 0, 0)
    assert engine.residency.begin(2 * SIZE) == ["a-1", "b-1"]
    assert engine.residency.begin(2 * SIZE) == []
    assert engine.arrive("c-1", "a-1", "b-1") == [True, True, False]


def test_somebody_looks_again_only_while_somebody_waits() -> None:
    engine = Engine(places=1)
    engine.arrive("a-1")
    assert engine.residency.look_again_s == float("inf")
    engine.arrive("b-1")
    assert engine.residency.look_again_s < 0.1


def test_a_run_whose_size_is_forgotten_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.dispatch.residency._SIZES", 2)
    engine = Engine(places=2)
    residency = engine.residency
    for number in range(5):
        assert residency.claim(f"a-{number}", "a")
        residency.fill(f"a-{number}", SIZE)
        residency.leave(f"a-{number}")
    assert list(residency._sizes) == ["a-3", "a-4"]
    assert engine.arrive("b-1", "b-2") == [True, True]
    assert residency.claim("a-0", "a")
    assert residency.refused("a-0", SIZE)  # the engine knows better, and says how large it is
    assert not residency.claim("a-0", "a")

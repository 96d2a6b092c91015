"""What runs and adapters may take: the limits, and the accounts that keep to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.interface import EngineConfig, UserError
from engines.memory import AdapterMemory, Limits, RunMemory, free_host_bytes, limits

KiB = 1024


def config(runs: int | None = None, adapters: int | None = None) -> EngineConfig:
    return EngineConfig(
        "e", "fake", "m", "", ("train",), "", 1, run_memory_bytes=runs, adapter_memory_bytes=adapters
    )


def machine(root: Path, available_kib: int) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(
        f"MemTotal:       9999999 kB\nMemAvailable:   {available_kib} kB\nHugePages_Total:       0\n"
    )
    return root


def group(root: Path, folder: str, most: str, used: int, droppable: int) -> None:
    """A control group of the second version, and this process in it."""
    (root / "proc/self/cgroup").write_text(f"0::/{folder}\n")
    own = root / "sys/fs/cgroup" / folder
    own.mkdir(parents=True)
    (own / "memory.max").write_text(f"{most}\n")
    (own / "memory.current").write_text(f"{used}\n")
    (own / "memory.stat").write_text(f"anon 5\ninactive_file {droppable}\nactive_file 7\n")


def test_limits_are_what_is_set_else_a_share_of_what_is_free() -> None:
    assert limits(config(), 1000) == Limits(400, 100)
    assert limits(config(runs=7), 1000) == Limits(7, 100)
    assert limits(config(adapters=8), None) == Limits(0, 8)


def test_the_machine_says_what_is_free(tmp_path: Path) -> None:
    assert free_host_bytes(machine(tmp_path, 500)) == 500 * KiB


@pytest.mark.parametrize("folder", ["", "user.slice/run-1.scope"])
def test_a_control_group_may_leave_less(tmp_path: Path, folder: str) -> None:
    group(machine(tmp_path, 500), folder, "200000", 150000, 30000)
    assert free_host_bytes(tmp_path) == 80000


@pytest.mark.parametrize(("most", "used"), [("max", 5), ("9000000000", 5)])
def test_a_control_group_may_leave_more(tmp_path: Path, most: str, used: int) -> None:
    group(machine(tmp_path, 500), "a", most, used, 0)
    assert free_host_bytes(tmp_path) == 500 * KiB


def test_a_full_control_group_leaves_nothing(tmp_path: Path) -> None:
    group(machine(tmp_path, 500), "a", "1000", 2000, 10)
    assert free_host_bytes(tmp_path) == 0


def test_elsewhere_nobody_knows(tmp_path: Path) -> None:
    assert free_host_bytes(tmp_path) is None


# ---------------------------------------------------------------------------- runs


def test_runs_are_taken_in_until_there_is_no_room() -> None:
    memory = RunMemory(100)
    assert memory.take("a", 60)
    assert not memory.take("b", 41)
    assert memory.take("c", 40)
    assert memory.used == 100
    memory.give_back("a")
    memory.give_back("never was")
    assert memory.take("b", 41)
    assert memory.used == 81


def test_a_run_that_is_made_again_is_counted_once() -> None:
    memory = RunMemory(100)
    assert memory.take("a", 60) and memory.take("a", 60) and memory.take("a", 100)
    assert memory.used == 100


def test_a_run_that_never_fits_is_refused_with_both_numbers() -> None:
    memory = RunMemory(100)
    with pytest.raises(UserError, match=r"needs 101 bytes.*may take 100 \(run_memory_bytes\)"):
        memory.take("a", 101)
    assert memory.used == 0


def test_without_a_limit_everything_fits() -> None:
    memory = RunMemory(0)
    assert memory.take("a", 1 << 60) and memory.take("b", 1 << 60)


# ---------------------------------------------------------------------------- sampled adapters


class Library:
    """Adapters that can be read, and how often each was."""

    def __init__(self, limit: int) -> None:
        self.memory: AdapterMemory[str] = AdapterMemory(limit)
        self.read: list[str] = []

    def take(self, folder: str, size: int = 10) -> str | None:
        def read() -> str:
            self.read.append(folder)
            return folder.upper()

        return self.memory.take(folder, size, read)


def test_the_least_recently_used_adapter_goes_first() -> None:
    library = Library(30)
    for folder in ("a", "b", "c", "a", "d", "a", "c", "b"):
        assert library.take(folder) == folder.upper()
        library.memory.give_back(folder)
    assert library.read == ["a", "b", "c", "d", "b"]
    assert (len(library.memory), library.memory.used) == (3, 30)


def test_an_adapter_in_use_stays_until_its_last_user_gives_it_back() -> None:
    library = Library(20)
    assert library.take("a") and library.take("a") and library.take("b")
    assert library.take("c") is None
    library.memory.give_back("a")
    assert library.take("c") is None
    library.memory.give_back("a")
    assert library.take("c") == "C"
    assert "a" not in library.memory and "b" in library.memory
    assert library.memory.used == 20


def test_nothing_goes_for_an_adapter_that_has_no_room_even_then() -> None:
    library = Library(30)
    library.take("a", 20)
    library.take("b", 10)
    library.memory.give_back("b")
    assert library.take("c", 11) is None
    assert "b" in library.memory


def test_a_large_adapter_takes_the_places_of_several() -> None:
    library = Library(30)
    for folder in ("a", "b", "c"):
        library.take(folder)
        library.memory.give_back(folder)
    assert library.take("large", 20) == "LARGE"
    assert [folder in library.memory for folder in ("a", "b", "c")] == [False, False, True]


def test_an_adapter_that_never_fits_is_refused_with_both_numbers() -> None:
    memory: AdapterMemory[str] = AdapterMemory(100)
    with pytest.raises(UserError, match=r"has 101 bytes.*may take 100 \(adapter_memory_bytes\)"):
        memory.require(101)
    memory.require(100)
    AdapterMemory[str](0).require(1 << 60)


def test_what_was_saved_is_kept_only_where_there_is_room() -> None:
    library = Library(10)
    assert library.memory.offer("a", 10, lambda: "A")
    assert library.take("a") == "A"
    assert not library.memory.offer("b", 10, lambda: "B")
    library.memory.give_back("a")
    assert library.memory.offer("b", 10, lambda: "B")
    assert library.read == []


def test_without_a_limit_all_are_kept() -> None:
    library = Library(0)
    for folder in "abcdefgh":
        library.take(folder, 1 << 50)
        library.memory.give_back(folder)
    assert len(library.memory) == 8


def test_an_adapter_that_cannot_be_read_takes_no_room() -> None:
    memory: AdapterMemory[str] = AdapterMemory(10)

    def broken() -> str:
        raise UserError("it cannot be read")

    with pytest.raises(UserError):
        memory.take("a", 10, broken)
    assert (len(memory), memory.used) == (0, 0)
    assert memory.take("b", 10, lambda: "B") == "B"

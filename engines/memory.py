"""Memory for adapters: what runs and sampled adapters may take, and what the runs in an engine take.

A run is counted with all that it will ever hold (weights, gradients, optimizer state) from its first moment on, so
that a limit that holds now holds later too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from engines.interface import EngineConfig, UserError

T = TypeVar("T")

RUN_SHARE = 0.4
ADAPTER_SHARE = 0.1
"""Parts of what is free once the base model is loaded that runs and sampled adapters get where nothing is configured;
the rest is for passes, the cache of sequences under way and remembered prompts."""


class Limits(NamedTuple):
    """Bytes; 0 is no limit."""

    runs: int
    adapters: int


def limits(config: EngineConfig, free_bytes: int | None) -> Limits:
    """What is configured, else a share of what is free; None: it is not known how much is."""
    free = free_bytes or 0
    runs, adapters = config.run_memory_bytes, config.adapter_memory_bytes
    return Limits(
        int(free * RUN_SHARE) if runs is None else runs,
        int(free * ADAPTER_SHARE) if adapters is None else adapters,
    )


def free_host_bytes(root: Path = Path("/")) -> int | None:
    """Main memory that this process may still take: the machine's, or its control group's if that is less.

    None where the operating system gives no account (anything but Linux).
    """
    machine = _fields(root / "proc/meminfo").get("MemAvailable")
    if machine is None:
        return None
    group = _group_free(root)
    return machine * 1024 if group is None else min(machine * 1024, group)


def _group_free(root: Path) -> int | None:
    """Of the control group (version 2); pages of files that can be dropped at once count as free."""
    folder = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        own = folder / line.removeprefix("0::").strip().lstrip("/")
        if line.startswith("0::") and (own / "memory.max").is_file():
            folder = own
    most, used = (_number(folder / name) for name in ("memory.max", "memory.current"))
    if most is None or used is None:
        return None
    return max(0, most - used + _fields(folder / "memory.stat").get("inactive_file", 0))


def _fields(path: Path) -> dict[str, int]:
    """Lines such as `MemAvailable:  1024 kB` and `inactive_file 4096`, by their first word."""
    words = [line.split() for line in _lines(path)]
    return {word[0].rstrip(":"): int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def _number(path: Path) -> int | None:
    [text] = _lines(path) or [""]
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


class RunMemory:
    """What the runs of one engine occupy. `limit` in bytes; 0 is none."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._runs: dict[str, int] = {}

    def take(self, run_id: str, size: int) -> bool:
        """Count a run that is about to be made; False, and nothing changes, when it has no room beside the others.

        Raises UserError when it would have none in an empty engine either.
        """
        if self.limit and size > self.limit:
            raise UserError(
                f"the run needs {size} bytes (its adapter, gradients and optimizer state) and all runs of this engine "
                f"together may take {self.limit} (run_memory_bytes): lower lora_config.rank, or train fewer of "
                "attention, MLP and unembedding"
            )
        others = self.used - self._runs.get(run_id, 0)
        if self.limit and others + size > self.limit:
            return False
        self._runs[run_id] = size
        self.used = others + size
        return True

    def give_back(self, run_id: str) -> None:
        """A run has been freed; an unknown one is no error."""
        self.used -= self._runs.pop(run_id, 0)


@dataclass
class _Kept(Generic[T]):
    adapter: T
    size: int
    users: int = 0


class AdapterMemory(Generic[T]):
    """Immutable adapters for sampling, by storage folder, within `limit` bytes (0: no limit). Those in use stay; of the
    others the least recently used one goes first. What has gone is read again when it is wanted."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._kept: OrderedDict[str, _Kept[T]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, folder: str) -> bool:
        return folder in self._kept

    def require(self, size: int) -> None:
        """Raises UserError when an adapter of this size does not fit, whatever else goes."""
        if self.limit and size > self.limit:
            raise UserError(
                f"the sampler's adapter has {size} bytes and all sampled adapters of this engine together may take "
                f"{self.limit} (adapter_memory_bytes)"
            )

    def take(self, folder: str, size: int, read: Callable[[], T]) -> T | None:
        """An adapter, which stays until it has been given back as often as it was taken.

        `read` gives it when it is not kept. None when those in use leave no room for it now.
        """
        if not self.offer(folder, size, read):
            return None
        kept = self._kept[folder]
        kept.users += 1
        self._kept.move_to_end(folder)
        return kept.adapter

    def offer(self, folder: str, size: int, make: Callable[[], T]) -> bool:
        """Keep an adapter if there is room beside those in use, as the most recently used one; whether it is kept."""
        if folder not in self._kept:
            if not self._make_room(size):
                return False
            self._kept[folder] = _Kept(make(), size)
            self.used += size
        return True

    def give_back(self, folder: str) -> None:
        """One user less."""
        self._kept[folder].users -= 1

    def clear(self) -> None:
        """Forget everything."""
        self._kept.clear()
        self.used = 0

    def drop_unused(self) -> None:
        """Forget everything that is not in use."""
        for folder in [folder for folder, kept in self._kept.items() if not kept.users]:
            self.used -= self._kept.pop(folder).size

    def _make_room(self, size: int) -> bool:
        unused = [folder for folder, kept in self._kept.items() if not kept.users]
        if self.limit and self.used - sum(self._kept[folder].size for folder in unused) + size > self.limit:
            return False
        for folder in unused:
            if not self.limit or self.used + size <= self.limit:
                break
            self.used -= self._kept.pop(folder).size
        return True

"""Two or more ways of doing the same work, measured in turn, so that whatever else the machine does meets them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import median, processor_seconds


@dataclass
class Side:
    """One way. `work` does it once and gives tokens per second; `processes` are those whose processor time it costs."""

    work: Callable[[], float]
    processes: Mapping[str, int]
    rates: list[float] = field(default_factory=list)
    spent: dict[str, list[float]] = field(default_factory=dict)

    def measure(self) -> None:
        """Do it once more, and note speed and processor seconds of each process."""
        before = {name: processor_seconds(pid) for name, pid in self.processes.items()}
        self.rates.append(self.work())
        for name, pid in self.processes.items():
            self.spent.setdefault(name, []).append(processor_seconds(pid) - before[name])

    def summary(self, units: int) -> dict[str, object]:
        """Tokens per second of each time, and processor milliseconds per unit of work, `units` of them each time."""
        return {
            "tokens_per_second": [round(rate, 1) for rate in self.rates],
            "cpu_ms": {name: round(1e3 * median(spent) / units, 3) for name, spent in self.spent.items()},
        }


def alternate(sides: Sequence[Side], repeats: int) -> None:
    """A B A B …, after a first round that does not count."""
    for side in sides:
        side.work()
    for _ in range(repeats):
        for side in sides:
            side.measure()


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Of each pair of neighbours; their median is what is claimed."""
    return [round(mine / other, 4) for mine, other in zip(ours, theirs, strict=True)]


def engine_process(gateway: int) -> int:
    """The process id of the one engine that a gateway has started."""
    children = Path(f"/proc/{gateway}/task/{gateway}/children").read_text().split()
    engines = [
        int(child) for child in children if b"engines.host" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    (engine,) = engines
    return engine

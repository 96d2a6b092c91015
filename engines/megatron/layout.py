"""From a model, a number of devices and their memory to a layout, with the reason in a sentence.

    python -m engines.megatron.layout MODEL --devices 8 --memory-gib 80

Everything can be set part by part; what is not set is chosen. Of the layouts that are possible and fit, the one that
cuts the model least is taken, since every cut is paid for in each layer of each step: what is left over becomes data
parallelism, which is paid for once a step.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from engines.interface import LoadError
from engines.megatron.constraints import DEGREES, Layout, divisors, failures, possible
from engines.megatron.costs import Memory, Workload, memory
from engines.megatron.options import MegatronOptions
from engines.megatron.shapes import ModelShape, read_shape

GIB = 2**30
USABLE = 0.9
"""Part of a device's memory that is planned with. The rest is the runtime's own, and what no plan foresees."""


class Asked(msgspec.Struct, frozen=True):
    """What somebody has decided; None is left to the proposal."""

    tensor: int | None = None
    pipeline: int | None = None
    data: int | None = None
    context: int | None = None
    expert: int | None = None
    sequence: bool | None = None
    recompute: bool | None = None

    @property
    def cuts(self) -> bool:
        """Whether it says how the model is cut and what is kept: what is left open changes no rank's memory much."""
        return None not in (self.tensor, self.pipeline, self.recompute)


class Proposal(msgspec.Struct, frozen=True):
    """A layout, whether activations are computed again on the way back, the memory of its fullest rank, and why."""

    layout: Layout
    recompute: bool
    memory: Memory
    reason: str


def propose(
    shape: ModelShape,
    devices: int,
    memory_bytes: int,
    asked: Asked = Asked(),  # noqa: B008 -- frozen
    load: Workload = Workload(),  # noqa: B008 -- frozen
    node: int = 8,
) -> Proposal:
    """The layout for `devices` of `memory_bytes` each, `node` of them in one machine.

    Raises LoadError which names the constraint when what was asked is impossible, and what is lacking when it is
    possible but fits no memory. Somebody who has set tensor, pipeline and recompute knows: then it is only told.
    """
    if devices < 1 or memory_bytes < 1:
        raise LoadError(
            f"there are {devices} devices of {memory_bytes} bytes; a layout needs at least one of each"
        )
    layouts = list(_possible(shape, devices, asked, node))
    if not layouts:
        raise LoadError(_why_none(shape, devices, asked, node))
    usable = int(memory_bytes * USABLE)
    wished = [asked.recompute] if asked.recompute is not None else [False, True]
    tried = [
        (layout, msgspec.structs.replace(load, recompute=recompute))
        for layout, recompute in itertools.product(layouts, wished)
    ]
    tried.sort(key=_burden)
    fitting = [(layout, way) for layout, way in tried if memory(shape, layout, way).total <= usable]
    if not fitting and not asked.cuts:
        raise LoadError(_too_little(shape, tried, memory_bytes))
    taken = fitting[0] if fitting else tried[0]
    layout, way = taken
    found = memory(shape, layout, way)
    return Proposal(layout, way.recompute, found, _reason(shape, tried, taken, memory_bytes))


def _possible(shape: ModelShape, devices: int, asked: Asked, node: int) -> Iterator[Layout]:
    """Every layout of the devices that agrees with what was asked. Context parallelism is for whom asks: it pays where
    a single sequence is too long for a device, which the length of what comes decides."""
    choices = {
        name: [size for size in divisors(shape, name, devices) if devices % size == 0] for name in DEGREES
    }
    choices["context"] = [1]
    if not shape.experts:
        choices["expert"] = [1]
    choices["tensor"] = [size for size in choices["tensor"] if size <= node]
    for name in DEGREES:
        wish = getattr(asked, name)
        if wish is not None:
            choices[name] = [wish]
    for sizes in itertools.product(*choices.values()):
        degrees = dict(zip(choices, sizes, strict=True))
        sequence = degrees["tensor"] > 1 if asked.sequence is None else asked.sequence
        layout = Layout(**degrees, sequence=sequence)
        if possible(shape, layout, devices):
            yield layout


def _burden(tried: tuple[Layout, Workload]) -> tuple[int, ...]:
    """What a layout costs, worst first: pieces of the model, stages that wait for each other, ranks that sum in each
    layer, computing twice, ranks that exchange tokens."""
    layout, way = tried
    cut = layout.tensor * layout.pipeline * layout.context
    return (cut, layout.pipeline, layout.tensor, layout.expert, way.recompute)


def _why_none(shape: ModelShape, devices: int, asked: Asked, node: int) -> str:
    """The constraint that fails for what was asked, with the rest at its least."""
    sizes = {name: getattr(asked, name) or 1 for name in DEGREES}
    given = {name: getattr(asked, name) for name in DEGREES if getattr(asked, name) is not None}
    rest = devices
    for name in ("tensor", "pipeline", "data", "context"):
        rest = rest // max(1, sizes[name]) if rest % max(1, sizes[name]) == 0 else 0
    if asked.data is None and rest > 1:
        sizes["data"] = rest
    sequence = sizes["tensor"] > 1 if asked.sequence is None else asked.sequence
    for name, wish in given.items():
        if wish < 1:
            return f"options.{name} is {wish}; it must be at least 1"
    for sentence in failures(shape, Layout(**sizes, sequence=sequence), devices):
        return sentence
    wanted = ", ".join(f"{name} {size}" for name, size in given.items()) or "nothing set"
    return f"no layout of {devices} devices ({node} a machine) has {wanted}"


def _too_little(shape: ModelShape, tried: Sequence[tuple[Layout, Workload]], memory_bytes: int) -> str:
    layout, way = min(tried, key=lambda one: memory(shape, *one).total)
    needs = memory(shape, layout, way)
    return (
        f"no layout fits: the one that needs least ({layout}) needs {_gib(needs.total)} on a device ({_parts(needs)}), "
        f"and {USABLE:.0%} of {_gib(memory_bytes)} can be planned with: take more devices, shorter passes or fewer runs"
    )


def _reason(
    shape: ModelShape,
    tried: Sequence[tuple[Layout, Workload]],
    taken: tuple[Layout, Workload],
    memory_bytes: int,
) -> str:
    """A sentence: what fits, and what was tried before it and does not."""
    layout, way = taken
    needs = memory(shape, layout, way)
    again = ", computing activations twice," if way.recompute else ""
    sentence = (
        f"{layout}{again} needs {_gib(needs.total)} of {_gib(memory_bytes)} on a device ({_parts(needs)})"
    )
    if needs.total > memory_bytes * USABLE:
        return f"{sentence}, which is more than the {USABLE:.0%} that can be planned with; it was asked for"
    before = tried[: tried.index(taken)]
    once = [one for one in before if one[0] == layout]
    if once:
        sentence += f"; computing them once it would need {_gib(memory(shape, *once[0]).total)}"
    simpler = [memory(shape, *one).total for one in before if one[0] != layout]
    if not simpler:
        return f"{sentence}; no layout cuts the model less"
    return f"{sentence}; what cuts the model less needs {_gib(min(simpler))} or more"


def _parts(found: Memory) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in msgspec.structs.asdict(found).items() if size)


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"


# ---------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    made = argparse.ArgumentParser(
        prog="python -m engines.megatron.layout", description="Propose how a model is laid out over devices."
    )
    made.add_argument("model", type=Path, help="a folder with the model's config.json")
    made.add_argument("--devices", type=int, required=True)
    made.add_argument("--memory-gib", type=float, required=True, help="of each device")
    made.add_argument(
        "--node", type=int, default=8, help="devices of one machine: the most tensor parallel ranks"
    )
    for name in DEGREES:
        made.add_argument(f"--{name}", type=int, help=f"{name} parallel ranks; chosen when not given")
    for name in ("sequence", "recompute"):
        made.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=None)
    load = Workload()
    made.add_argument(
        "--tokens", type=int, default=MegatronOptions().pass_tokens, help="of a pass (options.pass_tokens)"
    )
    made.add_argument("--adapter-rank", type=int, default=load.adapter_rank)
    made.add_argument("--runs", type=int, default=load.runs, help="in memory at once")
    made.add_argument("--float32", action="store_true", help="base weights in float32, not bfloat16")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the proposal; gives the exit status."""
    chosen = parser().parse_args(arguments)
    load = Workload(chosen.tokens, chosen.adapter_rank, chosen.runs, 4 if chosen.float32 else 2)
    wishes = {name: getattr(chosen, name) for name in Asked.__struct_fields__}
    try:
        shape = read_shape(chosen.model)
        memory_bytes = int(chosen.memory_gib * GIB)
        found = propose(shape, chosen.devices, memory_bytes, Asked(**wishes), load, chosen.node)
    except LoadError as error:
        print(error, file=sys.stderr)
        return 1
    settings = {name: getattr(found.layout, name) for name in Layout.__struct_fields__}
    print(_as_settings({**settings, "recompute": found.recompute}))
    print(found.reason)
    return 0


def _as_settings(options: dict[str, int | bool]) -> str:
    """The line for an engine's table in the settings file; numbers and truth are written alike in JSON and TOML."""
    parts = (f"{name} = {msgspec.json.encode(value).decode()}" for name, value in options.items())
    return f"options = {{ {', '.join(parts)} }}"


if __name__ == "__main__":
    sys.exit(main())

"""An engine runs under the layout that the command proposes; what is set stays, and what cannot be is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from engines.interface import LoadError
from engines.megatron import planning
from engines.megatron.constraints import Layout
from engines.megatron.cost_table import QWEN3_8B, QWEN3_235B
from engines.megatron.layout import GIB, main
from engines.megatron.options import MegatronOptions, read_options
from engines.megatron.planning import Plan, plan
from engines.megatron.shapes import ModelShape, parse_shape
from tests.megatron.shapes import encoded


def planned(shape: ModelShape, **options: Any) -> Plan:
    """For options as they stand in a settings file."""
    return plan(read_options({"device": "cpu", **options}), shape)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"devices": 4, "device_memory_gib": 1.0}),
    ("qwen3", {"devices": 4, "device_memory_gib": 0.055}),
    ("qwen3", {"devices": 4, "device_memory_gib": 0.04}),
    ("qwen3", {"devices": 1, "device_memory_gib": 0.055}),
    ("qwen3", {"devices": 4, "device_memory_gib": 1.0, "pipeline": 2}),
    ("qwen3_moe", {"devices": 8, "device_memory_gib": 0.05}),
    ("qwen3", {"devices": 4, "device_memory_gib": 0.001, "tensor": 2, "pipeline": 2, "recompute": False}),
    ("qwen3", {"devices": 2, "device_memory_gib": 1.0, "sequence": False, "tensor": 2}),
]


@pytest.mark.parametrize(("family", "options"), CASES, ids=str)
def test_the_command_and_the_engine_give_the_same_answer(
    family: str, options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes(encoded(family))
    told = [str(tmp_path), "--float32", "--devices", str(options["devices"])]
    told += ["--memory-gib", str(options["device_memory_gib"])]
    for name in ("tensor", "pipeline"):
        told += [f"--{name}", str(options[name])] if name in options else []
    for name in ("sequence", "recompute"):
        told += [f"--no-{name}"] if name in options else []
    assert main(told) == 0
    settings, reason = capsys.readouterr().out.splitlines()
    found = planned(parse_shape(encoded(family)), **options)
    assert found.parts == tomllib.loads(settings)["options"]
    assert found.reason == reason
    assert found.devices == [torch.device("cpu")] * options["devices"]


def test_the_cases_are_different_answers() -> None:
    answers = {str(planned(parse_shape(encoded(family)), **options).parts) for family, options in CASES}
    assert len(answers) == len(CASES)


def test_where_too_little_is_open_the_layout_is_refused_or_told() -> None:
    """Memory that lacks refuses a start, unless somebody has decided how the model is cut."""
    tight: dict[str, Any] = {"devices": 4, "device_memory_gib": 0.001}
    shape = parse_shape(encoded("qwen3"))
    with pytest.raises(LoadError, match="no layout fits"):
        planned(shape, **tight)
    with pytest.raises(LoadError, match="no layout fits"):
        planned(shape, **tight, tensor=2, pipeline=2)
    assert "it was asked for" in planned(shape, **tight, tensor=2, pipeline=2, recompute=True).reason


def test_processors_are_as_many_as_the_parts_ask_for() -> None:
    shape = parse_shape(encoded("qwen3"))
    assert planned(shape).parts["data"] == 1 and len(planned(shape).devices) == 1
    found = planned(shape, tensor=2, data=3)
    assert len(found.devices) == 6
    assert found.decided(MegatronOptions(tensor=2, data=3)).layout == Layout(tensor=2, data=3, sequence=True)
    assert found.reason.startswith("tensor 2, data 3, sequence parallel needs ")


@pytest.fixture
def four_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA devices of 80 GiB, but for the last."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    sizes = [80 * GIB, 80 * GIB, 80 * GIB, 40 * GIB]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda number: SimpleNamespace(total_memory=sizes[number])
    )


@pytest.mark.usefixtures("four_devices")
def test_all_devices_there_are_take_part_and_the_smallest_counts() -> None:
    found = plan(MegatronOptions(), QWEN3_8B)
    assert found.devices == [torch.device("cuda", number) for number in range(4)]
    assert found.parts["data"] == 4 and " of 40 GiB on a device" in found.reason
    fewer = plan(MegatronOptions(devices=3, device_memory_gib=24), QWEN3_8B)
    assert len(fewer.devices) == 3 and " of 24 GiB on a device" in fewer.reason
    wide = plan(MegatronOptions(devices=3, dtype="float32"), QWEN3_8B)
    assert "weights 30.5 GiB" in wide.reason and "weights 15.3 GiB" in found.reason
    assert plan(MegatronOptions(tensor=2), QWEN3_8B).decided(MegatronOptions()).layout.data == 2


@pytest.mark.usefixtures("four_devices")
def test_what_the_machine_cannot_do_is_refused_by_its_reason() -> None:
    with pytest.raises(LoadError, match=r"5 CUDA devices are wanted \(options.devices\), this machine has 4"):
        plan(MegatronOptions(devices=5), QWEN3_8B)
    with pytest.raises(LoadError, match=r"tensor 8 × .* are 8 ranks, but there are 4 devices"):
        plan(MegatronOptions(tensor=8), QWEN3_8B)
    with pytest.raises(LoadError, match=r"no layout fits: .* needs .* GiB on a device"):
        plan(MegatronOptions(), QWEN3_235B)


def test_a_machine_without_devices_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LoadError, match=r"1 CUDA devices are wanted .* this machine has 0"):
        plan(MegatronOptions(device="cuda"), QWEN3_8B)
    assert planning.device_kind(MegatronOptions()) == "cpu"


@pytest.mark.parametrize("memory", [0.0, -1.0])
def test_memory_is_more_than_none(memory: float) -> None:
    with pytest.raises(LoadError, match=r"options\.device_memory_gib is .*; it must be above 0"):
        read_options({"device_memory_gib": memory})


def test_a_plan_leaves_nothing_open() -> None:
    shape = parse_shape(encoded("qwen3"))
    decided = msgspec.structs.asdict(planned(shape, devices=2).decided(MegatronOptions()))
    assert all(decided[name] is not None for name in planned(shape).parts)

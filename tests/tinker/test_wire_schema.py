"""The protobuf schema: generated code is what the schema says, and its field numbers are the SDK's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from tinker.proto import tinker_public_pb2 as sdk_wire

from gateway.tinker import wire_pb2 as wire

ROOT = Path(__file__).parents[2]
PROTO = "gateway/tinker/wire.proto"


def test_the_generated_files_are_what_the_documented_command_makes(tmp_path: Path) -> None:
    command = (ROOT / PROTO).read_text().splitlines()[1].partition("python ")[2].split()
    assert command[:2] == ["-m", "grpc_tools.protoc"]
    command = [argument.replace("out=.", f"out={tmp_path}") for argument in command]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, timeout=60)
    for name in ("wire_pb2.py", "wire_pb2.pyi"):
        made = (tmp_path / "gateway/tinker" / name).read_text()
        assert made == (ROOT / "gateway/tinker" / name).read_text()


def _form(field: FieldDescriptor) -> tuple[int, int, bool, str | None]:
    """What of a field travels, and what decides how it is read."""
    entry = field.message_type is not None and field.message_type.GetOptions().map_entry
    return field.number, field.type, field.is_repeated, "map" if entry else None


def _pairs(ours: Descriptor, theirs: Descriptor, found: dict[str, tuple[Descriptor, Descriptor]]) -> None:
    if ours.full_name in found:
        return
    found[ours.full_name] = (ours, theirs)
    numbers = {field.number: field for field in theirs.fields}
    for field in ours.fields:
        other = numbers[field.number]
        if field.message_type is not None and other.message_type is not None:
            _pairs(field.message_type, other.message_type, found)


@pytest.mark.parametrize("root", ["ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"])
def test_every_field_has_the_number_and_the_type_that_the_sdk_gives_it(root: str) -> None:
    found: dict[str, tuple[Descriptor, Descriptor]] = {}
    _pairs(
        wire.DESCRIPTOR.message_types_by_name[root], sdk_wire.DESCRIPTOR.message_types_by_name[root], found
    )
    assert len(found) > 2
    for ours, theirs in found.values():
        forms = {field.number: _form(field) for field in theirs.fields}
        for field in ours.fields:
            assert _form(field) == forms[field.number], f"{ours.full_name}.{field.name}"


def _values(descriptor: EnumDescriptor) -> set[int]:
    return {value.number for value in descriptor.values}


def test_enums_have_the_same_numbers() -> None:
    ours = {**dict(wire.DType.items()), **dict(wire.StopReason.items())}
    theirs = {**dict(sdk_wire.DType.items()), **dict(sdk_wire.StopReason.items())}
    for name, number in ours.items():
        assert theirs[name if name in theirs else f"STOP_REASON_{name}"] == number
    for name in ("DType", "StopReason"):
        known = _values(wire.DESCRIPTOR.enum_types_by_name[name])
        assert known == _values(sdk_wire.DESCRIPTOR.enum_types_by_name[name])


def test_every_request_field_of_the_sdk_is_known() -> None:
    """The SDK that is installed sends nothing that would be refused as unknown."""
    found: dict[str, tuple[Descriptor, Descriptor]] = {}
    root = "ForwardBackwardRequest"
    _pairs(
        wire.DESCRIPTOR.message_types_by_name[root], sdk_wire.DESCRIPTOR.message_types_by_name[root], found
    )
    for ours, theirs in found.values():
        assert {field.number for field in theirs.fields} == {field.number for field in ours.fields}

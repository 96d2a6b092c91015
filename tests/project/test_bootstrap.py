"""The set-up scripts: what they install where, and what they say when they cannot."""

from __future__ import annotations

import ast
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

import bootstrap
from tests.project.source import ROOT

SCRIPTS = ("bootstrap.py", "check.py", "quickstart.py")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of its own for the scripts to install into; nothing in it is installed."""
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    (tmp_path / "constraints.txt").write_text("torch==2.13.0\nother-torch==1\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(bootstrap, "PYTHON", tmp_path / ".venv" / "bin" / "python")
    monkeypatch.setattr(bootstrap, "STAMP", tmp_path / ".venv" / "stamp.json")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", tmp_path / "constraints.txt")
    return tmp_path


@pytest.fixture
def installed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be installed, in order; the virtual environment is a link to this interpreter."""
    names: list[str] = []
    monkeypatch.setattr(
        bootstrap, "_make_venv", lambda: (tree / ".venv/bin/python").symlink_to(sys.executable)
    )
    monkeypatch.setattr(bootstrap, "_install_torch", lambda: names.append("torch"))
    monkeypatch.setattr(
        bootstrap, "_pip", lambda title, arguments: names.append(arguments[-1].removeprefix(str(tree)))
    )
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_needs_only_the_standard_library(script: str) -> None:
    allowed = {*sys.stdlib_module_names, "bootstrap"}
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= allowed


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_older_python_is_told_what_is_needed(script: str) -> None:
    ast.parse((ROOT / script).read_text(), feature_version=(3, 8))  # else it would see a syntax error instead
    pretend = f"import sys; sys.version_info = (3, 9, 1, 'final', 0); sys.argv = ['x']; import {script[:-3]}"
    done = subprocess.run(
        [sys.executable, "-c", pretend], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Tandem needs Python 3.11 or newer; this is Python 3.9")


def test_the_second_call_installs_nothing(installed: list[str]) -> None:
    bootstrap.install(frozenset({"hf", "sdk"}))
    assert installed == ["torch", "[hf,sdk]"]
    bootstrap.install(frozenset({"sdk"}))
    assert installed == ["torch", "[hf,sdk]"]


def test_a_changed_declaration_or_another_extra_is_installed(
    tree: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bootstrap.install(frozenset({"sdk"}))
    monkeypatch.setattr(bootstrap, "_make_venv", lambda: None)
    bootstrap.install(frozenset({"dev"}))
    (tree / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    bootstrap.install(frozenset({"sdk"}))
    assert installed == ["[sdk]", "[dev,sdk]", "[dev,sdk]"]


def test_a_broken_installation_is_not_taken_for_a_whole_one(
    tree: Path, installed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(title: str, arguments: list[str]) -> None:
        raise bootstrap.InstallError("no network")

    bootstrap.install(frozenset({"sdk"}))
    monkeypatch.setattr(bootstrap, "_make_venv", lambda: None)
    with monkeypatch.context() as broken:
        broken.setattr(bootstrap, "_pip", fail)
        with pytest.raises(bootstrap.InstallError):
            bootstrap.install(frozenset({"dev"}))
    bootstrap.install(frozenset({"sdk"}))
    assert installed == ["[sdk]", "[sdk]"]


def test_a_damaged_stamp_counts_as_none(tree: Path, installed: list[str]) -> None:
    bootstrap.STAMP.write_text("{")
    bootstrap.install(frozenset({"sdk"}))
    assert installed == ["[sdk]"]
    assert json.loads(bootstrap.STAMP.read_text())["extras"] == ["sdk"]


def test_a_machine_without_gpu_gets_the_build_for_cpus_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    assert bootstrap.torch_attempts("2.13.0") == [
        ["torch==2.13.0+cpu"],
        ["torch==2.13.0+cpu", "--extra-index-url", "https://download.pytorch.org/whl/cpu"],
        ["torch==2.13.0"],
    ]


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_a_gpu_or_a_mac_gets_the_general_build(
    monkeypatch: pytest.MonkeyPatch, system: str, gpu: bool
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: gpu)
    assert bootstrap.torch_attempts("2.13.0") == [["torch==2.13.0"]]


def test_torch_is_asked_for_until_one_source_has_it(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def only_the_index_has_it(title: str, arguments: list[str]) -> None:
        asked.append(title)
        if bootstrap.TORCH_CPU_INDEX not in arguments:
            raise bootstrap.InstallError("not found")

    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(bootstrap, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(bootstrap, "_answer", lambda python, script: "")
    monkeypatch.setattr(bootstrap, "_pip", only_the_index_has_it)
    bootstrap._install_torch()
    build = "torch 2.13.0, the build for CPUs, from"
    assert asked == [f"{build} pip's sources", f"{build} PyTorch's index"]


@pytest.mark.parametrize("present", ["2.13.0", "2.13.0+cpu"])
def test_a_torch_that_is_there_stays(tree: Path, monkeypatch: pytest.MonkeyPatch, present: str) -> None:
    monkeypatch.setattr(bootstrap, "_answer", lambda python, script: present)
    monkeypatch.setattr(bootstrap, "_pip", lambda title, arguments: pytest.fail(f"installs {title}"))
    bootstrap._install_torch()


@pytest.mark.parametrize(
    ("script", "expected"),
    [("echo 'GPU 0: NVIDIA H200'", True), ("echo 'No devices were found'", False), ("exit 9", False)],
)
def test_a_gpu_is_one_that_the_driver_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: bool
) -> None:
    if Path("/proc/driver/nvidia/version").exists():
        assert bootstrap.has_nvidia_gpu()
        return
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert bootstrap.has_nvidia_gpu() is expected


def test_a_version_comes_from_the_constraints(tree: Path) -> None:
    assert bootstrap.pinned_version("torch") == "2.13.0"
    with pytest.raises(bootstrap.InstallError, match=r"constraints\.txt has no line for numpy"):
        bootstrap.pinned_version("numpy")


def test_a_failing_tool_is_quoted(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = bootstrap._Step("the impossible")
    with pytest.raises(bootstrap.InstallError, match=r"(?s)install the impossible.*line 1\n.*line 2"):
        step.run([sys.executable, "-c", "print('line 1'); print('line 2'); raise SystemExit(3)"])
    assert "the impossible: not installed" in capsys.readouterr().out


def test_a_programs_environment_leads_to_no_other_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("NO_PROXY", "example.org")
    found = bootstrap.environment(TANDEM_DATA_DIR="here")
    assert "PYTHONPATH" not in found
    assert found["TANDEM_DATA_DIR"] == "here"
    assert found["NO_PROXY"] == found["no_proxy"] == "example.org,127.0.0.1,localhost"

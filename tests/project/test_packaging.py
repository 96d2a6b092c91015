"""What is declared is what is there: versions, entry points, and the files that an installation needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engines.interface import Engine
from tests.project.source import ROOT, files


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared: dict[str, Any] = tomllib.load(file)["project"]
    return declared


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=folder)
    return next(folder.glob("*.whl"))


def test_every_declared_package_has_a_version_that_was_tested(project: dict[str, Any]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {
        canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)
    }
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *(text for extra in extras.values() for text in extra)]:
        wanted = Requirement(text)
        version = versions.get(canonicalize_name(wanted.name))
        assert version is not None, f"constraints.txt lacks {wanted.name}"
        assert wanted.specifier.contains(version), (
            f"{text} does not allow {version}, which constraints.txt names"
        )


def test_entry_points_are_engines(project: dict[str, Any]) -> None:
    declared = project["entry-points"]["tandem.engines"]
    found = {entry.name: entry for entry in entry_points(group="tandem.engines")}
    assert set(declared) <= set(found), "install the tree again: python3 check.py"
    for name in declared:
        assert issubclass(found[name].load(), Engine)


def test_the_wheel_holds_all_that_runs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    expected = {path for path in files() if path.split("/")[0] in {"engines", "gateway", "migrations", "sdk"}}
    assert expected - held == set()
    assert {"migrations/env.py", "engines/tiny/model/model.safetensors"} <= held
    assert {path.split("/")[0] for path in held if ".dist-info" not in path} == {
        "engines",
        "gateway",
        "migrations",
        "sdk",
    }


def test_an_installation_can_make_its_database(wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    environment = {**os.environ, "PYTHONPATH": str(place), "TANDEM_DATA_DIR": str(tmp_path / "data")}
    where = "import gateway, runpy; print(gateway.__file__); runpy.run_module('gateway.migrate', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(str(place))
    assert (tmp_path / "data" / "tandem.db").exists()


def test_the_changelog_knows_this_version(project: dict[str, Any]) -> None:
    version = re.sub(r"\.dev\d+$", "", project["version"])
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {version}" in text or ("## Unreleased" in text and version != project["version"])

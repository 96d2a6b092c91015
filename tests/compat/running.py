"""Runs the calls of SDK versions against a served gateway, each version in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx

from tests.compat.environments import site_of
from tests.served import ServedGateway

BASE_MODEL = "fake/model"
ROOT = Path(__file__).parents[2]
_LONGEST_S = 1200


@dataclass(frozen=True)
class Report:
    """What came of one version: for each name of its surface the problem, or None where all is well; and which fail
    by the SDK's own fault."""

    sdk: str
    problems: dict[str, str | None]
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> dict[str, str]:
        return {name: problem for name, problem in self.problems.items() if problem is not None}


class ProbeError(Exception):
    """The calls of a version could not be made to their end."""


@contextmanager
def serving(folder: Path) -> Iterator[ServedGateway]:
    """A gateway with the numpy engine."""
    gateway = ServedGateway(folder / "gateway")
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()
        gateway.close()


def report_of(
    sdk: str, gateway: ServedGateway, folder: Path, told: Callable[[str], None] = lambda name: None
) -> Report:
    """Call everything that a version offers, as an owner of its own. Raises InstallError and ProbeError."""
    site = site_of(sdk)
    key = gateway.add_key(f"user of {sdk}")
    home = folder / f"sdk-{sdk}"
    home.mkdir(parents=True)
    _put_tokenizer(gateway.url, key, home)
    output = home / "calls.jsonl"
    command = [sys.executable, "-m", "tests.compat.probe", gateway.url, key, BASE_MODEL, str(output)]
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=home,
            env=environment(site, gateway.url, key, home),
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
        try:
            _follow(process, output, told)
        finally:
            process.kill()
            process.wait()
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    problems = {line["name"]: line["problem"] for line in lines[1:]}
    if process.returncode != 0 or not lines or list(problems) != lines[0]["surface"]:
        raise ProbeError(f"tinker {sdk}: {(home / 'log').read_text()[-3000:]}")
    return Report(sdk, problems, {line["name"]: line["broken"] for line in lines[1:] if line["broken"]})


def reports_of(
    sdks: list[str], gateway: ServedGateway, folder: Path, *, at_once: int, told: Callable[[str, str], None]
) -> list[Report]:
    """Several versions, some at once; in the order given."""
    with ThreadPoolExecutor(at_once) as pool:
        jobs = {pool.submit(report_of, sdk, gateway, folder, partial(told, sdk)): sdk for sdk in sdks}
        found = {jobs[job]: job.result() for job in as_completed(jobs)}
    return [found[sdk] for sdk in sdks]


def _follow(process: subprocess.Popen[bytes], output: Path, told: Callable[[str], None]) -> None:
    """Pass on each name as its call ends."""
    seen = 0
    for _ in range(_LONGEST_S * 5):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        lines = output.read_text().splitlines() if output.exists() else []
        for line in lines[max(seen, 1) :]:
            told(str(json.loads(line).get("name", "")))
        seen = len(lines)
        if process.returncode is not None:
            return


def environment(site: Path, url: str, key: str, home: Path) -> dict[str, str]:
    """The variables of a process that uses a version's package folder and this gateway."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TINKER_", "HF_"))}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join((str(site), str(ROOT))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": key,
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "400",
    }


def _put_tokenizer(url: str, key: str, home: Path) -> None:
    """The served model's tokenizer, where the SDK's `AutoTokenizer` looks for a model of that name: a folder."""
    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=60) as http:
        described = http.get("/api/v1/tokenizer", params={"model": BASE_MODEL}).raise_for_status().json()
        target = home / BASE_MODEL
        target.mkdir(parents=True)
        for name in described["files"]:
            content = (
                http.get(f"/api/v1/tokenizer/{name}", params={"model": BASE_MODEL}).raise_for_status().content
            )
            (target / name).write_bytes(content)

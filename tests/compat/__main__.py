"""Writes docs/compatibility.md: `python -m tests.compat`.

With `--versions 0.3.0,0.38.0` only these are called and nothing is written; `--details` prints what each failed call
said.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tests.compat.environments import VERSIONS
from tests.compat.running import ROOT, Report, reports_of, serving
from tests.compat.table import page

PAGE = ROOT / "docs" / "compatibility.md"
_USUAL = 130
"""Calls of a version, about: for the progress bar."""


def main() -> int:
    """Run; the exit code is 1 when a call failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.compat", description=__doc__)
    parser.add_argument("--versions", help="only these, separated by commas; nothing is written")
    parser.add_argument("--at-once", type=int, default=2, help="how many versions run at the same time")
    parser.add_argument("--details", action="store_true", help="print the problem of each call that failed")
    options = parser.parse_args()
    versions = options.versions.split(",") if options.versions else list(VERSIONS)
    reports = _run(versions, options.at_once)
    if options.versions is None:
        PAGE.write_text(page(reports))
    for report in reports:
        print(f"{report.sdk:8}{len(report.problems):4} calls, {len(report.failed)} failed")
        for name, problem in report.failed.items() if options.details else ():
            print(f"    {name}: {problem}")
    return int(any(report.failed for report in reports))


def _run(versions: list[str], at_once: int) -> list[Report]:
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(Path(folder)) as gateway,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("starting", total=_USUAL * len(versions))

        def told(sdk: str, name: str) -> None:
            progress.update(task, advance=1, description=f"{sdk} {name}"[:40])

        return reports_of(versions, gateway, Path(folder), at_once=at_once, told=told)


if __name__ == "__main__":
    sys.exit(main())

"""Six generations of the SDK: what docs/compatibility.md says of them holds. `python -m tests.compat` calls all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.compat.environments import TESTED, VERSIONS
from tests.compat.running import ROOT, report_of, serving
from tests.compat.table import ABSENT, BROKEN, FAIL
from tests.served import ServedGateway

PAGE = ROOT / "docs" / "compatibility.md"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    with serving(tmp_path_factory.mktemp("compat")) as served:
        yield served


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sdk", TESTED)
def test_what_the_page_says_of_a_version_works(sdk: str, gateway: ServedGateway, tmp_path: Path) -> None:
    report = report_of(sdk, gateway, tmp_path)
    cells = {name: row[VERSIONS.index(sdk)] for name, row in _rows().items()}
    assert {name for name, cell in cells.items() if cell != ABSENT} == set(report.problems)
    assert report.failed == {}
    assert {name for name, cell in cells.items() if cell == BROKEN} == set(report.broken)


def test_the_page_has_every_version() -> None:
    heads = [line for line in PAGE.read_text().splitlines() if line.startswith("| |")]
    assert {_cells(line) for line in heads} == {("", *VERSIONS)}
    assert set(TESTED) <= set(VERSIONS)


def test_nothing_fails() -> None:
    assert [name for name, cells in _rows().items() if FAIL in cells] == []


def _rows() -> dict[str, tuple[str, ...]]:
    """The cells of each method."""
    rows = [_cells(line) for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return {name.strip("`"): tuple(cells) for name, *cells in rows}


def _cells(line: str) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in line.strip("|").split("|"))

"""check.py: every check runs, and one that fails is not overlooked."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import bootstrap
import check
from tests.project.source import ROOT

PASSES = ["-c", "print('all is well')"]
AGAIN = dict(check.AGAIN)
FAILS = ["-c", "print('line 3: not well'); print(); raise SystemExit(4)"]


@pytest.fixture(autouse=True)
def _prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is installed; the checks are run by this interpreter."""
    monkeypatch.setattr(check, "_prepare", lambda: Path(sys.executable))
    monkeypatch.setattr(check, "AGAIN", {})


def test_all_passing_is_success(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "CHECKS", {"lint": PASSES, "types": PASSES})
    assert check.main([]) == 0
    printed = capfd.readouterr().out
    assert printed.count("passed") == 2
    assert "FAILED" not in printed


def test_a_failure_is_shown_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CHECKS", {"lint": FAILS, "types": PASSES})
    assert check.main([]) == 1
    summary = capfd.readouterr().out.partition("── summary")[2].splitlines()
    assert summary[1].startswith("lint    FAILED")
    assert summary[1].endswith("line 3: not well")
    assert summary[2].startswith("types   passed")


def test_failed_tests_have_one_more_chance_and_the_summary_says_so(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CHECKS", {"tests": FAILS})
    for again, code in ((PASSES, 0), (FAILS, 1)):
        monkeypatch.setattr(check, "AGAIN", {"tests": again})
        assert check.main([]) == code
        summary = capfd.readouterr().out.partition("── summary")[2]
        assert "(second attempt; first: line 3: not well)" in summary


def test_the_second_chance_is_for_what_has_failed_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the real pytest: one test passes, one fails at the first attempt; each is seen to run or not."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    (tmp_path / "test_two.py").write_text(
        "from pathlib import Path\n"
        "def test_well(): Path('well').open('a').write('.')\n"
        "def test_weak():\n"
        "    Path('weak').open('a').write('.')\n"
        "    assert Path('weak').read_text() == '..'\n"
    )
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(check, "AGAIN", {"tests": AGAIN["tests"]})
    assert check.main(["tests"]) == 0
    assert "1 passed" in capfd.readouterr().out.partition("── summary")[2]
    assert [(tmp_path / name).read_text() for name in ("well", "weak")] == [".", ".."]


def test_only_what_is_named_runs(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "CHECKS", {"lint": FAILS, "types": PASSES})
    assert check.main(["types"]) == 0
    assert "lint" not in capfd.readouterr().out


def test_quick_leaves_out_the_matrix(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check, "CHECKS", {"tests": PASSES, "matrix": FAILS})
    assert check.main(["--quick"]) == 0
    assert "matrix" not in capfd.readouterr().out
    assert check.main([]) == 1


def test_every_test_is_in_one_of_the_two() -> None:
    chosen = [check.CHECKS[name][-2:] for name in ("tests", "matrix")]
    assert chosen == [["-m", "not slow"], ["-m", "slow"]]


def test_an_unknown_check_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        check.main(["typos"])
    assert refusal.value.code == 2
    assert (
        "no such check: typos; there are lint, format, types, layers, tests, matrix"
        in capsys.readouterr().err
    )


def test_a_failed_installation_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Path:
        raise bootstrap.InstallError("Could not install torch.")

    monkeypatch.setattr(check, "_prepare", fail)
    assert check.main([]) == 1
    assert capsys.readouterr().out.strip() == "Could not install torch."


def test_continuous_integration_runs_it() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert 'exec python3 check.py "$@" </dev/null' in script.read_text()

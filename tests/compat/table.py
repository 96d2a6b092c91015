"""The page with the table: rows are methods, columns are versions."""

from __future__ import annotations

from tests.compat.running import Report

PASS, FAIL, ABSENT, BROKEN = "✓", "**fail**", "·", "§"
_HEAD = """\
# Compatibility

Written by `.venv/bin/python -m tests.compat`, which installs each version of the official `tinker` SDK, finds its
public methods by looking at its classes, and calls every one of them against a served gateway (numpy engine), judging
what comes back: numbers, listings, files. A method without such a call stops the writing.

✓ works · **fail** does not · `·` this SDK has no such method · § fails by that SDK's own fault, whatever a server
answers, and works with the fault repaired; below the tables is why
"""


def page(reports: list[Report]) -> str:
    """Markdown."""
    names = {name for report in reports for name in report.problems}
    groups: dict[str, list[str]] = {}
    for name in sorted(names, key=_order):
        groups.setdefault(_owner(name), []).append(name)
    failed = sum(len(report.failed) for report in reports)
    calls = sum(len(report.problems) for report in reports)
    broken = sum(len(report.broken) for report in reports)
    works = f"{calls - failed - broken} of {calls} calls work"
    sections = [_HEAD, f"{works}, {broken} cannot; {len(names)} methods of {len(reports)} versions.\n"]
    for owner, entries in groups.items():
        sections.append(f"## {owner}\n")
        sections.append(_table(entries, reports))
    reasons = {f"`{name}`: {reason}" for report in reports for name, reason in report.broken.items()}
    if reasons:
        sections += ["## § Faults of SDKs\n", *(f"* {reason}" for reason in sorted(reasons)), ""]
    return "\n".join(sections)


def _owner(name: str) -> str:
    """The class of a method; the command line is one group."""
    if name.startswith("tinker "):
        return "Command line"
    if name.startswith("tinker.auth."):
        return "tinker.auth"
    return name.split(" ")[-1].split(".")[0].removesuffix("()")


def _order(name: str) -> tuple[str, str]:
    return _owner(name).lower(), name


def _table(names: list[str], reports: list[Report]) -> str:
    head = "| | " + " | ".join(report.sdk for report in reports) + " |"
    rule = "|---|" + ":-:|" * len(reports)
    rows = [f"| `{name}` | " + " | ".join(_cell(report, name) for report in reports) + " |" for name in names]
    return "\n".join([head, rule, *rows]) + "\n"


def _cell(report: Report, name: str) -> str:
    if name not in report.problems:
        return ABSENT
    if name in report.broken:
        return BROKEN
    return PASS if report.problems[name] is None else FAIL

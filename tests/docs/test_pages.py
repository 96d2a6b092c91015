"""Links lead somewhere, commands exist, and every route, verb and error is described."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from engines.interface import Engine
from gateway.app import create_app
from sdk.cli import main
from tests.docs.pages import PAGES, ROOT, anchors, blocks, links, page, rows

NAMES = [path.name for path in PAGES]
FOREIGN = ("git", "cd", "pip", "export", "sqlite3", "rsync", "pg_dump", "pg_restore", "{")
"""First words of commands that are not ours."""


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    missing = [target for target in links(text) if not (path.parent / target).exists()]
    assert missing == []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", text):
        if "://" not in target:
            aim = path.parent / target if target else path
            assert anchor in anchors(aim.read_text()), f"{target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_files_that_are_named_exist(path: Path) -> None:
    named = re.findall(
        r"(?<![\w/.-])(?:gateway|engines|sdk|tests|docs|migrations|cookbook|benchmarks)/[\w/.]*\w",
        path.read_text(),
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("path", PAGES, ids=NAMES)
def test_commands_exist(path: Path) -> None:
    """Those of blocks without a language and of shell blocks."""
    text = path.read_text()
    for block in [*blocks(text, ""), *blocks(text, "sh")]:
        for line in _commands(block):
            _check_command(line)


def _commands(block: str) -> list[str]:
    """Lines that a shell would run; diagrams and help texts are none."""
    starts = (".venv/bin/", "python3 ", "tandem ", *(f"{word} " for word in FOREIGN))
    joined = [part.strip() for line in block.splitlines() for part in line.split("&&")]
    return [line for line in joined if line.startswith(starts)]


def _check_command(line: str) -> None:
    words = shlex.split(re.split(r"  +", line)[0], comments=True)
    program, arguments = words[0], words[1:]
    if program in FOREIGN:
        return
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    tool = Path(program).name
    if tool in ("python", "python3"):
        _check_python(arguments, line)
    elif tool in scripts:
        _check_tandem(arguments, line)
    else:
        assert tool in ("uvicorn", "pytest", "pip", "ray"), line
        if tool == "ray":
            assert arguments[0] in ("start", "get-auth-token"), line  # tests/on_ray/test_page.py runs them
        if tool == "uvicorn":
            module, _, name = arguments[0].partition(":")
            assert hasattr(importlib.import_module(module), name), line
        if tool == "pytest":
            assert (ROOT / arguments[0]).exists(), line


def _check_python(arguments: list[str], line: str) -> None:
    if arguments[0] == "-m":
        source = ROOT / Path(*arguments[1].split("."))
        assert source.with_suffix(".py").exists() or (source / "__main__.py").exists(), line
    else:
        assert (ROOT / arguments[0]).is_file(), line


def _check_tandem(arguments: list[str], line: str) -> None:
    commands = main.commands
    assert arguments[0] in commands, line
    inner = getattr(commands[arguments[0]], "commands", {})
    if len(arguments) > 1 and arguments[1].islower() and inner:
        assert arguments[1] in inner, line


def test_wrong_commands_would_be_found() -> None:
    for line in (
        "tandem dance",
        "python3 no_such.py",
        ".venv/bin/python -m gateway.nothing",
        ".venv/bin/pytest tests/x",
    ):
        with pytest.raises(AssertionError):
            _check_command(line)
    assert _commands("official SDK ─► gateway\npython3 check.py && tandem runs") == [
        "python3 check.py",
        "tandem runs",
    ]


def test_every_route_is_described() -> None:
    """As `METHOD /path`; a table's cell may name several methods of a path."""
    everything = "\n".join(path.read_text() for path in PAGES)
    missing = []
    for path, methods in create_app().openapi()["paths"].items():
        for method in methods:
            stands = re.search(
                rf"\b{method.upper()}\b[`, A-Z]*\s`?{re.escape(path)}(?![\w/{{])",
                everything.replace("{model:path}", "{model}"),
            )
            if stands is None:
                missing.append(f"{method.upper()} {path}")
    assert missing == []


def test_no_route_is_described_that_is_not_there() -> None:
    paths = {re.sub(r"{\w+}", "{}", path) for path in create_app().openapi()["paths"]}
    for name in ("tinker.md", "openai.md", "admin.md", "operations.md"):
        for path in re.findall(r"(?:GET|POST|PUT|DELETE) (/[\w/{}.]+)", page(name)):
            assert re.sub(r"{\w+}", "{}", path) in paths, f"{path} in {name}"


def test_every_verb_of_an_engine_is_described() -> None:
    verbs = {row[0] for row in rows(page("engines.md"))}
    assert verbs == set(Engine.__abstractmethods__)


def test_every_page_is_reached_from_the_readme() -> None:
    reached = {ROOT / "README.md"}
    waiting = [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        for target in links(path.read_text()):
            found = (path.parent / target).resolve()
            if found.suffix == ".md" and found.is_file() and found not in reached:
                reached.add(found)
                waiting.append(found)
    assert {path.name for path in PAGES} <= {path.name for path in reached}

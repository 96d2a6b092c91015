"""Sizes: what a reader can take in. The limits hold everywhere; what needs more is recorded here with its reason."""

from __future__ import annotations

import pytest

from tests.project.source import Module, modules, product, suite

FILE_LINES = 450
FUNCTION_LINES = 60
NESTING = 4
RECIPE_LINES = 250

EXCEPTIONS = {
    "migrations/versions/0001_the_first_schema.py upgrade": "one table after another, without logic",
}
"""What may exceed a limit: the path of a file or `path name` of a function, and why it reads better so."""


def _allowed(where: str) -> bool:
    """`where` is a path, or `path:line name`."""
    path, _, rest = where.partition(":")
    name = rest.partition(" ")[2]
    return f"{path} {name}".strip() in EXCEPTIONS


def _long_files(found: tuple[Module, ...] | list[Module], limit: int) -> list[str]:
    return [f"{module.path}: {len(module.lines)}" for module in found if len(module.lines) > limit]


def test_no_file_is_longer_than_a_reader_scrolls() -> None:
    assert _long_files([module for module in modules() if not _allowed(module.path)], FILE_LINES) == []


def test_a_recipe_is_read_top_to_bottom() -> None:
    assert _long_files([module for module in modules() if module.package == "cookbook"], RECIPE_LINES) == []


def test_no_function_is_longer_than_a_screen() -> None:
    functions = [function for module in modules() for function in module.functions()]
    assert [
        f"{f.where}: {f.length}" for f in functions if f.length > FUNCTION_LINES and not _allowed(f.where)
    ] == []


def test_no_block_is_nested_too_deep() -> None:
    functions = [function for module in modules() for function in module.functions()]
    assert [
        f"{f.where}: {f.nesting}" for f in functions if f.nesting > NESTING and not _allowed(f.where)
    ] == []


def test_exceptions_are_still_needed() -> None:
    too_large = {module.path for module in modules() if len(module.lines) > FILE_LINES}
    for module in modules():
        for function in module.functions():
            if function.length > FUNCTION_LINES or function.nesting > NESTING:
                too_large.add(f"{module.path} {function.where.partition(' ')[2]}")
    assert set(EXCEPTIONS) - too_large == set()


def test_there_are_as_many_lines_of_tests_as_of_source() -> None:
    checking = sum(module.code_lines() for module in suite())
    source = sum(module.code_lines() for module in product())
    assert checking >= source, f"{checking} lines of tests for {source} lines of source"


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        ("x = 1", 0),
        ("if x:\n  pass\nelif y:\n  pass\nelse:\n  pass", 1),
        ("if x:\n  pass\nelif y:\n  for z in y:\n    pass", 2),
        ("for x in y:\n  with x:\n    pass\nelse:\n  if x:\n    while x:\n      pass", 3),
        ("try:\n  pass\nexcept KeyError:\n  if x:\n    pass\nfinally:\n  pass", 2),
        ("match x:\n  case 1:\n    if x:\n      pass", 2),
    ],
)
def test_nesting_is_counted_as_documented(body: str, depth: int) -> None:
    indented = "\n".join(f"  {line}" for line in body.splitlines())
    (function,) = Module("m.py", f"def f():\n{indented}\n").functions()
    assert function.nesting == depth


def test_lengths_leave_out_docstrings_and_comments() -> None:
    module = Module("m.py", 'def f():\n    """Two\n    lines."""\n    # why\n\n    return 1\n')
    (function,) = module.functions()
    assert function.length == 4
    assert module.code_lines() == 2

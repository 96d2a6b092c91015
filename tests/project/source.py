"""The project's own Python files, read once: what the tests of its limits and layers look at."""

from __future__ import annotations

import ast
import functools
import io
import subprocess
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRODUCT = ("gateway", "engines", "sdk", "cookbook", "bootstrap.py", "check.py", "quickstart.py")
CONTRACT = "engines/contract/"
"""The tests that every plugin must pass; they lie with the interface that they describe, for plugins elsewhere."""
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
_Block = (
    ast.If | ast.For | ast.AsyncFor | ast.While | ast.With | ast.AsyncWith | ast.Try | ast.TryStar | ast.Match
)


@dataclass(frozen=True)
class Function:
    """A function or method: its length in lines without its docstring, and how deep its blocks are nested."""

    where: str
    length: int
    nesting: int


@dataclass(frozen=True)
class Module:
    """One Python file. `path` is relative to the root, with slashes."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """Its syntax tree."""
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        """The dotted name it is imported by."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        """Its top-level folder; for a script at the root, its own path."""
        return self.path.split("/")[0]

    @property
    def lines(self) -> list[str]:
        """Its lines, as they stand."""
        return self.text.splitlines()

    def functions(self) -> Iterator[Function]:
        """Every function in it, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, FunctionNode):
                documented = _docstring(node)
                text = (
                    documented.end_lineno - documented.lineno + 1
                    if documented and documented.end_lineno
                    else 0
                )
                length = (node.end_lineno or node.lineno) - node.lineno + 1 - text
                yield Function(f"{self.path}:{node.lineno} {node.name}", length, _nesting(node.body))

    def code_lines(self) -> int:
        """Lines that hold code: not blank, no comment, no docstring."""
        layout = {
            tokenize.COMMENT,
            tokenize.NL,
            tokenize.NEWLINE,
            tokenize.INDENT,
            tokenize.DEDENT,
            tokenize.ENDMARKER,
        }
        numbers: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in layout:
                numbers.update(range(token.start[0], token.end[0] + 1))
        for node in ast.walk(self.tree):
            text = _docstring(node)
            if text is not None:
                numbers.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
        return len(numbers)


@functools.cache
def files() -> tuple[str, ...]:
    """Every file of the project: what git tracks, or would if it were added."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return tuple(sorted({path for path in listed if (ROOT / path).is_file()}))


@functools.cache
def modules() -> tuple[Module, ...]:
    """Every Python file but those that the protobuf compiler wrote."""
    paths = [path for path in files() if path.endswith(".py") and not path.endswith("_pb2.py")]
    return tuple(Module(path, (ROOT / path).read_text(encoding="utf-8")) for path in paths)


def product() -> list[Module]:
    """The modules that users run or import."""
    return [
        module for module in modules() if module.package in PRODUCT and not module.path.startswith(CONTRACT)
    ]


def suite() -> list[Module]:
    """The modules that test the others."""
    return [module for module in modules() if module.package == "tests" or module.path.startswith(CONTRACT)]


def _docstring(node: ast.AST) -> ast.Expr | None:
    if (
        not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        or not node.body
    ):
        return None
    first = node.body[0]
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        return first
    return None


def _nesting(body: list[ast.stmt]) -> int:
    """Depth of the deepest block; an `elif` is as deep as its `if`."""
    return max((_depth(statement) for statement in body if isinstance(statement, _Block)), default=0)


def _depth(block: _Block) -> int:
    arms: list[list[ast.stmt]] = []
    if isinstance(block, ast.Match):
        arms += [case.body for case in block.cases]
    else:
        arms.append(block.body)
    if isinstance(block, (ast.Try, ast.TryStar)):
        arms += [handler.body for handler in block.handlers] + [block.finalbody]
    otherwise = [] if isinstance(block, (ast.With, ast.AsyncWith, ast.Match)) else block.orelse
    if isinstance(block, ast.If) and len(otherwise) == 1 and isinstance(otherwise[0], ast.If):
        return max(_depth(otherwise[0]), *(1 + _nesting(arm) for arm in arms))
    return 1 + max(_nesting(arm) for arm in [*arms, otherwise])

"""Habits that a machine can check: where errors end, where the environment is read, where a transaction ends."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.project.source import ROOT, Module, files, modules, product

VAGUE = ("utils", "helper", "misc", "common", "manager", "handler")
"""Words that say nothing about what a module or class is."""
# In two parts, so that this file does not hold what it looks for.
MACHINE_PATHS = re.compile(
    r"(?<![\w.:/~-])/(?:" + "|".join(("work", "farm", "root", "home", "Users")) + r")/[\w.]"
)


def unexplained_broad_excepts(module: Module) -> Iterator[str]:
    """Handlers of every error that neither pass it on nor say why they may end it.

    The reason stands on their line or the next: `# boundary: ` and what becomes of the error, or another reason of
    four words or more.
    """
    for node in ast.walk(module.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = {"BaseException"} if node.type is None else set(re.findall(r"\w+", ast.unparse(node.type)))
        passes_on = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        head = "\n".join(module.lines[node.lineno - 1 : max(node.lineno, node.body[0].lineno - 1)])
        explained = re.search(r"# *(?:boundary: \S+|(?:\S+ +){3}\S+)", head)
        if caught & {"Exception", "BaseException"} and not passes_on and not explained:
            yield f"{module.path}:{node.lineno}"


def silent_excepts(module: Module) -> Iterator[str]:
    """Handlers that do nothing at all and do not say why."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler) and all(isinstance(step, ast.Pass) for step in node.body):
            lines = module.lines[node.lineno - 1 : node.end_lineno]
            if not any("#" in line for line in lines):
                yield f"{module.path}:{node.lineno}"


def reads_environment(module: Module) -> bool:
    """Whether it uses `os.environ` or `os.getenv`, by whatever name."""
    words = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr in words and ast.unparse(node.value) == "os":
            return True
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and words & {alias.name for alias in node.names}
        ):
            return True
    return False


def commits(module: Module) -> Iterator[str]:
    """Calls of a `commit` method."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "commit":
            yield f"{module.path}:{node.lineno}"


def vague_names(module: Module) -> Iterator[str]:
    """Names of the module, its folders and its classes that hold a word of VAGUE."""
    classes = [node.name for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    for name in [*module.name.split("."), *classes]:
        if any(word in name.lower() for word in VAGUE):
            yield f"{module.path}: {name}"


def test_an_error_ends_silently_nowhere() -> None:
    assert [where for module in modules() for where in silent_excepts(module)] == []


def test_every_error_is_caught_at_boundaries_only() -> None:
    assert [where for module in modules() for where in unexplained_broad_excepts(module)] == []


def test_the_environment_is_read_in_one_file_of_each_package() -> None:
    readers = defaultdict(list)
    for module in product():
        if reads_environment(module):
            # The scripts at the root are one package here: they pass the environment on through bootstrap.py.
            readers["scripts" if module.path == module.package else module.package].append(module.path)
    assert {package: paths for package, paths in readers.items() if len(paths) > 1} == {}


def test_transactions_end_in_the_store_only() -> None:
    outside = [module for module in product() if not module.path.startswith("gateway/store/")]
    assert [where for module in outside for where in commits(module)] == []


def test_names_say_what_a_thing_is() -> None:
    assert [name for module in modules() for name in vague_names(module)] == []


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    found = []
    for path in files():
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights and other binary files
        found += [f"{path}: {match.group()}…" for match in MACHINE_PATHS.finditer(text)]
    assert found == []


def test_every_package_says_what_it_is() -> None:
    undocumented = [
        module.path for module in modules() if module.text.strip() and not ast.get_docstring(module.tree)
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    ("text", "unexplained", "silent"),
    [
        ("try:\n  f()\nexcept Exception:\n  g()", 1, 0),
        ("try:\n  f()\nexcept Exception:  # boundary: the caller is told\n  g()", 0, 0),
        ("try:\n  f()\nexcept Exception:\n  # boundary: the caller is told\n  g()", 0, 0),
        ("try:\n  f()\nexcept Exception:  # oh well\n  g()", 1, 0),
        ("try:\n  f()\nexcept (OSError, BaseException) as e:\n  g(e)", 1, 0),
        ("try:\n  f()\nexcept:\n  g()\n  raise", 0, 0),
        ("try:\n  f()\nexcept OSError:\n  pass", 0, 1),
        ("try:\n  f()\nexcept OSError:\n  pass  # it is gone already, which is what is wanted", 0, 0),
    ],
)
def test_excepts_are_judged_as_documented(text: str, unexplained: int, silent: int) -> None:
    module = Module("m.py", text)
    assert (len(list(unexplained_broad_excepts(module))), len(list(silent_excepts(module)))) == (
        unexplained,
        silent,
    )


def test_the_other_rules_can_fail() -> None:
    assert reads_environment(Module("m.py", "import os\nos.environ['A']"))
    assert reads_environment(Module("m.py", "from os import getenv"))
    assert not reads_environment(Module("m.py", "import os\nos.getpid()"))
    assert list(commits(Module("m.py", "connection.commit()"))) == ["m.py:1"]
    assert list(vague_names(Module("a/utils.py", "class JobManager: ..."))) == [
        "a/utils.py: utils",
        "a/utils.py: JobManager",
    ]
    assert MACHINE_PATHS.search("see " + "/ho" + "me/somebody")
    assert not MACHINE_PATHS.search("http://host/" + "wo" + "rk/x and ./ro" + "ot/x and /v1/models")

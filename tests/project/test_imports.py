"""Layers that import-linter cannot see: cycles closed by a late import, scripts, and what is loaded at run time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.project.imports import cycles, import_graph, imported_names
from tests.project.source import ROOT, Module, modules

HEAVY = {"accelerate", "megatron", "peft", "ray", "safetensors", "torch", "transformers", "vllm"}


def _loaded_by(statement: str) -> set[str]:
    """The top-level packages in memory after a statement, in an interpreter of its own."""
    script = (
        f"import json, sys; {statement}; print(json.dumps(sorted({{n.split('.')[0] for n in sys.modules}})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_no_modules_import_each_other() -> None:
    assert cycles(import_graph(modules())) == []


def test_a_recipe_knows_the_gateway_by_http_only() -> None:
    for module in modules():
        if module.package == "cookbook":
            packages = {name.split(".")[0] for name in imported_names(module)}
            assert packages.isdisjoint({"gateway", "engines", "tests", "benchmarks"}), module.path


def test_the_gateway_loads_no_machine_learning_library() -> None:
    assert _loaded_by("import gateway.app").isdisjoint(HEAVY)


def test_an_engine_host_needs_next_to_nothing() -> None:
    needed = {name for name in _loaded_by("import engines.host") if name not in sys.stdlib_module_names}
    foreign = HEAVY | {
        "alembic",
        "fastapi",
        "gateway",
        "pydantic",
        "sdk",
        "sqlalchemy",
        "starlette",
        "tokenizers",
    }
    assert needed.isdisjoint(foreign)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ({"a": "import b", "b": "x = 1"}, []),
        ({"a": "import b", "b": "def f():\n  from a import x"}, [["a", "b"]]),
        ({"a": "import b", "b": "import c", "c": "from a import x", "d": "import a"}, [["a", "b", "c"]]),
        ({"p/__init__": "", "p/x": "from p import y", "p/y": "import p.x"}, [["p.x", "p.y"]]),
    ],
)
def test_cycles_are_found(texts: dict[str, str], expected: list[list[str]]) -> None:
    found = [Module(f"{path}.py", text) for path, text in texts.items()]
    assert cycles(import_graph(found)) == expected

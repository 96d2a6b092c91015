"""Who imports whom among the project's modules, at import time or later."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping

from tests.project.source import Module

Graph = Mapping[str, set[str]]
"""Name of a module, and the names of the modules it imports."""


def import_graph(found: Iterable[Module]) -> Graph:
    """Every import of one given module by another, those inside functions and under TYPE_CHECKING too.

    What the protobuf compiler wrote imports nothing of the project, and is left out.
    """
    known = {module.name: module for module in found}
    return {name: _imported(module, known) - {name} for name, module in known.items()}


def imported_names(module: Module) -> set[str]:
    """The dotted names that a module imports, as far as its text says."""
    names: set[str] = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if not name.endswith("_pb2")}


def _imported(module: Module, known: Mapping[str, Module]) -> set[str]:
    """`from a import b` is an import of the module a.b where there is one, else of a."""
    found = set()
    for name in imported_names(module):
        parts = name.split(".")
        candidates = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
        found |= {next((candidate for candidate in candidates if candidate in known), module.name)}
    return found


def cycles(graph: Graph) -> list[list[str]]:
    """Groups of modules that reach each other (Kosaraju: components of the reversed graph, last finished first)."""
    order: list[str] = []
    seen: set[str] = set()
    for start in sorted(graph):
        _collect(start, graph, seen, order)
    reversed_graph: dict[str, set[str]] = {name: set() for name in graph}
    for name, targets in graph.items():
        for target in targets:
            reversed_graph[target].add(name)
    found = []
    seen = set()
    for start in reversed(order):
        component: list[str] = []
        _collect(start, reversed_graph, seen, component)
        if len(component) > 1:
            found.append(sorted(component))
    return sorted(found)


def _collect(start: str, graph: Graph, seen: set[str], finished: list[str]) -> None:
    """Depth first from `start`, appending each module when all that it reaches is done."""
    if start in seen:
        return
    seen.add(start)
    for target in sorted(graph[start]):
        _collect(target, graph, seen, finished)
    finished.append(start)

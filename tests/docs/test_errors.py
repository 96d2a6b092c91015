"""docs/errors.md lists every error class and every status, and no permanent error has one that the SDK repeats."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

import gateway.app
from gateway import errors
from gateway.errors import EngineFailed, Passing, TandemError
from gateway.openai.errors import HUNG_UP
from tests.docs.pages import ROOT, page, rows

REPEATED = {408, 409, 429, *range(500, 600)}
"""Statuses that the official SDK repeats for minutes."""

NOT_FOR_THE_SDK: set[type[TandemError]] = {TandemError, EngineFailed}
"""A bug may be gone after a restart; an engine's failure is a failed future for the SDK, and a 500 for OpenAI's
clients, which repeat it twice."""


def classes() -> dict[str, type]:
    """The error classes of the gateway's one module."""
    members = inspect.getmembers(errors, inspect.isclass)
    return {name: kind for name, kind in members if kind.__module__ == errors.__name__}


def descendants(kind: type[TandemError]) -> Iterator[type[TandemError]]:
    """Every error that can be raised, in whatever module it is."""
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)


def statuses_in_source() -> set[int]:
    """Statuses that stand in calls which make an answer, or in names for one."""
    found: set[int] = set()
    for path in (ROOT / "gateway").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _makes_an_answer(node):
                values = [*node.args, *(word.value for word in node.keywords)]
                parts = [
                    part for value in values for part in ast.walk(value) if isinstance(part, ast.Constant)
                ]
                found |= {part.value for part in parts if type(part.value) is int and 200 <= part.value < 600}
    return found


def _makes_an_answer(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    by_status = any(word.arg in ("status_code", "status") for word in call.keywords)
    return by_status or name.endswith(("Response", "HTTPException", "_reply"))


def declared_statuses() -> set[int]:
    """Statuses in the OpenAPI description of any route."""
    operations = [
        operation
        for methods in gateway.app.create_app().openapi()["paths"].values()
        for operation in methods.values()
    ]
    return {
        int(status) for operation in operations for status in operation["responses"] if status != "default"
    }


def described_statuses() -> dict[int, list[str]]:
    """The rows about statuses: when, and what the SDK does."""
    return {int(row[0]): row[1:] for row in rows(page("errors.md")) if row[0].isdigit()}


def test_every_status_is_described() -> None:
    framework = {404, 405}  # an unknown path, a method that a path does not have
    raised = {kind.status for kind in descendants(TandemError)}
    answered = statuses_in_source() | declared_statuses() | raised | framework | {HUNG_UP, 200}
    assert {204, 400, 413, 422, 429, 500, 503} <= answered
    assert described_statuses().keys() == answered


def test_every_error_is_described_as_it_is() -> None:
    described = {row[0]: row[1:3] for row in rows(page("errors.md")) if not row[0].isdigit()}
    assert described.keys() == classes().keys()
    for name, kind in classes().items():
        if issubclass(kind, TandemError) and kind not in (TandemError, Passing):
            assert described[name] == [str(kind.status), kind.code]
        else:
            assert described[name] == ["", ""]


def test_permanent_errors_are_never_repeated() -> None:
    for kind in set(descendants(TandemError)) - NOT_FOR_THE_SDK:
        assert issubclass(kind, Passing) == (kind.status in REPEATED), kind
    for status, (_, *effects) in described_statuses().items():
        if status in REPEATED:
            assert all(effect.startswith("repeats") for effect in effects), status
        elif 400 <= status < 499:
            assert effects[:2] == ["raises", "raises"], status


def test_what_passes_says_when_to_try_again() -> None:
    answer = gateway.app._answer_error(None, errors.TooManyRequests("full"))  # type: ignore[arg-type]
    assert answer.headers["retry-after"] == "1"
    assert "retry-after" not in gateway.app._answer_error(None, errors.NotFound("no")).headers  # type: ignore[arg-type]

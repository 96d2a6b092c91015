"""Inputs that schemathesis makes of the OpenAPI description: some that fit it, and some that do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import hypothesis
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import Case, GenerationMode, SerializationContext
from schemathesis.checks import CHECKS
from schemathesis.core.result import Err

from tests.fuzz.living import HEADERS, LONGEST_S, Broken, Living, Tally, living_things

BODY_LESS = frozenset(
    {
        "POST /api/v1/auth/token",
        "POST /api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/publish",
    }
)
"""Routes that take no body: all that they need is in their address, or is the key."""

_CHANGING = ("post", "put", "patch")
_EXPECTED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)


@schemathesis.serializer("application/x-protobuf", "application/x-tar")
def _serialize_bytes(context: SerializationContext, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode(errors="replace")


def undescribed(page: dict[str, Any]) -> list[str]:
    """Routes that do not say what they take: their bodies could not be fuzzed."""
    missing = []
    for path, operations in page["paths"].items():
        for method in _CHANGING:
            if method not in operations or f"{method.upper()} {path}" in BODY_LESS:
                continue
            content = operations[method].get("requestBody", {}).get("content", {})
            schemas = [_looked_up(form.get("schema", {}), page) for form in content.values()]
            if not schemas or not all(_says_something(schema) for schema in schemas):
                missing.append(f"{method.upper()} {path}")
    return missing


def _looked_up(schema: dict[str, Any], page: dict[str, Any]) -> dict[str, Any]:
    """What a reference leads to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    found: dict[str, Any] = page["components"]["schemas"][name] if name else schema
    return found


def _says_something(schema: dict[str, Any]) -> bool:
    """Whether a schema describes bytes, or an object with its fields."""
    if schema.get("format") == "binary":
        return True
    return bool(schema.get("properties") or schema.get("anyOf") or schema.get("oneOf"))


def fuzz(url: str, tally: Tally, per_route: int, seed: int) -> None:
    """That many inputs to each route. Raises Broken, with what was sent, for the first answer that must not be."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    missing = undescribed(schema.raw_schema)
    if missing:
        raise Broken(f"no schema says what these routes take: {', '.join(missing)}")
    with (
        httpx.Client(base_url=url, headers=HEADERS, timeout=LONGEST_S) as http,
        requests.Session() as session,
    ):
        for result in schema.get_all_operations():
            if isinstance(result, Err):
                raise Broken(f"a route's description cannot be read: {result.err()}")
            operation = result.ok()
            # fresh things for each route: some routes end a run or a session
            sender = _Sender(session, living_things(http), tally, random.Random(seed))
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _each(operation.as_strategy(generation_mode=mode), sender.send, per_route // 2, seed)


@dataclass(frozen=True)
class _Sender:
    session: requests.Session
    living: Living
    tally: Tally
    draw: random.Random

    def send(self, case: Case[Any]) -> None:
        """Send an input and judge its answer."""
        for part in (case.path_parameters, case.query, case.body):
            self.living.put_into(part, self.draw)
        answer = case.call(session=self.session, headers=HEADERS, timeout=LONGEST_S)
        what = f"{case.method} {case.path} {case.path_parameters} {case.query} {str(case.body)[:2000]}"
        self.tally.check(what, answer.status_code, answer.text)
        checks: list[Any] = [CHECKS.get_one(name) for name in _EXPECTED]
        case.validate_response(answer, checks=checks)
        self.tally.promise(answer)


def _each(cases: Any, send: Callable[[Case[Any]], None], count: int, seed: int) -> None:
    check: Any = hypothesis.given(cases)(send)  # type: ignore[no-untyped-call]  # strategies are untyped
    check = hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(check)
    try:
        hypothesis.seed(seed)(check)()
    except hypothesis.errors.Unsatisfiable:
        return  # a route without parameters has no input that does not fit

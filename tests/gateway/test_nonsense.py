"""Nonsense to every route: whatever comes is answered, with a client's error or a success, and nothing breaks."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import httpx

from tests.gateway.conftest import RETRIED, begin_run, outcome, send_pass
from tests.served import ServedGateway

WEIRD: list[Any] = [
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 1e308, 0.5, "", "a", "\0", "a\0b", "../..", "%s%n{}",
    "\U0001f600", "x" * 3000, [], [[]], [None], [1, "a", {}], {}, {"a": 1}, {"": ""}, "tinker://a/weights/b", "tinker://\0/weights/b",
]  # fmt: skip
RAW = [
    b"",
    b"\0",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"{",
    b"\xff\xfe\xfd",
    b"[" * 5000,
    b'{"a":' * 5000,
    b"1" * 5000,
]
TOKENS = [3, 1, 4, 1, 5]


def bodies(schema: dict[str, Any], draw: random.Random, count: int) -> list[bytes]:
    """Objects with the fields that a route names, filled with weird values, more or less of them."""
    fields = sorted(_fields(schema))
    made = []
    for _ in range(count):
        chosen = draw.sample(fields, draw.randint(0, len(fields))) if fields else []
        made.append(json.dumps({name: draw.choice(WEIRD) for name in [*chosen, "surplus"]}).encode())
    return made


def _fields(schema: dict[str, Any]) -> set[str]:
    """The names of all properties that a description of a body mentions at its top."""
    return set(schema.get("properties", {}))


def requests(paths: dict[str, Any], run_id: str, draw: random.Random) -> Iterator[tuple[str, str, bytes]]:
    """Method, path and body of what is to be sent."""
    ids = ["a", run_id, "%2e%2e", "%ff", "a%20b", "weights"]
    for path, methods in paths.items():
        for method, described in methods.items():
            content: dict[str, Any] = described.get("requestBody", {}).get("content", {})
            schema: dict[str, Any] = next((form["schema"] for form in content.values()), {})
            for body in [*RAW, *bodies(schema, draw, 20)]:
                yield method, re.sub(r"{\w+}", lambda _: draw.choice(ids), path), body


def test_no_route_breaks(served: ServedGateway, http: httpx.Client) -> None:
    draw = random.Random(17)
    paths = http.get("/openapi.json").json()["paths"]
    sent = list(requests(paths, begin_run(http), draw))
    assert len(sent) > 1000
    for method, path, body in sent:
        kind = draw.choice(["application/json", "application/x-protobuf", "text/plain", ""])
        answer = http.request(method, path, content=body, headers={"content-type": kind})
        assert answer.status_code < 500, f"{method} {path} {body[:300]!r}: {answer.text}"
        assert answer.status_code not in RETRIED
    promise = send_pass(http, begin_run(http), 1, TOKENS).json()
    assert outcome(http, promise["request_id"])["metrics"]["loss:sum"] > 0
    assert "Traceback" not in served.log.read_text()


def test_no_parameter_of_a_query_breaks(served: ServedGateway, http: httpx.Client) -> None:
    values = ["", "0", "-1", "1", "1e9", "99999999999999999999", "a", "%00", "%ff", "..", "x" * 5000, "null"]
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for parameter in methods.get("get", {}).get("parameters", []):
            if parameter["in"] != "query":
                continue
            for value in values:
                address = path.replace("{", "").replace("}", "")
                answer = http.get(f"{address}?{parameter['name']}={value}")
                assert answer.status_code < 500, f"{address}?{parameter['name']}={value}: {answer.text}"
                assert len(answer.text) < 100_000
    assert "Traceback" not in served.log.read_text()

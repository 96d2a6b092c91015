"""The OpenAPI page: schemas of what routes read and write themselves, and the refusals that routes have in common.

Routes declare what they take and answer; what they all have in common is added here, once, when the page is made.
"""

from __future__ import annotations

from typing import Any

import msgspec

from gateway.errors import (
    BadRequest,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    Forbidden,
    Gone,
    ModelNotLoadable,
    NotFound,
    PayloadTooLarge,
    StoreUnavailable,
    TandemError,
    TooManyRequests,
    Unauthorized,
    Unprocessable,
    UnsupportedMediaType,
)

JSON = "application/json"

_METHODS = ("get", "post", "put", "patch", "delete")
_ALWAYS = (BadRequest, Unauthorized, Forbidden, NotFound, Unprocessable, TandemError, StoreUnavailable)
_WITH_BODY = (PayloadTooLarge, UnsupportedMediaType)
_OF_DIALECT: dict[str, tuple[type[TandemError], ...]] = {
    "/admin/": (EngineUnavailable, ModelNotLoadable),
    "/api/": (Gone, TooManyRequests, EngineUnavailable, ModelNotLoadable),
    "/v1/": (EngineUnavailable, EngineLost, EngineFailed, ModelNotLoadable),
    "/oai/": (EngineUnavailable, EngineLost, EngineFailed, ModelNotLoadable),
}
_OPENAI = ("/v1/", "/oai/")


class Refusal(msgspec.Struct, omit_defaults=True):
    """What is answered instead: a sentence for people, a code for programs, the field to blame."""

    detail: str
    code: str | None = None
    param: str | None = None


def schema_of(kind: Any) -> dict[str, Any]:
    """JSON schema of a type, with nothing to look up elsewhere."""
    found = msgspec.json.schema(kind)
    return _inlined(found, found.get("$defs", {}))  # type: ignore[no-any-return]


def with_refusals(page: dict[str, Any]) -> dict[str, Any]:
    """The page with the refusals of each route; those that the framework guesses at are not ours."""
    for path, operations in page["paths"].items():
        for method in _METHODS:
            if method in operations:
                _add_refusals(path, operations[method])
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    schemas["Refusal"] = schema_of(Refusal)
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    return page


def _add_refusals(path: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    guessed = responses.get("422", {}).get("content", {}).get(JSON, {}).get("schema", {})
    if guessed.get("$ref", "").endswith("/HTTPValidationError"):
        del responses["422"]
    for status, meanings in sorted(_refusals(path, "requestBody" in operation).items()):
        answer: dict[str, Any] = {"description": " ".join(meanings)}
        if not path.startswith(_OPENAI):  # those routes declare their own form of an error
            answer["content"] = {JSON: {"schema": {"$ref": "#/components/schemas/Refusal"}}}
        else:
            answer["content"] = responses.get("default", {}).get("content", {})
        responses.setdefault(status, answer)


def _refusals(path: str, has_body: bool) -> dict[str, list[str]]:
    """What each status means, in the words of the error classes that have it."""
    kinds: list[type[TandemError]] = [*_ALWAYS, *(_WITH_BODY if has_body else ())]
    for prefix, more in _OF_DIALECT.items():
        kinds += more if path.startswith(prefix) else ()
    found: dict[str, list[str]] = {}
    for kind in kinds:
        meaning = (kind.__doc__ or "").partition("\n")[0]
        meaning = "Nobody's plan: the log says why." if kind is TandemError else meaning
        found.setdefault(str(kind.status), []).append(meaning)
    return found


def _inlined(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_inlined(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inlined(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    return {key: _inlined(value, definitions) for key, value in node.items() if key != "$defs"}

"""JSON bodies into structs.

A newer SDK sends fields that this server does not know. One that is null, false, 0 or empty asks for nothing and is
left out; any other would change the result and is refused by name, where the struct is a strict one.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from engines.misfit import Misfit, misfit_of, with_entries
from gateway.errors import BadRequest, Unprocessable

T = TypeVar("T")

_LONGEST = 400


def parse_json(body: bytes, schema: type[T]) -> T:
    """Raises BadRequest when the body is not JSON and Unprocessable naming the field when it does not fit."""
    try:
        return msgspec.json.decode(body, type=schema)
    except msgspec.ValidationError as error:
        return _decode_without_idle_fields(body, schema, error)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


def _decode_without_idle_fields(body: bytes, schema: type[T], first: msgspec.ValidationError) -> T:
    misfit = misfit_of(first)
    if "unknown field" not in misfit.what and "[...]" not in misfit.path:
        raise _refusal(misfit) from first
    try:
        value = msgspec.json.decode(body)
    except msgspec.ValidationError:  # a number that is too large for anything
        raise _refusal(misfit) from first
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    try:
        _drop_idle(value, _kind(cast(Hashable, schema)))
        return msgspec.convert(value, schema)
    except msgspec.ValidationError as error:
        raise _refusal(with_entries(misfit_of(error), value, schema)) from error
    except RecursionError as error:
        raise BadRequest(f"the body is not JSON: {error}") from error


@cache
def _kind(schema: Hashable) -> inspect.Type:
    return inspect.type_info(schema)


def _refusal(misfit: Misfit) -> Unprocessable:
    return Unprocessable(
        f"the body does not fit: {_shortened(str(misfit))}",
        param=_shortened(misfit.where) if misfit.where else None,
    )


def _shortened(text: str) -> str:
    """Errors repeat names that a sender has chosen, and those can be of any length."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


def _drop_idle(value: Any, kind: inspect.Type) -> None:
    """Remove, in place, what no struct knows and what asks for nothing."""
    for part, part_kind in _parts(value, kind):
        _drop_idle(part, part_kind)


def _parts(value: Any, kind: inspect.Type) -> list[tuple[Any, inspect.Type]]:
    """What a value consists of that can hold structs, with its type; idle fields are gone from the value."""
    match kind, value:
        case inspect.StructType(fields=fields), dict():
            known = {field.encode_name: field.type for field in fields}
            for name in [name for name, entry in value.items() if name not in known and not entry]:
                del value[name]
            return [(value[name], entry_kind) for name, entry_kind in known.items() if name in value]
        case inspect.ListType(item_type=inspect.StructType() as item), list():
            return [(entry, item) for entry in value]
        case inspect.DictType(value_type=inspect.StructType() as item), dict():
            return [(entry, item) for entry in value.values()]
        case inspect.UnionType(types=kinds), _:
            return [(value, alternative) for alternative in kinds]
    return []

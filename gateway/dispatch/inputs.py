"""Inputs of what has just been accepted, kept in memory until the engine gets them."""

from __future__ import annotations

from collections.abc import Sequence


class RecentInputs:
    """At most `most_bytes` of inputs by request_id; what does not fit is read from the database when it is needed."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._bytes = 0
        self._bodies: dict[str, bytes] = {}

    def add(self, request_id: str, body: bytes) -> None:
        """Keep an input if there is room: those that came before it are needed sooner."""
        if self._bytes + len(body) <= self._most_bytes and request_id not in self._bodies:
            self._bodies[request_id] = body
            self._bytes += len(body)

    def size(self, request_id: str) -> int | None:
        """Bytes of an input; None if it is not here."""
        body = self._bodies.get(request_id)
        return None if body is None else len(body)

    def take(self, request_ids: Sequence[str]) -> dict[str, bytes] | None:
        """The inputs of all of these; None if one of them is not here. Either way, they are forgotten."""
        found = {key: body for key in request_ids if (body := self.discard(key)) is not None}
        return found if len(found) == len(request_ids) else None

    def discard(self, request_id: str) -> bytes | None:
        """Forget an input; what it was, if it was here."""
        body = self._bodies.pop(request_id, None)
        self._bytes -= len(body or b"")
        return body

    def clear(self) -> None:
        """Forget everything."""
        self._bodies.clear()
        self._bytes = 0

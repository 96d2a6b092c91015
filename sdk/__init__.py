"""What the official SDK lacks: connecting to a Tandem gateway in one call, an admin client, a command line.

Speaks HTTP only; nothing of the gateway or its engines is imported.
"""

from typing import TYPE_CHECKING, Any

from sdk.admin import AdminClient, AdminError

if TYPE_CHECKING:
    from sdk.connection import ConnectionFailed, connect

__all__ = ["AdminClient", "AdminError", "ConnectionFailed", "connect"]


def __getattr__(name: str) -> Any:
    """The official SDK is imported by those who connect: the command line works without it, and starts at once."""
    if name in ("ConnectionFailed", "connect"):
        from sdk import connection

        return getattr(connection, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""What the official SDK lacks: connecting to a Tandem gateway in one call, an admin client, a command line.

Speaks HTTP only; nothing of the gateway or its engines is imported.
"""

from sdk.connection import connect

__all__ = ["connect"]

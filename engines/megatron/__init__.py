"""The engine on Megatron-Core: training of adapters on a model that several ranks hold together.

Importing this package imports neither torch nor megatron; asking for `MegatronEngine` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.megatron.engine import MegatronEngine

__all__ = ["MegatronEngine"]


def __getattr__(name: str) -> Any:
    if name == "MegatronEngine":
        from engines.megatron.engine import MegatronEngine

        return MegatronEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

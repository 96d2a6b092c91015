"""The engine on Hugging Face Transformers: training and sampling of LoRA adapters on one causal language model.

Importing this package imports no torch; asking for `HfEngine` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.hf.engine import HfEngine

__all__ = ["HfEngine"]


def __getattr__(name: str) -> Any:
    if name == "HfEngine":
        from engines.hf.engine import HfEngine

        return HfEngine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The engine on vLLM: sampling of LoRA adapters on one causal language model, in an environment of its own.

Importing this package imports no vLLM; an engine that is loaded does.
"""

from engines.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]

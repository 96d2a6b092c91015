"""What megatron-core assumes of CUDA, on a machine that has none. Installed only there, while the block lasts.

It names the current CUDA device as the place of buffers, waits for it, keeps the state of CUDA's generators, and its
schedules make tensors on "cuda" by name. None of it is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from engines.megatron.megatron_core import parallel_random

_CPU = torch.device("cpu")


class WithoutCuda:
    """The replacements; `around_schedule` is to be entered where a schedule runs."""

    def __init__(self) -> None:
        self._undo = ExitStack()
        self._replace(torch.cuda, "current_device", lambda: _CPU)
        self._replace(torch.cuda, "manual_seed", torch.manual_seed)
        self._replace(torch.cuda, "synchronize", _nothing)
        for name, function in (("get_rng_state", _get_state), ("set_rng_state", _set_state)):
            self._replace(torch.cuda, name, function)
        self._replace(parallel_random, "_get_cuda_rng_state", _get_state)
        self._replace(parallel_random, "_set_cuda_rng_state", _set_state)

    def around_schedule(self) -> TorchFunctionMode:
        """Tensors that are to be made on "cuda" are made in main memory."""
        return _CudaIsCpu()

    def __enter__(self) -> WithoutCuda:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def _replace(self, owner: Any, name: str, replacement: Callable[..., Any]) -> None:
        self._undo.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, replacement)


def _nothing(*device: Any) -> None:
    """There is nothing to wait for."""


def _get_state(*device: Any, **named: Any) -> torch.Tensor:
    return torch.get_rng_state()


def _set_state(state: torch.Tensor, *device: Any, **named: Any) -> None:
    torch.set_rng_state(state)


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if str(named.get("device", "")).startswith("cuda"):
            named = {**named, "device": _CPU}
        return function(*args, **named)

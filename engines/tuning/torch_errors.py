"""What torch's errors mean: a lack of memory, for which it has several types, and none of its own on the CPU; or a
device that computes nothing any more."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engines.interface import EngineBroken

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN, which has no other reason for these three where shapes are known
    "could not create a primitive",
    "could not execute a primitive",
    "std::bad_alloc",
)


def is_lack_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error of torch or Python says that memory was asked for and not there."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in _SIGNS)


@contextmanager
def translated() -> Iterator[None]:
    """Raise MemoryError for every lack of memory, and EngineBroken for an error of the device: after a failed kernel
    all that follows in this process fails."""
    try:
        yield
    except RuntimeError as error:
        if is_lack_of_memory(error):
            raise MemoryError(str(error).partition("\n")[0]) from error
        if isinstance(error, torch.AcceleratorError):
            raise EngineBroken(str(error).partition("\n")[0]) from error
        raise

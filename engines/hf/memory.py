"""What a lack of memory looks like in torch. It has several types of errors for it, and on the CPU none of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_SIGNS = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "could not create a memory object",  # oneDNN
    "std::bad_alloc",
)


def is_lack_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether an error of torch or Python says that memory was asked for and not there."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(sign in str(error) for sign in _SIGNS)


@contextmanager
def as_memory_error() -> Iterator[None]:
    """Raise MemoryError for every lack of memory, whatever it is called."""
    try:
        yield
    except RuntimeError as error:
        if is_lack_of_memory(error):
            raise MemoryError(str(error).partition("\n")[0]) from error
        raise

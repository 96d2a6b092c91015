"""A tensor as it travels: raw little-endian bytes with a dtype and a shape."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

DType = Literal["int32", "int64", "float32"]

_LITTLE_ENDIAN: dict[str, np.dtype[np.generic]] = {
    "int32": np.dtype("<i4"),
    "int64": np.dtype("<i8"),
    "float32": np.dtype("<f4"),
}


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """C-ordered array as raw little-endian bytes.

    `dtype` is one of int32, int64, float32; `data` holds exactly `prod(shape)` items.
    """

    dtype: DType
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, array: NDArray[np.generic]) -> Tensor:
        """The tensor of a numpy array whose dtype is int32, int64 or float32 (TypeError otherwise)."""
        name = array.dtype.name
        if name not in _LITTLE_ENDIAN:
            raise TypeError(f"a tensor holds int32, int64 or float32, not {name}")
        little = np.ascontiguousarray(array, dtype=_LITTLE_ENDIAN[name])
        return cls(dtype=name, shape=array.shape, data=little.tobytes())  # type: ignore[arg-type]

    def array(self) -> NDArray[np.generic]:
        """A read-only view of the bytes, of this tensor's dtype and shape.

        Raises ValueError when `data` does not hold exactly the items that `shape` asks for.
        """
        return np.frombuffer(self.data, dtype=_LITTLE_ENDIAN[self.dtype]).reshape(self.shape)

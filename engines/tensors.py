"""A tensor as it travels: raw little-endian bytes with a dtype and a shape."""

from __future__ import annotations

from typing import Any, Literal

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


class Matrix(msgspec.Struct, frozen=True, omit_defaults=True):
    """A matrix, dense or in compressed sparse rows (CSR).

    Dense: `values` is [rows, columns]. Sparse: `values` is [C], the listed cells row after row; `crow` int64
    [rows + 1] says where each row begins and ends among them, `col` int64 [C] the column of each.
    """

    shape: tuple[int, int]
    values: Tensor
    crow: Tensor | None = None
    col: Tensor | None = None

    def cells(self) -> tuple[NDArray[np.int64], NDArray[Any]]:
        """The row and the value of every listed cell, row after row: int64 [C] and [C]."""
        values: NDArray[Any] = self.values.array().ravel()
        if self.crow is None:
            return np.repeat(np.arange(self.shape[0]), self.shape[1]), values
        begins: NDArray[Any] = self.crow.array()
        return np.repeat(np.arange(self.shape[0]), np.diff(begins)), values

    def with_values(self, values: NDArray[np.generic]) -> Matrix:
        """A matrix of the same layout with these values [C] in its listed cells."""
        return msgspec.structs.replace(self, values=Tensor.of(values.reshape(self.values.shape)))

"""Tensors and token lists of the wire, protobuf and JSON, in the neutral form.

Whatever is wrong raises UserError naming the field, what came and what is allowed. Time and memory are bounded by the
size of the body and by `Room`, whatever its numbers say.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from numpy.typing import NDArray

from engines.interface import UserError
from engines.tensors import Matrix, Tensor
from gateway.tinker import schemas
from gateway.tinker import wire_pb2 as wire

_MOST_DIMENSIONS = 8
_MOST_ITEMS = 2**31
_ROOM_AT_LEAST = 4 << 20
_ROOM_PER_BYTE = 256
_ROOM_AT_MOST = 256 << 20
_HALF_SPARSE = "{where} has one of sparse_crow_indices and sparse_col_indices; they belong together"
_ECHO = 80
"""Characters of a sender's own words that an error repeats."""

_INT64 = np.dtype("<i8")
_NUMPY: dict[int, np.dtype[Any]] = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: _INT64,
    wire.DTYPE_INT32: np.dtype("<i4"),
}


class Room:
    """Bytes that the sparse tensors of one request may take when they are written out.

    A few bytes can stand for an enormous tensor, and a body can hold many of them; what is accepted is stored and sent
    written out. So the room grows with what was sent: tensors of some hundred columns fit however empty they are.
    """

    def __init__(self, sent: int) -> None:
        self._size = min(_ROOM_AT_LEAST + _ROOM_PER_BYTE * sent, _ROOM_AT_MOST)
        self._left = self._size

    def take(self, needed: int, where: str) -> None:
        """Raises UserError when less than `needed` bytes are left."""
        self._left -= needed
        if self._left < 0:
            raise UserError(
                f"{where} is sparse and takes {needed} bytes when written out; the sparse tensors of one request may "
                f"take {self._size} bytes together: send it dense, or fewer data at a time"
            )


def input_name(name: str) -> str:
    """How an error names an entry of `loss_fn_inputs`."""
    return f"loss_fn_inputs[{name[:_ECHO]!r}]"


def refuse_unknown(message: Message, where: str) -> None:
    """A newer client asks for something that would not be done: UserError with the numbers of its fields."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        numbers = sorted({unknown[index].field_number for index in range(len(unknown))})
        raise UserError(
            f"{where} has fields that this server does not know (protobuf field "
            f"{', '.join(str(number) for number in numbers[:10])}); it would not do what they ask for"
        )


# ---------------------------------------------------------------------------- tokens


def tokens_of_chunks(chunks: Iterable[wire.Chunk], where: str) -> Tensor:
    """Token ids of all chunks, int32 [N]. Raises UserError for what is not text."""
    parts = [_chunk_bytes(chunk, f"{where}[{index}]") for index, chunk in enumerate(chunks)]
    data = parts[0] if len(parts) == 1 else b"".join(parts)
    return Tensor("int32", (len(data) // 4,), data)


def _chunk_bytes(chunk: wire.Chunk, where: str) -> bytes:
    refuse_unknown(chunk, where)
    kind = chunk.WhichOneof("chunk")
    if kind != "encoded_text":
        raise _not_text(where, kind or "empty")
    refuse_unknown(chunk.encoded_text, where)
    return _whole(chunk.encoded_text.tokens, np.dtype("<i4"), f"{where}.tokens")


def tokens_of(model_input: schemas.ModelInput, where: str) -> Tensor:
    """Token ids of all chunks, int32 [N]. Raises UserError for what is not text."""
    tokens: list[int] = []
    for index, chunk in enumerate(model_input.chunks):
        if not isinstance(chunk.tokens, list) or chunk.type not in (None, "encoded_text"):
            raise _not_text(f"{where}.chunks[{index}]", chunk.kind[:_ECHO])
        if chunk.beside_text is not None:
            raise UserError(f"{where}.chunks[{index}] is text, which has tokens and no {chunk.beside_text}")
        tokens += chunk.tokens
    try:
        return Tensor.of(np.array(tokens, dtype=np.int32))
    except OverflowError as error:
        raise UserError(f"{where} holds a token id that is no 32-bit integer") from error


def _not_text(where: str, kind: str) -> UserError:
    """Images are counted in tokens by models that take them, and none here does."""
    what = f"{where} is {kind}; only encoded_text is served here"
    if kind in ("image", "image_asset_pointer"):
        return UserError(f"{what}: no model of this server takes images, so expected_tokens is not looked at")
    return UserError(f"{what}: no model of this server takes audio" if kind == "dmel" else what)


# ---------------------------------------------------------------------------- tensors


def tensor_of_message(tensor: wire.Tensor, where: str, room: Room) -> Tensor:
    """float32, or int64 also where int32 came. Raises UserError."""
    refuse_unknown(tensor, where)
    dtype = _NUMPY.get(tensor.dtype)
    if dtype is None:
        raise UserError(
            f"{where} has dtype {_dtype_name(tensor.dtype)}; allowed are float32, int64 and int32"
        )
    if tensor.WhichOneof("encoding") == "sparse_csr":
        csr = tensor.sparse_csr
        refuse_unknown(csr, where)
        values = np.frombuffer(_whole(csr.values, dtype, where), dtype)
        crow = np.frombuffer(_whole(csr.crow_indices, _INT64, where), _INT64)
        col = np.frombuffer(_whole(csr.col_indices, _INT64, where), _INT64)
        return _written_out(_widened(values), crow, col, _shape(tensor.shape, where), where, room)
    data = _whole(tensor.dense, dtype, where)
    shape = _shape(tensor.shape, where) if tensor.shape else (len(data) // dtype.itemsize,)
    _require_items(len(data) // dtype.itemsize, shape, where)
    if dtype.kind == "i" and dtype != _INT64:
        return Tensor.of(_widened(np.frombuffer(data, dtype)).reshape(shape))
    return Tensor(dtype.name, shape, data)  # type: ignore[arg-type]


def tensor_of(tensor: schemas.TensorData, where: str, room: Room) -> Tensor:
    """The same for the JSON form."""
    values = _values(tensor.data, tensor.dtype, where)
    if (tensor.sparse_crow_indices is None) != (tensor.sparse_col_indices is None):
        raise UserError(_HALF_SPARSE.format(where=where))
    if tensor.sparse_crow_indices is not None and tensor.sparse_col_indices is not None:
        crow = _values(tensor.sparse_crow_indices, "int64", f"{where}.sparse_crow_indices")
        col = _values(tensor.sparse_col_indices, "int64", f"{where}.sparse_col_indices")
        return _written_out(values, crow, col, _shape(tensor.shape or (), where), where, room)
    shape = _shape(tensor.shape, where) if tensor.shape is not None else values.shape
    _require_items(values.size, shape, where)
    return Tensor.of(values.reshape(shape))


def matrix_of(tensor: schemas.TensorData, where: str) -> Matrix:
    """A matrix in the layout in which it came, for a reply in the same; what it holds is the engine's to check."""
    values = _values(tensor.data, tensor.dtype, where)
    shape = _shape(tensor.shape or (), where)
    if len(shape) != 2:
        raise UserError(
            f"{where} has shape {list(shape)}; it has two dimensions, [tokens of the prompt - 1, K]"
        )
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if (crow is None) != (col is None):
        raise UserError(_HALF_SPARSE.format(where=where))
    if crow is None or col is None:
        _require_items(values.size, shape, where)
        return Matrix((shape[0], shape[1]), Tensor.of(values.reshape(shape)))
    return Matrix(
        (shape[0], shape[1]),
        Tensor.of(values),
        Tensor.of(_values(crow, "int64", f"{where}.sparse_crow_indices")),
        Tensor.of(_values(col, "int64", f"{where}.sparse_col_indices")),
    )


def _values(data: Sequence[int | float], dtype: str, where: str) -> NDArray[Any]:
    try:
        with np.errstate(over="ignore"):
            values = np.array(data, dtype=dtype)
    except OverflowError as error:
        raise UserError(f"{where} holds a number that does not fit into {dtype}") from error
    if dtype == "float32" and not np.isfinite(values).all():
        raise UserError(f"{where} holds a number that does not fit into float32")
    if dtype == "int64" and float in map(type, data):
        _require_integers(data, where)
    return values


def _require_integers(data: Sequence[int | float], where: str) -> None:
    """Clients may write 3 as 3.0; a fraction must not be cut off, and 1e300 is no int64."""
    for index, value in enumerate(data):
        if isinstance(value, float) and not (value.is_integer() and abs(value) <= 2**53):
            raise UserError(f"{where} has dtype int64 and holds {value} at {index}")


def _dtype_name(number: int) -> str:
    known = number in wire.DType.values()
    return wire.DType.Name(number).removeprefix("DTYPE_").lower() if known else str(number)


def _whole(data: bytes, dtype: np.dtype[Any], where: str) -> bytes:
    if len(data) % dtype.itemsize:
        raise UserError(f"{where} has {len(data)} bytes, which is no whole number of {dtype.name}")
    return data


def _widened(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.int64) if values.dtype.kind == "i" else values


def _shape(sizes: Sequence[int], where: str) -> tuple[int, ...]:
    if len(sizes) > _MOST_DIMENSIONS:
        raise UserError(f"{where} has {len(sizes)} dimensions; at most {_MOST_DIMENSIONS} are allowed")
    shape = tuple(sizes)
    if min(shape, default=0) < 0 or math.prod(max(size, 1) for size in shape) > _MOST_ITEMS:
        raise UserError(
            f"{where} has shape {str(list(shape))[:_ECHO]}; sizes are not negative, and at most {_MOST_ITEMS} items "
            "are allowed"
        )
    return shape


def _require_items(items: int, shape: tuple[int, ...], where: str) -> None:
    if math.prod(shape) != items:
        raise UserError(f"{where} has {items} values, but its shape {list(shape)} takes {math.prod(shape)}")


def _written_out(
    values: NDArray[Any],
    crow: NDArray[np.int64],
    col: NDArray[np.int64],
    shape: tuple[int, ...],
    where: str,
    room: Room,
) -> Tensor:
    """A sparse matrix (CSR) as a dense one; what is not listed is 0."""
    if len(shape) != 2:
        raise UserError(f"{where} is sparse and has shape {list(shape)}; sparse tensors have two dimensions")
    rows, columns = shape
    # bounds before differences: those of extreme numbers would wrap around
    in_range = (
        len(crow) == rows + 1 and crow[0] == 0 and crow[-1] == len(values) and crow.max() <= len(values)
    )
    counts = np.diff(crow)
    if not in_range or (counts < 0).any():
        raise UserError(
            f"{where}: crow_indices must have {rows + 1} entries that rise from 0 to the number of values, "
            f"{len(values)}"
        )
    if len(col) != len(values) or ((col < 0) | (col >= columns)).any():
        raise UserError(
            f"{where}: col_indices must name a column from 0 to {columns - 1} for each of the {len(values)} values"
        )
    places = np.repeat(np.arange(rows) * columns, counts) + col
    if (np.diff(places) <= 0).any():
        raise UserError(f"{where}: col_indices must rise within each row; no place is given twice")
    room.take(rows * columns * values.itemsize, where)
    dense = np.zeros(rows * columns, values.dtype)
    dense[places] = values
    return Tensor.of(dense.reshape(shape))

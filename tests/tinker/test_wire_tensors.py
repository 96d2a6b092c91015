"""Tensors: sparse ones against a plain expansion, and those that say something impossible."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import tinker
import torch
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.interface import UserError
from engines.operations import Forward
from engines.tensors import Tensor
from gateway.tinker import schemas
from gateway.tinker import wire_pb2 as wire
from gateway.tinker.requests import pass_of, pass_of_json
from gateway.tinker.tensors import Room, tensor_of, tensor_of_message
from tests.tinker.material import array, expand, parsed, sdk_body

WHERE = "data[0].loss_fn_inputs['weights']"
MiB = 1 << 20


class Sparse(NamedTuple):
    """A CSR matrix as lists."""

    values: list[int]
    crow: list[int]
    col: list[int]
    columns: int


@st.composite
def sparse_matrices(draw: st.DrawFn) -> Sparse:
    columns = draw(st.integers(0, 6))
    rows = draw(st.lists(st.sets(st.integers(0, columns - 1)) if columns else st.just(set()), max_size=6))
    col = [place for row in rows for place in sorted(row)]
    values = draw(st.lists(st.integers(-(2**24), 2**24), min_size=len(col), max_size=len(col)))
    return Sparse(values, np.cumsum([0, *map(len, rows)]).tolist(), col, columns)


def message_of(
    sparse: Sparse, dtype: int = wire.DTYPE_INT64, shape: list[int] | None = None, kind: str = "<i8"
) -> wire.Tensor:
    csr = wire.SparseCsr(
        values=np.array(sparse.values, kind).tobytes(),
        crow_indices=np.array(sparse.crow, "<i8").tobytes(),
        col_indices=np.array(sparse.col, "<i8").tobytes(),
    )
    shape = shape if shape is not None else [len(sparse.crow) - 1, sparse.columns]
    return wire.Tensor(sparse_csr=csr, dtype=dtype, shape=shape)  # type: ignore[arg-type]


def from_message(tensor: wire.Tensor) -> Tensor:
    return tensor_of_message(tensor, WHERE, Room(1 << 20))


def from_json(**fields: Any) -> Tensor:
    return tensor_of(msgspec.convert(fields, schemas.TensorData), WHERE, Room(1 << 20))


# ---------------------------------------------------------------------------- sparse


@given(sparse_matrices())
@settings(max_examples=200, deadline=None)
def test_a_sparse_matrix_is_written_out(sparse: Sparse) -> None:
    shape = (len(sparse.crow) - 1, sparse.columns)
    expected = expand(sparse.values, sparse.crow, sparse.col, sparse.columns)
    forms = {
        "int64": [
            from_message(message_of(sparse)),
            from_message(message_of(sparse, wire.DTYPE_INT32, kind="<i4")),
        ],
        "float32": [from_message(message_of(sparse, wire.DTYPE_FLOAT32, kind="<f4"))],
    }
    for dtype, found in forms.items():
        json_form = {
            "sparse_crow_indices": sparse.crow,
            "sparse_col_indices": sparse.col,
            "shape": list(shape),
        }
        found.append(from_json(data=sparse.values, dtype=dtype, **json_form))
        for tensor in found:
            assert (tensor.dtype, tensor.shape) == (dtype, shape)
            assert array(tensor).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_what_torch_makes_sparse_arrives_dense(dtype: torch.dtype) -> None:
    dense = torch.zeros(40, 30)
    dense[torch.randperm(40)[:20], torch.randint(30, (20,))] = torch.arange(1.0, 21.0)
    data = tinker.TensorData.from_torch_sparse(dense.to(dtype))
    assert data.sparse_crow_indices is not None
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints([1]), loss_fn_inputs={"weights": data})
    found = parsed(sdk_body([datum])).data[0].loss_inputs["weights"]
    assert array(found).tolist() == dense.to(dtype).tolist()


GOOD = Sparse(values=[5, 6, 7], crow=[0, 2, 2, 3], col=[0, 3, 1], columns=4)
HUGE = 2**63 - 1

BAD_SPARSE: dict[str, tuple[Sparse, list[int] | None, str]] = {
    "too few rows": (GOOD, [4, 4], "crow_indices must have 5 entries"),
    "no crow": (GOOD._replace(crow=[]), [3, 4], "crow_indices must have 4 entries"),
    "crow not from 0": (GOOD._replace(crow=[1, 2, 2, 3]), [3, 4], "crow_indices"),
    "crow falls": (GOOD._replace(crow=[0, 3, 2, 3]), [3, 4], "crow_indices"),
    "crow beyond the values": (GOOD._replace(crow=[0, 9, 9, 9]), [3, 4], "crow_indices"),
    "crow wraps around": (GOOD._replace(crow=[0, HUGE, -2, 3]), [3, 4], "crow_indices"),
    "negative column": (GOOD._replace(col=[0, -1, 1]), [3, 4], "col_indices must name a column from 0 to 3"),
    "column too large": (GOOD._replace(col=[0, 4, 1]), [3, 4], "col_indices"),
    "column far too large": (GOOD._replace(col=[0, HUGE, 1]), [3, 4], "col_indices"),
    "too few columns": (GOOD._replace(col=[0, 3]), [3, 4], "col_indices"),
    "a place twice": (GOOD._replace(col=[3, 3, 1]), [3, 4], "no place is given twice"),
    "columns fall": (GOOD._replace(col=[3, 0, 1]), [3, 4], "must rise within each row"),
    "one dimension": (GOOD, [12], "sparse tensors have two dimensions"),
    "three dimensions": (GOOD, [3, 2, 2], "sparse tensors have two dimensions"),
    "no shape": (GOOD, [], "sparse tensors have two dimensions"),
    "negative size": (GOOD, [-3, 4], "sizes are not negative"),
    "overflow": (GOOD, [2**62, 4], "at most 2147483648 items"),
    "too large to write out": (GOOD._replace(crow=[0, 3], col=[0, 3, 4]), [1, 2**26], "when written out"),
}


@pytest.mark.parametrize("name", BAD_SPARSE)
def test_impossible_sparse_matrices_are_refused_by_name(name: str) -> None:
    sparse, shape, message = BAD_SPARSE[name]
    with pytest.raises(UserError, match=message) as raised:
        from_message(message_of(sparse, shape=shape))
    assert WHERE in str(raised.value)
    with pytest.raises(UserError, match=message):
        from_json(
            data=sparse.values,
            dtype="int64",
            shape=shape,
            sparse_crow_indices=sparse.crow,
            sparse_col_indices=sparse.col,
        )


def test_one_list_of_indices_is_not_enough() -> None:
    with pytest.raises(UserError, match="belong together"):
        from_json(data=[1], dtype="int64", shape=[1, 1], sparse_crow_indices=[0, 1])
    with pytest.raises(UserError, match="belong together"):
        from_json(data=[1], dtype="int64", shape=[1, 1], sparse_col_indices=[0])


@pytest.mark.parametrize("field", ["values", "crow_indices", "col_indices"])
def test_bytes_of_a_sparse_matrix_are_whole_numbers(field: str) -> None:
    tensor = message_of(GOOD)
    setattr(tensor.sparse_csr, field, getattr(tensor.sparse_csr, field) + b"\0")
    with pytest.raises(UserError, match="no whole number of int64"):
        from_message(tensor)


def many_sparse(count: int, columns: int) -> wire.ForwardBackwardRequest:
    """A small request that stands for `count` rows of 8 * `columns` bytes."""
    request = wire.ForwardBackwardRequest(model_id="m", seq_id=1, loss_fn="cross_entropy")
    for _ in range(count):
        datum = request.data.add()
        datum.loss_fn_inputs["weights"].CopyFrom(message_of(Sparse([1], [0, 1], [0], 1), shape=[1, columns]))
    return request


@pytest.mark.parametrize("count", [60, 10_000])
def test_many_small_sparse_matrices_do_not_become_large_together(count: int) -> None:
    request = many_sparse(count, MiB)
    sent = request.ByteSize()
    assert sent < 100 * count
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(UserError, match=r"the sparse tensors of one request may take \d+ bytes together"):
        pass_of(request)
    assert time.process_time() - start < 10
    assert tracemalloc.get_traced_memory()[1] < min(5 * MiB + 256 * sent, 256 * MiB) + 32 * MiB
    tracemalloc.stop()


def test_mostly_empty_rows_of_some_hundred_columns_fit() -> None:
    rows, columns = 20_000, 256
    tensor = message_of(Sparse([1], [0] * rows + [1], [0], columns))
    request = wire.ForwardBackwardRequest(model_id="m", seq_id=1)
    request.data.add().loss_fn_inputs["weights"].CopyFrom(tensor)
    found = pass_of(request).data[0].loss_inputs["weights"]
    assert found.shape == (rows, columns)
    assert len(found.data) == 8 * rows * columns


def test_the_json_form_has_no_more_room() -> None:
    tensor = {
        "data": [1],
        "dtype": "int64",
        "shape": [1, MiB],
        "sparse_crow_indices": [0, 1],
        "sparse_col_indices": [0],
    }
    datum = {"model_input": {"chunks": []}, "loss_fn_inputs": {"weights": tensor}}
    given = {"data": [datum], "loss_fn": "cross_entropy"}
    fields = {"model_id": "m", "seq_id": 1, "forward_input": given}
    with pytest.raises(UserError, match=r"data\[0\].* may take \d+ bytes together"):
        pass_of_json(msgspec.convert(fields, schemas.ForwardBackwardBody), Forward)
    tensor["shape"] = [1, 1000]
    found = pass_of_json(msgspec.convert(fields, schemas.ForwardBackwardBody), Forward)
    assert found.data[0].loss_inputs["weights"].shape == (1, 1000)


# ---------------------------------------------------------------------------- dense


def dense(data: bytes, dtype: int = wire.DTYPE_FLOAT32, shape: list[int] | None = None) -> wire.Tensor:
    return wire.Tensor(dense=data, dtype=dtype, shape=shape or [])  # type: ignore[arg-type]


BAD_DENSE: dict[str, tuple[wire.Tensor, str]] = {
    "no dtype": (dense(b"\0" * 4, wire.DTYPE_UNSPECIFIED), "has dtype unspecified; allowed are float32"),
    "bfloat16": (dense(b"\0" * 4, wire.DTYPE_BFLOAT16), "has dtype bfloat16"),
    "unknown dtype": (dense(b"\0" * 4, 77), "has dtype 77"),
    "torn bytes": (dense(b"\0" * 7), "has 7 bytes, which is no whole number of float32"),
    "torn int64": (dense(b"\0" * 12, wire.DTYPE_INT64), "no whole number of int64"),
    "fewer than the shape": (dense(b"\0" * 8, shape=[3]), r"has 2 values, but its shape \[3\] takes 3"),
    "more than the shape": (dense(b"\0" * 16, shape=[3]), "has 4 values"),
    "negative sizes": (dense(b"\0" * 16, shape=[-2, -2]), "sizes are not negative"),
    "product wraps to what came": (dense(b"\0" * 4, shape=[2**32, 2**32, 1]), "at most 2147483648 items"),
    "nothing of very much": (dense(b"", shape=[0, 2**62, 2**62]), "at most 2147483648 items"),
    "nine dimensions": (dense(b"\0" * 4, shape=[1] * 9), "has 9 dimensions; at most 8"),
}


@pytest.mark.parametrize("name", BAD_DENSE)
def test_impossible_tensors_are_refused_by_name(name: str) -> None:
    tensor, message = BAD_DENSE[name]
    with pytest.raises(UserError, match=message) as raised:
        from_message(tensor)
    assert WHERE in str(raised.value)


def test_a_shape_of_a_million_sizes_costs_nothing() -> None:
    tensor = dense(b"\0" * 4, shape=[2**62] * 1_000_000)
    start = time.process_time()
    with pytest.raises(UserError, match="has 1000000 dimensions") as raised:
        from_message(tensor)
    assert time.process_time() - start < 0.5
    assert len(str(raised.value)) < 300


def test_a_long_name_is_not_repeated_in_full() -> None:
    request = wire.ForwardBackwardRequest(model_id="m", seq_id=1)
    request.data.add().loss_fn_inputs["x" * 100_000].CopyFrom(dense(b"\0"))
    with pytest.raises(UserError, match=r"data\[0\]\.loss_fn_inputs\['xxx") as raised:
        pass_of(request)
    assert len(str(raised.value)) < 300


def test_int32_is_widened() -> None:
    values = np.array([[-(2**31), 2**31 - 1]], "<i4")
    found = from_message(dense(values.tobytes(), wire.DTYPE_INT32, [1, 2]))
    assert (found.dtype, found.shape) == ("int64", (1, 2))
    assert array(found).tolist() == values.tolist()


def test_numbers_that_are_not_finite_travel() -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0], "<f4")
    assert from_message(dense(values.tobytes())).data == values.tobytes()


# ---------------------------------------------------------------------------- JSON


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(FLOATS, max_size=12))
def test_json_floats(values: list[float]) -> None:
    found = from_json(data=values, dtype="float32")
    assert found.data == np.array(values, "<f4").tobytes()
    assert found.shape == (len(values),)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=12))
def test_json_integers(values: list[int]) -> None:
    found = from_json(data=values, dtype="int64", shape=[1, len(values)])
    assert array(found).tolist() == [values]


def test_json_integers_may_be_written_as_floats() -> None:
    assert array(from_json(data=[1.0, 2, -0.0], dtype="int64")).tolist() == [1, 2, 0]
    assert array(from_json(data=[1, 2], dtype="float32")).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data": [1, 1.5], "dtype": "int64"}, "dtype int64 and holds 1.5 at 1"),
        ({"data": [1e300], "dtype": "int64"}, "does not fit into int64"),
        ({"data": [2**63], "dtype": "int64"}, "does not fit into int64"),
        ({"data": [1e300], "dtype": "float32"}, "does not fit into float32"),
        ({"data": [10**400], "dtype": "float32"}, "does not fit into float32"),
        ({"data": [1], "dtype": "int64", "shape": [2]}, r"has 1 values, but its shape \[2\] takes 2"),
        ({"data": [1], "dtype": "int64", "shape": [-1, -1]}, "sizes are not negative"),
        ({"data": [], "dtype": "int64", "shape": [0, 2**80]}, "at most 2147483648 items"),
        ({"data": [1], "dtype": "int64", "shape": [1] * 9}, "has 9 dimensions"),
    ],
)
def test_impossible_json_tensors_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        from_json(**fields)
    assert WHERE in str(raised.value)


# ---------------------------------------------------------------------------- unknown fields


def nested(place: Callable[[wire.ForwardBackwardRequest], Any]) -> wire.ForwardBackwardRequest:
    """A request with a field 99 = 1 in one of its messages."""
    request = wire.ForwardBackwardRequest(model_id="m", seq_id=1)
    datum = request.data.add()
    datum.model_input.add().encoded_text.tokens = b"\1\0\0\0"
    datum.loss_fn_inputs["weights"].CopyFrom(dense(b"\0" * 4))
    datum.loss_fn_inputs["target_tokens"].CopyFrom(message_of(GOOD))
    request.loss_fn_config_v2["beta"].number = 1.0
    datum.model_input_spans.add().prompt_tokens.length = 1
    pass_of(request)
    place(request).MergeFromString(b"\x98\x06\x01")
    return request


PLACES: dict[str, Callable[[wire.ForwardBackwardRequest], Any]] = {
    "the request": lambda request: request,
    "data[0]": lambda request: request.data[0],
    "data[0].model_input[0]": lambda request: request.data[0].model_input[0],
    "data[0].model_input[0] ": lambda request: request.data[0].model_input[0].encoded_text,
    "data[0].loss_fn_inputs['weights']": lambda request: request.data[0].loss_fn_inputs["weights"],
    "data[0].loss_fn_inputs['target_tokens']": lambda request: (
        request.data[0].loss_fn_inputs["target_tokens"].sparse_csr
    ),
    "loss_fn_config['beta']": lambda request: request.loss_fn_config_v2["beta"],
}


@pytest.mark.parametrize("where", PLACES)
def test_a_field_that_is_not_known_is_refused_by_its_number(where: str) -> None:
    with pytest.raises(UserError) as raised:
        pass_of(nested(PLACES[where]))
    assert str(raised.value).startswith(where.strip())
    assert "protobuf field 99" in str(raised.value)


def test_a_field_that_is_not_known_in_provenance_means_nothing() -> None:
    pass_of(nested(lambda request: request.data[0].model_input_spans[0]))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=1000)
def test_any_bytes_are_a_tensor_or_a_user_error(body: bytes) -> None:
    tensor = wire.Tensor()
    try:
        tensor.ParseFromString(body)
    except DecodeError:  # what protobuf itself refuses is not the point here
        return
    try:
        found = from_message(tensor)
    except UserError as error:
        assert WHERE in str(error)
        return
    assert len(found.data) == int(np.prod(found.shape)) * np.dtype(found.dtype).itemsize

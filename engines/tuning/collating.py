"""Packing the data of several operations, each of a run of its own, into passes.

The rows of one operation are neighbours in a pass, so that its run's adapter is one segment. Within it data are sorted
by length, so that equal lengths attend in one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.losses import LOSSES
from engines.operations import Datum, Forward, ForwardBackward
from engines.tuning.judging import Shares
from engines.tuning.transfer import to_device

Operation = Forward | ForwardBackward


class Pack(NamedTuple):
    """Sequences one after the other: int64 `tokens` and `positions`, both [1, T]."""

    tokens: Tensor
    positions: Tensor


class Piece(NamedTuple):
    """What one pass holds of operation number `operation`: the pass's rows, and the data in them, whose own rows are
    counted from the first of these."""

    operation: int
    rows: slice
    shares: Shares


class Batch(NamedTuple):
    """The data of one pass. `lengths` are those of its sequences; `targets` int64 [T, K] are on the device, K the
    largest of the data; what pads a datum to K has weight 0."""

    pack: Pack
    lengths: Sequence[int]
    targets: Tensor
    pieces: Sequence[Piece]


class _Planned(NamedTuple):
    """Positions of the data of one operation that one pass holds."""

    operation: int
    members: list[int]


def collate(
    device: torch.device,
    operations: Sequence[Operation],
    pass_tokens: int,
    *,
    together: bool,
    members: Sequence[Sequence[int]] | None = None,
) -> Iterator[Batch]:
    """Passes of at most `pass_tokens` tokens (a longer datum goes alone), of several operations if `together`.

    `members` are the positions of those data of each operation that are wanted; all of them when not given.
    """
    wanted = members or [range(len(operation.data)) for operation in operations]
    for planned in _plan(operations, wanted, pass_tokens, together):
        yield _batch(device, operations, planned)


def pack(
    device: torch.device,
    sequences: Sequence[Sequence[int] | NDArray[np.generic]],
    firsts: Sequence[int] | None = None,
) -> Pack:
    """Lay token sequences one after the other on the device; `firsts` are the positions that they begin at."""
    tokens = np.concatenate([np.asarray(tokens, dtype=np.int64) for tokens in sequences])
    begins = firsts or [0] * len(sequences)
    positions = np.concatenate(
        [np.arange(first, first + len(tokens)) for first, tokens in zip(begins, sequences, strict=True)]
    )
    both = to_device(torch.from_numpy(np.stack([tokens, positions])), device)
    return Pack(both[:1], both[1:])


def width_of(datum: Datum) -> int:
    """K of a datum; 1 for targets of shape [N]."""
    shape = datum.loss_inputs["target_tokens"].shape
    return shape[1] if len(shape) == 2 else 1


def _plan(
    operations: Sequence[Operation], wanted: Sequence[Sequence[int]], pass_tokens: int, together: bool
) -> Iterator[list[_Planned]]:
    """Operations with as many targets at a position share passes: none is padded for another's sake."""
    widths = [max(width_of(datum) for datum in operation.data) for operation in operations]
    planned: list[_Planned] = []
    tokens = 0
    for number in sorted(range(len(operations)), key=widths.__getitem__):
        data = operations[number].data
        if planned and not (together and widths[number] == widths[planned[-1].operation]):
            yield planned
            planned, tokens = [], 0
        for member in sorted(wanted[number], key=lambda i: data[i].tokens.shape[0]):
            length = data[member].tokens.shape[0]
            if planned and tokens + length > pass_tokens:
                yield planned
                planned, tokens = [], 0
            if not planned or planned[-1].operation != number:
                planned.append(_Planned(number, []))
            planned[-1].members.append(member)
            tokens += length
    if planned:
        yield planned


def _batch(device: torch.device, operations: Sequence[Operation], planned: Sequence[_Planned]) -> Batch:
    data = [operations[number].data[member] for number, members in planned for member in members]
    width = max(width_of(datum) for datum in data)
    targets = torch.from_numpy(_rows(data, "target_tokens", width, np.int64))
    pieces = []
    start = 0
    for number, members in planned:
        piece = _piece(device, operations[number], number, members, width, start)
        pieces.append(piece)
        start = piece.rows.stop
    return Batch(
        pack(device, [datum.tokens.array() for datum in data]),
        [datum.tokens.shape[0] for datum in data],
        to_device(targets, device),
        pieces,
    )


def _piece(
    device: torch.device, operation: Operation, number: int, members: Sequence[int], width: int, start: int
) -> Piece:
    data = [operation.data[member] for member in members]
    lengths = [datum.tokens.shape[0] for datum in data]
    ends = list(accumulate(lengths))
    own = [slice(end - length, end) for length, end in zip(lengths, ends, strict=True)]
    shares = Shares(members, own, _inputs(device, operation, data, width))
    return Piece(number, slice(start, start + ends[-1]), shares)


def _inputs(
    device: torch.device, operation: Operation, data: Sequence[Datum], width: int
) -> dict[str, Tensor]:
    """The loss inputs besides the targets; of the settings per token those that any of the data brings. A traced loss
    takes its own from the data."""
    if operation.custom is not None:
        return {}
    spec = LOSSES[operation.loss]
    settings = spec.with_defaults(operation.loss_config)
    names = [name for name in spec.inputs if name != "target_tokens"]
    names += [name for name in spec.per_token if any(name in datum.loss_inputs for datum in data)]
    rows = [_rows(data, name, width, np.float32, settings.get(name)) for name in names]
    inputs = to_device(torch.from_numpy(np.stack(rows)), device)
    return dict(zip(names, inputs, strict=True))


def _rows(
    data: Sequence[Datum], name: str, width: int, dtype: type[np.generic], setting: float | None = None
) -> NDArray[np.generic]:
    """One loss input of all data as [T, width], padded with zeros on the right. A datum that lacks it has the setting
    for every token."""
    parts = []
    for datum in data:
        length = datum.tokens.shape[0]
        given = datum.loss_inputs.get(name)
        part = np.full((length, width), setting) if given is None else given.array().reshape(length, -1)
        parts.append(np.pad(part, ((0, 0), (0, width - part.shape[1]))) if part.shape[1] < width else part)
    return np.concatenate(parts).astype(dtype, copy=False)

"""What `EngineConfig.options` may hold for the fake engine."""

from __future__ import annotations

from typing import Any

import msgspec

from engines.interface import LoadError
from engines.misfit import misfit_of


class FakeOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the fake engine, most of them to see what others make of an engine that is slow, breaks or dies."""

    delay_s: float = 0.0
    """Seconds that every training call and every decoding step takes longer."""
    crash_on_token: int | None = None
    """The process dies at once when a training datum or a prompt contains this token."""
    hang_on_token: int | None = None
    """The call never ends when a training datum or a prompt contains this token."""
    fail_on_token: int | None = None
    """The call raises RuntimeError when a training datum or a prompt contains this token."""
    drift: float = 0.0
    """The loss that it tells is higher by this for each epoch, so that a later process gives other numbers."""
    max_context: int = 8192
    """Longest sequence in tokens."""
    max_rank: int = 64


def read_options(options: dict[str, Any]) -> FakeOptions:
    """The options of a configuration; raises LoadError naming what is unknown, mistyped or out of range."""
    try:
        read = msgspec.convert(options, FakeOptions)
    except msgspec.ValidationError as error:
        allowed = ", ".join(FakeOptions.__struct_fields__)
        raise LoadError(f"{misfit_of(error, 'options')}; options of the fake engine are {allowed}") from error
    if read.delay_s < 0:
        raise LoadError(f"options.delay_s is {read.delay_s}; it must not be negative")
    if read.max_context < 2 or read.max_rank < 1:
        raise LoadError(
            f"options.max_context is {read.max_context} and options.max_rank {read.max_rank}; "
            "they must be at least 2 and 1"
        )
    return read

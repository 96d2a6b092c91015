"""Receiving an adapter from outside: two at a time, so nobody keeps a place by sending nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from gateway.admin import imports
from gateway.errors import NoRoom, PayloadTooLarge


async def body(parts: Sequence[bytes], *, ends: bool = True) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if not ends:
        await asyncio.sleep(60)


async def test_what_has_come_is_written(tmp_path: Path) -> None:
    target = tmp_path / "upload.tar"
    await imports._receive(body([b"ab", b"", b"cd"]), target, 4)
    assert target.read_bytes() == b"abcd"


async def test_what_is_too_large_is_refused_with_its_limit(tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLarge, match=r"larger than 4 bytes.*max_import_bytes"):
        await imports._receive(body([b"abc", b"de"]), tmp_path / "upload.tar", 4)


async def test_a_sender_who_falls_silent_gives_its_place_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.bodies._PATIENCE_S", 0.05)
    with pytest.raises(NoRoom, match="slowly"):
        async with asyncio.timeout(10):
            await imports._receive(body([b"ab"], ends=False), tmp_path / "upload.tar", 1 << 30)

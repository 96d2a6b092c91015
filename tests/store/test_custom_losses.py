"""Custom losses are kept as they were first stored."""

from __future__ import annotations

from dataclasses import replace

from gateway.store import Store
from gateway.store.records import StoredLoss
from tests.store.conftest import a_session


async def test_the_first_of_a_name_stays(store: Store) -> None:
    session = await store.sessions.create(a_session())
    loss = StoredLoss(
        f"{session.session_id}:loss:0", session.owner, session.session_id, "näme", b"\0\xff", None, 12.5
    )
    await store.custom_losses.create(loss)
    await store.custom_losses.create(replace(loss, body=b"other", error="refused"))
    assert await store.custom_losses.get(loss.loss_id) == loss
    assert await store.custom_losses.get(f"{session.session_id}:loss:1") is None

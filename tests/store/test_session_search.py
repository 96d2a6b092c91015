"""Which sessions are active, by their heartbeats."""

from __future__ import annotations

import time

from gateway.store import Store
from gateway.store.session_search import SessionSearch, StatusFilter, is_alive
from gateway.store.sessions import Assignment, Finish
from tests.store.conftest import a_session

ACTIVE = SessionSearch(statuses=(StatusFilter("active"),))


async def test_a_silent_session_is_neither_active_nor_finished(store: Store) -> None:
    now = time.time()
    alive = await store.sessions.create(a_session(heartbeat_at=now - 200))
    silent = await store.sessions.create(a_session(heartbeat_at=now - 400))
    done = await store.sessions.create(a_session(heartbeat_at=now))
    await store.sessions.finish(Finish(done.session_id, "success", None))
    assert [found.session for found in await store.sessions.search(ACTIVE, 9)] == [alive]
    finished = SessionSearch(statuses=(StatusFilter("client_finished"),))
    [found] = await store.sessions.search(finished, 9)
    assert found.session.session_id == done.session_id
    assert is_alive(alive)
    assert not is_alive(silent)
    assert not is_alive(found.session)
    await store.sessions.beat(silent.session_id)
    assert len(await store.sessions.search(ACTIVE, 9)) == 2


async def test_sessions_of_the_same_moment_are_told_apart_by_their_ids(store: Store) -> None:
    made = [await store.sessions.create(a_session(session_id=name, created_at=5.1234567)) for name in "abc"]
    [first, second] = await store.sessions.search(SessionSearch(), 2)
    assert [first.session, second.session] == [made[2], made[1]]
    for moment in (5.1234567, 5.123457):  # as it is, and as the wire rounds it
        rest = await store.sessions.search(SessionSearch(before=(moment, "b")), 9)
        assert [found.session for found in rest] == [made[0]]
    gone = await store.sessions.search(SessionSearch(before=(6.0, "no such")), 9)
    assert len(gone) == 3


async def test_metadata_keys_may_be_any_text(store: Store) -> None:
    session = await store.sessions.create(
        a_session(user_metadata={"a.b": "x", "ü $[0]": "ä", 'q"\\': "z", "n": 3})
    )
    for pairs, there in (
        ({"a.b": "x"}, True),
        ({"ü $[0]": "ä"}, True),
        ({'q"\\': "z"}, True),
        ({"n": "3"}, True),
        ({"a.b": "y"}, False),
        ({"a": "x"}, False),
    ):
        found = await store.sessions.search(SessionSearch(user_metadata=pairs), 9)
        assert ([each.session for each in found] == [session]) is there


async def test_an_assignment_is_written_down(store: Store) -> None:
    session = await store.sessions.create(a_session())
    await store.sessions.assign_project(Assignment(session.session_id, "p"))
    await store.sessions.assign_project(Assignment("no such", "p"))
    after = await store.sessions.get(session.session_id)
    assert after is not None
    assert after.project_id == "p"
    [entry] = await store.audit.between("alice", time.time() - 60, time.time() + 60, None)
    assert entry.event == "project_session_assigned"
    assert await store.sessions.metadata_of({session.session_id, "no such"}) == {session.session_id: {}}
    assert await store.sessions.metadata_of(set()) == {}

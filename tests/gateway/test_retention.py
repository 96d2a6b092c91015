"""What a client meets when its session is over, its results have gone, its unnamed weights are not kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection, update

from gateway.app import create_app
from gateway.engine_settings import EngineSettings
from gateway.settings import Settings
from gateway.state import Gateway
from gateway.store import schema
from gateway.store.records import DutyRecord
from tests.gateway.conftest import json_datum

FAKE = EngineSettings(name="fake", plugin="fake", base_model="fake/model")
DAY = 86400.0


class Client:
    """Requests to an application in this process, whose database the tests can set back in time."""

    def __init__(self, http: httpx.AsyncClient, gateway: Gateway) -> None:
        self.http = http
        self.gateway = gateway

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(f"/api/v1/{path}", json=body)

    async def outcome(self, request_id: str) -> dict[str, Any]:
        while True:
            answer = await self.post("retrieve_future", request_id=request_id)
            body: dict[str, Any] = answer.json()
            if body.get("type") != "try_again":
                return body

    async def begin(self) -> str:
        """A session with a run."""
        session = str((await self.post("create_session")).json()["session_id"])
        config = {"rank": 4, "seed": 1}
        promise = await self.post(
            "create_model", session_id=session, model_seq_id=0, base_model="fake/model", lora_config=config
        )
        assert (await self.outcome(promise.json()["request_id"]))["type"] == "create_model"
        return session

    async def train(self, run: str, seq_id: int) -> str:
        given = {"data": [json_datum([1, 2, 3, 4])], "loss_fn": "cross_entropy"}
        answer = await self.post(
            "forward_backward", model_id=run, seq_id=seq_id, forward_backward_input=given
        )
        return str(answer.json()["request_id"])

    async def age(self, seconds: float) -> None:
        """Everything is so much older, for whoever asks the database."""
        tables = {
            schema.sessions: ("created_at", "heartbeat_at", "finished_at"),
            schema.runs: ("created_at", "last_request_at"),
            schema.futures: ("created_at", "finished_at"),
            schema.results: ("stored_at",),
            schema.samplers: ("created_at",),
            schema.duties: ("last_run_at",),
        }

        def work(connection: Connection, _: list[None]) -> list[None]:
            for table, columns in tables.items():
                connection.execute(update(table).values({name: table.c[name] - seconds for name in columns}))
            return [None]

        await self.gateway.store.database.write(work, None)

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it did not come to pass in 10 s")

    async def rounds(self) -> None:
        """Returns when every duty has been performed once more, but for those that seldom are."""

        async def frequent() -> list[DutyRecord]:
            found = await self.gateway.store.duties.all()
            return [duty for duty in found if not duty.name.startswith("stray ")]

        begun = {duty.name: duty.runs for duty in await frequent()}
        for _ in range(1000):
            duties = await frequent()
            if len(duties) >= 6 and all(duty.runs >= begun.get(duty.name, 0) + 2 for duty in duties):
                assert [duty.last_error for duty in duties if duty.failures] == []
                return
            await asyncio.sleep(0.02)
        raise AssertionError("the duties are not performed")


@asynccontextmanager
async def a_client(tmp_path: Path, **settings: Any) -> AsyncIterator[Client]:
    chosen = Settings(
        data_dir=tmp_path,
        engines=(FAKE,),
        duty_s=0.05,
        sqlite_synchronous="NORMAL",
        result_cache_bytes=0,
        **settings,
    )
    app = create_app(chosen)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as http:
            yield Client(http, app.state.gateway)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with a_client(tmp_path) as made:
        yield made


async def test_a_silent_session_ends_its_memory_is_freed_and_its_run_goes_on(client: Client) -> None:
    session = await client.begin()
    run = f"{session}:train:0"
    assert "loss_fn_outputs" in await client.outcome(await client.train(run, 1))
    lane = client.gateway.fleet.dispatchers["fake"].training
    assert run in lane.residency.runs
    await client.age(DAY / 2)
    await client.rounds()
    assert (await client.post("session_heartbeat", session_id=session)).status_code == 200
    assert run in lane.residency.runs
    await client.age(DAY + 1)
    await client.until(lambda: run not in lane.residency.runs)
    refused = await client.post("session_heartbeat", session_id=session)
    assert refused.status_code == 410 and "not heard of" in refused.json()["detail"]
    assert (
        await client.post("create_model", session_id=session, model_seq_id=1, base_model="fake/model")
    ).status_code == 410
    assert "loss_fn_outputs" in await client.outcome(await client.train(run, 2))  # from its log
    await client.rounds()
    assert run in lane.residency.runs  # it has worked since its session ended


async def test_a_result_is_gone_after_its_time_and_never_nothing(client: Client) -> None:
    session = await client.begin()
    run = f"{session}:train:0"
    request_id = await client.train(run, 1)
    first = await client.outcome(request_id)
    assert await client.outcome(request_id) == first
    await client.age(6 * DAY)
    await client.rounds()
    assert await client.outcome(request_id) == first
    await client.age(2 * DAY)
    await client.rounds()
    gone = await client.post("retrieve_future", request_id=request_id)
    assert gone.status_code == 410 and "not kept any more" in gone.json()["detail"]
    again = await client.train(run, 1)  # sent again, it is still the first one, which was performed
    assert again == request_id
    assert (await client.post("retrieve_future", request_id=request_id)).status_code == 410
    later = await client.outcome(await client.train(run, 2))
    assert later["loss_fn_outputs"] == first["loss_fn_outputs"]  # no step between them


async def test_a_call_that_was_forgotten_is_gone_and_one_that_never_was_is_not_found(client: Client) -> None:
    session = await client.begin()
    made = await client.post(
        "create_sampling_session", session_id=session, sampling_session_seq_id=0, base_model="fake/model"
    )
    sampler = made.json()["sampling_session_id"]
    ask = {
        "sampling_params": {"max_tokens": 2},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
    }
    promise = await client.post("asample", sampling_session_id=sampler, seq_id=0, **ask)
    request_id = promise.json()["request_id"]
    assert "sequences" in await client.outcome(request_id)
    unknown = await client.post("retrieve_future", request_id=f"{sampler}:7")
    assert unknown.status_code == 404
    await client.age(31 * DAY)
    await client.rounds()
    assert await client.gateway.store.futures.get(request_id) is None
    assert (await client.post("retrieve_future", request_id=request_id)).status_code == 410
    assert (await client.post("retrieve_future", request_id="other:sample:0:1")).status_code == 404
    fresh = await client.begin()
    assert (await client.post("retrieve_future", request_id=f"{fresh}:sample:0:1")).status_code == 404


@pytest.mark.parametrize("kind", ["snapshot", "inflight"])
async def test_unnamed_weights_are_gone_and_the_base_model_does_not_answer_for_them(
    client: Client, kind: str
) -> None:
    session = await client.begin()
    run = f"{session}:train:0"
    body = {"model_id": run, "seq_id": 1, "sampling_session_seq_id": 0, "kind": kind}
    saved = await client.outcome((await client.post("save_weights_for_sampler", **body)).json()["request_id"])
    sampler = saved["sampling_session_id"]
    stored = await client.gateway.store.samplers.get(sampler)
    assert stored is not None and stored.folder is not None
    folder = client.gateway.settings.storage_dir / stored.folder
    assert folder.exists()
    ask = {
        "sampling_params": {"max_tokens": 2},
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
    }
    first = await client.post("asample", sampling_session_id=sampler, seq_id=0, **ask)
    assert "sequences" in await client.outcome(first.json()["request_id"])
    assert (await client.post(f"sessions/{session}/finish", reason={"type": "success"})).status_code == 200
    await client.rounds()
    assert folder.exists()
    await client.age(DAY + 1)
    await client.until(lambda: not folder.exists())
    refused = await client.post("asample", sampling_session_id=sampler, seq_id=1, **ask)
    assert refused.status_code == 410 and "save them under a name" in refused.json()["detail"]
    promoted = await client.http.post(f"/admin/v1/samplers/{sampler}/promote", json={"name": "late"})
    assert promoted.status_code == 410


async def test_what_lies_within_its_time_stays(client: Client) -> None:
    session = await client.begin()
    run = f"{session}:train:0"
    request_id = await client.train(run, 1)
    first = await client.outcome(request_id)
    began = time.monotonic()
    await client.rounds()
    assert await client.outcome(request_id) == first
    assert run in client.gateway.fleet.dispatchers["fake"].training.residency.runs
    assert time.monotonic() - began < 60

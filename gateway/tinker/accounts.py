"""Who calls, what they have used, and what has been done: keys and tokens, usage by the hour, the audit log.

An owner sees their own; an admin's key sees everybody's, which is what the wire calls the organization's.
"""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal

from fastapi import Query, Response
from pydantic import AwareDatetime

from gateway.auth import Caller, Who
from gateway.errors import Forbidden, NotFound, Unprocessable
from gateway.state import Running
from gateway.store.records import AuditEntry, AuditTopic
from gateway.tinker.accounting import events_of
from gateway.tinker.edge import json_reply, moment
from gateway.tinker.routing import topic
from gateway.tinker.texts import texts_of
from gateway.tokens import ORGANIZATION, owner_urn

router = topic()

_LONGEST_WINDOW = timedelta(days=14)
_HOUR = 3600
_GIGABYTE = 10**9


@router.post("/auth/token")
async def auth_token(caller: Who, gateway: Running) -> dict[str, str]:
    """A token that counts as the caller's key for a while, as long as the key exists."""
    return {"jwt": gateway.keys.token_for(caller)}


@router.get("/auth/apikey/me")
async def get_own_key(caller: Who) -> dict[str, Any]:
    """The key that the request carries, itself or by a token. Without keys: who one is all the same."""
    key = caller.key
    return {
        "key_id": key.key_id if key is not None else 0,
        "name": (key.label or key.key_hash[:12]) if key is not None else "this machine",
        "note": "admin" if caller.admin else "",
        "details": {"org_details": {"name": ORGANIZATION}, "user_details": {"email": caller.owner}},
    }


@router.delete("/auth/apikey/me")
async def delete_own_key(caller: Who, gateway: Running) -> Response:
    """Remove the key that the request carries; its tokens end with it. The last key is not removed this way."""
    if caller.key is None:
        raise NotFound("there are no API keys here, so there is none to delete")
    if not await gateway.store.keys.remove_unless_last(caller.key.key_hash):
        raise Forbidden(
            "this is the only key, and without keys the gateway serves its own machine only, whoever calls; remove it "
            "there with `python -m gateway.keys remove`"
        )
    gateway.keys.forget()
    return json_reply({})


@router.get("/audit")
async def audit(
    caller: Who,
    gateway: Running,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: Annotated[date | None, Query(description="UTC; left out: today")] = None,
) -> dict[str, Any]:
    """What was done on a day, in order. There are no teams here, so nothing was done with one."""
    if event_type == "teams":
        return {"entries": []}
    chosen = day if day is not None else datetime.now(UTC).date()
    start = datetime(chosen.year, chosen.month, chosen.day, tzinfo=UTC).timestamp()
    wanted = None if event_type == "all" else AuditTopic(event_type)
    entries = await gateway.store.audit.between(_whose(caller), start, start + 24 * _HOUR, wanted)
    return {"entries": [_entry_json(entry) for entry in entries]}


def _entry_json(entry: AuditEntry) -> dict[str, Any]:
    details = {**entry.details, "owner": owner_urn(entry.owner)}
    if "reader" in details:
        details["reader"] = owner_urn(details["reader"])
    body = {"timestamp": moment(entry.at), "event": entry.event, "event_details": details}
    path = entry.details.get("tinker_path")
    if path is not None:
        body |= {"tinker_path": path, "model_id": path.removeprefix("tinker://").partition("/")[0]}
    if "purpose" in entry.details:
        body["purpose"] = entry.details["purpose"]
    return body


@router.get("/billing/usage/events")
async def usage_events(
    caller: Who, gateway: Running, starting_on: AwareDatetime, ending_before: AwareDatetime
) -> dict[str, Any]:
    """Tokens, saves and stored bytes by the hour. There are no prices here, so no costs."""
    start, end = _window(starting_on, ending_before)
    owner = _whose(caller)
    rows = await gateway.store.usage.rows(owner, start, end)
    intervals = await gateway.store.usage.intervals(owner, start, end)
    sessions = await gateway.store.sessions.metadata_of({row.session_id for row in rows if row.session_id})
    return {
        "data": events_of(rows, intervals, start, end, time.time()),
        "sessions": {
            session_id: {"user_metadata": texts_of(metadata)} for session_id, metadata in sessions.items()
        },
    }


def _window(starting_on: datetime, ending_before: datetime) -> tuple[int, int]:
    """Whole hours. Raises Unprocessable."""
    for name, value in (("starting_on", starting_on), ("ending_before", ending_before)):
        if value.timestamp() % _HOUR:
            raise Unprocessable(f"{name} is {value.isoformat()}; it must be a full hour, UTC", param=name)
    if starting_on > datetime.now(UTC):
        raise Unprocessable(
            f"starting_on is {starting_on.isoformat()}, which is in the future", param="starting_on"
        )
    if not timedelta(0) < ending_before - starting_on <= _LONGEST_WINDOW:
        raise Unprocessable(
            f"ending_before is {ending_before.isoformat()}; it must be after starting_on, by at most 14 days",
            param="ending_before",
        )
    return int(starting_on.timestamp()), int(ending_before.timestamp())


@router.get("/billing/usage/checkpoints/current")
async def current_storage(
    caller: Who, gateway: Running, project_id: Annotated[str | None, Query(max_length=1_000)] = None
) -> dict[str, Any]:
    """Checkpoints and their bytes as they are now, by project and owner."""
    data = []
    for stored in await gateway.store.usage.stored_now(_whose(caller), project_id):
        item = {
            "org_user_urn": owner_urn(stored.owner),
            "user_name": stored.owner,
            "checkpoint_count": stored.count,
            "size_bytes": stored.size_bytes,
            "size_gigabytes": stored.size_bytes / _GIGABYTE,
        }
        data.append(item if stored.project_id is None else {**item, "project_id": stored.project_id})
    return {"data": data}


def _whose(caller: Caller) -> str | None:
    """Whose things a caller sees; None: everybody's."""
    return None if caller.admin else caller.owner

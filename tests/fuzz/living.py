"""What the fuzzing of a gateway shares: things that exist there, and what no answer may be."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

KEY = "tml-fuzz"
HEADERS = {"X-API-Key": KEY}
LONGEST_S = 20.0
"""An answer that takes longer is a hang; nothing here waits for a result for more than `hold_s`."""
SETTINGS: dict[str, Any] = {"hold_s": "0.2", "gap_timeout_s": "2", "max_body_bytes": "2000000"}
"""Of the gateway that is fuzzed."""

_REPEATED_BY_SDK = (408, 409, 429)
_SIGNS = ("Traceback (most", 'File "/', '.py", line')


class Answer(Protocol):
    """What the clients' answers have in common."""

    @property
    def status_code(self) -> int: ...

    @property
    def text(self) -> str: ...


class Broken(AssertionError):
    """An answer that must not be."""


@dataclass
class Tally:
    """How many inputs were answered with which status, and what was promised."""

    statuses: Counter[int] = field(default_factory=Counter)
    promised: list[str] = field(default_factory=list)

    def check(self, what: str, status: int, text: str) -> None:
        """Count an answer. Raises Broken for a server's error, a status that means `later`, or a traceback."""
        self.statuses[status] += 1
        if status >= 500 or status in _REPEATED_BY_SDK:
            raise Broken(f"{what}\nis answered {status}: {text[:2000]}")
        if any(sign in text for sign in _SIGNS):
            raise Broken(f"{what}\nshows a traceback: {text[:2000]}")

    def promise(self, answer: Answer) -> None:
        """Remember the promise that an answer may be."""
        if answer.status_code == 200 and answer.text.startswith('{"request_id"'):
            self.promised.append(json.loads(answer.text)["request_id"])

    @property
    def inputs(self) -> int:
        """How many inputs were answered."""
        return self.statuses.total()


@dataclass(frozen=True)
class Living:
    """Ids of things that exist, by the names of the fields and parameters that take such."""

    by_field: dict[str, list[Any]]

    def put_into(self, value: Any, draw: random.Random) -> None:
        """Replace some ids of an input, in place, by living ones, so that it gets past the first look-up."""
        if isinstance(value, dict):
            for name, old in value.items():
                if name in self.by_field and draw.random() < 0.7:
                    value[name] = draw.choice(self.by_field[name])
                else:
                    self.put_into(old, draw)
        elif isinstance(value, list):
            for item in value:
                self.put_into(item, draw)


def living_things(http: httpx.Client) -> Living:
    """A session with a run, a sampler and a checkpoint."""
    session = _posted(http, "create_session", {})["session_id"]
    new = {
        "session_id": session,
        "model_seq_id": 0,
        "base_model": "fake/model",
        "lora_config": {"rank": 4, "seed": 1},
    }
    run = _posted(http, "create_model", new)["model_id"]
    save = {"model_id": run, "seq_id": 1, "path": "kept"}
    path = _fulfilled(http, _posted(http, "save_weights", save)["request_id"])["path"]
    opened = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "fake/model"}
    sampler = _posted(http, "create_sampling_session", opened)["sampling_session_id"]
    return Living(
        {
            "session_id": [session],
            "model_id": [run],
            "run_id": [run],
            "sampling_session_id": [sampler],
            "sampler_id": [sampler],
            "base_model": ["fake/model"],
            "model": ["fake/model", path],
            "model_path": [path],
            "tinker_path": [path],
            "request_id": [f"{run}:1", f"{run}:7", f"{sampler}:1"],
            "kind": ["weights", "sampler_weights", "snapshot"],
            "name": ["kept"],
            "seq_id": list(range(2, 60)),
            "dtype": ["int64", "float32"],
            "loss_fn": ["cross_entropy", "ppo", "importance_sampling"],
        }
    )


def finished(http: httpx.Client, tally: Tally) -> Counter[str]:
    """What became of every promise: `done` or the category of its failure. Raises Broken for one that the server
    itself is to blame for, or that is never fulfilled."""
    ends: Counter[str] = Counter()
    for request_id in dict.fromkeys(tally.promised):
        body = _fulfilled(http, request_id)
        if body.get("category") in ("server", "unknown"):
            raise Broken(f"{request_id} failed in the server: {body}")
        ends[body.get("category", "done")] += 1
    return ends


def check_log(log: Path) -> None:
    """Raises Broken when the gateway, or an engine, has logged an error of its own."""
    text = log.read_text()
    if "Traceback" in text:
        raise Broken(f"the log has a traceback: {text[text.index('Traceback') :][:3000]}")


def _posted(http: httpx.Client, route: str, body: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = http.post(f"/api/v1/{route}", json=body).raise_for_status().json()
    return answer


def _fulfilled(http: httpx.Client, request_id: str) -> dict[str, Any]:
    for _ in range(300):
        body: dict[str, Any] = _posted(http, "retrieve_future", {"request_id": request_id})
        if body.get("type") != "try_again":
            return body
    raise Broken(f"{request_id} was accepted and is never fulfilled")

"""Damaged bytes: what the official SDK has sent, protobuf and JSON, with bytes changed before and after compression."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import zstandard

from gateway.tinker import wire_pb2 as wire
from tests.fuzz.living import HEADERS, LONGEST_S, Tally, living_things
from tests.gateway.conftest import datum
from tests.tinker.material import captured, captured_requests, sdk_body

PROTOBUF = "application/x-protobuf"
_PASSES = [f"fwdbwd_request_{number}" for number in range(1, 7)]
_EXTREME = [b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff\xff\xff\xff\x0f", b"\xff" * 9 + b"\x01", b"\x80" * 12]
_AT_A_TIME = 6


@dataclass(frozen=True, slots=True)
class Shot:
    """One input."""

    route: str
    headers: dict[str, str]
    body: bytes

    def __str__(self) -> str:
        return f"POST {self.route} {self.headers} {self.body[:1500]!r}"


Change = Callable[[bytes, random.Random], bytes]


def _flip_bits(body: bytes, draw: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(draw.choice([1, 1, 2, 8])):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _cut(body: bytes, draw: random.Random) -> bytes:
    return body[: draw.randrange(len(body))]


def _insert(body: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(body) + 1)
    return body[:at] + draw.choice([*_EXTREME, draw.randbytes(draw.randint(1, 16))]) + body[at:]


def _overwrite(body: bytes, draw: random.Random) -> bytes:
    at, new = draw.randrange(len(body)), draw.choice(_EXTREME)
    return body[:at] + new + body[at + len(new) :]


def _repeat_slice(body: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(body))
    end = draw.randint(start, min(len(body), start + 64))
    return body[:end] + body[start:end] * draw.randint(1, 20) + body[end:]


def _remove_slice(body: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(body))
    return body[:start] + body[draw.randint(start, min(len(body), start + 32)) :]


CHANGES: tuple[Change, ...] = (_flip_bits, _cut, _insert, _overwrite, _repeat_slice, _remove_slice)


def damaged(body: bytes, draw: random.Random) -> bytes:
    """The body with up to three changes; now and then with none."""
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        if body:
            body = draw.choice(CHANGES)(body, draw)
    return body


class Shots:
    """Inputs without end for one run. An accepted operation is followed by the next number, so that many are performed;
    whatever ends the run is followed by another run."""

    def __init__(self, http: httpx.Client, seed: int) -> None:
        self._http = http
        self._draw = random.Random(seed)
        self._living = living_things(http)
        self._seq_id = 2
        names = [captured(name) for name in _PASSES] + [sdk_body([datum(n), datum(n + 1)]) for n in range(4)]
        self._passes = [wire.ForwardBackwardRequest.FromString(body) for body in names]
        self._texts = [(f"/api/v1/{request.route}", request.body) for request in captured_requests()]

    def next(self) -> Shot:
        """Something to send."""
        self._living.by_field["seq_id"] = [self._seq_id]
        if self._draw.random() < 0.7:
            message = self._draw.choice(self._passes)
            message.model_id = self._living.by_field["model_id"][0]
            message.seq_id = self._seq_id
            return _packed("/api/v1/forward_backward", PROTOBUF, message.SerializeToString(), self._draw)
        route, body = self._draw.choice(self._texts)
        alive = json.loads(json.dumps(body))
        self._living.put_into(alive, self._draw)
        return _packed(route, "application/json", json.dumps(alive).encode(), self._draw)

    def answered(self, answer: httpx.Response) -> None:
        """What became of it."""
        if answer.status_code == 410:
            self._living, self._seq_id = living_things(self._http), 2
        elif f'{self._living.by_field["model_id"][0]}:{self._seq_id}"' in answer.text:
            self._seq_id += 1


def _packed(route: str, media_type: str, plain: bytes, draw: random.Random) -> Shot:
    """Damaged before compression, after it, or both."""
    headers = {"content-type": media_type}
    encoding = draw.choice(["", "zstd", "zstd", "gzip"])
    body = damaged(plain, draw)
    if encoding:
        headers["content-encoding"] = encoding
        body = zstandard.compress(body) if encoding == "zstd" else gzip.compress(body, 1)
        if draw.random() < 0.4:
            body = damaged(body, draw)
    return Shot(route, headers, body)


def fuzz(url: str, tally: Tally, count: int, seed: int) -> None:
    """That many inputs, from several threads. Raises Broken for the first answer that must not be."""
    shares = [count // _AT_A_TIME + (index < count % _AT_A_TIME) for index in range(_AT_A_TIME)]
    with ThreadPoolExecutor(_AT_A_TIME) as threads:
        senders = [
            threads.submit(_send, url, tally, share, seed + 1000 * index)
            for index, share in enumerate(shares)
        ]
        for sender in senders:
            sender.result()


def _send(url: str, tally: Tally, count: int, seed: int) -> None:
    with httpx.Client(base_url=url, headers=HEADERS, timeout=LONGEST_S) as http:
        shots = Shots(http, seed)
        for _ in range(count):
            shot = shots.next()
            answer = http.post(shot.route, content=shot.body, headers=shot.headers)
            tally.check(str(shot), answer.status_code, answer.text)
            tally.promise(answer)
            shots.answered(answer)

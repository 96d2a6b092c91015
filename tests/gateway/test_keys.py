"""Who is served: nobody but this machine without keys, and with keys each owner their own things only."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.gateway.conftest import begin_run, clean, outcome, send_pass, send_step
from tests.gateway.foreign import SIGNED, foreign_requests
from tests.served import ServedGateway

ROOT = Path(__file__).parents[2]
TOKENS = [3, 1, 4, 1, 5]


def keys_command(gateway: ServedGateway, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m gateway.keys`, as an operator runs it beside the gateway."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    environment["TANDEM_DATA_DIR"] = str(gateway.data_dir)
    command = [sys.executable, "-m", "gateway.keys", *arguments]
    return subprocess.run(
        command, check=False, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def make_key(gateway: ServedGateway, owner: str, *options: str) -> str:
    done = keys_command(gateway, "add", owner, *options)
    assert done.returncode == 0, done.stderr
    key, _, explanation = done.stdout.partition("\n")
    assert key.startswith("tml-")
    assert owner in explanation
    return key


def client_with(gateway: ServedGateway, key: str | None, **headers: str) -> httpx.Client:
    given = {"X-API-Key": key, **headers} if key is not None else headers
    return httpx.Client(base_url=gateway.url, headers=given, timeout=60, trust_env=False)


# ---------------------------------------------------------------------------- without keys


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """It listens on every address, as one behind a proxy or in a container would."""
    gateway = ServedGateway(tmp_path_factory.mktemp("open"), host="0.0.0.0")
    gateway.start()
    yield gateway
    gateway.stop()
    gateway.close()


@pytest.mark.parametrize("headers", [{}, {"X-API-Key": "tml-any"}, {"Authorization": "Bearer sk-any"}])
def test_this_machine_is_served_whatever_key_it_sends(
    open_gateway: ServedGateway, headers: dict[str, str]
) -> None:
    with client_with(open_gateway, None, **headers) as http:
        assert http.get("/api/v1/training_runs").status_code == 200
        assert http.get("/v1/models").status_code == 200
        assert http.get("/admin/v1/runs").status_code == 200


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"X-Forwarded-For": "127.0.0.1"}, "x-forwarded-for"),
        ({"X-Forwarded-For": "203.0.113.9"}, "203.0.113.9"),
        ({"X-Forwarded-Proto": "https"}, "x-forwarded-proto"),
        ({"X-Forwarded-Host": "localhost"}, "x-forwarded-host"),
        ({"X-Real-IP": "127.0.0.1"}, "x-real-ip"),
        ({"Forwarded": "for=127.0.0.1"}, "forwarded"),
        ({"Via": "1.1 proxy"}, "via"),
        ({"Host": "evil.example"}, "evil.example"),
        ({"Host": "127.0.0.1.evil.example:8000"}, "evil.example"),
        ({"Host": "localhost@evil.example"}, "evil.example"),
        ({"Origin": "https://evil.example"}, "evil.example"),
        ({"Origin": "null"}, "null"),
        ({"Origin": "http://localhost.evil.example"}, "evil.example"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/api/v1/training_runs", "/v1/models", "/admin/v1/runs", "/api/v1/tokenizer?model=x"]
)
def test_what_may_come_from_elsewhere_is_refused_with_the_reason(
    open_gateway: ServedGateway, headers: dict[str, str], reason: str, path: str
) -> None:
    with client_with(open_gateway, "tml-any", **headers) as http:
        answer = http.get(path)
    assert answer.status_code == 403
    assert "no API keys are configured" in answer.text
    assert "gateway.keys add" in answer.text
    assert reason in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost:8000"},
        {"Host": "LOCALHOST"},
        {"Host": "[::1]:80"},
        {"Origin": "http://localhost:3000"},
    ],
)
def test_names_of_this_machine_are_no_matter(open_gateway: ServedGateway, headers: dict[str, str]) -> None:
    with client_with(open_gateway, None, **headers) as http:
        assert http.get("/api/v1/training_runs").status_code == 200


def test_a_peer_that_is_not_this_machine_is_refused(open_gateway: ServedGateway) -> None:
    address = _other_address()
    if address is None:
        pytest.skip("this machine has no address but its loopback")
    url = f"http://{address}:{open_gateway.port}/api/v1/training_runs"
    answer = httpx.get(url, headers={"Host": "localhost", "X-API-Key": "tml-any"}, trust_env=False)
    assert answer.status_code == 403
    assert address in answer.json()["detail"]
    assert httpx.get(f"http://{address}:{open_gateway.port}/healthz", trust_env=False).status_code == 200


def _other_address() -> str | None:
    """An address of this machine that is not its loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
    return None if address.startswith("127.") else address


# ---------------------------------------------------------------------------- with keys


@dataclass(frozen=True)
class Shared:
    """A gateway with two owners; alice has one of everything."""

    gateway: ServedGateway
    keys: dict[str, str]
    things: dict[str, str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    gateway = ServedGateway(tmp_path_factory.mktemp("keys"))
    keys = {owner: make_key(gateway, owner) for owner in ("alice", "bob")}
    gateway.start()
    with client_with(gateway, keys["alice"]) as http:
        things = _one_of_everything(http)
    yield Shared(gateway, keys, things)
    gateway.stop()
    gateway.close()


def _one_of_everything(http: httpx.Client) -> dict[str, str]:
    run_id = begin_run(http)
    session_id = run_id.partition(":")[0]
    future = send_pass(http, run_id, 1, TOKENS).json()["request_id"]
    outcome(http, future)
    save = {"model_id": run_id, "seq_id": 2, "path": "mine"}
    path = outcome(http, http.post("/api/v1/save_weights", json=save).json()["request_id"])["path"]
    body = {"session_id": session_id, "sampling_session_seq_id": 0, "model_path": path}
    sampler = http.post("/api/v1/create_sampling_session", json=body).json()["sampling_session_id"]
    return {"run": run_id, "session": session_id, "future": future, "path": path, "sampler": sampler}


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({}, "an API key is needed"),
        ({"X-API-Key": ""}, "an API key is needed"),
        ({"Authorization": "Basic YTpi"}, "an API key is needed"),
        ({"Authorization": "Bearer"}, "an API key is needed"),
        ({"X-API-Key": "tml-guess"}, "not known here"),
        ({"Authorization": "Bearer tml-guess"}, "not known here"),
        ({"X-API-Key": "ключ".encode().decode("latin-1")}, "not known here"),
    ],
)
@pytest.mark.parametrize(
    "path", ["/api/v1/training_runs", "/v1/models", "/admin/v1/runs", "/api/v1/tokenizer?model=x"]
)
def test_without_a_known_key_nothing_is_served(
    shared: Shared, headers: dict[str, str], reason: str, path: str
) -> None:
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    with httpx.Client(base_url=shared.gateway.url, headers=encoded, trust_env=False) as http:
        answer = http.get(path)
    assert answer.status_code == 401
    assert reason in answer.text


def test_every_route_wants_a_key(shared: Shared) -> None:
    """Whatever the page of all routes lists, but the health checks, and what a signed address opens."""
    with httpx.Client(base_url=shared.gateway.url, trust_env=False) as http:
        paths = http.get("/openapi.json").json()["paths"]
        open_routes = set()
        for path, methods in paths.items():
            for method in methods:
                answer = http.request(method, path.replace("{", "").replace("}", ""))
                if answer.status_code != 401:
                    open_routes.add(path)
    assert open_routes == {"/healthz", "/api/v1/healthz", "/readyz", *SIGNED}


def test_both_headers_are_taken_and_forwarded_requests_are_served(shared: Shared) -> None:
    key = shared.keys["alice"]
    for headers in (
        {"X-API-Key": key},
        {"Authorization": f"Bearer {key}"},
        {"Authorization": f"bearer {key}", "X-Forwarded-For": "203.0.113.9", "Host": "tandem.example"},
    ):
        with client_with(shared.gateway, None, **headers) as http:
            runs = http.get("/api/v1/training_runs").json()["training_runs"]
        assert [run["training_run_id"] for run in runs] == [shared.things["run"]]


def test_a_signed_address_opens_only_with_its_signature(shared: Shared) -> None:
    things = shared.things
    with client_with(shared.gateway, shared.keys["alice"]) as http:
        for path in (
            f"/api/v1/downloads/1/{things['run']}/weights/mine/archive.tar",
            f"/api/v1/sessions/{things['session']}/trace",
        ):
            forged = f"{path}?expires=9999999999&signature={'0' * 64}"
            assert http.get(path).status_code == 422, path
            assert http.get(forged).status_code == 403, http.get(forged).text


def test_what_is_somebody_elses_does_not_exist(shared: Shared) -> None:
    with client_with(shared.gateway, shared.keys["bob"]) as http:
        own = http.post("/api/v1/create_session", json={}).json()["session_id"]
        for method, path, body in foreign_requests(shared.things, own):
            answer = http.request(method, path, json=body)
            where = f"{method} {path} {answer.text}"
            if "request_id" in answer.text and answer.status_code == 200:  # told by the promise
                answer_body = outcome(http, answer.json()["request_id"])
                assert "there is no" in answer_body["error"], where
            else:
                assert answer.status_code == 404, where
        for listing in ("training_runs", "checkpoints", "sessions"):
            listed = http.get(f"/api/v1/{listing}").text
            assert shared.things["session"] not in listed
    with client_with(shared.gateway, shared.keys["alice"]) as http:  # nothing has happened to her things
        checkpoints = http.get(f"/api/v1/training_runs/{shared.things['run']}/checkpoints").json()[
            "checkpoints"
        ]
        assert [(row["tinker_path"], row["public"]) for row in checkpoints] == [
            (shared.things["path"], False)
        ]
        assert "expires_at" not in checkpoints[0]
        step = send_step(http, shared.things["run"], 3).json()
        assert outcome(http, step["request_id"])["type"] == "optim_step"


def test_every_route_with_an_id_has_been_tried(shared: Shared) -> None:
    """A new route must be added to `foreign_requests`, or to those that hold nothing of an owner's."""
    nobodys = {
        "/healthz", "/api/v1/healthz", "/readyz", "/api/v1/tokenizer", "/api/v1/tokenizer/{file}",
        "/api/v1/client/config", "/api/v1/client/dynamic_config", "/api/v1/get_server_capabilities",
        "/api/v1/create_session", "/api/v1/telemetry", "/api/v1/sessions", "/api/v1/training_runs",
        "/api/v1/checkpoints", "/admin/v1/engines", "/admin/v1/engines/{name}",
        "/admin/v1/engines/{name}/replicas", "/admin/v1/metrics", "/admin/v1/duties",
        "/admin/v1/runs", "/admin/v1/sessions", "/admin/v1/samplers", "/admin/v1/futures", "/admin/v1/checkpoints",
        "/v1/models", "/oai/api/v1/models", "/api/v1/auth/token", "/api/v1/auth/apikey/me", "/api/v1/audit",
        "/api/v1/billing/usage/events", "/api/v1/billing/usage/checkpoints/current", "/api/v1/sessions/search",
        *SIGNED,
    }  # fmt: skip
    names = {"run_id": "RUN", "session_id": "SESSION", "request_id": "FUTURE", "sampler_id": "SAMPLER"}
    things = {"run": "RUN", "session": "SESSION", "future": "FUTURE", "sampler": "SAMPLER", "path": "PATH"}
    tried = {(method.lower(), path) for method, path, _ in foreign_requests(things, "OWN")}
    paths = httpx.get(f"{shared.gateway.url}/openapi.json", trust_env=False).json()["paths"]
    for path, methods in paths.items():
        filled = path.replace("{kind}", "weights").replace("{name}", "mine").replace("{model}", "PATH")
        for parameter, value in names.items():
            filled = filled.replace(f"{{{parameter}}}", value)
        for method in methods:
            assert path in nobodys or (method, filled) in tried, f"{method} {path}"


def test_published_weights_may_be_read_by_all_and_changed_by_their_owner(shared: Shared) -> None:
    path = shared.things["path"]
    publish = f"/api/v1/training_runs/{shared.things['run']}/checkpoints/weights/mine/publish"
    with (
        client_with(shared.gateway, shared.keys["alice"]) as alice,
        client_with(shared.gateway, shared.keys["bob"]) as bob,
    ):
        assert alice.post(publish).status_code == 200
        session = bob.post("/api/v1/create_session", json={}).json()["session_id"]
        load = {"session_id": session, "model_seq_id": 0, "path": path}
        promise = bob.post("/api/v1/load_weights", json=load).json()
        assert outcome(bob, promise["request_id"])["type"] == "load_weights"
        assert bob.post("/api/v1/weights_info", json={"tinker_path": path}).status_code == 200
        for method, address in (("DELETE", publish), ("DELETE", publish.removesuffix("/publish"))):
            assert bob.request(method, address).status_code == 404
        assert alice.delete(publish).status_code == 200
        assert bob.post("/api/v1/weights_info", json={"tinker_path": path}).status_code == 404


def test_removal_counts_within_seconds(shared: Shared) -> None:
    key = make_key(shared.gateway, "carol", "--label", "laptop")
    with client_with(shared.gateway, key) as http:
        _wait_for(http, 200)
        listed = keys_command(shared.gateway, "list").stdout
        [line] = [line for line in listed.splitlines() if "carol" in line]
        assert "laptop" in line
        assert key not in listed
        removed = keys_command(shared.gateway, "remove", line.split()[0])
        assert "carol" in removed.stdout
        _wait_for(http, 401)


def _wait_for(http: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + 5
    while (found := http.get("/api/v1/training_runs").status_code) != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_the_command_refuses_what_makes_no_sense(shared: Shared) -> None:
    for arguments, reason in (
        (("remove", ""), "2 keys"),
        (("add", "a\nb"), "owner"),
        (("add", "x" * 201), "owner"),
    ):
        done = keys_command(shared.gateway, *arguments)
        assert done.returncode == 1
        assert reason in done.stderr
        assert "Traceback" not in done.stderr


def test_keys_are_nowhere_but_with_their_owners(shared: Shared) -> None:
    """Not in the database, not in the log, not in what is told to anybody."""
    secrets = [*shared.keys.values(), "tml-in-an-event-of-the-sdk"]
    with client_with(shared.gateway, shared.keys["alice"]) as http:
        events = [{"event": "GENERIC_EVENT", "event_data": {"api_key": secrets[-1], "key": secrets[0]}}]
        assert http.post("/api/v1/telemetry", json={"events": events}).json() == {"status": "accepted"}
        assert http.post("/api/v1/telemetry", content=b"no JSON " + secrets[0].encode()).status_code == 200
        wrong = http.get("/api/v1/training_runs", headers={"X-API-Key": secrets[0] + "x"})
        assert secrets[0] not in wrong.text
        told = [
            http.get(path).text
            for path in ("/admin/v1/runs", "/admin/v1/sessions", "/openapi.json", "/readyz")
        ]
    files = [path for path in shared.gateway.data_dir.rglob("*") if path.is_file()]
    assert {"tandem.db", "gateway.log"} <= {path.name for path in files}
    contents = b"\n".join([*(path.read_bytes() for path in files), *(text.encode() for text in told)])
    for secret in secrets:
        assert secret.encode() not in contents
        assert secret.removeprefix("tml-").encode() not in contents
    assert b"alice" in contents  # what is looked for would be found


def test_errors_of_the_openai_dialect_have_its_shape(shared: Shared) -> None:
    with client_with(shared.gateway, "tml-guess") as http:
        body = json.loads(http.get("/v1/models").text)
    assert body["error"]["code"] == "invalid_api_key"
    assert (
        clean(httpx.get(f"{shared.gateway.url}/api/v1/training_runs", trust_env=False))["code"]
        == "invalid_api_key"
    )

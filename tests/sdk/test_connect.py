"""`connect`, and the official SDK's `get_tokenizer` after it, in programs of their own with a cache of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sdk import ConnectionFailed, connect
from sdk.environment import go_without_proxies, takes_proxies
from tests.official import LEAVE
from tests.sdk.conftest import Place
from tests.served import ServedGateway

ROOT = Path(__file__).parents[2]
TEXT = "héllo"
TOKENS = list(TEXT.encode())  # the numpy model's tokens are bytes

CONNECTING = f"""
import json, sys
from sdk import connect
from transformers import AutoTokenizer

with connect(sys.argv[1]) as service:
    client = service.create_lora_training_client("fake/model", rank=4).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    told = []
    by_name = AutoTokenizer.from_pretrained(pretrained_model_name_or_path="fake/model")
    for tokenizer in (client.get_tokenizer(), sampler.get_tokenizer(), by_name):
        chat = tokenizer.apply_chat_template([{{"role": "user", "content": "a"}}], tokenize=False)
        told.append([tokenizer.encode({TEXT!r}), tokenizer.decode(tokenizer.encode({TEXT!r})), chat])
    print(json.dumps(told), flush=True)
{LEAVE}
"""

BY_NAME = f"""
import json, sys
from transformers import AutoTokenizer

print(json.dumps(AutoTokenizer.from_pretrained(sys.argv[1]).encode({TEXT!r})))
"""


def run(program: str, argument: str, home: Path, **environment: str) -> Any:
    """What a program prints, as JSON; its cache of the hub is in `home`."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "TANDEM_", "TINKER_", "TRANSFORMERS_"))
    }
    kept |= {
        "HF_HOME": str(home),
        "PYTHONPATH": str(ROOT),
        "TINKER_TELEMETRY": "0",
        "NO_PROXY": "*",
        "no_proxy": "*",
        **environment,
    }
    command = [sys.executable, "-W", "ignore", "-c", program, argument]
    done = subprocess.run(
        command, env=kept, cwd=home, capture_output=True, text=True, timeout=110, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """A hub that knows no model, and what it was asked for."""
    asked: list[str] = []

    class Unknowing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Unknowing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_get_tokenizer_works_here_and_later_without_connecting(place: Place, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="cached files"):
        run(BY_NAME, "fake/model", tmp_path, HF_HUB_OFFLINE="1")
    told = run(CONNECTING, place.url, tmp_path, HF_HUB_OFFLINE="1")
    chat = "<|im_start|>user\na<|im_end|>\n"
    assert told == [[TOKENS, TEXT, chat]] * 3
    assert run(BY_NAME, "fake/model", tmp_path, HF_HUB_OFFLINE="1") == TOKENS


def test_get_tokenizer_works_with_a_hub_that_knows_no_such_model(
    place: Place, tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    endpoint, asked = hub
    with pytest.raises(RuntimeError, match="other/model"):
        run(BY_NAME, "other/model", tmp_path, HF_ENDPOINT=endpoint)
    assert any("other/model" in path for path in asked)
    told = run(CONNECTING, place.url, tmp_path, HF_ENDPOINT=endpoint)
    assert [tokens for tokens, _, _ in told] == [TOKENS] * 3
    assert not any("fake/model" in path for path in asked)


def test_a_cache_that_cannot_be_written_is_no_obstacle(place: Place, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file where the folder should be")
    told = run(
        CONNECTING, place.url, tmp_path, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub" / "cache")
    )
    assert [tokens for tokens, _, _ in told] == [TOKENS] * 3


def test_a_name_without_a_slash_is_served_too(tmp_path: Path) -> None:
    engines = [{"name": "n", "plugin": "fake", "base_model": "plain"}]
    gateway = ServedGateway(tmp_path / "data", engines)
    gateway.start()
    try:
        program = CONNECTING.replace("fake/model", "plain")
        told = run(program, gateway.url, tmp_path, HF_HUB_OFFLINE="1")
        assert [tokens for tokens, _, _ in told] == [TOKENS] * 3
        assert run(BY_NAME, "plain", tmp_path, HF_HUB_OFFLINE="1") == TOKENS
    finally:
        gateway.close()


def test_the_environments_proxies_are_not_asked_for_this_machine(
    place: Place, tmp_path: Path, hub: tuple[str, list[str]]
) -> None:
    proxy, asked = hub
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "elsewhere", "no_proxy": "elsewhere"}
    told = run(CONNECTING, place.url, tmp_path, HF_HUB_OFFLINE="1", **proxies)
    assert [tokens for tokens, _, _ in told] == [TOKENS] * 3
    assert asked == []


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "127.0.0.1"), ("a.example", "a.example,127.0.0.1"), ("b, 127.0.0.1", "b, 127.0.0.1"), ("*", "*")],
)
def test_a_host_that_goes_without_proxies_is_added_once(
    before: str | None, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {} if before is None else {"no_proxy": before}
    monkeypatch.setattr(os, "environ", changed)
    go_without_proxies("127.0.0.1")
    go_without_proxies("127.0.0.1")
    assert changed["no_proxy"] == after
    assert changed.get("NO_PROXY", after) == after


@pytest.mark.parametrize(
    ("host", "takes"),
    [
        *(("127.0.0.1", False), ("127.8.9.1", False), ("::1", False), ("localhost", False)),
        *(("10.0.0.1", True), ("gateway.example", True), ("", True)),
    ],
)
def test_only_this_machine_takes_no_proxies(host: str, takes: bool) -> None:
    assert takes_proxies(host) is takes


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connecting changes nothing in this process's environment."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")


@pytest.mark.usefixtures("direct")
def test_connecting_to_nothing_says_what_to_do() -> None:
    with pytest.raises(ConnectionFailed) as failed:
        connect("http://127.0.0.1:9")
    assert "nothing answers at http://127.0.0.1:9" in str(failed.value)
    assert "tandem serve" in str(failed.value)


SERVED = (200, '{"supported_models": [{"model_name": "a/b"}]}')
DESCRIBED = (200, '{"revision": "0123456789abcdef", "files": {"tokenizer.json": 2}}')


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ([(200, "<html>hello</html>")], "answers as no gateway of this version does"),
        ([(200, '{"models": []}')], "supported_models"),
        (
            [(401, '{"detail": "an API key is needed"}')],
            "asks for an API key: connect(url, key), or set TANDEM_API_KEY",
        ),
        ([(404, "no such page")], "answers 404: no such page"),
        ([SERVED, (500, '{"detail": "the disk is full"}')], "the disk is full"),
        ([SERVED, (200, '{"files": 3}')], "answers as no gateway of this version does"),
        ([SERVED, (200, '{"revision": "..", "files": {}}')], "revision '..'"),
        ([SERVED, DESCRIBED, (503, '{"detail": "the engine is down"}')], "the engine is down"),
        ([SERVED, DESCRIBED, None], "broke"),
    ],
)
def test_whatever_fails_while_connecting_is_one_error(
    answers: list[tuple[int, str] | None], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with answering(answers) as url, pytest.raises(ConnectionFailed) as failed:
        connect(url)
    assert words in str(failed.value)
    assert "\n" not in str(failed.value)


@contextmanager
def answering(answers: Sequence[tuple[int, str] | None]) -> Iterator[str]:
    """A server that gives these answers one after the other; for None it closes the connection."""
    left = list(answers)

    class Answering(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = left.pop(0)
            if answer is None:
                return
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1].encode())

        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

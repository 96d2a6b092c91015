"""Files of tokenizers in the hub's cache: whole, marked as ours, and never over what the hub has put there."""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from sdk import tokenizers
from tests.sdk.conftest import Place

FILES = {"config.json": b"{}", "tokenizer.json": b"[1]", "tokenizer_config.json": b"[2]"}
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Which folder this process would load each name from; the hub's cache is in `tmp_path`."""
    chosen: dict[str, Path] = {}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(tokenizers, "_prefer", chosen.__setitem__)
    return chosen


def gateway(
    files: dict[str, bytes] = FILES,
    revision: str = REVISION,
    status: int = 200,
    wait: Callable[[], Any] = lambda: None,
) -> httpx.Client:
    """A gateway that serves these files; `wait` is called before each is sent."""

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/api/v1/tokenizer":
            sizes = {name: len(content) for name, content in files.items()}
            return httpx.Response(status, json={"model": "a/b", "revision": revision, "files": sizes})
        wait()
        return httpx.Response(200, content=files[request.url.path.rpartition("/")[2]])

    return httpx.Client(base_url="http://gateway", transport=httpx.MockTransport(answer))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_files_lie_where_the_hub_would_put_them(preferred: dict[str, Path], tmp_path: Path) -> None:
    with gateway() as http:
        tokenizers.serve_tokenizer(http, "a/b")
    repository = tmp_path / "hub" / "models--a--b"
    assert (repository / "refs" / "main").read_text() == REVISION
    assert contents(repository / "snapshots" / REVISION) == FILES
    assert preferred == {"a/b": repository / "snapshots" / REVISION}
    assert [path.name for path in (tmp_path / "hub").iterdir()] == ["models--a--b"]


def test_a_changed_tokenizer_is_fetched_anew(preferred: dict[str, Path], tmp_path: Path) -> None:
    with gateway() as http:
        tokenizers.serve_tokenizer(http, "a/b")
    newer = "f" * 40
    with gateway({"tokenizer.json": b"new"}, newer) as http:
        tokenizers.serve_tokenizer(http, "a/b")
    repository = tmp_path / "hub" / "models--a--b"
    assert (repository / "refs" / "main").read_text() == newer
    assert contents(preferred["a/b"]) == {"tokenizer.json": b"new", "config.json": b"{}"}


def test_what_was_fetched_is_not_fetched_again(preferred: dict[str, Path]) -> None:
    fetched: list[None] = []
    for _ in range(2):
        with gateway(wait=lambda: fetched.append(None)) as http:
            tokenizers.serve_tokenizer(http, "a/b")
    assert len(fetched) == len(FILES)


def test_a_model_of_the_hubs_own_is_left_alone(preferred: dict[str, Path], tmp_path: Path) -> None:
    theirs = tmp_path / "hub" / "models--a--b" / "snapshots" / "abc"
    theirs.mkdir(parents=True)
    with gateway() as http:
        tokenizers.serve_tokenizer(http, "a/b")
    assert preferred == {}
    assert [path.name for path in theirs.parents[1].rglob("*")] == ["snapshots", "abc"]


@pytest.mark.parametrize("revision", [REVISION, "f" * 40], ids=["as before", "changed"])
def test_a_model_that_the_hub_brings_later_stays_the_newest(
    revision: str, preferred: dict[str, Path], tmp_path: Path
) -> None:
    with gateway() as http:
        tokenizers.serve_tokenizer(http, "a/b")
    repository = tmp_path / "hub" / "models--a--b"
    theirs = "abc0" * 10
    (repository / "snapshots" / theirs).mkdir()
    (repository / "refs" / "main").write_text(theirs)
    preferred.clear()
    with gateway(revision=revision) as http:
        tokenizers.serve_tokenizer(http, "a/b")
    assert (repository / "refs" / "main").read_text() == theirs
    assert list((repository / "snapshots" / theirs).iterdir()) == []
    assert preferred == {}


def test_a_model_that_the_hub_brings_meanwhile_stays_the_newest(
    preferred: dict[str, Path], tmp_path: Path
) -> None:
    main = tmp_path / "hub" / "models--a--b" / "refs" / "main"

    def download() -> None:
        main.parent.mkdir(exist_ok=True)
        main.write_text("abc0" * 10)

    with gateway(wait=download) as http:
        tokenizers.serve_tokenizer(http, "a/b")
    assert main.read_text() == "abc0" * 10


@pytest.mark.parametrize("status", [404, 503])
def test_a_model_that_is_not_ready_is_passed_over(
    status: int, preferred: dict[str, Path], tmp_path: Path
) -> None:
    with gateway(status=status) as http:
        tokenizers.serve_tokenizer(http, "a/b")
    assert preferred == {}
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize(
    ("files", "revision"),
    [
        ({"../evil": b""}, REVISION),
        ({"/etc/evil": b""}, REVISION),
        ({"..": b""}, REVISION),
        (FILES, "../../evil"),
        (FILES, ""),
    ],
)
def test_no_name_leads_out_of_the_folder(
    files: dict[str, bytes], revision: str, preferred: dict[str, Path], tmp_path: Path
) -> None:
    with gateway(files, revision) as http, pytest.raises(ValueError, match="the gateway names"):
        tokenizers.serve_tokenizer(http, "a/b")
    assert not (tmp_path / "hub").exists()


def test_programs_that_connect_at_once_all_get_it(preferred: dict[str, Path], tmp_path: Path) -> None:
    count = 4
    together = threading.Barrier(count)
    failed: list[BaseException] = []

    def program() -> None:
        try:
            with gateway(wait=lambda: together.wait(30)) as http:
                tokenizers.serve_tokenizer(http, "a/b")
        except Exception as error:  # boundary: a thread's error is told by the test
            failed.append(error)

    threads = [threading.Thread(target=program) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert contents(preferred["a/b"]) == FILES


class _HalfImported(types.ModuleType):
    """Like `transformers`: a name that is not there yet is imported when it is first asked for, and whoever asks
    meanwhile is told that there is none."""

    def __init__(self) -> None:
        super().__init__("transformers")
        self.importing = False

    def __getattr__(self, name: str) -> Any:
        if name != "AutoTokenizer" or self.importing:
            raise AttributeError(name)
        self.importing = True
        time.sleep(0.1)
        self.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda name: [name])
        return self.AutoTokenizer


def test_threads_that_ask_for_the_first_time_at_once_all_get_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = _HalfImported()
    monkeypatch.setitem(sys.modules, "transformers", transformers)
    monkeypatch.setattr(tokenizers, "_folders", {})
    names = [f"a/b{number}" for number in range(8)]
    together = threading.Barrier(len(names))
    failed: list[Exception] = []

    def ask(name: str) -> None:
        together.wait(30)
        try:
            tokenizers._prefer(name, Path("/folders") / name)
        except ImportError as error:
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert failed == []
    loaded = [transformers.AutoTokenizer.from_pretrained(name) for name in [*names, "other"]]
    assert loaded == [*([Path("/folders") / name] for name in names), ["other"]]


def test_what_the_gateway_serves_is_described_truly(place: Place) -> None:
    with httpx.Client(base_url=place.url, trust_env=False) as http:
        described = http.get("/api/v1/tokenizer", params={"model": "fake/model"}).json()
        assert described == http.get("/api/v1/tokenizer", params={"model": "fake/model"}).json()
        assert set(described["files"]) >= {"tokenizer.json", "tokenizer_config.json"}
        digest = hashlib.sha256()
        for name, length in sorted(described["files"].items()):
            content = http.get(f"/api/v1/tokenizer/{name}", params={"model": "fake/model"}).content
            assert len(content) == length
            digest.update(f"{name} {length}\n".encode() + content)
        assert described["revision"] == digest.hexdigest()[:40]
        for route, named in (("?model=other", "fake/model"), ("/weights?model=fake/model", "tokenizer.json")):
            missing = http.get(f"/api/v1/tokenizer{route}")
            assert missing.status_code == 404
            assert named in missing.json()["detail"]
        assert http.get("/api/v1/tokenizer").status_code == 422

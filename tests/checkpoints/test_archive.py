"""The tar of a checkpoint behind a signed address, as SDKs up to 0.34 download it."""

from __future__ import annotations

import io
import re
import tarfile
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import pytest

from tests.admin.conftest import finish, save
from tests.checkpoints.conftest import Place, route_of, trained_run
from tests.served import ServedGateway

ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]

IN_TAR = [*ADAPTER, "checkpoint_complete"]
"""The command line of SDKs 0.10 to 0.34 refuses to publish what lacks the empty last file."""


def address_of(http: httpx.Client, path: str) -> str:
    answer = http.get(route_of(path, "/archive"))
    assert answer.status_code == 302, answer.text
    return answer.headers["location"]


def stored_files(place: Place, before: set[Path]) -> dict[str, bytes]:
    [folder] = place.folders() - before
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_tar_has_the_adapter_byte_for_byte(
    place: Place, alice: httpx.Client, anybody: httpx.Client
) -> None:
    before = place.folders()
    path = save(alice, trained_run(alice), 3, "w")
    stored = stored_files(place, before)
    assert set(stored) == {*ADAPTER, "optimizer.safetensors", "checksums.json"}
    answer = alice.get(route_of(path, "/archive"))
    assert answer.status_code == 302
    expires = parsedate_to_datetime(answer.headers["expires"])
    assert 3500 < expires.timestamp() - time.time() <= 3600
    fetched = anybody.get(answer.headers["location"])
    assert fetched.status_code == 200
    assert int(fetched.headers["content-length"]) == len(fetched.content)
    assert "transfer-encoding" not in fetched.headers
    with tarfile.open(fileobj=io.BytesIO(fetched.content), mode="r") as tar:
        members = tar.getmembers()
        assert [member.name for member in members] == IN_TAR
        assert all(member.isreg() for member in members)
        for member in members:
            file = tar.extractfile(member)
            assert file is not None
            assert file.read() == stored.get(member.name, b"")


def test_following_the_redirect_with_the_key_gives_the_bytes(place: Place, alice: httpx.Client) -> None:
    """As SDK 0.1.0 does it, which wants the bytes of the tar, not its address."""
    path = save(alice, trained_run(alice), 3, "w", "sampler_weights")
    answer = alice.get(route_of(path, "/archive"), follow_redirects=True)
    assert answer.status_code == 200
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r") as tar:
        assert tar.getnames() == IN_TAR


def changed(address: str, **query: str) -> str:
    parts = urlsplit(address)
    return parts._replace(query=urlencode({**dict(parse_qsl(parts.query)), **query})).geturl()


def test_an_address_opens_nothing_else(place: Place, alice: httpx.Client, anybody: httpx.Client) -> None:
    run_id = trained_run(alice)
    one, other = save(alice, run_id, 3, "one"), save(alice, run_id, 4, "other")
    address = address_of(alice, one)
    later = str(int(dict(parse_qsl(urlsplit(address).query))["expires"]) + 1)
    for tried in (
        changed(address, expires=later),
        changed(address, signature="0" * 64),
        changed(address, signature="é"),
        address.replace("/one/", "/other/"),
        address.replace("/archive.tar", "/optimizer.safetensors"),
        address.replace("/weights/", "/sampler_weights/"),
        address.replace("/archive.tar", "/..%2f..%2fgateway.log"),
        address.replace(urlsplit(address).query, ""),
    ):
        answer = anybody.get(tried)
        assert answer.status_code in (403, 404, 422), (tried, answer.text)
        assert answer.headers["content-type"] == "application/json"
    with_signature = urlsplit(address).query
    for elsewhere in (route_of(other, "/archive"), "/api/v1/checkpoints", "/admin/v1/checkpoints"):
        assert anybody.get(f"{elsewhere}?{with_signature}").status_code in (401, 403)


def test_an_address_ends_with_its_checkpoint(
    place: Place, alice: httpx.Client, anybody: httpx.Client
) -> None:
    run_id = trained_run(alice)
    path = save(alice, run_id, 3, "w")
    address = address_of(alice, path)
    overwrite = {"model_id": run_id, "path": "w", "seq_id": 4, "overwrite": True}
    finish(alice, alice.post("/api/v1/save_weights", json=overwrite))
    assert anybody.get(address).status_code == 404  # never the files of another version
    renewed = address_of(alice, path)
    assert anybody.get(renewed).status_code == 200
    assert alice.delete(route_of(path)).status_code == 200
    assert anybody.get(renewed).status_code == 404


def test_an_address_is_good_no_longer_than_its_checkpoint(alice: httpx.Client) -> None:
    run_id = trained_run(alice)
    path = save(alice, run_id, 3, "w")
    assert alice.put(route_of(path, "/ttl"), json={"ttl_seconds": 3600}).status_code == 200
    time.sleep(1.1)
    expires = parsedate_to_datetime(alice.get(route_of(path, "/archive")).headers["expires"])
    assert expires.timestamp() - time.time() < 3599


def test_others_get_what_is_published_and_nothing_else(alice: httpx.Client, bob: httpx.Client) -> None:
    path = save(alice, trained_run(alice), 3, "w")
    assert bob.get(route_of(path, "/archive")).status_code == 404
    assert alice.post(route_of(path, "/publish")).status_code == 200
    assert bob.get(route_of(path, "/archive")).status_code == 302
    assert alice.delete(route_of(path, "/publish")).status_code == 200
    assert bob.get(route_of(path, "/archive")).status_code == 404


@pytest.mark.parametrize("route", ["archive", "external_weights_urls"])
def test_what_is_not_there_is_404(alice: httpx.Client, route: str) -> None:
    run_id = trained_run(alice)
    for path in (f"tinker://{run_id}/weights/none", "tinker://nobody:train:0/weights/none"):
        assert alice.get(route_of(path, f"/{route}")).status_code == 404
    assert alice.get(route_of(f"tinker://{run_id}/no_kind/none", f"/{route}")).status_code == 400


def test_the_address_leads_back_through_a_proxy(place: Place, alice: httpx.Client) -> None:
    """What the client wrote in its request is what it gets: host and port of the proxy, its scheme."""
    path = save(alice, trained_run(alice), 3, "w")
    forwarded = {"Host": "tandem.example:8443", "X-Forwarded-Proto": "https", "X-Forwarded-For": "10.0.0.9"}
    answer = alice.get(route_of(path, "/archive"), headers=forwarded)
    assert answer.headers["location"].startswith("https://tandem.example:8443/api/v1/downloads/")


def test_an_address_is_served_where_the_settings_say(tmp_path: Path) -> None:
    """With `public_url`, whatever the request was sent to; and the secret outlives the process."""
    gateway = ServedGateway(tmp_path, None, public_url="https://lab.example/tandem/")
    gateway.start()
    try:
        with httpx.Client(base_url=gateway.url, headers={"X-API-Key": "tml-x"}, trust_env=False) as http:
            path = save(http, trained_run(http), 3, "w")
            address = address_of(http, path)
        assert address.startswith("https://lab.example/tandem/api/v1/downloads/")
        assert gateway.stop() == 0
        gateway.start()
        local = re.sub("^https://lab.example/tandem", gateway.url, address)
        assert httpx.get(local, trust_env=False).status_code == 200
    finally:
        gateway.close()

"""The pages for people work on a machine that reaches nothing but the gateway."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from gateway.app import create_app
from gateway.settings import Settings


@pytest.fixture(scope="module")
def browser() -> Iterator[TestClient]:
    """The application as a browser reaches it, behind a proxy that cuts off a prefix; nothing is started."""
    yield TestClient(create_app(Settings(data_dir=Path("nowhere"))), base_url="http://testserver")


def test_whoever_opens_the_address_is_led_to_the_description(browser: TestClient) -> None:
    answer = browser.get("/")
    assert answer.status_code == 200
    assert answer.url.path == "/docs"
    assert answer.headers["content-type"].startswith("text/html")


def test_the_description_consists_of_nothing_from_elsewhere(browser: TestClient) -> None:
    page = browser.get("/docs")
    parts = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)'""", page.text)
    addresses = [one or other for one, other in parts]
    assert len(addresses) == 4, addresses  # program, style, icon, description
    assert "://" not in page.text
    found = {address: browser.get(str(page.url.join(address))) for address in addresses}
    for address, answer in found.items():
        assert answer.status_code == 200, address
        assert len(answer.content) > 1000, address
    assert b"SwaggerUIBundle" in next(
        answer.content for name, answer in found.items() if name.endswith(".js")
    )
    assert "/api/v1/forward_backward" in found["openapi.json"].json()["paths"]


@pytest.mark.parametrize("address", ["/", "/docs"])
def test_its_addresses_hold_behind_a_prefix(browser: TestClient, address: str) -> None:
    """A proxy serves the gateway under `/tandem/`: no address may begin at the proxy's root."""
    answer = browser.get(address, follow_redirects=False)
    named = (
        [answer.headers["location"]]
        if answer.has_redirect_location
        else re.findall(r"""(?:src|href)=["']([^"']+)""", answer.text)
    )
    outside = httpx.URL(f"https://example.org/tandem{address}")
    assert named
    for name in named:
        assert str(outside.join(name)).startswith("https://example.org/tandem/docs"), name

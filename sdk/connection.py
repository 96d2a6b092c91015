"""A ready `tinker.ServiceClient` for a gateway."""

from __future__ import annotations

from typing import Any

import httpx
import tinker

from sdk.environment import DEFAULT_URL
from sdk.tokenizers import serve_tokenizer

LOCAL_KEY = "tml-local"
"""The SDK insists on a key that begins with `tml-`; a gateway without configured keys takes any."""

_TIMEOUT_S = 60.0


class ConnectionFailed(Exception):
    """The gateway cannot be used; the message says why and what to do."""


def connect(url: str = DEFAULT_URL, key: str | None = None, **arguments: Any) -> tinker.ServiceClient:
    """A `ServiceClient` of the official SDK, for the gateway at `url`.

    `key` may be left out for a gateway on this machine that has no keys configured. Other arguments go to
    `ServiceClient`. The tokenizers of the models that the gateway serves are fetched, so that `get_tokenizer()` works
    for them. Raises ConnectionFailed.
    """
    key = key or LOCAL_KEY
    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=_TIMEOUT_S) as http:
        for model in _served_models(http, url):
            serve_tokenizer(http, model)
    return tinker.ServiceClient(base_url=url, api_key=key, **arguments)


def _served_models(http: httpx.Client, url: str) -> list[str]:
    try:
        response = http.get("/api/v1/get_server_capabilities")
    except httpx.TransportError as error:
        raise ConnectionFailed(
            f"nothing answers at {url} ({error}); start a gateway with `tandem serve` or `python3 quickstart.py`"
        ) from error
    if response.is_error:
        raise ConnectionFailed(f"{url} answered {response.status_code}: {_detail(response)}")
    return [model["model_name"] for model in response.json()["supported_models"]]


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]

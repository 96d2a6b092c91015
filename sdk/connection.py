"""A ready `tinker.ServiceClient` for a gateway."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import tinker

from sdk.answers import refusal, silence
from sdk.environment import client_environment, go_without_proxies, takes_proxies
from sdk.tokenizers import serve_tokenizer

LOCAL_KEY = "tml-local"
"""The SDK insists on a key that begins with `tml-`; a gateway without configured keys takes any."""

_TIMEOUT_S = 60.0
_UNAUTHORIZED = 401


class ConnectionFailed(Exception):
    """The gateway cannot be used; the message says why and what to do."""


class _Model(msgspec.Struct):
    model_name: str


class _Capabilities(msgspec.Struct):
    """As much of them as is needed here."""

    supported_models: list[_Model]


def connect(url: str | None = None, key: str | None = None, **arguments: Any) -> tinker.ServiceClient:
    """A `ServiceClient` of the official SDK, for the gateway at `url`; else TANDEM_URL, else http://127.0.0.1:8000.

    Without `key`, TANDEM_API_KEY or TINKER_API_KEY is taken; a gateway on this machine that has no keys configured
    needs none. Other arguments go to
    `ServiceClient`. The tokenizers of the models that the gateway serves are fetched, so that `get_tokenizer()` works
    for them. A gateway on this machine is reached without the environment's proxies; as the official SDK can be told so
    by NO_PROXY only, its address is added to that variable of this process. Raises ConnectionFailed.
    """
    environment = client_environment()
    url = environment.url if url is None else url
    given = key or environment.key
    key = given or LOCAL_KEY
    try:
        host = httpx.URL(url).host
        if not takes_proxies(host):
            go_without_proxies(host)
        _fetch_tokenizers(url, key)
    except httpx.HTTPStatusError as error:
        if given is None and error.response.status_code == _UNAUTHORIZED:
            raise ConnectionFailed(
                f"{url} asks for an API key: connect(url, key), or set TANDEM_API_KEY"
            ) from error
        raise ConnectionFailed(refusal(url, error.response)) from error
    except (httpx.RequestError, httpx.InvalidURL) as error:
        raise ConnectionFailed(silence(url, error)) from error
    except (ValueError, msgspec.DecodeError) as error:
        raise ConnectionFailed(f"{url} answers as no gateway of this version does: {error}") from error
    try:
        return tinker.ServiceClient(base_url=url, api_key=key, **arguments)
    except tinker.TinkerError as error:  # it looks at the key's form before it sends anything
        raise ConnectionFailed(str(error)) from error


def _fetch_tokenizers(url: str, key: str) -> None:
    """Of every served model."""
    with httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=_TIMEOUT_S) as http:
        capabilities = http.get("/api/v1/get_server_capabilities").raise_for_status()
        for model in msgspec.json.decode(capabilities.content, type=_Capabilities).supported_models:
            serve_tokenizer(http, model.model_name)

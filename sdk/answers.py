"""What a gateway's refusals, and the lack of an answer, are in sentences for whoever called."""

from __future__ import annotations

import errno

import httpx

from sdk.environment import DEFAULT_URL

_REFUSED = f"[Errno {errno.ECONNREFUSED}]"


def refusal(url: str, response: httpx.Response) -> str:
    """What the gateway says, in one line."""
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        # Not the gateway's own form: a proxy before it, or another program on that port.
        return f"{url} answers {response.status_code}: {' '.join(response.text.split())[:200] or 'nothing'}"


def silence(url: str, error: httpx.RequestError | httpx.InvalidURL) -> str:
    """Why there was no answer, and what to do."""
    if isinstance(error, httpx.InvalidURL):
        return f"{url!r} is no URL ({error}); one looks like {DEFAULT_URL}"
    if isinstance(error, httpx.UnsupportedProtocol):
        return f"{url!r} is no URL; one looks like {DEFAULT_URL}"
    if isinstance(error, httpx.ConnectError):
        if _REFUSED in str(error):
            return f"nothing answers at {url}; start it with `tandem serve`"
        return f"{url} cannot be reached: {str(error) or type(error).__name__}"  # no such host, a bad certificate
    if isinstance(error, httpx.TimeoutException):
        return f"{url} did not answer in time"
    return f"the connection to {url} broke: {str(error) or type(error).__name__}"

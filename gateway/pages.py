"""Pages for people: the description of every route, which works without the internet.

The framework's own page fetches its program from elsewhere; here it is the copy that the package `fastapi-offline`
carries. Addresses in the page are relative, so that it also works behind a proxy's prefix.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

DOCS = "/docs"
_STATIC = str(files("fastapi_offline") / "static")


def add_pages(app: FastAPI) -> None:
    """Serve `/docs` and what it consists of; `/` leads there."""
    app.add_route("/", _front, include_in_schema=False)
    app.add_route(DOCS, _docs, include_in_schema=False)
    app.mount(f"{DOCS}/files", StaticFiles(directory=_STATIC))


async def _front(request: object) -> Response:
    """Whoever opens the gateway's address in a browser."""
    return RedirectResponse(DOCS.lstrip("/"), 302)


async def _docs(request: object) -> HTMLResponse:
    """Every route: what it takes, what it answers, how it refuses."""
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Tandem: the routes",
        swagger_js_url="docs/files/swagger-ui-bundle.js",
        swagger_css_url="docs/files/swagger-ui.css",
        swagger_favicon_url="docs/files/favicon.png",
        swagger_ui_parameters={"docExpansion": "none", "filter": True, "validatorUrl": None},
    )

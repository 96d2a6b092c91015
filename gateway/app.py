"""The application: `uvicorn gateway.app:app` starts it all."""

from __future__ import annotations

import logging
import resource
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engines.distant_folders import StorageUnreachable
from engines.interface import UserError
from gateway import admin, openai, tinker
from gateway.auth import Keys
from gateway.bodies import Bodies, ReleasedBodies
from gateway.checkpoints import FolderRemovals
from gateway.completions import Completions
from gateway.data_folder import lock, make_private
from gateway.duties import Duties, standing_duties
from gateway.errors import ConfigurationError, StorageUnavailable, StoreUnavailable, TandemError
from gateway.fleet import Fleet
from gateway.futures import Futures
from gateway.health import router as health
from gateway.migrate import prepare
from gateway.models import router as models
from gateway.notices import Notices
from gateway.openai_backend import FleetBackend
from gateway.openapi import with_refusals
from gateway.pages import add_pages
from gateway.retention import Retention
from gateway.settings import Settings, load_settings
from gateway.shutdown import draining_on_signals
from gateway.signed_urls import SignedUrls
from gateway.snapshot_files import check_place
from gateway.state import Gateway
from gateway.store import Store
from gateway.store.database import Database
from gateway.store.outages import once_it_answers
from gateway.store.records import Future, Settled
from gateway.tokens import Tokens

log = logging.getLogger(__name__)

_FILES_NEEDED = 4096
_ECHO = 200
"""Characters of an address that an error repeats."""
_NOT_FOUND = 404
_OPENAI_PATHS = ("/v1/", "/oai/")


def create_app(settings: Settings | None = None) -> FastAPI:
    """An application with these settings, or with those of the environment."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            chosen = settings if settings is not None else load_settings()
            async with running_gateway(chosen) as gateway:
                app.state.gateway = gateway
                app.state.keys = gateway.keys
                app.state.bodies = Bodies(chosen.max_body_bytes, chosen.body_memory_bytes)
                app.state.backend = backend = FleetBackend(gateway)
                try:
                    yield
                finally:
                    await backend.close()
        except (ConfigurationError, StoreUnavailable) as error:
            app.state.problem = str(error)
            raise

    app = _Application(
        title="Tandem",
        summary="Train and sample adapters on shared base models.",
        description="Speaks the Tinker API, the OpenAI API, and an admin API of its own.",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
    )
    add_pages(app)
    app.router.routes.extend(tinker.routes)
    app.include_router(health)
    app.include_router(models)
    app.include_router(admin.router)
    for prefix in ("/v1", "/oai/api/v1"):
        app.include_router(openai.router, prefix=prefix)
    app.router.routes.extend(tinker.last_routes)
    app.add_exception_handler(TandemError, _answer_error)
    app.add_exception_handler(UserError, _answer_user_error)
    app.add_exception_handler(StorageUnreachable, _answer_unreachable)
    app.add_exception_handler(RequestValidationError, _answer_bad_parameter)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(ClientDisconnect, _answer_nobody)
    app.add_exception_handler(Exception, _answer_bug)
    app.add_middleware(_StorableAddresses)
    app.add_middleware(ReleasedBodies)
    app.add_middleware(_HeadAsGet)
    return app


class _Application(FastAPI):
    """FastAPI, whose description of this application says how requests are refused here, and which tells in a sentence
    why it cannot start."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def plainly(message: Message) -> None:
            problem: str | None = getattr(self.state, "problem", None)
            if message["type"] == "lifespan.startup.failed" and problem is not None:
                message = {**message, "message": problem}  # in place of a traceback, for the server's log
            await send(message)

        await super().__call__(scope, receive, plainly if scope["type"] == "lifespan" else send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = with_refusals(super().openapi())
        return self.openapi_schema


class _StorableAddresses:
    """Refuses addresses with a NUL character, which PostgreSQL cannot hold, so that nothing has such a name."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and ("\0" in scope["path"] or b"%00" in scope["query_string"]):
            refusal = HTTPException(400, "a NUL character stands in the address")
            response = _answer_http_error(Request(scope), refusal)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _HeadAsGet:
    """Answers HEAD wherever GET is answered, as GET without the body: proxies and health checks ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


@asynccontextmanager
async def running_gateway(settings: Settings) -> AsyncIterator[Gateway]:
    """Everything behind the routes, started in order and stopped in reverse."""
    _configure_log(settings.log_level)
    _check_file_limit()
    check_place(settings)
    make_private(settings)
    locked = lock(settings) if settings.embedded else None
    database = Database(settings.url, sqlite_synchronous=settings.sqlite_synchronous)
    store = Store(database)
    try:
        patience_s = 0.0 if settings.embedded else settings.database_wait_s
        await once_it_answers(lambda: prepare(database, settings), patience_s)
        store.start()
        secret = await once_it_answers(lambda: store.secrets.get("signing"), patience_s)
        gateway = _assemble(settings, store, secret)
        await once_it_answers(gateway.notices.start, patience_s)
        gateway.fleet.start()
        gateway.duties.start()
        try:
            answers = (gateway.futures.answer_waiters, gateway.completions.answer_waiters)
            with draining_on_signals(gateway.fleet, answers):
                yield gateway
        finally:
            await gateway.duties.stop()
            await gateway.fleet.drain()
            await gateway.notices.stop()
            await gateway.removals.close()
    finally:
        await store.close()
        if locked is not None:
            locked.close()


def _assemble(settings: Settings, store: Store, secret: bytes) -> Gateway:
    """Futures and fleet know each other: what is accepted goes to an engine, what is settled wakes who waits."""

    def held(engine: str) -> bool:
        return fleet.holds(engine)

    def accepted(future: Future, body: bytes | None) -> None:
        fleet.accept(future, body)
        if not future.open:
            completions.add(future)

    def settled(outcome: Settled | None) -> None:
        futures.settled(outcome)
        if outcome is not None:
            completions.add(outcome.future)
        if outcome is not None and outcome.orphaned_folder is not None:
            removals.append(outcome.orphaned_folder)

    def released(sampler_id: str) -> None:
        gateway.known_samplers.forget(sampler_id)

    removals = FolderRemovals(settings)
    completions = Completions(store)
    futures = Futures(store, accepted, settings.result_cache_bytes, held, settings.future_retention_s)
    fleet = Fleet(settings, store, futures.opened, settled, futures.lost)
    notices = Notices(settings, store, fleet, futures, completions)
    keys = Keys(store, settings.allowed_hosts, Tokens(secret, settings.token_lifetime_s))
    signed_urls = SignedUrls(secret, settings.public_url)
    retention = Retention(store, settings, fleet, released)
    duties = Duties(store, fleet.holder, settings.lease_s, standing_duties(store, settings, retention))
    gateway = Gateway(
        settings, store, futures, completions, fleet, keys, removals, signed_urls, duties, notices
    )
    return gateway


def _configure_log(level: str) -> None:
    """One line an event, to standard error, in the form of the engines' own; an application that has set up logging
    itself is left alone."""
    logger = logging.getLogger("gateway")
    logger.setLevel(level)
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s gateway: %(message)s"))
        logger.addHandler(handler)


def _check_file_limit() -> None:
    """Each waiting client holds a connection; the soft limit of open files is raised as far as it goes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < _FILES_NEEDED:
        log.warning(
            "only %d files may be open, so about %d clients can wait at a time; see `ulimit -n`",
            hard,
            hard - 64,
        )


def _answer_error(request: Request, error: Exception) -> Response:
    """The one place where an error of ours becomes an answer."""
    assert isinstance(error, TandemError)
    body = {"detail": error.message, "code": error.code}
    if error.param is not None:
        body["param"] = error.param
    return JSONResponse(body, error.status, dict(error.headers))


def _answer_unreachable(request: Request, error: Exception) -> Response:
    error_id = secrets.token_hex(6)
    log.error("error %s: %s %s: the storage: %s", error_id, request.method, request.url.path, error)
    sentence = f"the storage cannot be reached; the server's log says why under {error_id}"
    return _answer_error(request, StorageUnavailable(sentence))


def _answer_user_error(request: Request, error: Exception) -> Response:
    """Input that cannot be honoured, in a call that has no promise to tell it by."""
    return JSONResponse({"detail": str(error), "code": "bad_request"}, 400)


def _answer_bad_parameter(request: Request, error: Exception) -> Response:
    """A part of the path or the query that a route does not take."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][1:])
    message = f"{name} is {str(first.get('input'))[:80]!r}: {first['msg']}"
    return JSONResponse({"detail": message, "code": "unprocessable", "param": name}, 422)


def _answer_nobody(request: Request, error: Exception) -> Response:
    """Whoever asked has hung up in the middle; the status is for the access log."""
    return Response(status_code=openai.HUNG_UP)


def _answer_http_error(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    if request.url.path.startswith(_OPENAI_PATHS):
        if error.status_code == _NOT_FOUND:
            served = "GET /models, GET /models/{model}, POST /completions, POST /chat/completions"
            asked = f"{request.method} {request.url.path[:_ECHO]}"
            error = HTTPException(_NOT_FOUND, f"{asked} is not served here; of this API there are {served}")
        return openai.render_error(error)
    detail = f"{error.detail}: {request.method} {request.url.path[:_ECHO]}"
    return JSONResponse({"detail": detail}, error.status_code, error.headers)


def _answer_bug(request: Request, error: Exception) -> Response:
    """Nobody's plan: the log has the traceback under an id, the client gets the id."""
    error_id = secrets.token_hex(6)
    log.error("%s %s failed (%s)", request.method, request.url.path, error_id, exc_info=error)
    if request.url.path.startswith(_OPENAI_PATHS):
        return openai.render_error(error, error_id)
    return JSONResponse(
        {"detail": f"the server failed to answer this request; its log says why under {error_id}"}, 500
    )


app = create_app()

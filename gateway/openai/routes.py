"""The four routes. The application mounts them under every prefix at which OpenAI's clients look for them."""

from __future__ import annotations

from contextlib import aclosing
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request, Response

from gateway.auth import owner_of
from gateway.bodies import bodies_of, let_go, read_sent
from gateway.errors import NotFound
from gateway.openai.backend import Backend, ServedModel, backend_of
from gateway.openai.errors import ErrorReply, OpenAIRoute
from gateway.openai.parse import parse
from gateway.openai.plan import Plan, off_loop, plan_chat, plan_completion
from gateway.openai.rendering import ChatRendering, CompletionRendering, Rendering
from gateway.openai.replies import ChatReply, CompletionReply, Identity, ModelList, ModelReply
from gateway.openai.requests import MAX_BODY_BYTES, ChatRequest, CompletionRequest
from gateway.openai.sampling import Usage, carry_out
from gateway.openai.streams import EventStream, events
from gateway.openapi import schema_of
from gateway.presence import while_connected

router = APIRouter(route_class=OpenAIRoute, tags=["OpenAI"])

Owner = Annotated[str, Depends(owner_of)]
BackendOf = Annotated[Backend, Depends(backend_of)]


def _documented(
    reply: type[msgspec.Struct], request: type[msgspec.Struct] | None = None, *, streams: bool = False
) -> dict[str, Any]:
    """What OpenAPI says of a route: bodies are read and written here, not by the framework."""
    content: dict[str, Any] = {"application/json": {"schema": schema_of(reply)}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": schema_of(ErrorReply)}}
    found: dict[str, Any] = {
        "responses": {
            "200": {"description": "The answer.", "content": content},
            "default": {"description": "What went wrong.", "content": error},
        }
    }
    if request is not None:
        body = {"application/json": {"schema": schema_of(request)}}
        found["requestBody"] = {"required": True, "content": body}
    return found


@router.get("/models", openapi_extra=_documented(ModelList))
async def list_models(owner: Owner, backend: BackendOf) -> Response:
    """The base models that can be sampled."""
    return _json(ModelList([_model(model) for model in await backend.models(owner)]))


@router.get("/models/{model:path}", openapi_extra=_documented(ModelReply))
async def get_model(model: str, owner: Owner, backend: BackendOf) -> Response:
    """One base model, or what a `tinker://` path stands for."""
    served = {known.name: known for known in await backend.models(owner)}
    if model in served:
        return _json(_model(served[model]))
    if not model.startswith("tinker://"):
        raise NotFound(
            f"There is no model {model!r}; the base models are {sorted(served)}. A checkpoint is named by its "
            "tinker:// path.",
            param="model",
        )
    target = await backend.resolve(owner, model)
    base = served[target.base_model]
    return _json(ModelReply(model, base.created, target.info.max_context, ready=base.ready))


@router.post("/completions", openapi_extra=_documented(CompletionReply, CompletionRequest, streams=True))
async def create_completion(request: Request, owner: Owner, backend: BackendOf) -> Response:
    """Continue one or several texts or token sequences."""
    sent = await _sent(request)
    asked = parse(sent, CompletionRequest)
    target = await backend.resolve(owner, asked.model)
    if target.at is not None:
        return await backend.passage.pass_on(request, sent, target.at)
    let_go(request, bodies_of(request).sent)  # the answer may take long
    del sent
    plan = await plan_completion(target, asked)
    identity = Identity.new("cmpl", asked.model, target)
    rendering = CompletionRendering(plan, identity, include_usage=asked.include_usage)
    return await _answer(request, backend, plan, rendering, include_usage=asked.include_usage)


@router.post("/chat/completions", openapi_extra=_documented(ChatReply, ChatRequest, streams=True))
async def create_chat_completion(request: Request, owner: Owner, backend: BackendOf) -> Response:
    """Answer a conversation, in the form of the model's chat template."""
    sent = await _sent(request)
    asked = parse(sent, ChatRequest)
    target = await backend.resolve(owner, asked.model)
    if target.at is not None:
        return await backend.passage.pass_on(request, sent, target.at)
    let_go(request, bodies_of(request).sent)  # the answer may take long
    del sent
    plan = await plan_chat(target, asked)
    identity = Identity.new("chatcmpl", asked.model, target)
    rendering = ChatRendering(plan, identity, include_usage=asked.include_usage)
    return await _answer(request, backend, plan, rendering, include_usage=asked.include_usage)


async def _sent(request: Request) -> bytes:
    limit = min(MAX_BODY_BYTES, bodies_of(request).largest)
    return await read_sent(request, limit, "; send fewer or shorter prompts in one request")


async def _answer(
    request: Request, backend: Backend, plan: Plan, rendering: Rendering, *, include_usage: bool
) -> Response:
    usage = Usage()
    pieces = carry_out(backend, plan, usage)
    if plan.stream:
        # With the first piece at hand, what is refused at once is still answered with its own status.
        first = await while_connected(request.receive, anext(pieces))
        return EventStream(events(rendering, first, pieces, usage, include_usage=include_usage), pieces)

    async def whole() -> Response:
        async with aclosing(pieces):
            found = [piece async for piece in pieces]
        size = sum(len(piece.tokens) for piece in found)
        return await off_loop(size, lambda: _json(rendering.whole(found, usage)))

    return await while_connected(request.receive, whole())


def _model(served: ServedModel) -> ModelReply:
    return ModelReply(served.name, served.created, served.max_context, ready=served.ready)


def _json(body: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")

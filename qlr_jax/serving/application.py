"""The HTTP application: routes, streams, and errors as OpenAI's API has them. Importing it needs starlette."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from qlr_jax.errors import QLRError
from qlr_jax.evaluation.text import Piece
from qlr_jax.serving import engine as queue
from qlr_jax.serving.guard import Guard
from qlr_jax.serving.page import PAGE, POLICY
from qlr_jax.serving.parameters import (
    COMPLETION_TOKENS,
    Parameters,
    RequestError,
    messages_of,
    new_tokens,
    parameters,
    prompt_of,
)
from qlr_jax.serving.replies import Reply, error, event, refused

LARGEST_BODY = 4 << 20  # bytes
GONE = 499  # the status of an answer that nobody reads


@dataclasses.dataclass(frozen=True)
class Service:
    """What the routes share.

    Attributes:
        engine: generates.
        name: of the model.
        most: new tokens that a request may ask for.
    """

    engine: queue.Engine
    name: str
    most: int

    async def page(self, request: Request) -> Response:
        """GET /"""
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    async def health(self, request: Request) -> Response:
        """GET /health"""
        return JSONResponse({"status": "ok", "running": self.engine.running, "waiting": self.engine.waiting})

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME"""
        self._check_model(request.path_params["model"])
        return JSONResponse(self._model())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions"""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        body = await _body(request)
        self._check_model(body.get("model", self.name))
        # Tokenizing a long prompt takes a while, in which others are to be answered.
        asked, wanted = await run_in_threadpool(self._read, body, chat)
        generation, reply = Generation(self.engine, wanted), Reply(self.name, chat)
        if asked.stream:
            return Stream(generation, reply, asked.usage)
        text, last = "", None
        async with generation.pieces(request.receive) as pieces:
            async for last in pieces:
                text += last.text
        if last is None or last.finish is None:
            return Response(status_code=GONE)
        return JSONResponse(reply.whole(text, last.finish, len(wanted.tokens), last.tokens))

    def _read(self, body: dict[str, Any], chat: bool) -> tuple[Parameters, queue.Request]:
        param = "messages" if chat else "prompt"
        asked, prompt = parameters(body, param), messages_of(body) if chat else prompt_of(body)
        try:
            tokens = self.engine.tokens(prompt)
        except QLRError as wrong:
            raise RequestError(str(wrong), param) from None
        default = self.most if chat else COMPLETION_TOKENS
        new = new_tokens(asked.most, default, limit=self.most, prompt=len(tokens), context=self.engine.context)
        return asked, queue.Request(tokens, dataclasses.replace(asked.settings, max_new_tokens=new), asked.stop)

    def _check_model(self, name: Any) -> None:
        if name != self.name:
            raise RequestError(f"there is no model {str(name)[:80]} here, only {self.name}", "model", "model_not_found", 404)

    def _model(self) -> dict[str, Any]:
        about = {"max_model_len": self.engine.context, "max_tokens": self.most, "chat": self.engine.has_chat_template}
        return {"id": self.name, "object": "model", "created": STARTED, "owned_by": "qlr-jax", **about}


STARTED = int(time.time())


def application(engine: queue.Engine, *, name: str, most: int, api_key: str | None = None) -> Starlette:
    """The application of one model.

    Args:
        engine: generates; it has to be entered for as long as the application serves.
        name: of the model, which requests name.
        most: new tokens that a request may ask for.
        api_key: without it /v1 answers nobody. None: all who name the host by a loopback name.
    """
    service = Service(engine, name, most)
    routes = [
        Route("/", service.page),
        Route("/health", service.health),
        Route("/v1/models", service.models),
        Route("/v1/models/{model:path}", service.model),
        Route("/v1/completions", service.completions, methods=["POST"]),
        Route("/v1/chat/completions", service.chat, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {HTTPException: _not_routed, QLRError: _cannot, Exception: _failed}
    return Starlette(routes=routes, middleware=[Middleware(Guard, api_key=api_key)], exception_handlers=handlers)


class Generation:
    """A request in the engine's queue, seen from the event loop.

    Args:
        engine: generates.
        wanted: what.

    Raises:
        QueueFull, Stopping, QLRError: as `Engine.submit`.
    """

    def __init__(self, engine: queue.Engine, wanted: queue.Request):
        self.prompt = len(wanted.tokens)
        self._events: asyncio.Queue[Piece | QLRError | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(found: Piece | QLRError) -> None:
            with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
                loop.call_soon_threadsafe(self._events.put_nowait, found)

        self._ticket = engine.submit(wanted, deliver)

    @asynccontextmanager
    async def pieces(self, receive: Receive) -> AsyncIterator[AsyncIterator[Piece]]:
        """The pieces as they come; they end early where the client goes away, and nothing more is generated then.

        Args:
            receive: of the request, whose body was read.
        """
        watch = asyncio.create_task(self._watch(receive))
        try:
            yield self._iterate()
        finally:
            watch.cancel()
            self._ticket.cancel()

    async def _iterate(self) -> AsyncIterator[Piece]:
        while (found := await self._events.get()) is not None:
            if isinstance(found, QLRError):
                raise found
            yield found
            if found.finish:
                return

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._events.put_nowait(None)


class Stream(Response):
    """An answer of server-sent events.

    Args:
        generation: gives the text.
        reply: words it.
        count: whether the tokens are counted at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, reply: Reply, count: bool):
        self.status_code, self.background = 200, None
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._generation, self._reply, self._count = generation, reply, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._generation.pieces(receive) as pieces:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for part in self._chunks(pieces):
                await send({"type": "http.response.body", "body": event(part), "more_body": True})
            await send({"type": "http.response.body", "body": event("[DONE]"), "more_body": False})

    async def _chunks(self, pieces: AsyncIterator[Piece]) -> AsyncIterator[dict[str, Any]]:
        for chunk in self._reply.opening():
            yield chunk
        try:
            async for piece in pieces:
                if piece.text:
                    yield self._reply.part(piece.text)
                if piece.finish:
                    yield self._reply.end(piece.finish)
                    if self._count:
                        yield self._reply.count(self._generation.prompt, piece.tokens)
        except QLRError as failure:  # the status is sent already
            yield error(*_worded(failure))


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object that was sent.

    A page of another site can send text without asking the browser first, but not the type application/json.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            f"the body has the type {kind[:80]!r}; send JSON with Content-Type: application/json", None, "not_json", 415
        )
    raw = bytearray()
    async for part in request.stream():
        raw += part
        if len(raw) > LARGEST_BODY:
            raise RequestError(f"the body is longer than {LARGEST_BODY} bytes; send a shorter prompt", None, "body_too_large", 413)
    try:
        body = json.loads(raw)
        json.dumps(body, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON in UTF-8; send one object", None, "not_json") from None
    if not isinstance(body, dict):
        raise RequestError("the body is not a JSON object; send one with model and prompt or messages", None, "not_json")
    return body


def _worded(failure: Exception) -> tuple[str, int, str | None, str | None]:
    """Message, status, parameter and code of what went wrong."""
    if isinstance(failure, RequestError):
        return str(failure), failure.status, failure.param, failure.code
    if isinstance(failure, queue.QueueFull):
        return str(failure), 429, None, "queue_full"
    if isinstance(failure, queue.Stopping):
        return str(failure), 503, None, "stopping"
    if isinstance(failure, queue.Failed):
        return str(failure), 500, None, "generation_failed"
    if isinstance(failure, QLRError):
        return str(failure), 400, None, "invalid_value"
    return f"the server failed on this request ({type(failure).__name__}); its log says more", 500, None, None


async def _cannot(request: Request, failure: Exception) -> Response:
    headers = {"Retry-After": str(failure.retry_after)} if isinstance(failure, queue.QueueFull) else None
    return refused(*_worded(failure), headers)


async def _failed(request: Request, failure: Exception) -> Response:
    return refused(*_worded(failure))


async def _not_routed(request: Request, failure: Exception) -> Response:
    assert isinstance(failure, HTTPException)
    method, path = request.method, request.url.path[:80]
    routes = "GET /v1/models, POST /v1/completions, POST /v1/chat/completions, GET /health"
    return refused(
        f"there is no {method} {path} here; there are {routes}", failure.status_code, None, "unknown_url", failure.headers
    )

"""The server: a Ray Serve deployment over one bundle.

`python -m polar_fx serve` runs it on one machine; on a cluster, `serve run
polar_fx.serving.app:build bundle=/path`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve

from ..bundle import load_bundle
from ..bundle.settings import check_served
from ..engine import Request as Running
from .answers import CHAT, COMPLETION, Form, Reply, models, usage_event
from .measures import Measures
from .playground import playground
from .requests import (
    MAX_BODY_BYTES,
    MAX_PROMPTS,
    Chat,
    Completion,
    RequestError,
    Settings,
    read,
)
from .service import Ask, Service
from .waiting import Waiting

app = FastAPI(title="polar_fx", docs_url=None, redoc_url=None, openapi_url=None)

_LEFT = 499  # status recorded when the client disconnects
_QUEUED = 8  # prompts that wait at most, for each row; further requests are answered 503
# Requests that Serve lets in at once, far more than run or wait: health, metrics and models count
# among them, and must not wait for generations. How many prompts wait is limited in the server.
_LET_IN = 100_000


# above the server: Serve copies its class, with the names that are there, where it is decorated


class _Count:
    """Time and end of one request."""

    def __init__(self, measures: Measures, route: str) -> None:
        self._measures, self._route, self._start = measures, route, time.perf_counter()

    def end(self, status: int) -> None:
        self._measures.requests.labels(self._route, str(status)).inc()
        self._measures.seconds.labels(self._route).observe(time.perf_counter() - self._start)


def _event(what: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(what)}\n\n"


async def _body(request: Request) -> bytes:
    """The body, or as much of it as shows that it is too long."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > MAX_BODY_BYTES:
            break
    return bytes(found)


@serve.deployment
@serve.ingress(app)
class Server:
    """One bundle behind HTTP.

    All that runs on it runs in the engine's thread, so that health and metrics answer meanwhile.
    """

    def __init__(
        self,
        bundle: str,
        name: str,
        *,
        fingerprint: str | None,
        threads: int,
        max_batch: int,
        policy: str | None = None,
    ) -> None:
        torch.set_num_threads(threads)
        model = load_bundle(bundle, fingerprint=fingerprint)
        if policy is not None:
            model.choose_by(policy)
        check_served(model.generation_config)
        most = (1 + _QUEUED) * max_batch
        # how many wait is limited here, and may be exceeded by one request of several prompts
        self.service = Service(model, name, max_rows=max_batch, max_waiting=most + MAX_PROMPTS)
        self._waiting = Waiting(most, self.service.measures)
        self._started = int(time.time())
        self.service.__enter__()

    async def _answers(
        self, asks: Sequence[Ask], told: Callable[[tuple[Running, int]], None] | None = None
    ) -> list[Reply]:
        """An answer each; `told` is called in the event loop at each token, with how many there
        were then: the engine may be ahead by some.
        """
        loop, running = asyncio.get_running_loop(), list[Running]()
        ended = asyncio.Semaphore(0)

        def news(request: Running) -> None:
            if request.is_done:
                loop.call_soon_threadsafe(ended.release)
            elif told is not None:
                loop.call_soon_threadsafe(told, (request, len(request.tokens)))

        with self._waiting.holding(len(asks)):
            try:
                for ask in asks:
                    running.append(self.service.add(ask, news))
                for _ in asks:
                    await ended.acquire()
            except BaseException:
                # the client left, or its time is over: its rows end at their next token
                for request in running:
                    request.cancel()
                raise
        return [self.service.reply(request) for request in running]

    async def _respond(self, request: Request, kind: type[Settings], *, form: Form) -> Response:
        count = _Count(self.service.measures, request.url.path)
        try:
            asked = read(kind, await _body(request))
            self._waiting.check_room()
            asks = self.service.read(asked)  # type: ignore[arg-type]
            if asked.stream:
                return StreamingResponse(
                    self._stream(asked, asks[0], form=form, count=count),
                    media_type="text/event-stream",
                )
            response = form.response(self.service.name, await self._answers(asks))
        except RequestError as error:
            count.end(error.status)
            return JSONResponse(error.body(), error.status)
        except asyncio.CancelledError:
            count.end(_LEFT)
            raise
        count.end(200)
        return JSONResponse(response)

    async def _stream(
        self, asked: Settings, ask: Ask, *, form: Form, count: "_Count"
    ) -> AsyncIterator[str]:
        """Server-sent events: text as it is certain, then how it ended."""
        news: asyncio.Queue[tuple[Running, int] | None] = asyncio.Queue()
        status = _LEFT
        running = asyncio.ensure_future(self._answers([ask], news.put_nowait))
        running.add_done_callback(lambda _: news.put_nowait(None))
        head, sent = form.head(self.service.name), ""
        try:
            while (told := await news.get()) is not None:
                text = self.service.known_text(*told)
                if len(text) > len(sent) and text.startswith(sent):
                    yield _event(form.event(head, text[len(sent) :]))
                    sent = text
            (answer,) = await running
            status = 200
            yield _event(form.event(head, answer.text[len(sent) :], answer=answer))
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(usage_event(head, answer))
            yield "data: [DONE]\n\n"
        except RequestError as error:
            status = error.status
            yield _event(error.body())
        finally:
            running.cancel()
            count.end(status)

    @app.get("/")
    async def playground(self) -> Response:
        return HTMLResponse(playground(self.service.bundle, self.service.name))

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._respond(request, Completion, form=COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, Chat, form=CHAT)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        bundle = self.service.bundle
        policy = None if bundle.dispatcher is None else str(bundle.dispatcher.policy)
        about = {
            "programs": [str(p) for p in bundle.programs],
            "policy": policy,
            "max_length": bundle.pool.max_length,
        }
        return models(self.service.name, self._started, **about)

    @app.get("/health")
    async def health(self) -> Response:
        if self.service.engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the engine stopped"}, 503)

    def check_health(self) -> None:
        """What Serve asks: a replica whose engine stopped is replaced."""
        if not self.service.engine.is_open:
            raise RuntimeError("the engine stopped")

    @app.get("/metrics")
    async def metrics(self) -> Response:
        self.service.measures.kv_bytes.set(self.service.engine.stats()["bytes"])
        return Response(self.service.measures.text(), media_type=CONTENT_TYPE_LATEST)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a bundle, whose folder `bundle` names.

    Optional are `name` (what clients call the model; default: the folder's name), `fingerprint`,
    `threads` (default: 1), `max_batch` (prompts that run at once; 32) and `policy` (default: the
    bundle's).
    """
    given = dict(args)
    given.pop("wait_ms", None)  # of former versions: nothing waits for a batch any more
    bundle = Path(given.pop("bundle")).resolve()
    max_batch = int(given.pop("max_batch", 32))
    server: Any = Server
    options = server.options(max_ongoing_requests=_LET_IN)
    return options.bind(
        str(bundle),
        given.pop("name", bundle.name),
        fingerprint=given.pop("fingerprint", None),
        threads=int(given.pop("threads", 1)),
        max_batch=max_batch,
        **given,
    )

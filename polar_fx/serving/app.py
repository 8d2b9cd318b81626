"""The server: a Ray Serve deployment over one bundle.

`python -m polar_fx serve` runs it on one machine; on a cluster, `serve run
polar_fx.serving.app:build bundle=/path`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from ray import serve

from ..bundle import load_bundle
from ..bundle.settings import check_served
from .answers import CHAT, COMPLETION, Form, Reply, models, usage_event
from .engine import Ask, Engine
from .measures import Measures
from .requests import MAX_BODY_BYTES, Chat, Completion, RequestError, Settings, read
from .waiting import Waiting

app = FastAPI(title="polar_fx", docs_url=None, redoc_url=None, openapi_url=None)

_LEFT = 499  # status recorded when the client disconnects
_QUEUED = 8  # batches that wait at most; further requests are answered 503
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

    All that runs on it runs in one thread, so that health and metrics answer meanwhile.
    """

    def __init__(
        self,
        bundle: str,
        name: str,
        fingerprint: str | None,
        threads: int,
        max_batch: int,
        wait_s: float,
    ) -> None:
        torch.set_num_threads(threads)
        model = load_bundle(bundle, fingerprint=fingerprint)
        check_served(model.generation_config)
        self.engine = Engine(model, name)
        self._waiting = Waiting((1 + _QUEUED) * max_batch, self.engine.measures)
        self._started = int(time.time())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._answer.set_max_batch_size(max_batch)  # type: ignore[attr-defined]
        self._answer.set_batch_wait_timeout_s(wait_s)  # type: ignore[attr-defined]

    @serve.batch
    async def _answer(self, asks: list[Ask]) -> list[Reply | RequestError]:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self.engine.answer, asks
        )

    async def _answers(self, asks: Sequence[Ask]) -> list[Reply]:
        with self._waiting.holding(len(asks)):
            try:
                found: list[Any] = await asyncio.gather(*(self._answer(ask) for ask in asks))  # type: ignore[arg-type]
            except asyncio.CancelledError:
                # the client left, or its time is over: its rows end at their next token
                for ask in asks:
                    ask.dropped = True
                raise
        if (error := next((f for f in found if isinstance(f, RequestError)), None)) is not None:
            raise error
        return found

    async def _respond(self, request: Request, kind: type[Settings], form: Form) -> Response:
        count = _Count(self.engine.measures, request.url.path)
        try:
            asked = read(kind, await _body(request))
            self._waiting.check_room()
            asks = self.engine.read(asked)  # type: ignore[arg-type]
            if asked.stream:
                return StreamingResponse(
                    self._stream(asked, asks[0], form, count), media_type="text/event-stream"
                )
            response = form.response(self.engine.name, await self._answers(asks))
        except RequestError as error:
            count.end(error.status)
            return JSONResponse(error.body(), error.status)
        except asyncio.CancelledError:
            count.end(_LEFT)
            raise
        count.end(200)
        return JSONResponse(response)

    async def _stream(
        self, asked: Settings, ask: Ask, form: Form, count: "_Count"
    ) -> AsyncIterator[str]:
        """Server-sent events: text as it is certain, then how it ended."""
        texts: asyncio.Queue[str | None] = asyncio.Queue()
        loop, status = asyncio.get_running_loop(), _LEFT
        ask.told = lambda text: loop.call_soon_threadsafe(texts.put_nowait, text)
        running = asyncio.ensure_future(self._answers([ask]))
        running.add_done_callback(lambda _: texts.put_nowait(None))
        head, sent = form.head(self.engine.name), ""
        try:
            while (text := await texts.get()) is not None:
                if len(text) > len(sent) and text.startswith(sent):
                    yield _event(form.event(head, text[len(sent) :]))
                    sent = text
            (answer,) = await running
            status = 200
            yield _event(form.event(head, answer.text[len(sent) :], answer))
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(usage_event(head, answer))
            yield "data: [DONE]\n\n"
        except RequestError as error:
            status = error.status
            yield _event(error.body())
        finally:
            running.cancel()
            count.end(status)

    @app.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        return await self._respond(request, Completion, COMPLETION)

    @app.post("/v1/chat/completions")
    async def chat_completions(self, request: Request) -> Response:
        return await self._respond(request, Chat, CHAT)

    @app.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        bundle = self.engine.bundle
        policy = None if bundle.dispatcher is None else str(bundle.dispatcher.policy)
        about = {
            "programs": [str(p) for p in bundle.programs],
            "policy": policy,
            "max_length": bundle.pool.max_length,
        }
        return models(self.engine.name, self._started, **about)

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics(self) -> Response:
        return Response(self.engine.measures.text(), media_type=CONTENT_TYPE_LATEST)


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application of a bundle, whose folder `bundle` names.

    Optional are `name` (what clients call the model; default: the folder's name), `fingerprint`,
    `threads` (default: 1), `max_batch` (prompts that run at once; 8) and `wait_ms` (milliseconds
    that a prompt waits for others; 5).
    """
    given = dict(args)
    bundle = Path(given.pop("bundle")).resolve()
    max_batch = int(given.pop("max_batch", 8))
    server: Any = Server
    options = server.options(max_ongoing_requests=_LET_IN)
    return options.bind(
        str(bundle),
        given.pop("name", bundle.name),
        given.pop("fingerprint", None),
        int(given.pop("threads", 1)),
        max_batch,
        float(given.pop("wait_ms", 5)) / 1e3,
        **given,
    )

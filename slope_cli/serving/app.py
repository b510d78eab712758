"""The paths that the server answers, and its errors in OpenAI's form."""

import asyncio
import hmac
import json
import sys
import time
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedTokenizerFast

from slope_cli.errors import SlopeError, UsageError
from slope_cli.report.terminal import one_row
from slope_cli.serving.engine_thread import BusyError, EngineError, EngineThread, Job, StoppedError
from slope_cli.serving.protocol import Answer, ChatRequest, CompletionRequest, TextRequest, error_body, usage

HEALTH = "/health"
LARGEST_BODY = 16 << 20
"""Bytes of a request."""
_STATUS: dict[type[Exception], int] = {UsageError: 400, BusyError: 429, EngineError: 500, StoppedError: 503}


def make_app(thread: EngineThread, tokenizer: PreTrainedTokenizerFast, name: str, api_key: str) -> ASGIApp:
    """The paths of a model of that name; api_key: that requests must have, "" for none."""
    app, created = FastAPI(title="slope serve", openapi_url=None), int(time.time())
    listed = {"id": name, "object": "model", "created": created, "owned_by": "slope"}
    listed["max_model_len"] = thread.engine.max_length
    for kind in (*_STATUS, RequestValidationError, AnyHTTPException, Exception):
        app.add_exception_handler(kind, _error)

    def require_model(asked: str | None) -> None:
        if asked not in (None, name):
            raise AnyHTTPException(404, f"model {asked!r} is not served here; this is {name!r}")

    async def answered(body: TextRequest) -> Response:
        require_model(body.model)
        body.require_supported()
        job = thread.submit(partial(body.prompts, tokenizer), body.samplings())
        return TextResponse(thread, job, body, Answer(body, name))

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        return await answered(body)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        if not tokenizer.chat_template:
            raise UsageError("the tokenizer of this model has no chat template; use /v1/completions")
        return await answered(body)

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{asked:path}")
    async def model(asked: str) -> Any:
        require_model(asked)
        return listed

    @app.get(HEALTH)
    async def health() -> Any:
        if thread.fault:
            raise StoppedError(thread.fault)
        running = min(thread.texts, thread.engine.max_batch)
        return {"status": "ok", "running": running, "waiting": thread.texts - running}

    return Gate(app, api_key)


class TextResponse(Response):
    """The texts of a request, at the end or as they come; a client that goes away cancels them."""

    def __init__(self, thread: EngineThread, job: Job, body: TextRequest, answer: Answer) -> None:
        super().__init__()
        self._thread, self._job, self._body, self._answer = thread, job, body, answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        told = self._streamed(send) if self._body.stream else self._whole(scope, receive, send)
        work, gone = asyncio.create_task(told), asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            cancelled = ["cancelled"] if self._job.unfinished else []
            self._thread.cancel(self._job)
            work.cancel()
            gone.cancel()
            counts = self._usage()
            texts, read, new = self._job.texts, counts["prompt_tokens"], counts["completion_tokens"]
            scope[Gate.NOTE] = [f"{texts} text{'s'[: texts > 1]}", f"{read} + {new} tokens", *cancelled]

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts, reasons = [""] * self._job.texts, [""] * self._job.texts
        async for piece in self._job.pieces():
            texts[piece.choice] += piece.text
            reasons[piece.choice] = piece.finish_reason
        answer = self._answer.whole(zip(texts, reasons, strict=True), self._usage())
        await JSONResponse(answer)(scope, receive, send)

    async def _streamed(self, send: Send) -> None:
        await self._job.admitted()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            for beginning in self._answer.beginnings(self._job.texts):
                await _send_event(send, beginning)
            async for piece in self._job.pieces():
                if piece.text or piece.finish_reason:
                    await _send_event(send, self._answer.part(piece.choice, piece.text, piece.finish_reason))
            if self._body.stream_options is not None and self._body.stream_options.include_usage:
                await _send_event(send, self._answer.usage(self._usage()))
            await _send_event(send, "[DONE]")
        except SlopeError as error:  # too late for a status
            await _send_event(send, error_body(_STATUS.get(type(error), 500), str(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _usage(self) -> dict[str, int]:
        return usage(self._job.prompt_tokens, self._job.tokens, self._body.n or 1)


class Gate:
    """Before the paths: the key, and the size of a request; after them, a line of the log.

    A healthy answer of /health has none: what watches a server asks every few seconds.
    """

    NOTE = "slope.note"
    """The key of a scope for what the line says of its answer, word by word."""

    def __init__(self, app: ASGIApp, api_key: str) -> None:
        self._app, self._expected = app, f"Bearer {api_key}".encode() if api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        started, status, size = time.monotonic(), "unanswered", 0

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LARGEST_BODY:
                raise HTTPException(413, f"the request has more than {LARGEST_BODY >> 20} MiB")
            return message

        try:
            if self._may_pass(scope):
                await self._app(scope, limited, noting)
            else:
                refusal = error_body(401, "the key in the Authorization header is not the server's")
                await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, noting)
        finally:
            words = [scope["method"], scope["path"], status, f"{time.monotonic() - started:.2f} s"]
            if words[1:3] != [HEALTH, "200"]:
                print(one_row("  ".join([*words, *scope.get(self.NOTE, ())])), file=sys.stderr, flush=True)

    def _may_pass(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self._expected or scope["path"] == HEALTH or hmac.compare_digest(given, self._expected)


async def _error(request: Request, error: Exception) -> Response:
    """Any error in OpenAI's form; the log says what was wrong with the request."""
    status, sentence, parameter, headers = _told(request, error)
    if status < 500:
        request.scope[Gate.NOTE] = [sentence]
    return JSONResponse(error_body(status, sentence, parameter), status, headers)


def _told(request: Request, error: Exception) -> tuple[int, str, str | None, Mapping[str, str] | None]:
    """The status of an error, its sentence, the parameter that is wrong, and headers."""
    if isinstance(error, RequestValidationError):
        first, *others = error.errors()
        # Of a union each alternative has an error: that of the one that has the value's type says what is wrong.
        alternatives = [each for each in others if each["loc"][:2] == first["loc"][:2]]
        first = next((each for each in [first, *alternatives] if not each["type"].endswith("_type")), first)
        place = [str(part) for part in first["loc"][1:] if not isinstance(part, int)]
        sentence = f"{place[0] if place else 'the request'}: {first['msg']}"
        if not place and "json" not in request.headers.get("content-type", ""):
            sentence = "the request: must be JSON, with the header Content-Type: application/json"
        return 400, sentence, place[0] if place else None, None
    if isinstance(error, AnyHTTPException):
        asked = f"{request.method} {request.url.path}"
        default = error.detail == HTTPStatus(error.status_code).phrase
        sentence = f"{asked}: {error.detail.lower()}" if default else error.detail
        return error.status_code, sentence, None, error.headers
    status = _STATUS.get(type(error), 500)
    sentence = str(error) if type(error) in _STATUS else f"the server failed: {type(error).__name__}; its log says more"
    return status, sentence, None, {"Retry-After": "1"} if status == 429 else None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": True})

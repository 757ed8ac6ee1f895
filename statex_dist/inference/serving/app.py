"""The HTTP routes."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Any

from fastapi import APIRouter, Depends, FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from statex_dist.inference.serving.completion_response import Exchange, abort_of
from statex_dist.inference.serving.metrics import Metrics
from statex_dist.inference.serving.protocol import RequestError, shown
from statex_dist.inference.serving.service import Service
from statex_dist.inference.serving.sse_writer import error_response


def build_app(service: Service, *, api_key: str | None = None) -> FastAPI:
    """Return the application.

    Args:
        service: Answers the requests; started by whoever runs the application.
        api_key: What ``/v1`` asks for as bearer token, or None for nothing.
    """
    app = FastAPI(openapi_url=None)
    created = int(time.time())

    def check_key(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # as it was sent
        if api_key is not None and not secrets.compare_digest(given, f"Bearer {api_key}".encode()):
            raise RequestError(
                401, "the API key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key"
            )

    v1 = APIRouter(prefix="/v1", dependencies=[Depends(check_key)])

    def model() -> dict[str, Any]:
        return {"id": service.name, "object": "model", "created": created, "owned_by": "statex-dist"}

    @v1.get("/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @v1.get("/models/{name:path}")
    async def retrieve_model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return model()

    @v1.post("/completions")
    async def create_completion(request: Request) -> Response:
        arrived = asyncio.get_running_loop().time()
        seconds = min(service.limits.request_timeout, service.limits.body_timeout)
        try:
            service.check_health()
            with service.connection(abort_of(request.scope)):
                async with asyncio.timeout(seconds):
                    body = await _read_body(request, service.limits.max_body_bytes)
        except RequestError as error:
            service.metrics.count(error.outcome)
            raise
        except TimeoutError:
            service.metrics.count("timeout")
            raise RequestError(
                408, f"the body did not arrive in {seconds:g} s", code="timeout", headers={"Connection": "close"}
            ) from None
        except ClientDisconnect:
            service.metrics.count("disconnected")
            return Response(status_code=400)  # to nobody
        return Exchange(service, body, arrived)

    @v1.api_route("/chat/completions", methods=["GET", "POST"])
    async def refuse_chat() -> Response:
        raise RequestError(
            404,
            "chat is not supported, only completions; use POST /v1/completions",
            code="unsupported",
        )

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        service.check_health()
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=Metrics.CONTENT_TYPE)

    app.include_router(v1)

    @app.exception_handler(RequestError)
    async def answer_error(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def answer_http_error(request: Request, error: HTTPException) -> Response:
        path, detail = shown(request.url.path), str(error.detail).lower()
        text = f"{request.method} {path}: {detail}; there are GET /v1/models, /health, /metrics, POST /v1/completions"
        code = "method_not_allowed" if error.status_code == 405 else "unknown_url"
        return error_response(RequestError(error.status_code, text, code=code, headers=error.headers))

    @app.exception_handler(Exception)
    async def answer_crash(request: Request, error: Exception) -> Response:
        return error_response(RequestError(500, "the server failed; its log says why"))

    return app


async def _read_body(request: Request, most: int) -> bytes:
    """Return a request's body, without reading on when it is larger than allowed.

    Raises:
        RequestError: It is (413).
    """
    # What comes after the answer is received and thrown away: many clients read an answer only when they have sent all.
    too_large = RequestError(413, f"the body is larger than {most} bytes; send less at once", code="too_large")
    if int(request.headers.get("content-length", "0")) > most:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise too_large
    return bytes(body)

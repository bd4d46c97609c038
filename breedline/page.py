"""A page that is whole in itself, on this machine alone, with the program behind it that it asks.

The server listens on the loopback address, where any web page that a browser shows could reach it. So it answers only
under its own name, which a name that was made to lead here (DNS rebinding) is not, and changes nothing unless its own page
asks. Where a page shows or changes what is not everybody's on this machine, whoever asks also needs a token.

The page, one HTML file with its own script and style, may ask nobody but this server for anything.
"""

import asyncio
import base64
import contextlib
import hashlib
import re
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from breedline.errors import BreedlineError

LOOPBACK, PORT = "127.0.0.1", 8000
"""The port is tried where none is asked for; if it is taken, another one will do."""
CONNECTIONS = 32
"""At a time; each further one is refused."""
SECONDS_TO_UPLOAD = 60
"""Within which what a page sends must have arrived."""
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
Handler = Callable[[Request], Awaitable[Response]]


def serve(made: Callable[[int], Starlette], port: int | None, told: str) -> None:
    """Serve what `made` gives for the number of a port until Ctrl-C; print `told`, with the address in place of its {}.

    Raises:
        BreedlineError: the port is taken.
    """
    with listener(port) as listening:
        number = listening.getsockname()[1]
        config = uvicorn.Config(
            made(number), log_config=None, log_level="error", access_log=False, lifespan="off",
            ws="none", proxy_headers=False, server_header=False, limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        print(told.format(f"http://{LOOPBACK}:{number}"), flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])


def listener(port: int | None) -> socket.socket:
    """A socket at `port`; with None at PORT or, where that is taken, at any free one. Raises BreedlineError if it is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((LOOPBACK, PORT if port is None else port))
        listening.listen()
    except OSError as error:
        listening.close()
        if port is None:
            return listener(0)
        raise BreedlineError(
            f"port {port} cannot be had ({error.strerror}): leave --port out, or name another"
        ) from error
    return listening


def application(page: Path, routes: Sequence[Route], port: int, token: str | None = None) -> Starlette:
    """The file `page` and the `routes` that it asks, for a server at that port; with a `token`, all but the page wants it.

    What a route raises, HTTPException or BreedlineError, is told in words.
    """
    text = page.read_text("utf-8")
    headers = HEADERS | {"Content-Security-Policy": _policy(text)}

    async def show(request: Request) -> Response:
        return HTMLResponse(text)

    async def guard(request: Request, handler: Handler) -> Response:
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in (LOOPBACK, "localhost") or (host.partition(":")[2] or "80") != str(port):
            response = refusal(421, f"this is http://{LOOPBACK}:{port}, and goes by no other name")
        elif request.method not in ("GET", "HEAD") and request.headers.get("origin") != f"http://{host}":
            response = refusal(403, "only the page of this address may ask that")
        elif token and request.url.path != "/" and not _has(request, token):
            response = refusal(403, "open the whole address that was printed: what follows # lets you in")
        else:
            response = await handler(request)
        response.headers.update(headers)
        return response

    async def refuse(request: Request, error: Exception) -> Response:
        return (
            refusal(error.status_code, error.detail) if isinstance(error, HTTPException) else refusal(500, str(error))
        )

    return Starlette(
        routes=[Route("/", show), *routes],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=guard)],
        exception_handlers={HTTPException: refuse, BreedlineError: refuse},
    )


def _has(request: Request, token: str) -> bool:
    """Whether the request carries the token; how long the answer takes tells nothing of it."""
    given = request.headers.get("authorization", "")
    return secrets.compare_digest(given.encode(), f"Bearer {token}".encode())


def refusal(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status)


async def body(request: Request, most: int) -> bytes:
    """The content of the request; no more of it is read than `most` bytes.

    Raises:
        HTTPException: it is larger, or does not arrive whole and in time.
    """
    try:
        async with asyncio.timeout(SECONDS_TO_UPLOAD):
            data = await _read(request, most)
    except TimeoutError:
        raise HTTPException(408, f"it did not arrive within {SECONDS_TO_UPLOAD} seconds") from None
    except ClientDisconnect:
        raise HTTPException(400, "it did not arrive whole") from None
    if data is None:
        raise HTTPException(413, f"it is larger than {most / 1e6:g} MB")
    return data


async def _read(request: Request, most: int) -> bytes | None:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        return None
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            return None
    return bytes(data)


def _policy(page: str) -> str:
    """A Content-Security-Policy under which the page's own script and style run, nothing else, and it asks only this server."""
    hashes = {}
    for kind in ("script", "style"):
        (text,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.S)
        hashes[kind] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )

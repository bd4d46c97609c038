"""A proxy on loopback, between a client and an S3 server, that misbehaves as it is told."""

import http.client
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit

ALWAYS = 1_000_000
STALL = 30.0
"""Seconds in which a stalled request is not answered, unless the proxy is healed before: more than any client here waits."""
HOP = {"connection", "content-length", "date", "keep-alive", "server", "transfer-encoding"}
"""Headers that belong to one connection, not to the answer."""


class Fault(NamedTuple):
    """What goes wrong, with which requests."""

    kind: str
    """answers 500, answers a page (of somebody between), loses (what is put), alters (a bit), cuts, stalls, or vanishes."""
    method: str
    """PUT, GET, HEAD, LIST; or "", for any."""
    times: int = ALWAYS
    after: int = 0
    """How many such requests go well before."""

    def __str__(self) -> str:
        often = {1: "once", ALWAYS: "always"}.get(self.times, f"{self.times} times")
        when = f"from request {self.after + 1} on" if self.kind == "vanishes" else often
        return " ".join(filter(None, [self.kind, self.method, when]))


class Proxy:
    """Forwards what comes to `url` to the server, but for what the fault says."""

    def __init__(self, server: str) -> None:
        self.server = urlsplit(server).netloc
        self.healed = threading.Event()
        self._lock = threading.Lock()
        self._listen(0)
        self.url = f"http://127.0.0.1:{self._listener.server_port}"
        self.heal()

    def misbehave(self, fault: Fault) -> None:
        self.fault, self.seen, self.met = fault, 0, 0
        self.healed.clear()

    def heal(self) -> None:
        """Forward everything from now on; on the same port, if the listener had vanished."""
        self.fault, self.seen, self.met = None, 0, 0
        self.healed.set()
        if not self.listens:
            self._listen(self._listener.server_port)

    def close(self) -> None:
        if self.listens:
            self._listener.shutdown()
            self._listener.server_close()
        self.listens = False

    def fault_of(self, method: str) -> str:
        """What goes wrong with the next request, if anything does."""
        with self._lock:
            if not self.fault or self.fault.method not in ("", method):
                return ""
            self.seen += 1
            if not self.fault.after < self.seen <= self.fault.after + self.fault.times:
                return ""
            self.met += 1
            if self.fault.kind == "vanishes":
                self.close()
            return self.fault.kind

    def _listen(self, port: int) -> None:
        self._listener = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"proxy": self}))
        threading.Thread(target=self._listener.serve_forever, args=[0.02], daemon=True).start()
        self.listens = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def _answer(self) -> None:
        fault = self.proxy.fault_of("LIST" if "list-type=" in self.path else self.command)
        length = int(self.headers.get("Content-Length", 0))
        if fault == "vanishes" or (fault == "cuts" and self.command == "HEAD"):
            self.close_connection = True
            return
        if fault == "cuts" and self.command == "PUT":
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault == "stalls":
            self.proxy.healed.wait(STALL)
            self.close_connection = True
            return
        if fault == "answers 500":
            self._send(500, {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
            return
        if fault == "answers a page":
            self._send(200, {"Content-Type": "text/html"}, b"<html>Log in, please")
            return
        if fault == "loses":
            self._send(200, {"ETag": '"d41d8cd98f00b204e9800998ecf8427e"'}, b"")
            return
        sent = dict(self.headers)
        if fault == "alters" and self.command == "PUT":
            body, sent = _altered(body), _without_checksum(sent)
        server = http.client.HTTPConnection(self.proxy.server, timeout=30)
        server.request(self.command, self.path, body, sent)
        answer = server.getresponse()
        content = answer.read()
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in HOP}
        size = answer.headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        if fault == "alters" and self.command == "GET":
            content, headers = _altered(content), _without_checksum(headers)
        if fault == "cuts":
            content = content[: len(content) // 2]
            self.close_connection = True
        self._send(answer.status, headers, content, size)
        server.close()

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815 - http.server's names

    def _send(self, status: int, headers: dict[str, str], content: bytes, size: str | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", size or str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
        pass


def _altered(content: bytes) -> bytes:
    """As many bytes, one of which has another bit."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 1]) + content[middle + 1 :]


def _without_checksum(headers: dict[str, str]) -> dict[str, str]:
    """As of a server that keeps none: the client would find what is altered by itself."""
    return {name: value for name, value in headers.items() if "checksum" not in name.lower()}

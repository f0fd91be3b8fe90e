"""A real S3 server on loopback (moto), and a wire to it on which things go wrong when asked."""

from __future__ import annotations

import hashlib
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

BUCKET = "bucket"
SECRET = "very-secret"

# What the wire does to one request.
Fault = str | None
FAULTS = ("503", "slow", "truncate", "short", "flip", "lost", "drop", "403")


@dataclass
class Seen:
    """One request that came by."""

    method: str
    key: str
    status: int = 0
    query: str = ""
    headers: dict[str, str] = field(default_factory=dict)


class Wire(ThreadingHTTPServer):
    """A proxy in front of an S3 server.

    Attributes:
        fault: called for every request with its method and key; one of FAULTS, or None. `503`:
            answered so without asking the server. `slow`: answered after `delay` seconds.
            `truncate`: the body ends early, against its own length. `short`: the same with a
            length that fits. `flip`: one bit of the body is wrong, on its way back, or of a put on
            its way there. `lost`: done by the server,
            and the connection closed without an answer. `drop`: closed before anything is done.
        seen: what came by.
        delay: seconds.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target).netloc
        self.fault: Callable[[str, str], Fault] = lambda _, __: None
        self.seen: list[Seen] = []
        self.delay = 0.3

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, method: str, part: str = "") -> int:
        """How many requests of a method went to keys with `part` in them."""
        return sum(each.method == method and part in each.key for each in self.seen)

    def handle_error(self, *_: Any) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Wire
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).removeprefix(f"/{BUCKET}").lstrip("/")
        seen = Seen(self.command, key, query=parts.query, headers=dict(self.headers))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self.command, key)
        self.server.seen.append(seen)
        if fault == "drop":
            return self._hang_up()
        if fault in ("503", "403"):
            seen.status = int(fault)
            code = {"503": "SlowDown", "403": "AccessDenied"}[fault]
            text = f"<Error><Code>{code}</Code><AWSAccessKeyId>WHO</AWSAccessKeyId></Error>"
            return self._answer(seen.status, {}, text.encode())
        if fault == "slow":
            time.sleep(self.server.delay)
        if fault == "flip" and self.command == "PUT":
            body = bytes([body[0] ^ 1]) + body[1:]
        if _is_damaged(body, self.headers):
            # As S3 does, and moto does not.
            seen.status = 400
            return self._answer(400, {}, b"<Error><Code>XAmzContentSHA256Mismatch</Code></Error>")
        upstream = http.client.HTTPConnection(self.server.target, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        upstream.close()
        seen.status = answer.status
        if fault == "lost":
            return self._hang_up()
        if fault == "flip" and data and self.command == "GET":
            data = bytes([data[0] ^ 1]) + data[1:]
        if fault == "short":
            data = data[: len(data) // 2]
        return self._answer(answer.status, headers, data, cut=fault == "truncate")

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _serve  # noqa: N815 - http.server's names

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, *, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        own = {"content-length", "connection", "transfer-encoding", "date", "server"}
        for name, value in headers.items():
            if name.lower() not in own:
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and data:
            self.wfile.write(data[: len(data) // 2])
            self._hang_up()
            return
        self.wfile.write(data)

    def _hang_up(self) -> None:
        # A reset, as from a machine that is gone.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()


def _is_damaged(body: bytes, headers: Mapping[str, str]) -> bool:
    """Whether a body is not the one that was signed."""
    signed = headers.get("x-amz-content-sha256", "")
    return len(signed) == 64 and hashlib.sha256(body).hexdigest() != signed


@contextmanager
def wire_to(target: str) -> Iterator[Wire]:
    """A running `Wire` to the server at `target`."""
    wire = Wire(target)
    thread = threading.Thread(target=wire.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        wire.shutdown()
        wire.server_close()
        thread.join()


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of an S3 server with one bucket."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    made = http.client.HTTPConnection(host, port)
    made.request("PUT", f"/{BUCKET}")
    assert made.getresponse().status == 200
    made.close()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def wire(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Wire]:
    """The way to the server, in an environment that knows of it and of nothing else."""
    for name in ("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "WHO")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home-cache"))
    with wire_to(server) as running:
        monkeypatch.setenv("AWS_ENDPOINT_URL", running.url)
        yield running


@pytest.fixture
def url(wire: Wire, tmp_path: Any) -> str:
    """Where a test's cache is: below a prefix of its own."""
    return f"s3://{BUCKET}/{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}/cache"


def every(number: int, fault: str, *methods: str) -> Callable[[str, str], Fault]:
    """A fault for one request of `number`, of some methods; the requests after it go well."""
    seen, lock = [0], threading.Lock()

    def strike(method: str, _: str) -> Fault:
        if methods and method not in methods:
            return None
        with lock:
            seen[0] += 1
            return fault if seen[0] % number == 1 else None

    return strike

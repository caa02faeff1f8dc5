"""An S3 store (moto's) over HTTP that records the requests and can be told to fail them."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

SLOW_DOWN, TIMEOUT, RESET, DENIED, LOST = "503", "timeout", "reset", "403", "lost"
"""Faults: an answer of that status, none at all, or a closed connection. `LOST`: the request is
carried out, and the connection is closed before the answer."""
_ERRORS = {SLOW_DOWN: ("SlowDown", "503 Slow Down"), DENIED: ("AccessDenied", "403 Forbidden")}


@dataclass
class ObjectStore:
    """The store, as a WSGI application."""

    app: Any
    url: str = ""
    requests: list[str] = field(default_factory=list)
    """`METHOD path` of every request, failed ones too."""
    fault: Callable[[str], str | None] = lambda request: None
    """Takes a request and returns its fault; called by one thread at a time."""
    ended: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        request = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        if length := environ.get("CONTENT_LENGTH"):
            # All of it, or an answer before its end would break the connection.
            environ["wsgi.input"] = io.BytesIO(environ["wsgi.input"].read(int(length)))
        with self._lock:
            self.requests.append(request)
            fault = self.fault(request)
        if fault == TIMEOUT:
            self.ended.wait(30)
        if fault in (TIMEOUT, RESET):
            return _hang_up(environ)
        if fault in _ERRORS:
            code, status = _ERRORS[fault]
            text = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
            start(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))])
            return [b"" if request.startswith("HEAD") else text]
        # moto looks and then writes; one request at a time, its conditions are atomic as S3's are.
        with self._lock:
            answer = list(self.app(environ, start))
        return _hang_up(environ) if fault == LOST else answer


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, *args: Any) -> None:
        """Log nothing."""


def _hang_up(environ: dict[str, Any]) -> list[bytes]:
    with contextlib.suppress(OSError):
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


@contextlib.contextmanager
def object_store(bucket: str) -> Iterator[ObjectStore]:
    """Run a store with an empty bucket; the environment names it and its credentials meanwhile."""
    store = ObjectStore(app=DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True, request_handler=_Quiet)
    store.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    names = {
        "AWS_ENDPOINT_URL": store.url,
        "AWS_ACCESS_KEY_ID": "rayline",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        with mock.patch.dict(os.environ, names):
            with urllib.request.urlopen(
                urllib.request.Request(f"{store.url}/{bucket}", method="PUT"), timeout=30
            ):
                store.requests.clear()
            yield store
    finally:
        store.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()

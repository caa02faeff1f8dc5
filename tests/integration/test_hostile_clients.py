"""Clients that are slow, broken or malicious, at the socket of a gateway without Ray."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests

from lib.storage import Storage
from tests.console_line import publish_models, served
from tests.e2e.clients import until

IMAGE = bytes(28 * 28)
RAW = {"Content-Type": "application/octet-stream"}
TIMEOUT_S = 60


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    storage = Storage(str(tmp_path_factory.mktemp("gateway")))
    publish_models(storage)
    with served(storage) as line:
        answer = requests.post(f"{line.url}/predict", IMAGE, headers=RAW, timeout=TIMEOUT_S)
        assert answer.status_code == 200
        yield line.url


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname
    assert parts.port
    return socket.create_connection((parts.hostname, parts.port), timeout=TIMEOUT_S)


def head(*lines: str, path: str = "/predict", method: str = "POST") -> bytes:
    first = f"{method} {path} HTTP/1.1"
    wanted = ("Host: localhost", "Content-Type: application/octet-stream", *lines)
    return "\r\n".join((first, *wanted, "", "")).encode()


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection."""
    content = b""
    while part := connection.recv(65536):
        content += part
    return content


def statuses(content: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", content)]


def sent(url: str, request: bytes) -> list[int]:
    """Send bytes on a connection of their own; return the statuses of all answers."""
    with connect(url) as connection:
        connection.sendall(request)
        return statuses(read_all(connection))


def latencies_s(url: str, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Ask on one connection and return how long each answer took; all of them must be right."""
    taken = []
    with requests.Session() as session:
        for _ in range(count):
            start_s = time.perf_counter()
            answer = session.post(f"{url}/predict", IMAGE, headers=RAW, timeout=TIMEOUT_S)
            taken.append(time.perf_counter() - start_s)
            assert answer.status_code == 200, answer.text
    return np.array(taken)


def test_300_slow_uploads_neither_refuse_nor_slow_down_others(url: str) -> None:
    before_s = np.percentile(latencies_s(url, 200), 99)
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(url)) for _ in range(300)]
        for connection in slow:
            connection.sendall(head(f"Content-Length: {16 * 2**20}") + b"\0")
        meanwhile_s = latencies_s(url, 100)
        for connection in slow:
            connection.sendall(b"\0" * 1000)
        meanwhile_s = np.concatenate([meanwhile_s, latencies_s(url, 100)])
        # None was answered, so all of them were waited for.
        for connection in slow:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.recv(1)
    # The least is for other work of a busy machine; full of slow uploads it would be seconds.
    assert np.percentile(meanwhile_s, 99) <= max(2 * before_s, 0.5)


def test_pipelined_requests_are_answered_in_their_order(url: str) -> None:
    asked = [head("Content-Length: 784", f"X-Request-Id: id-{number}") for number in range(5)]
    asked[-1] = asked[-1].replace(b"Host:", b"Connection: close\r\nHost:")
    with connect(url) as connection:
        connection.sendall(b"".join(each + IMAGE for each in asked))
        content = read_all(connection)
    assert statuses(content) == [200] * 5
    ids = [found.decode() for found in re.findall(rb'"request_id":"([^"]+)"', content)]
    assert ids == [f"id-{number}" for number in range(5)]


def test_a_client_that_stops_sending_leaves_nothing_behind(url: str) -> None:
    for body in (b"", b"\0" * 10, IMAGE):
        for is_half in (True, False):
            with connect(url) as connection:
                connection.sendall(head("Content-Length: 784") + body)
                if is_half:
                    connection.shutdown(socket.SHUT_WR)
                    assert set(statuses(read_all(connection))) <= {200}
    assert latencies_s(url, 3).all()


@pytest.mark.parametrize(
    ("path", "header", "expected"),
    [
        ("/predict", "Content-Length: " + "9" * 5000, {400, 413}),
        ("/predict", "Content-Length: 99999999", {413}),
        ("/predict", "X-Model-Version: " + "9" * 5000, {404}),
        ("/predict", "X-Request-Id: " + "9" * 5000, {200}),
        ("/predict", "X-Routing-Key: " + "9" * 5000, {200}),
        ("/v2/models/digits/infer", "Inference-Header-Content-Length: " + "9" * 5000, {400}),
        ("/v2/models/digits/versions/" + "9" * 5000 + "/infer", "X-A: b", {404}),
    ],
)
def test_numbers_of_5000_digits_are_refused_and_not_converted(
    url: str, path: str, header: str, expected: set[int]
) -> None:
    length = () if header.startswith("Content-Length") else ("Content-Length: 784",)
    request = head(header, *length, "Connection: close", path=path) + IMAGE
    found = sent(url, request)
    assert found
    assert set(found) <= expected


def test_bodies_in_chunks_and_old_or_absolute_requests_are_taken(url: str) -> None:
    chunks = b"".join(b"1\r\n\0\r\n" for _ in range(784)) + b"0\r\n\r\n"
    closing = "Connection: close"
    assert sent(url, head("Transfer-Encoding: chunked", closing) + chunks) == [200]
    absolute = head("Content-Length: 784", closing, path=f"{url}/predict") + IMAGE
    assert sent(url, absolute) == [200]
    old = head("Content-Length: 784").replace(b"HTTP/1.1", b"HTTP/1.0") + IMAGE
    assert sent(url, old) == [200]


def test_a_client_that_asks_first_is_told_to_continue(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(head("Content-Length: 784", "Expect: 100-continue", "Connection: close"))
        content = b""

        def is_told() -> bool:
            nonlocal content
            content += connection.recv(65536)
            return b"100 Continue" in content

        until(is_told, what="100 Continue")
        connection.sendall(IMAGE)
        assert statuses(content + read_all(connection)) == [100, 200]

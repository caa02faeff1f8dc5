"""Keep-alive clients that load a live gateway and count what they get."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

RAW = {"Content-Type": "application/octet-stream"}


@dataclass(slots=True)
class Counts:
    """What a load run saw; `failures` holds a line for each request without a 200."""

    answered: int = 0
    failures: list[str] = field(default_factory=list)
    versions: dict[int, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, status: int | None, body: bytes) -> None:
        with self.lock:
            if status == 200:
                self.answered += 1
                version = json.loads(body)["model_version"]
                self.versions[version] = self.versions.get(version, 0) + 1
            else:
                self.failures.append(f"{status}: {body[:200]!r}")


def post(
    connection: http.client.HTTPConnection,
    body: bytes,
    headers: Mapping[str, str],
    *,
    path: str = "/predict",
) -> tuple[int | None, bytes]:
    """Send one request; a connection that broke gives (None, reason)."""
    try:
        connection.request("POST", path, body, dict(headers))
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return None, repr(error).encode()


def connect(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    return http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)


@contextmanager
def load(url: str, body: bytes, *, num_clients: int = 8, pause_s: float = 0.0) -> Iterator[Counts]:
    """Post the same image from keep-alive clients for as long as the block runs.

    With a pause after each answer the clients leave the processor to what else goes on.
    """
    counts, stop = Counts(), threading.Event()

    def client() -> None:
        connection = connect(url)
        while not stop.is_set():
            counts.add(*post(connection, body, RAW))
            stop.wait(pause_s)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def post_all(
    url: str, requests: list[tuple[bytes, dict[str, str]]], *, num_clients: int = 8
) -> list[Any]:
    """Send each (body, headers) once and return the JSON answers in the same order."""
    answers: list[Any] = [None] * len(requests)

    def client(offset: int) -> None:
        connection = connect(url)
        for index in range(offset, len(requests), num_clients):
            body, headers = requests[index]
            status, answer = post(connection, body, {**RAW, **headers})
            answers[index] = json.loads(answer) if status == 200 else f"{status}: {answer!r}"
        connection.close()

    threads = [threading.Thread(target=client, args=(offset,)) for offset in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def until(
    condition: Callable[[], bool], *, deadline_s: float = 60, every_s: float = 0.05, what: str
) -> None:
    """Wait for a condition; fail the test at the deadline."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {deadline_s:.0f} s"
        time.sleep(every_s)

"""Calls of Serve's REST interface that are worth making again."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lib.config import Settings
from lib.errors import ServingError
from lib.serving import client
from lib.serving.client import ServeClient

SETTINGS = Settings(storage="/s", mlflow_uri="http://m", model="digits")


def answers(monkeypatch: pytest.MonkeyPatch, *texts: str) -> list[str]:
    """Let Serve answer so, one after the other; an empty text is success."""
    left, calls = list(texts), []

    def request(method: str, *_: Any, **__: Any) -> Any:
        calls.append(method)
        text = left.pop(0)
        return SimpleNamespace(ok=not text, status_code=500 if text else 200, text=text)

    monkeypatch.setattr(client.requests, "request", request)
    monkeypatch.setattr(client, "_AGAIN_S", 0.0)
    return calls


def test_a_config_is_sent_again_where_the_ingress_was_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died = "ray.exceptions.ActorDiedError: HAProxyManager was killed by `ray.kill`"
    calls = answers(monkeypatch, died, died, "")
    ServeClient(SETTINGS).apply({})
    assert calls == ["PUT"] * 3

    calls = answers(monkeypatch, *[died] * 9)
    with pytest.raises(ServingError, match="ActorDiedError"):
        ServeClient(SETTINGS).apply({})
    assert len(calls) == 4


def test_what_serve_refuses_is_not_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = answers(monkeypatch, "no such import path")
    with pytest.raises(ServingError, match="no such import path"):
        ServeClient(SETTINGS).apply({})
    assert calls == ["PUT"]

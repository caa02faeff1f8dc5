"""The read-only JSON that the console draws: traffic of the last minutes, and what the jobs wrote.

GET /stats, all gateways together; the lists are as long as `times` (seconds since 1970):

    {"bucket_s": 10, "times": [1700000000, …], "gateways": 2, "refused": {"401": 3},
     "versions": {"digits/3": {
       "statuses": {"200": 512}, "requests_per_s": [1.2, …], "errors_per_s": [0, …],
       "p50_ms": [2.1, null, …], "p99_ms": [9.3, null, …],
       "overall": {"p50_ms": 2.2, "p99_ms": 9.9}}}}

GET /watch hands on two files by model, each null until a job has written it. The console reads the
following of them and does without whatever is absent; times are ISO 8601 or seconds since 1970.

    {"models": {"digits": {
       "watch": {                           # watch/MODEL/state.json, of jobs/monitor
         "time": "…",
         "versions": {"3": {"accuracy": 0.98, "low": 0.96, "high": 0.99, "labels": 200,
                            "confidence": 0.97, "disagreement": 0.02}},
         "drift": {"score": 0.1, "p_value": 0.4, "alarm": false, "moved": ["class 3", "row 2"]},
         "history": [{"time": "…", "versions": {"3": {…}}, "drift": {…}}, …]},   # oldest first
       "rollout": {                         # rollouts/MODEL/state.json, of jobs/rollout
         "candidate": 4, "champion": 3, "weight": 5, "since": "…", "reason": "…",
         "status": "running",   # paused, held, withdrawing, rolled_back, aborted, promoted
         "stage": "canary-5", "stages": ["replay", "shadow", "canary-1", …],
         "gates": [{"name": "error_rate", "verdict": "pass", "value": 0,       # wait, breach
                    "champion": 0, "limit": 0.01, "samples": 812}],
         "history": [{"time": "…", "stage": "shadow", "status": "passed", "reason": "…"}]}}},
     "links": {"MLflow": "http://…", "Ray dashboard": "http://…"}}

GET /samples/{model}: `{"samples": [{"label": "7", "png": "base64"}]}`, test images of the data
set of the champion, one a class.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from lib.serving.router import Router
from lib.serving.samples import read_samples
from lib.storage import Storage
from lib.watch.overview import overview
from lib.watch.stats import collect
from serve_apps.asgi import Call, Reply, Route, json_reply

_LINKS = {"MLflow": "MLFLOW_TRACKING_URI", "Ray dashboard": "RAY_API_SERVER_ADDRESS"}


class Watching:
    """The handlers, over storage."""

    def __init__(self, router: Router, storage: Storage) -> None:
        self._router = router
        self._storage = storage
        self._samples = lru_cache(maxsize=4)(lambda digest: read_samples(storage, digest))

    async def stats(self, call: Call) -> Reply:
        """GET /stats: requests and latency per version, of the last 15 minutes."""
        return json_reply(await asyncio.to_thread(collect, self._storage, time.time()))

    async def watch(self, call: Call) -> Reply:
        """GET /watch: quality, drift and rollout per model."""
        models = sorted(self._router.table.policy.models)
        found = await asyncio.to_thread(overview, self._storage, models)
        return json_reply({"models": found, "links": links(os.environ)})

    async def samples(self, call: Call) -> Reply:
        """GET /samples/{model}: test images of the champion's data set."""
        digest = self._router.table.champion(call.params["model"]).card.data_digest
        return json_reply({"samples": await asyncio.to_thread(self._samples, digest)})


def links(env: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses of the line's other pages that a browser can open."""
    found = {}
    for name, variable in _LINKS.items():
        try:
            parts = urlsplit(env.get(variable, ""))
        except ValueError:
            continue
        if parts.scheme in ("http", "https") and parts.hostname:
            # Without a user's name and password, which an address may hold.
            found[name] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    return found


def routes(watching: Watching) -> list[Route]:
    """Return the paths."""
    table: list[tuple[str, Any, str, tuple[int, ...]]] = [
        ("/stats", watching.stats, "Requests and latency of the last 15 minutes.", (503,)),
        ("/watch", watching.watch, "Quality, drift and rollout as last judged.", (503,)),
        ("/samples/{model}", watching.samples, "Some test images.", (404, 503)),
    ]
    return [
        Route(
            method="GET", path=path, handler=handler, summary=summary, errors=errors, scope="view"
        )
        for path, handler, summary, errors in table
    ]

"""What there is to be asked, as Triton's clients ask for it: models, their set-up, their counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lib.serving import oip, payload, triton
from lib.serving.payload import PayloadError
from lib.serving.record import Record
from lib.serving.router import Router
from serve_apps import schemas
from serve_apps.asgi import Call, Reply, Route, json_reply

Counts = Callable[[], tuple[Record, Mapping[tuple[str, str], int]]]
"""Gives what a gateway has counted since it started, and when it last counted each version."""


def nothing() -> tuple[Record, Mapping[tuple[str, str], int]]:
    """Return the counts of a gateway that counts nothing."""
    return Record(), {}


class Repository:
    """The answers, over a router and the counts of its gateway."""

    def __init__(self, router: Router, counts: Counts) -> None:
        self._router = router
        self._counts = counts

    def index(self, *, is_ready_only: bool) -> list[dict[str, str]]:
        """Return every version with its state."""
        table = self._router.table
        states = {(name, n): table.is_ready(name, str(n)) for name, n in table.listed()}
        return triton.repository_index(
            {key: is_up for key, is_up in states.items() if is_up or not is_ready_only}
        )

    def config(self, name: str, version: str | None) -> dict[str, Any]:
        """Return a model's configuration; raise PayloadError 404 for an unknown one."""
        table = self._router.table
        name, traffic = table.model(name)
        pin = version or str(traffic.champion)
        # Also of a version that is away.
        card = replace(table, gone=frozenset()).pick(name, pin, "").card
        return triton.model_config(card, sorted(traffic.bundles))

    def statistics(self, name: str | None, version: str | None) -> list[dict[str, Any]]:
        """Return the counts of all versions, of a model's, or of one; raise PayloadError 404."""
        table = self._router.table
        if name:
            name, traffic = table.model(name)
            known = [str(number) for number in sorted(traffic.bundles)]
            if version and version not in known:
                message = f"no version {version!r} of {name} is served; there are: "
                raise PayloadError(404, message + ", ".join(known))
        record, last_ms = self._counts()
        return [
            triton.model_statistics(model, number, record, last_ms)
            for model, number in table.listed()
            if (not name or model == name) and (not version or str(number) == version)
        ]

    async def list_models(self, call: Call) -> Reply:
        """GET /v2/models: the names, as KServe's clients ask for them."""
        return json_reply({"models": sorted(self._router.table.policy.models)})

    async def post_index(self, call: Call) -> Reply:
        """POST /v2/repository/index: every version with its state."""
        content = payload.load_json(call.body) if call.body.strip() else {}
        is_ready_only = content.get("ready", False) if isinstance(content, dict) else None
        if not isinstance(is_ready_only, bool):
            raise PayloadError(422, 'send nothing, or {"ready": true} for what is up alone')
        return json_reply(self.index(is_ready_only=is_ready_only))

    async def get_config(self, call: Call) -> Reply:
        """GET /v2/models/…/config."""
        return json_reply(self.config(call.params["model"], call.params.get("version")))

    async def get_statistics(self, call: Call) -> Reply:
        """GET /v2/models/…/stats."""
        found = self.statistics(call.params.get("model"), call.params.get("version"))
        return json_reply({"model_stats": found})


def routes(repository: Repository) -> list[Route]:
    """Return the paths; those of all models stand before those of one."""
    body = {"application/json": {"schema": schemas.IndexRequest.model_json_schema()}}
    index = Route(
        method="POST",
        path="/v2/repository/index",
        handler=repository.post_index,
        summary="Every version with its state.",
        response=schemas.RepositoryIndex,
        request=body,
        is_body_required=False,
        errors=(400, 408, 413, 415, 422, 503),
        tag=oip.TAG,
        scope="predict",
    )
    gets = [("/v2/models", repository.list_models, "Names of the models.", "predict")]
    gets.append(("/v2/models/stats", repository.get_statistics, "Counts of all versions.", "view"))
    for base in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        gets.append((f"{base}/config", repository.get_config, "Model configuration.", "predict"))
        gets.append((f"{base}/stats", repository.get_statistics, "Counts of a gateway.", "view"))
    return [
        index,
        *(
            Route(
                method="GET",
                path=path,
                handler=handler,
                summary=summary,
                errors=(404, 503),
                tag=oip.TAG,
                scope=scope,
            )
            for path, handler, summary, scope in gets
        ),
    ]

"""Changes of what is served, in phases, so that no request meets a version that is not there.

Bring new versions up → commit the policy → wait until every gateway follows it and has nothing
in flight on what left → take that away. A version that fails to load stops at the first phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import requests

from lib.cli import progress
from lib.config import Settings
from lib.errors import ServingError
from lib.registry.models import CHALLENGER, CHAMPION, Version, ensure_bundle, versions
from lib.serving import plan, policy
from lib.serving.client import ServeClient, live_applications, wait_until
from lib.serving.traffic import ModelTraffic, Policy
from lib.storage import Storage

START_DEADLINE_S = 180
FOLLOW_DEADLINE_S = 60
PROBE_DEADLINE_S = 60

CHALLENGER_SHARE = 10.0


def deploy(
    settings: Settings,
    storage: Storage,
    *,
    who: str,
    why: str,
    challenger_share: float = CHALLENGER_SHARE,
) -> Mapping[str, Any]:
    """Serve the model's champion and challenger; return the policy in force and the address.

    The champion gets what the challenger's share, in percent, leaves. What is served already
    goes on unchanged, so deploying twice does nothing the second time.
    """
    if not 0 <= challenger_share < 100:
        raise ServingError(f"the challenger's share {challenger_share} is not in 0–100 %")
    base = policy.current(storage)
    desired = _desired(settings, storage, base, challenger_share)
    if desired != (base.models.get(settings.model) if base else None):
        models = {**(base.models if base else {}), settings.model: desired}
    else:
        models = dict(base.models) if base else {}
    client = ServeClient(settings)
    _bring_up(settings, storage, client, models)
    if base is None or models != base.models:
        default = base.default_model if base else settings.model
        base = policy.commit(storage, base, models, default_model=default, who=who, why=why)
        progress("deploy", f"policy generation {base.generation}: {_describe(desired)}")
    _wait_followed(storage, client, base)
    _take_away(settings, client, models)
    _probe(settings, desired)
    return {"generation": base.generation, "url": _url(settings), **_summary(settings, desired)}


def _desired(
    settings: Settings, storage: Storage, base: Policy | None, challenger_share: float
) -> ModelTraffic:
    served = base.models.get(settings.model) if base else None
    by_alias = {alias: version for version in versions(settings) for alias in version.aliases}
    champion, challenger = by_alias.get(CHAMPION), by_alias.get(CHALLENGER)
    if champion is None:
        raise ServingError(f"{settings.model} has no champion; run jobs.register first")
    if served and served.champion == champion.version:
        known = {champion.version} | ({challenger.version} if challenger else set())
        if known == set(served.bundles):
            # Weights that somebody set since then are theirs to change.
            return served
    served_versions: list[Version] = [champion]
    weights = {champion.version: 100.0}
    if challenger is not None and challenger.version != champion.version:
        served_versions.append(challenger)
        weights = {
            champion.version: 100.0 - challenger_share,
            challenger.version: challenger_share,
        }
    return ModelTraffic(
        weights=weights,
        bundles={
            version.version: ensure_bundle(settings, storage, version)
            for version in served_versions
        },
        champion=champion.version,
        previous_champion=served.previous_champion if served else None,
    )


def _applications(
    settings: Settings,
    live: Mapping[str, Any],
    code_uri: str,
    models: Mapping[str, ModelTraffic],
) -> list[dict[str, Any]]:
    applications = [plan.application(settings, live, code_uri, name=plan.GATEWAY, bundle=None)]
    for name, traffic in models.items():
        for version, bundle in traffic.bundles.items():
            application = plan.version_application(name, version)
            applications.append(
                plan.application(settings, live, code_uri, name=application, bundle=bundle)
            )
    return applications


def _bring_up(
    settings: Settings, storage: Storage, client: ServeClient, models: Mapping[str, ModelTraffic]
) -> None:
    details = client.details()
    live = live_applications(details)
    wanted = _applications(settings, live, plan.publish_code(storage), models)
    names = [config["name"] for config in wanted]
    statuses = {name: _status(details, name) for name in names}
    if all(live.get(config["name"]) == config for config in wanted) and all(
        status == "RUNNING" for status in statuses.values()
    ):
        return
    others = [config for name, config in live.items() if name not in names]
    progress("deploy", f"bringing up {', '.join(names)}")
    client.apply(plan.serve_config(settings, [*wanted, *others]))
    try:
        _wait_running(client, names)
    except ServingError:
        # What was served before goes on; the version that failed leaves no trace in Serve.
        client.apply(plan.serve_config(settings, list(live.values())))
        raise


def _wait_running(client: ServeClient, names: list[str]) -> None:
    seen: dict[str, str] = {}

    def all_running() -> bool:
        details = client.details()
        for name in names:
            status = _status(details, name)
            if seen.get(name) != status:
                seen[name] = status
                progress("deploy", f"{name}: {status.lower()}")
            if status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise ServingError(f"{name} failed to start: {_reason(details, name)}")
        return all(seen[name] == "RUNNING" for name in names)

    wait_until(all_running, deadline_s=START_DEADLINE_S, what=f"start of {', '.join(names)}")


def _status(details: Mapping[str, Any], name: str) -> str:
    return str(details.get("applications", {}).get(name, {}).get("status", "NOT_STARTED"))


def _reason(details: Mapping[str, Any], name: str) -> str:
    application = details["applications"][name]
    messages = [application.get("message", "")]
    messages += [item.get("message", "") for item in application.get("deployments", {}).values()]
    return " ".join(message for message in messages if message)[-2000:]


def _wait_followed(storage: Storage, client: ServeClient, wanted: Policy) -> None:
    def followed() -> bool:
        deployments = client.details()["applications"][plan.GATEWAY]["deployments"]
        running = [
            replica["replica_id"]
            for deployment in deployments.values()
            for replica in deployment["replicas"]
            if replica["state"] == "RUNNING"
        ]
        return bool(running) and all(
            policy.acknowledged(storage, replica) >= wanted.generation for replica in running
        )

    wait_until(followed, deadline_s=FOLLOW_DEADLINE_S, what="the gateways' change of policy")


def _take_away(settings: Settings, client: ServeClient, models: Mapping[str, ModelTraffic]) -> None:
    live = live_applications(client.details())
    kept = {plan.GATEWAY} | {
        plan.version_application(name, version)
        for name, traffic in models.items()
        for version in traffic.bundles
    }
    if leaving := sorted(set(live) - kept):
        progress("deploy", f"taking away {', '.join(leaving)}")
        client.apply(plan.serve_config(settings, [live[name] for name in sorted(kept)]))


def _probe(settings: Settings, desired: ModelTraffic) -> None:
    """Ask every version once through the address that callers use."""
    base = f"{_url(settings)}/v2/models/{settings.model}"
    for version in desired.bundles:
        url = f"{base}/versions/{version}"
        last = "nothing yet"

        def answers(url: str = url) -> bool:
            nonlocal last
            try:
                shape = [1, *requests.get(url, timeout=30).json()["inputs"][0]["shape"][1:]]
                tensor = {"name": "images", "datatype": "UINT8", "shape": shape}
                body = {"inputs": [{**tensor, "data": [0] * math.prod(shape)}]}
                answer = requests.post(f"{url}/infer", json=body, timeout=60)
            except (requests.RequestException, LookupError) as error:
                # The ingress may just be coming back; a version that is wrong stays wrong.
                last = repr(error)
                return False
            last = answer.text[:500]
            return answer.ok

        try:
            wait_until(answers, deadline_s=PROBE_DEADLINE_S, what=f"an answer of version {version}")
        except ServingError as error:
            raise ServingError(f"{error}; it said: {last}") from error
        progress("deploy", f"version {version} answers")


def _host(settings: Settings) -> str:
    return "127.0.0.1" if settings.http_host == "0.0.0.0" else settings.http_host


def _url(settings: Settings) -> str:
    return f"http://{_host(settings)}:{settings.http_port}"


def _describe(traffic: ModelTraffic) -> str:
    total = sum(traffic.weights.values())
    shares = [f"v{version} {100 * w / total:g} %" for version, w in traffic.weights.items()]
    return ", ".join(shares)


def _summary(settings: Settings, traffic: ModelTraffic) -> dict[str, Any]:
    return {
        "model": settings.model,
        "champion": traffic.champion,
        "weights": {str(version): weight for version, weight in traffic.weights.items()},
    }

"""A change of what is served, in phases, so that no request meets a version that is not there.

Bring new versions up → commit the policy → wait until every gateway follows it and has nothing
in flight on what left → take that away. A version that fails to load stops at the first phase. On
Kubernetes the RayService is told after the first and the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import requests

from lib.cli import progress
from lib.config import Settings
from lib.errors import RefusedError, ServingError, StartError
from lib.serving import plan, policy, rayservice
from lib.serving.bundle import read_card
from lib.serving.client import ServeClient, live_applications, wait_until
from lib.serving.feedback import PROBE_ID
from lib.serving.keys import internal_headers
from lib.serving.predictor import load_predictor
from lib.serving.reach import as_started, serve_url
from lib.serving.traffic import COLOCATED, ModelTraffic, Policy
from lib.storage import Storage

START_DEADLINE_S = 180
FOLLOW_DEADLINE_S = 60
PROBE_DEADLINE_S = 60


def apply(
    settings: Settings,
    storage: Storage,
    base: Policy | None,
    desired: ModelTraffic,
    *,
    who: str,
    why: str,
    new_code: bool = False,
    other_classes: bool = False,
) -> Policy:
    """Make `desired` the traffic of the settings' model; return the policy in force.

    Args:
        settings: Where the line is, and which model is meant.
        storage: The storage root.
        base: The policy that `desired` was made from.
        desired: What is wanted; where it is what `base` says, only what is missing is repaired.
        who: Name of the person, for the history.
        why: Their reason, for the history.
        new_code: Whether gateways and versions are to run this checkout's code; else what is live
            keeps the code that it was deployed with.
        other_classes: Whether a version with other classes, or another shape, than the champion's
            may get requests that were the champion's.

    Raises:
        RefusedError: A version with other classes or another shape would get requests.
        ServingError: A version did not start, somebody else changed the policy meanwhile, or the
            RayService can't be told. What was served before goes on.
    """
    models = {**(base.models if base else {}), settings.model: desired}
    if base and settings.model in base.models and not other_classes:
        check_classes(settings.model, storage, base.models[settings.model], desired)
    client = ServeClient(settings)
    settings = as_started(settings, client.details())
    _bring_up(settings, storage, client, models, new_code=new_code)
    # Before anything depends on it: what it does not know goes when its operator restarts.
    _tell_rayservice(settings, client)
    if base is None or models != base.models:
        default = base.default_model if base else settings.model
        base = policy.commit(storage, base, models, default_model=default, who=who, why=why)
        progress("deploy", f"policy generation {base.generation}: {describe(desired)}")
    _wait_followed(storage, client, base)
    if _take_away(settings, client, models):
        _tell_rayservice(settings, client)
    _probe(settings, storage, desired)
    return base


def describe(traffic: ModelTraffic) -> str:
    """Return the split for people."""
    total = sum(traffic.weights.values())
    shares = [f"v{version} {100 * w / total:g} %" for version, w in traffic.weights.items()]
    shares += [f"v{version} shadows {percent:g} %" for version, percent in traffic.shadows.items()]
    return ", ".join(shares)


def check_classes(
    model: str, storage: Storage, served: ModelTraffic, desired: ModelTraffic
) -> None:
    """Refuse traffic to a version whose classes or shape are not the served champion's.

    Its callers would get answers of another meaning, or errors. Versions that have traffic already
    are not looked at: somebody decided that.

    Raises:
        RefusedError: Names the version and the flag that allows it.
    """
    answering = {(number, served.bundles[number]) for number in served.reachable()}
    card = None
    for number in sorted(desired.reachable()):
        bundle = desired.bundles[number]
        if (number, bundle) in answering:
            continue
        card = card or read_card(storage, served.bundles[served.champion])
        other = read_card(storage, bundle)
        if difference := card.difference(other.class_names, other.shape):
            raise RefusedError(
                f"version {number} of {model} has {difference}, those of its champion, version "
                f"{served.champion}; nothing was changed. Bring it up as a model of its own "
                "(MODEL=another-name), or let `python -m jobs.deploy` give it this model's "
                "requests with `--other-classes`"
            )


def _bring_up(
    settings: Settings,
    storage: Storage,
    client: ServeClient,
    models: Mapping[str, ModelTraffic],
    *,
    new_code: bool,
) -> None:
    _check_colocated(storage, models[settings.model])
    details = client.details()
    live = live_applications(details)
    code_uri = plan.publish_code(storage)
    wanted = plan.applications(settings, {} if new_code else live, code_uri, models)
    names = [config["name"] for config in wanted]
    plan.check_names(settings, details, names)
    statuses = {name: _status(details, name) for name in names}
    if all(live.get(config["name"]) == config for config in wanted) and all(
        status == "RUNNING" for status in statuses.values()
    ):
        return
    progress("deploy", f"bringing up {', '.join(names)}")
    _replace(settings, client, {config["name"]: config for config in wanted})
    try:
        _wait_running(client, names)
    except ServingError:
        # What was served before goes on; the version that failed leaves no trace in Serve.
        _replace(settings, client, {name: live.get(name) for name in names})
        raise


def _replace(
    settings: Settings, client: ServeClient, changes: Mapping[str, dict[str, Any] | None]
) -> None:
    """Deploy applications by name, or delete them where None is given; all others stay.

    Serve takes its whole config at once and deletes what is missing there, so the config is read
    just before: what others deployed since is in it.
    """
    configs = {**live_applications(client.details()), **changes}
    client.apply(plan.serve_config(settings, [c for c in configs.values() if c is not None]))


def _check_colocated(storage: Storage, traffic: ModelTraffic) -> None:
    """Load here what gateways will load, so that a broken version never gets to them."""
    for version, bundle in traffic.bundles.items():
        if traffic.placement_of(version) == COLOCATED:
            load_predictor(storage, bundle, read_card(storage, bundle))


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
                raise StartError(f"{name} failed to start: {_reason(details, name)}")
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
        states = _gateways(client)
        running = [replica for replica, state in states.items() if state == "RUNNING"]
        return bool(running) and all(
            policy.acknowledged(storage, replica) >= wanted.generation for replica in running
        )

    wait_until(followed, deadline_s=FOLLOW_DEADLINE_S, what="the gateways' change of policy")
    # In this order: one that comes up meanwhile is not taken for one that is gone.
    known = policy.acknowledging(storage)
    for gateway in known - _gateways(client).keys():
        policy.forget(storage, gateway)


def _gateways(client: ServeClient) -> dict[str, str]:
    """Return the state of each replica of the gateway by its id."""
    deployments = client.details()["applications"][plan.GATEWAY]["deployments"]
    return {
        replica["replica_id"]: replica["state"]
        for deployment in deployments.values()
        for replica in deployment["replicas"]
    }


def _take_away(settings: Settings, client: ServeClient, models: Mapping[str, ModelTraffic]) -> bool:
    """Delete this model's versions that the policy does not need; return whether there were any.

    Other applications stay: other people's, and other models' that are just coming up.
    """
    kept = plan.names(models)
    leaving = sorted(
        name
        for name, config in live_applications(client.details()).items()
        if plan.is_version_of(settings.model, name)
        and plan.is_ours(settings, config)
        and name not in kept
    )
    if leaving:
        progress("deploy", f"taking away {', '.join(leaving)}")
        _replace(settings, client, dict.fromkeys(leaving))
    return bool(leaving)


def _tell_rayservice(settings: Settings, client: ServeClient) -> None:
    if settings.rayservice:
        live = live_applications(client.details())
        rayservice.patch(settings.rayservice, plan.ray_service_patch(settings, live))


def _probe(settings: Settings, storage: Storage, desired: ModelTraffic) -> None:
    """Ask every version once through the address that callers use."""
    base = f"{serve_url(settings)}/v2/models/{settings.model}"
    headers = {**internal_headers(storage), "X-Request-Id": PROBE_ID}
    for version in desired.bundles:
        url = f"{base}/versions/{version}"
        last = "nothing yet"

        def answers(url: str = url) -> bool:
            nonlocal last
            try:
                metadata = requests.get(url, headers=headers, timeout=30).json()
                shape = [1, *metadata["inputs"][0]["shape"][1:]]
                tensor = {"name": "images", "datatype": "UINT8", "shape": shape}
                body = {"inputs": [{**tensor, "data": [0] * math.prod(shape)}]}
                answer = requests.post(f"{url}/infer", json=body, headers=headers, timeout=60)
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

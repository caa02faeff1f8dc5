"""Where the traffic policy lives: one file a generation, and the newest one counts.

Creating the next generation's file is the one commit point of every change, and the files are the
history. Gateways look for the next file several times a second, which on a local disk costs
microseconds and needs no process beside storage; the last policy read stays in force meanwhile.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from lib.errors import ServingError
from lib.serving.traffic import ModelTraffic, Policy
from lib.storage import Storage

_GENERATION = re.compile(r"traffic/\d{8}\.json")


def _path(generation: int) -> str:
    return f"traffic/{generation:08d}.json"


def _files(storage: Storage) -> list[str]:
    """Return the generations' files, oldest first: whatever else lies there is no generation."""
    return [path for path in storage.list("traffic") if _GENERATION.fullmatch(path)]


def current(storage: Storage, *, known: Policy | None = None) -> Policy | None:
    """Return the newest policy, or None before the first; `known` saves the listing."""
    if known is None:
        files = _files(storage)
        if not files:
            return None
        return Policy.from_json(storage.read_json(files[-1]))
    while storage.exists(_path(known.generation + 1)):
        known = Policy.from_json(storage.read_json(_path(known.generation + 1)))
    return known


def not_served(model: str, policy: Policy | None) -> ServingError:
    """Return the error for a model that gets no traffic."""
    others = f"; served: {', '.join(sorted(policy.models))}" if policy else ""
    return ServingError(
        f"{model} is not served yet{others}. Set RAYLINE_MODEL to a model that is served, or run "
        f"jobs.deploy to serve {model}"
    )


def history(storage: Storage) -> list[Policy]:
    """Return every policy that there was, oldest first."""
    return [Policy.from_json(storage.read_json(path)) for path in _files(storage)]


def commit(
    storage: Storage,
    base: Policy | None,
    models: Mapping[str, ModelTraffic],
    *,
    default_model: str,
    who: str,
    why: str,
) -> Policy:
    """Publish the policy that follows `base`.

    Raises ServingError if somebody else changed the policy since `base` was read: nothing is
    overwritten, and the caller decides again from what is there now.
    """
    policy = Policy(
        generation=base.generation + 1 if base else 1,
        models=dict(models),
        default_model=default_model,
        who=who,
        why=why,
        when=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    if not storage.create_json(_path(policy.generation), policy.to_json()):
        raise ServingError(
            f"the traffic policy was changed meanwhile (generation {policy.generation} exists); "
            "look at GET /traffic and run the command again"
        )
    return policy


def acknowledge(storage: Storage, gateway: str, generation: int) -> None:
    """Record that a gateway routes by this generation and has nothing in flight by older ones."""
    storage.write_json(f"gateways/{gateway}.json", {"generation": generation})


def acknowledging(storage: Storage) -> set[str]:
    """Return the gateways that have acknowledged a generation, also those that are gone."""
    names = (path.removeprefix("gateways/") for path in storage.list("gateways"))
    return {name.removesuffix(".json") for name in names if name.endswith(".json")}


def forget(storage: Storage, gateway: str) -> None:
    """Delete what a gateway that is gone has acknowledged."""
    storage.delete(f"gateways/{gateway}.json")


def acknowledged(storage: Storage, gateway: str) -> int:
    """Return the generation that a gateway acknowledged last, 0 before the first."""
    path = f"gateways/{gateway}.json"
    return int(storage.read_json(path)["generation"]) if storage.exists(path) else 0

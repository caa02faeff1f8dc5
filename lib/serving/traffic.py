"""The traffic policy: which version answers which request. Pure data and pure functions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lib.errors import ServingError

ISOLATED = "isolated"
"""Every version is a Serve application of its own, with its own scaling and failures."""
COLOCATED = "colocated"
"""Small versions live in the gateways: no call between processes, the lowest cost a request."""
CHALLENGER_SHARE = 10.0
"""Percent of the requests that a new challenger answers, unless it is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelTraffic:
    """How the requests for one model are shared among its versions."""

    weights: Mapping[int, float]
    """Version → share. Only ratios count; a version with weight 0 answers pinned requests."""
    bundles: Mapping[int, str]
    """Version → bundle path below the storage root, for every version that is up."""
    champion: int
    previous_champion: int | None = None
    placement: str = ISOLATED
    shadows: Mapping[int, float] = field(default_factory=dict)
    """Version → percent of the requests of which it gets a copy; its answers go to no caller."""
    pins: Mapping[str, int] = field(default_factory=dict)
    """Routing key → the version that answers it, whatever the weights."""

    def placement_of(self, version: int) -> str:
        """Return where a version runs; one that is only a shadow never runs inside a gateway."""
        is_only_shadow = version in self.shadows and not self.weights.get(version)
        return ISOLATED if is_only_shadow else self.placement

    def isolated(self) -> list[int]:
        """Return the versions that are Serve applications of their own."""
        return [number for number in self.bundles if self.placement_of(number) == ISOLATED]

    def reachable(self) -> set[int]:
        """Return the versions that get requests which do not name a version, or copies of them."""
        weighted = {number for number, weight in self.weights.items() if weight > 0}
        return weighted | set(self.shadows) | set(self.pins.values()) | {self.champion}

    def __post_init__(self) -> None:
        """Refuse a policy that could not be served."""
        for what, versions in (
            ("have a weight", self.weights),
            ("are shadows", self.shadows),
            ("are pinned", self.pins.values()),
        ):
            if unknown := set(versions) - set(self.bundles):
                raise ServingError(f"versions {sorted(unknown)} {what} but are not deployed")
        if self.champion not in self.bundles:
            raise ServingError(f"champion {self.champion} is not deployed")
        if self.placement not in (ISOLATED, COLOCATED):
            raise ServingError(f"placement {self.placement!r} is neither isolated nor colocated")
        for version, percent in self.shadows.items():
            if not 0 < percent <= 100:
                raise ServingError(f"shadow {version}: {percent!r} is not in 0–100 percent")
        for version, weight in self.weights.items():
            if not math.isfinite(weight) or weight < 0:
                raise ServingError(f"weight {weight!r} of version {version} is not ≥ 0")
        if not any(self.weights.values()):
            raise ServingError("all weights are 0: no version would answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """The desired state of serving: one document, versioned by its generation."""

    generation: int
    models: Mapping[str, ModelTraffic]
    default_model: str
    """The model that answers where a request names none."""
    who: str
    why: str
    when: str
    """UTC, ISO 8601."""

    def __post_init__(self) -> None:
        """Refuse a default that is not there."""
        if self.default_model not in self.models:
            raise ServingError(f"default model {self.default_model!r} has no traffic")

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Policy:
        """Rebuild a policy from JSON, whose keys are strings."""
        fields = dict(content)
        fields["models"] = {
            name: ModelTraffic(**{**model, **{key: _by_version(model[key]) for key in _MAPS}})
            for name, model in content["models"].items()
        }
        return cls(**fields)


_MAPS = ("weights", "bundles", "shadows")


def _by_version(content: Mapping[str, Any]) -> dict[int, Any]:
    return {int(version): value for version, value in content.items()}


def choose(weights: Mapping[int, float], key: str) -> int:
    """Return the version that answers a routing key.

    Weighted rendezvous hashing (Schindelhauer and Schomaker, "Weighted distributed hash tables",
    2005): every version draws a number from its hash with the key, scaled by its weight, and the
    highest wins. A key always gets the same version, each version gets its share of keys, and
    raising one version's weight moves keys towards it only.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little")
    chosen, best = -1, -math.inf
    for version, weight in weights.items():
        if weight <= 0:
            continue
        score = weight / -math.log(_unit(seed, version))
        if score > best or (score == best and version < chosen):
            chosen, best = version, score
    return chosen


def is_shadowed(percent: float, version: int, request_id: str) -> bool:
    """Whether a shadow gets a copy of this request; always the same answer for one request."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, salt=b"shadow").digest()
    return 100 * _unit(int.from_bytes(digest, "little"), version) < percent


_MASK = (1 << 64) - 1


def _unit(seed: int, version: int) -> float:
    """Mix a key's hash with a version (SplitMix64) into a number in (0, 1)."""
    mixed = (seed + version * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    mixed ^= mixed >> 31
    return ((mixed >> 11) + 0.5) / (1 << 53)

"""What is served: deploy, promote, roll back, shift weights.

The traffic policy is the one record of what should be; the registry's alias and Serve's
applications follow it. Every change here first repairs what a crash left behind halfway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lib.cli import progress
from lib.config import Settings
from lib.errors import RegistryError, ServingError
from lib.serving import policy
from lib.serving.apply import apply, describe
from lib.serving.reach import serve_url
from lib.serving.traffic import CHALLENGER_SHARE, ModelTraffic, Policy
from lib.storage import Storage

if TYPE_CHECKING:
    from lib.registry.models import Version


def deploy(
    settings: Settings,
    storage: Storage,
    *,
    who: str,
    why: str,
    challenger_share: float = CHALLENGER_SHARE,
    placement: str | None = None,
    new_code: bool = False,
    other_classes: bool = False,
) -> Mapping[str, Any]:
    """Serve the model's champion and challenger; return the policy in force and the address.

    A model that is not served yet: the registry's champion gets all requests or, beside a
    challenger, the rest of the challenger's share (in percent).

    A model that is served keeps its traffic, whatever the registry's aliases say, with one
    exception: a challenger that was never in this model's policy is added with its share, and the
    weights of the others keep their ratios. So deploying twice does nothing the second time, and a
    version that a person or a rollout took out does not come back. A retrained version has no alias
    before its gates have passed (`lib.registry.registration.register`), so it is never added here.

    Raises:
        RefusedError: Policy and registry mean different versions by one number, or the challenger
            has other classes or another shape and `other_classes` is not set.
    """
    if not 0 <= challenger_share < 100:
        raise ServingError(f"the challenger's share {challenger_share} is not in 0–100 %")
    base = policy.current(storage)
    desired = _champion_and_challenger(settings, storage, base, challenger_share)
    if placement:
        desired = replace(desired, placement=placement)
    made = apply(
        settings,
        storage,
        base,
        desired,
        who=who,
        why=why,
        new_code=new_code,
        other_classes=other_classes,
    )
    return _summary(settings, made)


def promote(
    settings: Settings,
    storage: Storage,
    version: int,
    *,
    who: str,
    why: str,
    other_classes: bool = False,
) -> Mapping[str, Any]:
    """Make a version champion with all of the traffic; the champion before stays warm."""
    base, served = _served(settings, storage)
    if version == served.champion:
        raise ServingError(f"version {version} is the champion already")
    _check_registry(settings, served)
    bundles = {**served.bundles, **_bundles(settings, storage, [version], served)}
    kept = {version, served.champion, *served.shadows, *served.pins.values()}
    bundles = {number: path for number, path in bundles.items() if number in kept}
    desired = _crowned(served, version, bundles)
    made = apply(settings, storage, base, desired, who=who, why=why, other_classes=other_classes)
    return _summary(settings, made)


def rollback(settings: Settings, storage: Storage, *, who: str, why: str) -> Mapping[str, Any]:
    """Give all of the traffic back to the previous champion, which is warm.

    The policy comes first: going back must not wait for a version that is ill, nor for MLflow.
    """
    base, served = _served(settings, storage)
    before = served.previous_champion
    if before is None or before not in served.bundles:
        raise ServingError(f"{settings.model} has no previous champion to go back to")
    desired = _crowned(served, before, served.bundles)
    models = {**base.models, settings.model: desired}
    made = policy.commit(storage, base, models, default_model=base.default_model, who=who, why=why)
    progress("deploy", f"policy generation {made.generation}: {describe(desired)}")
    return _summary(settings, apply(settings, storage, made, desired, who=who, why=why))


def _crowned(served: ModelTraffic, champion: int, bundles: Mapping[int, str]) -> ModelTraffic:
    """Return the traffic with another champion, which gets all of it; the one before stays up."""
    return replace(
        served,
        bundles=bundles,
        weights={champion: 100.0, served.champion: 0.0},
        champion=champion,
        previous_champion=served.champion,
        shadows={n: percent for n, percent in served.shadows.items() if n != champion},
    )


def set_traffic(
    settings: Settings,
    storage: Storage,
    *,
    weights: Mapping[int, float],
    shadows: Mapping[int, float],
    pins: Mapping[str, int],
    who: str,
    why: str,
    other_classes: bool = False,
) -> Mapping[str, Any]:
    """Replace weights, shadows and pins; versions that are named are brought up, others leave.

    Champion and previous champion stay up, whatever their weights.
    """
    base, served = _served(settings, storage)
    _check_registry(settings, served)
    named = {*weights, *shadows, *pins.values(), served.champion, served.previous_champion}
    desired = replace(
        served,
        weights=dict(weights),
        shadows=dict(shadows),
        pins=dict(pins),
        bundles=_bundles(settings, storage, [n for n in named if n is not None], served),
    )
    made = apply(settings, storage, base, desired, who=who, why=why, other_classes=other_classes)
    return _summary(settings, made)


def put(
    settings: Settings,
    storage: Storage,
    desired: ModelTraffic,
    *,
    who: str,
    why: str,
    at_once: bool = False,
) -> Policy:
    """Make `desired` the traffic as it is; the registry is left to the caller.

    `at_once` publishes the policy before Serve is asked for anything, which is for versions that
    leave: all that `desired` shares requests among must be up.
    """
    base, served = _served(settings, storage)
    if at_once and desired != served:
        models = {**base.models, settings.model: desired}
        base = policy.commit(
            storage, base, models, default_model=base.default_model, who=who, why=why
        )
        progress("deploy", f"policy generation {base.generation}: {describe(desired)}")
    return apply(settings, storage, base, desired, who=who, why=why)


def bundle(settings: Settings, storage: Storage, version: int) -> str:
    """Return the bundle of a version that is served, or that the registry has."""
    _, served = _served(settings, storage)
    _check_registry(settings, served)
    return _bundles(settings, storage, [version], served)[version]


def _served(settings: Settings, storage: Storage) -> tuple[Policy, ModelTraffic]:
    base = policy.current(storage)
    if base is None or settings.model not in base.models:
        raise policy.not_served(settings.model, base)
    return base, base.models[settings.model]


def _check_registry(settings: Settings, served: ModelTraffic) -> None:
    """Refuse if policy and registry mean different versions by one number, where both can be asked.

    What is served can be changed while MLflow is away; a version that only the registry knows
    needs it anyway.
    """
    from lib.registry.models import check_same, versions

    try:
        known = versions(settings)
    except RegistryError as error:
        progress("deploy", f"the registry could not be compared with the policy: {error}")
        return
    check_same(served, known)


def _champion_and_challenger(
    settings: Settings, storage: Storage, base: Policy | None, challenger_share: float
) -> ModelTraffic:
    from lib.registry.models import CHALLENGER, CHAMPION, check_same, versions

    served = base.models.get(settings.model) if base else None
    known = {version.version: version for version in versions(settings)}
    check_same(served, known.values())
    aliases = {alias: number for number, found in known.items() for alias in found.aliases}
    challenger = aliases.get(CHALLENGER)
    if served is None:
        champion = aliases.get(CHAMPION)
        if champion is None:
            raise ServingError(f"{settings.model} has no champion; run jobs.register first")
        weights = {champion: 100.0}
        if challenger is not None and challenger != champion:
            weights = {champion: 100.0 - challenger_share, challenger: challenger_share}
        bundles = _bundles(settings, storage, list(weights), served)
        return ModelTraffic(weights=weights, bundles=bundles, champion=champion)
    if challenger is None or _was_served(storage, known[challenger]):
        # Weights that somebody set since then are theirs to change.
        return served
    rest = (100.0 - challenger_share) / sum(served.weights.values())
    weights = {number: rest * weight for number, weight in served.weights.items()}
    return replace(
        served,
        weights={**weights, challenger: challenger_share},
        bundles={**served.bundles, **_bundles(settings, storage, [challenger], served)},
    )


def _was_served(storage: Storage, version: Version) -> bool:
    """Whether a version is, or ever was, in the policy."""
    return any(
        version.bundle in made.models[version.name].bundles.values()
        for made in reversed(policy.history(storage))
        if version.name in made.models
    )


def _bundles(
    settings: Settings, storage: Storage, numbers: list[int], served: ModelTraffic | None
) -> dict[int, str]:
    """Return bundle paths, of what is served as they are, of others published from MLflow."""
    there = dict(served.bundles) if served else {}
    found: dict[int, str] = {}
    for number in sorted(set(numbers)):
        if number not in there:
            from lib.registry.models import ensure_bundle, resolve

            version: Version = resolve(settings, settings.model, str(number))
            there[number] = ensure_bundle(settings, storage, version)
        found[number] = there[number]
    return found


def align_registry(settings: Settings, traffic: ModelTraffic) -> str | None:
    """Make the registry's alias follow the policy; return why that failed, None if it did not.

    The traffic has moved by then, so a registry that is away fails no command: the next deploy sets
    the alias.
    """
    # Imported late, here and above: MLflow takes seconds, and rolling back must not wait for it.
    from lib.registry.models import check_same, resolve, set_champion

    champion = traffic.champion
    try:
        check_same(traffic, [resolve(settings, settings.model, str(champion))])
        if set_champion(settings, settings.model, champion):
            what = f"the registry's champion is now version {champion}, as the policy says"
            progress("deploy", what)
    except RegistryError as error:
        warning = (
            f"the traffic is as asked for, but the registry's alias could not be set to version "
            f"{champion}: {error}. `python -m jobs.deploy` sets it later"
        )
        progress("deploy", warning)
        return warning
    return None


def _summary(settings: Settings, made: Policy) -> dict[str, Any]:
    """Let the registry follow, last of all; return what a command prints."""
    traffic = made.models[settings.model]
    warning = align_registry(settings, traffic)
    return {
        "generation": made.generation,
        "url": serve_url(settings),
        "model": settings.model,
        "champion": traffic.champion,
        "previous_champion": traffic.previous_champion,
        "weights": {str(version): weight for version, weight in traffic.weights.items()},
        **({"warning": warning} if warning else {}),
    }

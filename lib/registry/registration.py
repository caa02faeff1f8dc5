"""From the trials of a sweep to versions of a registered model, and their aliases.

Every step can be interrupted: the next `register` of the same sweep goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mlflow import MlflowClient

from lib.cli import progress
from lib.config import Settings
from lib.data.manifest import Manifest, load_manifest
from lib.errors import RefusedError, RegistryError
from lib.registry.claims import claimed
from lib.registry.external import fetched, save, understand
from lib.registry.external_runs import as_trial, closed_run, ensure_run, owner_of
from lib.registry.gaps import too_weak_to_challenge
from lib.registry.leaderboard import Board, Entry
from lib.registry.models import (
    CHALLENGER,
    CHAMPION,
    READY_ALONE,
    READY_TAG,
    Version,
    ensure_bundle,
    resolve,
    versions,
)
from lib.registry.publish import Publisher
from lib.registry.server import connect, explained
from lib.registry.trials import ranked_trials
from lib.serving.bundle import CARD_FILE, bundle_path, read_card
from lib.storage import Storage

WEAK_TAG = "rayline.no_challenger"
"""On a version: why its registration did not make it challenger."""
_ALIASES = "aliases"
"""Claim under which they are set: two first registrations would both make a champion."""


def register(
    settings: Settings,
    storage: Storage,
    manifest: Manifest,
    sweep_run_id: str,
    num_versions: int = 2,
    *,
    challenges: bool = True,
) -> list[Version]:
    """Make the best trials of a sweep versions of the model; return these versions, best first.

    A trial that has its version keeps it. The first registration makes the best one champion and
    the next one challenger; once there is a champion, the best new version becomes challenger,
    unless `challenges` is false: then something else, such as a rollout, decides about it later.
    Raises RefusedError if the best trial is refused; a later one is left out, and that is said.
    """
    if num_versions < 1:
        raise RegistryError(f"num_versions={num_versions} must be at least 1")
    # The name is part of paths and of MLflow's queries: check it before any work.
    bundle_path(settings.model, 1, "")
    client = connect(settings)
    with explained(settings, f"registering sweep {sweep_run_id}"):
        trials = ranked_trials(client, sweep_run_id, manifest.digest)[:num_versions]
        if len(trials) < num_versions:
            progress(
                "register",
                f"asked for {num_versions} versions, but only {len(trials)} trial of the sweep "
                "finished: registering that",
            )
        publisher = Publisher(settings=settings, storage=storage, manifest=manifest, client=client)
        registered: list[Version] = []
        for trial in trials:
            try:
                version = publisher.ensure_version(trial)
            except RefusedError as error:
                if not registered:
                    raise
                progress("register", f"left out: {error}")
                continue
            ensure_bundle(settings, storage, version)
            registered.append(version)
        with claimed(storage, settings.model, _ALIASES):
            _complete(client, settings, storage, manifest, registered, challenges=challenges)
        by_number = {version.version: version for version in versions(settings)}
    return [by_number[version.version] for version in registered]


def register_ranked(settings: Settings, storage: Storage, board: Board, entry: Entry) -> Version:
    """Make the trial of one rank a version, through the same gates, without an alias.

    Aliases and traffic stay as they are. Raises RefusedError that names the rank and the trial.
    """
    trial = board.trials.get(entry.run_id)
    if trial is None:
        raise RegistryError(
            f"version {entry.version} is not complete and came from no sweep: register its model "
            "again with jobs.register --uri"
        )
    progress("register", f"trial {trial.run_id}, of rank {entry.rank}, is no version yet")
    manifest = load_manifest(storage, trial.data_digest)
    client = connect(settings)
    with explained(settings, f"registering trial {trial.run_id}"):
        publisher = Publisher(settings=settings, storage=storage, manifest=manifest, client=client)
        try:
            version = publisher.ensure_version(trial)
        except RefusedError as error:
            raise RefusedError(
                f"the trial of rank {entry.rank}, {trial.run_id}, is not made a version: {error}"
            ) from error
        ensure_bundle(settings, storage, version)
        if not version.ready:
            number = str(version.version)
            client.set_model_version_tag(settings.model, number, READY_TAG, READY_ALONE)
    return resolve(settings, settings.model, str(version.version))


def register_external(
    settings: Settings, storage: Storage, manifest: Manifest, uri: str, *, trust_code: bool = False
) -> Version:
    """Make an MLflow model that someone else trained a version, through the same gates.

    The same model on the same data keeps its version. Raises RefusedError with the reason;
    `trust_code` allows models that are pickles.
    """
    bundle_path(settings.model, 1, "")
    client = connect(settings)
    with fetched(settings, uri) as model, explained(settings, f"registering {uri}"):
        publisher = Publisher(settings=settings, storage=storage, manifest=manifest, client=client)
        with claimed(storage, settings.model, f"external-{model.sha256}"):
            run = ensure_run(client, settings, manifest, model)
        known = [version for version in versions(settings) if version.run_id == run.info.run_id]
        if known:
            progress("register", f"{uri} is version {known[0].version} already")
            version = known[0]
        else:
            with closed_run(client, run.info.run_id):
                understood = understand(
                    model, manifest, publisher.split("val"), trust_code=trust_code
                )
                version = publisher.ensure_version(
                    as_trial(run, understood),
                    lambda folder: save(
                        understood, model, manifest, owner_of(run), folder / "model"
                    ),
                )
        ensure_bundle(settings, storage, version)
        with claimed(storage, settings.model, _ALIASES):
            _complete(client, settings, storage, manifest, [version], challenges=True)
        by_number = {version.version: version for version in versions(settings)}
    return by_number[version.version]


def choose_aliases(
    pending: Sequence[int], champion: int | None, weak: Collection[int] = ()
) -> dict[str, int]:
    """Return which aliases a registration sets.

    Args:
        pending: Versions whose registration is not complete, best first.
        champion: The version that is champion now.
        weak: Versions too far below the champion to challenge it.
    """
    aliases: dict[str, int] = {}
    if champion is None and pending:
        champion = aliases[CHAMPION] = pending[0]
    challengers = [number for number in pending if number != champion and number not in weak]
    if challengers:
        aliases[CHALLENGER] = challengers[0]
    return aliases


def _complete(
    client: MlflowClient,
    settings: Settings,
    storage: Storage,
    manifest: Manifest,
    registered: Sequence[Version],
    *,
    challenges: bool,
) -> None:
    # Versions that were fetched by their rank are ready, and no registration has aliased them yet.
    pending = [
        version.version
        for version in registered
        if client.get_model_version(settings.model, str(version.version)).tags.get(READY_TAG)
        != "true"
    ]
    if not pending:
        return
    current = client.get_registered_model(settings.model).aliases
    champion = int(current[CHAMPION]) if CHAMPION in current else None
    weak = _weak(settings, storage, manifest, pending, pending[0] if champion is None else champion)
    for number, why in weak.items():
        progress("register", f"{settings.model} version {number} is no challenger: {why}")
        client.set_model_version_tag(settings.model, str(number), WEAK_TAG, why)
    for alias, number in choose_aliases(pending, champion, weak).items():
        if alias == CHALLENGER and not challenges:
            continue
        client.set_registered_model_alias(settings.model, alias, str(number))
        progress("register", f"{settings.model} version {number} is now {alias}")
    # Last: until then, the next registration of the sweep sets the aliases again; afterwards
    # it leaves alone what people or a rollout have decided since.
    for number in pending:
        client.set_model_version_tag(settings.model, str(number), READY_TAG, "true")


def _weak(
    settings: Settings,
    storage: Storage,
    manifest: Manifest,
    pending: Sequence[int],
    champion: int,
) -> dict[int, str]:
    """Return which pending versions must not challenge the champion, and why.

    Those with other classes or another shape, and those that are too weak; a champion measured on
    other data says nothing about that.
    """
    known = {version.version: version for version in versions(settings)}
    if champion not in known:
        return {}
    if storage.exists(f"{known[champion].bundle}/{CARD_FILE}"):
        card = read_card(storage, known[champion].bundle)
        if difference := card.difference(manifest.class_names, manifest.shape):
            why = f"it has {difference}, those of the champion, version {champion}"
            return {number: why for number in pending if number != champion}
    if known[champion].data_digest != manifest.digest:
        return {}
    standing, rows = known[champion].test_accuracy, manifest.rows("test")
    found = {
        number: too_weak_to_challenge(known[number].test_accuracy, standing, rows)
        for number in pending
        if number != champion
    }
    return {number: why for number, why in found.items() if why}

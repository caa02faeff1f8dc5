"""A retrained version in the registry: what it goes on from, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping

from mlflow.exceptions import MlflowException

from lib.cli import progress
from lib.config import Settings
from lib.registry.models import CHALLENGER, Version, check_same, resolve
from lib.registry.registration import WEAK_TAG
from lib.registry.server import connect, explained
from lib.serving import policy
from lib.storage import Storage

RETRAIN_TAG = "rayline.retrain"
"""On a version: the retrain that made it."""
REASON_TAG = "rayline.retrain_reason"


def served_champion(settings: Settings, storage: Storage) -> Version:
    """Return the version that is champion in the traffic, else the one that the alias names.

    Raises RefusedError if the registry's version of that number is another one.
    """
    served = policy.current(storage)
    traffic = served.models.get(settings.model) if served else None
    ref = str(traffic.champion) if traffic else "champion"
    version = resolve(settings, settings.model, ref)
    check_same(traffic, [version])
    return version


def parameters(settings: Settings, version: Version) -> Mapping[str, str]:
    """Return what the version's trial was trained with; empty if its run is gone."""
    client = connect(settings)
    with explained(settings, f"reading the run of version {version.version}"):
        try:
            return dict(client.get_run(version.run_id).data.params)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return {}


def mark(settings: Settings, version: int, retrain_id: str, reason: str) -> None:
    """Write on a version which retrain made it, and why."""
    client = connect(settings)
    with explained(settings, f"marking version {version}"):
        for name, value in ((RETRAIN_TAG, retrain_id), (REASON_TAG, reason)):
            client.set_model_version_tag(settings.model, str(version), name, value)


def withdraw(settings: Settings, version: int, why: str) -> None:
    """Keep a version from challenging: the alias goes, and the reason stays on it."""
    client = connect(settings)
    with explained(settings, f"withdrawing version {version}"):
        client.set_model_version_tag(settings.model, str(version), WEAK_TAG, why)
        aliases = client.get_registered_model(settings.model).aliases
        if str(aliases.get(CHALLENGER)) == str(version):
            client.delete_registered_model_alias(settings.model, CHALLENGER)
    progress("retrain", f"{settings.model} version {version} is no challenger: {why}")

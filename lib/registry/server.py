"""The MLflow server: one place that connects to it, and says what to do when that fails."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException

from lib.cli import progress
from lib.config import Settings
from lib.errors import AWAY, RegistryError

_HEALTH_TIMEOUT_S = 10


def connect(settings: Settings) -> MlflowClient:
    """Return a client of the configured server; raise RegistryError at once if it is away.

    MLflow itself would retry for minutes before it says so.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if settings.mlflow_uri.startswith(("http://", "https://")):
        try:
            urllib.request.urlopen(f"{settings.mlflow_uri}/health", timeout=_HEALTH_TIMEOUT_S)
        except urllib.error.HTTPError:
            pass  # It answers; a server behind a gateway may have no such page.
        except OSError as error:
            raise RegistryError(
                f"MLflow does not answer at {settings.mlflow_uri} ({error}); start it with "
                "`make up`, or set MLFLOW_TRACKING_URI to a server that runs",
                exit_code=AWAY,
            ) from error
    return MlflowClient(tracking_uri=settings.mlflow_uri, registry_uri=settings.mlflow_uri)


@contextmanager
def explained(settings: Settings, doing: str) -> Iterator[None]:
    """Turn an error of MLflow inside the block into a RegistryError that names the server."""
    try:
        yield
    except MlflowException as error:
        raise RegistryError(
            f"MLflow at {settings.mlflow_uri} failed while {doing}: {error}"
        ) from error


def ensure_experiment(client: MlflowClient, name: str) -> str:
    """Return an experiment's id; it is made if there is none, and restored if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException as error:
            found = client.get_experiment_by_name(name)
            if found is None:  # Else somebody made it meanwhile.
                raise error
    if found.lifecycle_stage != LifecycleStage.ACTIVE:
        client.restore_experiment(found.experiment_id)
        progress("registry", f"experiment {name!r} had been deleted in MLflow: it is restored")
    return str(found.experiment_id)


def pages(search: Callable[..., Any], **query: Any) -> list[Any]:
    """Return the results of all pages of one of MLflow's searches."""
    results: list[Any] = []
    token: str | None = None
    while True:
        page = search(page_token=token, **query)
        results += page
        token = page.token
        if not token:
            return results


def download(settings: Settings, artifact_uri: str, folder: Path) -> Path:
    """Copy an artifact below `folder` and return where it is."""
    with explained(settings, f"reading {artifact_uri}"):
        return Path(
            mlflow.artifacts.download_artifacts(
                artifact_uri=artifact_uri,
                dst_path=str(folder),
                tracking_uri=settings.mlflow_uri,
                registry_uri=settings.mlflow_uri,
            )
        )

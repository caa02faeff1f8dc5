"""The errors that Rayline raises on purpose; each message says what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class RaylineError(Exception):
    """Base of all errors that a user can act on; jobs print it without a traceback."""


class ConfigError(RaylineError):
    """A setting or argument is missing or out of range."""


class DataError(RaylineError):
    """A source or a data set is unusable; the message names the file and the row."""


class TooFewError(DataError):
    """There are too few labelled rows to learn from."""


class StorageError(RaylineError):
    """The storage root can't be read or written (full, missing, damaged)."""


class SearchError(RaylineError):
    """A sweep ended without a usable trial."""


class RegistryError(RaylineError):
    """A model version is unknown, or was refused by a gate."""


class RefusedError(RegistryError):
    """A gate refused to make a trial a version."""


class RetrainError(RaylineError):
    """A retrain can't begin or go on."""


class ServingError(RaylineError):
    """A version or the gateway did not come up, or a traffic policy is invalid."""


class StartError(ServingError):
    """A version did not start; what was served before goes on."""


class RolloutError(RaylineError):
    """A rollout did not end with a promotion; `details` are part of the job's result."""

    def __init__(self, message: str, details: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.details: Mapping[str, Any] = details or {}


class LineError(RaylineError):
    """A part of the line (Ray, MLflow, Prometheus) did not start, answer or end."""


class WatchError(RaylineError):
    """What watches the models (Prometheus, Grafana, Ray's metrics) does not answer, or refuses."""

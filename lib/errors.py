"""The errors that Rayline raises on purpose; each message says what to do next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAILED, USAGE, REFUSED, HELD, AWAY = 1, 2, 3, 4, 5
"""Exit codes of jobs; `lib.cli` says what each means."""


class RaylineError(Exception):
    """Base of all errors that a user can act on; jobs print it without a traceback.

    Args:
        message: What is wrong, where, and the next step.
        details: Further entries of the job's result.
        exit_code: Of the job that ends with it; the class says the usual one.
    """

    exit_code = FAILED

    def __init__(
        self,
        message: str = "",
        details: Mapping[str, Any] | None = None,
        *,
        exit_code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.details: Mapping[str, Any] = details or {}
        if exit_code is not None:
            self.exit_code = exit_code


class ConfigError(RaylineError):
    """A setting or argument is missing or out of range."""

    exit_code = USAGE


class DataError(RaylineError):
    """A source or a data set is unusable; the message names the file and the row."""


class TooFewError(DataError):
    """There are too few labelled rows to learn from."""

    exit_code = HELD


class StorageError(RaylineError):
    """The storage root can't be read or written (full, missing, damaged)."""

    exit_code = AWAY


class MissingError(StorageError):
    """A file is not there."""


class DeviceError(RaylineError):
    """A GPU was granted and can't be used."""

    exit_code = AWAY


class SearchError(RaylineError):
    """A sweep ended without a usable trial."""


class RegistryError(RaylineError):
    """A model version is unknown, or was refused by a gate."""


class FilesError(RegistryError):
    """A version's files are gone, or are not those that were registered."""


class RefusedError(RegistryError):
    """A gate refused to make a trial a version."""

    exit_code = REFUSED


class RetrainError(RaylineError):
    """A retrain can't begin or go on."""


class ServingError(RaylineError):
    """A version or the gateway did not come up, or a traffic policy is invalid."""


class StartError(ServingError):
    """A version did not start; what was served before goes on."""


class RolloutError(RaylineError):
    """A rollout did not end with a promotion; `details` say how it ended."""

    def __init__(self, message: str = "", details: Mapping[str, Any] | None = None) -> None:
        by_status = {"held": HELD, "rolled_back": REFUSED}
        super().__init__(
            message, details, exit_code=by_status.get((details or {}).get("status", ""))
        )


class LineError(RaylineError):
    """A part of the line (Ray, MLflow, Prometheus) did not start, answer or end."""

    exit_code = AWAY


class WatchError(RaylineError):
    """What watches the models (Prometheus, Grafana, Ray's metrics) does not answer, or refuses."""

    exit_code = AWAY

"""The connection of a job to Ray."""

from __future__ import annotations

import logging
import os

import ray

from lib.errors import LineError


def connect_ray(*, may_start: bool = True) -> None:
    """Connect to the Ray cluster of this shell or job, or start a Ray on this machine.

    None is started beside a cluster that the settings name, or unless it `may_start`.

    Raises:
        LineError: There is no cluster to connect to.
    """
    names_cluster = bool(os.environ.get("RAY_API_SERVER_ADDRESS"))
    address = None if may_start and not names_cluster else "auto"
    try:
        ray.init(
            address=os.environ.get("RAY_ADDRESS") or address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LineError(
            f"no Ray is reached from here ({error}); run `. .rayline/env` first, or submit the "
            "job: python -m jobs.submit VERB …"
        ) from error

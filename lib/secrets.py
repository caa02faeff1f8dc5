"""Keeps passwords out of what is recorded: addresses travel into logs, job metadata and MLflow."""

from __future__ import annotations

import re

from lib.errors import ConfigError

_USER_AND_PASSWORD = re.compile(r"\w[\w+.-]*://[^/?#]*:[^/?#]*@")
_SECRET_PARAMETER = re.compile(r"[?&][^=&#]*(secret|password|token|signature|key)[^=&#]*=", re.I)


def refuse_password(variable: str, address: str, instead: str) -> None:
    """Raise ConfigError if an address has a password in it, without repeating the address.

    Args:
        variable: Where the address came from.
        address: A URI, or a path.
        instead: Where such a password belongs.
    """
    if _USER_AND_PASSWORD.match(address) or _SECRET_PARAMETER.search(address):
        raise ConfigError(
            f"{variable} has a password in it, and would be printed and recorded with it; "
            f"take it out, and set {instead}"
        )

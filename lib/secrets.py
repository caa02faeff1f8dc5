"""Keeps passwords out of what is recorded, and secrets away from code that is not ours.

Addresses travel into logs, job metadata and MLflow.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

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


def bare_environment(home: str, python_path: Path) -> dict[str, str]:
    """Return all that a process is told that runs code of others: no token, key or address.

    Args:
        home: A folder that stands for the user's and for temporary files.
        python_path: Where the process imports from.
    """
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "HOME": home,
        "TMPDIR": home,
        "PYTHONPATH": str(python_path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }

"""Keeps passwords out of what is recorded, and secrets away from code and users that are not ours.

Addresses travel into logs, job metadata and MLflow.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from lib.errors import ConfigError

UMASK = 0o077
"""Of every process that writes what callers sent, or keys: nobody else on the machine reads it."""
PRIVATE_DIR_VARIABLE = "RAYLINE_PRIVATE_DIR"
"""Folder on this node that only this user may enter, for sockets."""
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


def make_private(folder: Path) -> None:
    """Make a folder that only this user may enter, or close one of this user's to all others.

    Its parent must exist.

    Raises:
        PermissionError: It is another user's, or a link, which another user can have put there.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    check_owner(folder)
    if folder.stat().st_mode & 0o077:
        folder.chmod(0o700)


def check_owner(folder: Path) -> os.stat_result:
    """Return the status of a folder; raise PermissionError if it is another user's, or a link."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise PermissionError(f"{folder} is not a folder; remove it")
    if found.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user (uid {found.st_uid})")
    return found

"""API keys: who may ask for predictions.

Callers' keys are kept as hashes, below the storage root. The line's own key, by which deploys
probe, lies beside them as it is: whoever can read storage can use it.

The file is the setting: once it is there, every prediction needs a key, also when none is left in
it. `python -m jobs.keys add NAME` makes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from lib.errors import MissingError, ServingError
from lib.serving.payload import PayloadError
from lib.storage import Storage

KEYS_FILE = "keys.json"
_LOCK_FILE = ".keys.lock"
INTERNAL = "rayline"
"""Name of the key that deploys probe with; whoever can read storage can read it."""
ANYONE = "anyone"
"""Name of the caller where no keys are asked for."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


class Keys:
    """The names of keys, by hash; empty means that nobody gets in."""

    def __init__(self, hashes: Mapping[str, bytes]) -> None:
        self._hashes = dict(hashes)

    def name_of(self, key: bytes) -> str | None:
        """Return the name of a key, None if it is unknown; takes as long for either."""
        # Keys hold 256 random bits: a plain hash can't be guessed, and is fast enough to ask for.
        given = hashlib.sha256(key).digest()
        found = None
        for name, kept in self._hashes.items():
            if hmac.compare_digest(given, kept):
                found = name
        return found


def read_keys(storage: Storage) -> Keys | None:
    """Return the keys, or None if no keys are asked for."""
    try:
        # Without asking first whether it is there: gateways read it several times a second.
        content = storage.read_json(KEYS_FILE)
    except MissingError:
        return None
    hashes = {name: bytes.fromhex(key["sha256"]) for name, key in content["keys"].items()}
    return Keys({**hashes, INTERNAL: hashlib.sha256(content["internal"].encode()).digest()})


def internal_headers(storage: Storage) -> dict[str, str]:
    """Return the header that lets the line itself in; empty if no keys are asked for."""
    if not storage.exists(KEYS_FILE):
        return {}
    return {"X-API-Key": storage.read_json(KEYS_FILE)["internal"]}


def list_keys(storage: Storage) -> dict[str, str]:
    """Return when each key was made, by name."""
    return {name: key["created"] for name, key in _content(storage)["keys"].items()}


def add_key(storage: Storage, name: str) -> str:
    """Make a key and return it: the only time that it can be seen."""
    if not _NAME.fullmatch(name) or name in (ANYONE, INTERNAL):
        raise ServingError(
            f"key name {name!r}: use letters, digits, `_`, `.`, `-`, and neither {ANYONE!r} nor "
            f"{INTERNAL!r}"
        )
    key = f"rl_{secrets.token_urlsafe(32)}"
    created = datetime.now(UTC).isoformat(timespec="seconds")
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    with _changed(storage) as content:
        if name in content["keys"]:
            raise ServingError(
                f"there is a key named {name!r}; remove it first, or use another name"
            )
        content["keys"][name] = {"sha256": sha256, "created": created}
    return key


def remove_key(storage: Storage, name: str) -> None:
    """Take a key's access away; gateways follow within 2 s."""
    with _changed(storage) as content:
        if name not in content["keys"]:
            there = ", ".join(content["keys"]) or "none"
            raise ServingError(f"there is no key named {name!r}; there are: {there}")
        del content["keys"][name]


def authenticate(keys: Keys | None, headers: Mapping[bytes, bytes]) -> str:
    """Return the caller's name by the headers of a request; raise PayloadError 401."""
    if keys is None:
        return ANYONE
    key = headers.get(b"x-api-key")
    if key is None:
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = b""
    name = keys.name_of(key)
    if name is None:
        raise PayloadError(
            401, "send a valid API key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
        )
    return name


def name_of_caller(storage: Storage, key: str | None) -> str | None:
    """Return the name that a key proves, None where no keys are asked for.

    Raises ServingError if one is asked for and this is none.
    """
    keys = read_keys(storage)
    if keys is None:
        return None
    name = keys.name_of((key or "").encode())
    if name is None:
        raise ServingError("this line asks for API keys: set RAYLINE_API_KEY to yours")
    return name


@contextmanager
def _changed(storage: Storage) -> Iterator[dict[str, Any]]:
    """Yield the file's content and write it back, while no other process does the same.

    The kernel frees the lock of a process that is killed. Object stores have no locks: there two
    changes of the same second can lose one of them, as with every file that is replaced.
    """
    if not storage.is_local:
        content = _content(storage)
        yield content
        storage.write_json(KEYS_FILE, content)
        return
    path = storage.path(_LOCK_FILE)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        lock = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise storage.failure(_LOCK_FILE, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        content = _content(storage)
        yield content
        storage.write_json(KEYS_FILE, content)


def _content(storage: Storage) -> dict[str, Any]:
    if storage.exists(KEYS_FILE):
        return dict(storage.read_json(KEYS_FILE))
    return {"keys": {}, "internal": secrets.token_urlsafe(32)}

"""Keeps passwords out of what is recorded: addresses travel into logs, job metadata and MLflow."""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit

from lib.errors import ConfigError

_SECRET_PARAMETERS = ("secret", "password", "token", "signature", "key")


def refuse_password(variable: str, address: str, instead: str) -> None:
    """Raise ConfigError if an address has a password in it, without repeating the address.

    Args:
        variable: Where the address came from.
        address: A URI, or a path.
        instead: Where such a password belongs.
    """
    parts = urlsplit(address)
    names = [name.lower() for name, _ in parse_qsl(parts.query)]
    has_parameter = any(word in name for name in names for word in _SECRET_PARAMETERS)
    if "@" in parts.netloc and ":" in parts.netloc.rpartition("@")[0] or has_parameter:
        raise ConfigError(
            f"{variable} has a password in it, and would be printed and recorded with it; "
            f"take it out, and set {instead}"
        )

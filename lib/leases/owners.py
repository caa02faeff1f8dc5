"""How many trials each owner may have running on a cluster that several people share."""

from __future__ import annotations

from collections.abc import Mapping

from lib.errors import ConfigError

OTHERS = "*"
"""Stands for every owner that is not named."""


def read_limits(variable: str, text: str) -> dict[str, int]:
    """Return the limits of `ann=2,*=4`, empty for an empty text.

    Raises:
        ConfigError: The text is something else; it names the variable that it came from.
    """
    limits: dict[str, int] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        owner, _, number = (side.strip() for side in pair.rpartition("="))
        if not owner or not (number.isascii() and number.isdigit()) or int(number) < 1:
            raise ConfigError(
                f"{variable}={text!r}: {pair!r} is no limit; write `owner=trials` with at least 1, "
                f"`{OTHERS}=trials` for all others, and commas between several"
            )
        if owner in limits:
            raise ConfigError(f"{variable}={text!r}: {owner} is given two limits; keep one")
        limits[owner] = int(number)
    return limits


def limit_of(limits: Mapping[str, int], owner: str) -> int | None:
    """Return how many trials an owner may have running, None for any number."""
    return limits.get(owner, limits.get(OTHERS))

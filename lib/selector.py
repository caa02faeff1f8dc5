"""Which nodes of a cluster a piece of work may run on, by the labels that nodes were started with.

On one machine nothing has labels, and an empty selector means any node.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lib.errors import ConfigError

# What Ray and Kubernetes allow; Ray's `in(…)` is left out, as its commas would end a pair here.
_KEY = re.compile(
    r"([a-z0-9]([a-z0-9.-]*[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
)
_VALUE = re.compile(r"!?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")


def read_selector(variable: str, text: str) -> dict[str, str]:
    """Return Ray's label selector for `key=value,key=!value`, empty for an empty text.

    Raises:
        ConfigError: The text is something else; it names the variable that it came from.
    """
    selector = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (side.strip() for side in pair.partition("="))
        if not _KEY.fullmatch(key) or not _VALUE.fullmatch(value):
            raise ConfigError(
                f"{variable}={text!r}: {pair!r} is not a label; write `key=value`, or `key=!value` "
                "for all nodes but those, with commas between several"
            )
        selector[key] = value
    return selector


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is one of those that are meant."""
    return all(
        labels.get(key) != value[1:] if value.startswith("!") else labels.get(key) == value
        for key, value in selector.items()
    )

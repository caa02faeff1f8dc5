"""API keys for inference: once the first one is made, every prediction needs one.

    python -m jobs.keys add night-shift     # prints the key, this once
    python -m jobs.keys list
    python -m jobs.keys remove night-shift

Only hashes of these keys are kept. Gateways follow within 2 s.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and change the keys."""
    parser = cli.parser("keys", __doc__)
    parser.add_argument("verb", choices=("add", "list", "remove"))
    parser.add_argument("name", nargs="?", help="who or what the key is for")
    arguments = parser.parse_args(argv)
    if arguments.verb != "list" and not arguments.name:
        parser.error(f"{arguments.verb} needs a name")
    cli.run(lambda: _change(arguments), only_json=arguments.json)


def _change(arguments: argparse.Namespace) -> Mapping[str, Any]:
    from lib.config import Settings
    from lib.serving.keys import add_key, list_keys, remove_key
    from lib.storage import Storage

    storage = Storage(Settings.from_env().storage)
    if arguments.verb == "add":
        return {"name": arguments.name, "key": add_key(storage, arguments.name)}
    if arguments.verb == "remove":
        remove_key(storage, arguments.name)
    return {"keys": list_keys(storage)}


if __name__ == "__main__":
    main()

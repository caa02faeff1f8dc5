"""API keys for inference: once the first one is made, every prediction needs one.

    python -m jobs.keys add night-shift     # prints the key, this once
    python -m jobs.keys list
    python -m jobs.keys remove night-shift

Only hashes are kept. Gateways follow within 2 s.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lib.cli import run
from lib.config import Settings
from lib.serving.keys import add_key, list_keys, remove_key
from lib.storage import Storage


def main() -> Mapping[str, Any]:
    """Parse, change the keys, and return what was done."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.keys",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("add", "list", "remove"))
    parser.add_argument("name", nargs="?", help="who or what the key is for")
    arguments = parser.parse_args()
    if arguments.verb != "list" and not arguments.name:
        parser.error(f"{arguments.verb} needs a name")
    storage = Storage(Settings.from_env().storage)
    if arguments.verb == "add":
        return {"name": arguments.name, "key": add_key(storage, arguments.name)}
    if arguments.verb == "remove":
        remove_key(storage, arguments.name)
    return {"keys": list_keys(storage)}


if __name__ == "__main__":
    run(main)

"""Decide what is served: deploy, promote, roll back, shift weights, read the history.

    python -m jobs.deploy                             # champion and challenger
    python -m jobs.deploy promote 3 --why "2 points better on the night shift"
    python -m jobs.deploy rollback                    # back to the champion before
    python -m jobs.deploy weights 3=95 4=5 --shadow 5=20 --pin user-7=4
    python -m jobs.deploy history

Without a verb, what is served goes on unchanged; only a challenger that never was in the traffic is
added, with 10 % of it. Running a command again changes nothing more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lib import cli
from lib.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and change what is served."""
    arguments = _parse(argv)
    cli.run(lambda: _change(arguments), only_json=arguments.json)


def _change(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """Return the policy in force."""
    from lib import provenance
    from lib.config import Settings
    from lib.serving import deploy, policy
    from lib.serving.keys import name_of_caller
    from lib.storage import Storage

    settings = Settings.from_env()
    storage = Storage(settings.storage)
    if arguments.verb == "history":
        return {"history": [made.to_json() for made in policy.history(storage)]}
    named = name_of_caller(storage, os.environ.get("RAYLINE_API_KEY"))
    by: dict[str, Any] = {
        "who": named or provenance.current().owner or "unknown",
        "why": arguments.why,
    }
    if arguments.verb == "rollback":
        return deploy.rollback(settings, storage, **by)
    by["other_classes"] = arguments.other_classes
    if arguments.verb == "promote":
        return deploy.promote(settings, storage, arguments.version, **by)
    if arguments.verb == "weights":
        shadows = {_version(name): share for name, share in _pairs(arguments.shadow).items()}
        return deploy.set_traffic(
            settings,
            storage,
            weights={_version(name): share for name, share in _pairs(arguments.shares).items()},
            shadows=shadows,
            pins={key: int(version) for key, version in _pairs(arguments.pin).items()},
            **by,
        )
    return deploy.deploy(
        settings,
        storage,
        challenger_share=arguments.challenger_share,
        placement=arguments.placement,
        new_code=arguments.new_code,
        **by,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from lib.serving.traffic import CHALLENGER_SHARE, COLOCATED, ISOLATED

    parser = cli.parser("deploy", __doc__)
    parser.add_argument(
        "--challenger-share",
        type=float,
        default=CHALLENGER_SHARE,
        help="percent of the requests that a new challenger answers",
    )
    parser.add_argument(
        "--placement",
        choices=(ISOLATED, COLOCATED),
        help="colocated: small versions live in the gateways (default: unchanged)",
    )
    parser.add_argument(
        "--new-code", action="store_true", help="roll this checkout's code out to what is live"
    )
    parser.add_argument("--why", default="jobs.deploy", help="kept in the policy's history")
    verbs = parser.add_subparsers(dest="verb", metavar="promote | rollback | weights | history")
    promote = verbs.add_parser("promote", help="make a version champion")
    promote.add_argument("version", type=int)
    rollback = verbs.add_parser("rollback", help="go back to the champion before")
    weights = verbs.add_parser("weights", help="replace weights, shadows and pins")
    weights.add_argument("shares", nargs="+", metavar="VERSION=WEIGHT")
    weights.add_argument("--shadow", action="append", default=[], metavar="VERSION=PERCENT")
    weights.add_argument("--pin", action="append", default=[], metavar="KEY=VERSION")
    history = verbs.add_parser("history", help="who changed what, when and why")
    for verb in (promote, rollback, weights, history):
        # Not False again, which would hide the flag given before the verb.
        verb.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
    allow: dict[str, Any] = {
        "action": "store_true",
        "help": "give callers of this model a version with other classes or another shape",
    }
    parser.add_argument("--other-classes", **allow)
    for verb in (promote, weights):
        verb.add_argument("--other-classes", default=argparse.SUPPRESS, **allow)
    for verb in (promote, rollback, weights):
        # Not again the default, which would hide a reason given before the verb.
        verb.add_argument("--why", default=argparse.SUPPRESS, help="kept in the policy's history")
    return parser.parse_args(argv)


def _pairs(texts: Sequence[str]) -> dict[str, float]:
    pairs = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            pairs[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(f"{text!r} is not of the form NAME=NUMBER, such as 3=95")
    return pairs


def _version(text: str) -> int:
    if not text.isdecimal():
        raise ConfigError(f"{text!r} is not a version's number")
    return int(text)


if __name__ == "__main__":
    main()

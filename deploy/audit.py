"""Audits the pins: known weaknesses where an advisory service can be reached, else the pins alone.

make audit

Exits with 1 if a pin has a known weakness, or the pins are not whole.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PIP_AUDIT = "pip-audit==2.9.0"
_TIMEOUT_S = 300


def read_pins(text: str) -> list[Requirement]:
    """Return the lines of a requirements file; raise InvalidRequirement for a line that is none."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def check_pins(pins: Sequence[Requirement], direct: Sequence[Requirement]) -> list[str]:
    """Return what is wrong with pins by themselves: loose, twice, or not all that is asked for."""
    wrong = []
    seen: dict[str, Requirement] = {}
    for pin in pins:
        if not re.fullmatch(r"==[^*,]+", str(pin.specifier)):
            wrong.append(f"{pin}: pin it to one version, as `{pin.name}==…`")
        name = canonicalize_name(pin.name)
        other = seen.setdefault(name, pin)
        if other is not pin and not (other.marker and pin.marker):
            wrong.append(f"{pin.name} is pinned twice; keep one, or give both a marker")
    for wanted in direct:
        name = canonicalize_name(wanted.name)
        if name not in seen:
            wrong.append(f"{wanted.name} of pyproject.toml is not pinned")
        elif not wanted.specifier.contains(str(seen[name].specifier)[2:], prereleases=True):
            wrong.append(f"{seen[name]} is not what pyproject.toml asks for ({wanted})")
    return wrong


def check_installed(pins: Sequence[Requirement]) -> list[str]:
    """Return where this environment is not what the pins say, or lacks what a pin needs."""
    wrong = []
    for pin in pins:
        if pin.marker and not pin.marker.evaluate():
            continue
        found = _installed(pin.name)
        if found is None:
            wrong.append(f"{pin} is not installed: run `make lint`, which installs the pins")
            continue
        if not pin.specifier.contains(found.version, prereleases=True):
            wrong.append(f"{pin}, but {found.version} is installed")
    return wrong


@dataclass(frozen=True, slots=True)
class Report:
    """What an advisory service said."""

    weaknesses: list[str]
    num_unknown: int
    """Pins that the service could say nothing about."""


def known_weaknesses(requirements: Path) -> Report | None:
    """Return what advisories say of the pins, None where no advisory service can be reached."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        uv = Path(sys.executable).with_name("uv")
        command = [str(uv), "tool", "run", "--from", PIP_AUDIT, "pip-audit", "--disable-pip"]
        command += ["--no-deps", "-r", str(requirements), "-f", "json", "-o", str(report)]
        try:
            subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
            return read_report(report.read_text())
        except (OSError, subprocess.TimeoutExpired, ValueError, KeyError):
            return None


def read_report(text: str) -> Report | None:
    """Read a report of pip-audit; None if it has an answer for no pin at all."""
    packages = json.loads(text)["dependencies"]
    unknown = [package for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        # A mirror without advisories: pip-audit ends well, having found nothing.
        return None
    weaknesses = [
        f"{package['name']} {package.get('version')}: {weakness['id']}, fixed in "
        f"{', '.join(weakness['fix_versions']) or 'no version yet'}"
        for package in packages
        for weakness in package.get("vulns", [])
    ]
    return Report(weaknesses, len(unknown))


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    requirements = ROOT / "requirements.txt"
    pins = read_pins(requirements.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wrong = check_pins(pins, [Requirement(line) for line in named]) + check_installed(pins)
    report = known_weaknesses(requirements)
    if report is None:
        print("no advisory service can be reached: only the pins themselves are checked")
    elif report.num_unknown:
        print(f"the advisory service knows nothing of {report.num_unknown} pins")
    found = [*wrong, *(report.weaknesses if report else [])]
    for line in found:
        print(line)
    if found:
        sys.exit(1)
    print(f"{len(pins)} pins: nothing is wrong")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

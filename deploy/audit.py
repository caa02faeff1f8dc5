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
        pin = seen.get(canonicalize_name(wanted.name))
        if pin is None:
            wrong.append(f"{wanted.name} of pyproject.toml is not pinned")
        elif not wanted.specifier.contains(str(pin.specifier)[2:], prereleases=True):
            wrong.append(f"{pin} is not what pyproject.toml asks for ({wanted})")
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


def known_weaknesses(requirements: Path) -> list[str] | None:
    """Return the pins that advisories name, None where no advisory service can be reached."""
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


def read_report(text: str) -> list[str]:
    """Return a line for each weakness in a report of pip-audit."""
    return [
        f"{package['name']} {package.get('version')}: {weakness['id']}, fixed in "
        f"{', '.join(weakness['fix_versions']) or 'no version yet'}"
        for package in json.loads(text)["dependencies"]
        for weakness in package.get("vulns", [])
    ]


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is."""
    requirements = ROOT / "requirements.txt"
    pins = read_pins(requirements.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wrong = check_pins(pins, [Requirement(line) for line in named]) + check_installed(pins)
    weaknesses = known_weaknesses(requirements)
    if weaknesses is None:
        print("no advisory service can be reached: only the pins themselves are checked")
    for line in [*wrong, *(weaknesses or [])]:
        print(line)
    if wrong or weaknesses:
        sys.exit(1)
    print(f"{len(pins)} pins: nothing is wrong")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

"""Audits the pins: known weaknesses, by an advisory service, and whether the pins are whole.

make audit

Exits with 1 if a pin has a known weakness or the pins are not whole, with 5 if no advisory was
looked up.
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


class LookUpError(Exception):
    """No advisory was looked up."""


def known_weaknesses(requirements: Path) -> Report:
    """Return what advisories say of the pins.

    Raises:
        LookUpError: pip-audit could not be installed, crashed, or reached no advisory service.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        uv = Path(sys.executable).with_name("uv")
        command = [str(uv), "tool", "run", "--from", PIP_AUDIT, "pip-audit", "--disable-pip"]
        command += ["--no-deps", "-r", str(requirements), "-f", "json", "-o", str(report)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise LookUpError(str(error)) from error
        try:
            return read_report(report.read_text())
        except (OSError, ValueError, KeyError) as error:
            raise LookUpError(done.stderr.strip()[-1500:] or f"no report: {error}") from error


def read_report(text: str) -> Report:
    """Read a report of pip-audit; raise LookUpError if it has an answer for no pin at all."""
    packages = json.loads(text)["dependencies"]
    unknown = [package for package in packages if "skip_reason" in package]
    if len(unknown) == len(packages):
        # A mirror without advisories: pip-audit ends well, having found nothing.
        raise LookUpError("the package index has no advisories")
    weaknesses = [
        f"{package['name']} {package.get('version')}: {weakness['id']}, fixed in "
        f"{', '.join(weakness['fix_versions']) or 'no version yet'}"
        for package in packages
        for weakness in package.get("vulns", [])
    ]
    return Report(weaknesses, len(unknown))


def main() -> None:
    """Print what is wrong, and exit with 1 if anything is, with 5 if nothing was looked up."""
    requirements = ROOT / "requirements.txt"
    pins = read_pins(requirements.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    found = check_pins(pins, [Requirement(line) for line in named])
    # Without a GPU the Makefile leaves some pins out; this is what it has installed.
    chosen = Path(sys.prefix) / "pins.txt"
    found += check_installed(read_pins(chosen.read_text()) if chosen.exists() else pins)
    problem = ""
    try:
        report = known_weaknesses(requirements)
        if report.num_unknown:
            print(f"the advisory service knows nothing of {report.num_unknown} pins")
        found += report.weaknesses
    except LookUpError as error:
        problem = f"no advisory was looked up, only the pins themselves are checked: {error}"
    for line in found:
        print(line)
    if problem:
        print(problem)
    if found or problem:
        sys.exit(1 if found else 5)
    print(f"{len(pins)} pins: nothing is wrong")


def _installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()

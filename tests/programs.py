"""The system programs that tests run, and the Debian packages that have them.

    python -m tests.programs     # installs what is missing, as root or by passwordless sudo

Elsewhere the tests that need a missing program are skipped, and the end of the run names the
packages.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

# Package → names of the program that tests look for; one of them is enough.
PACKAGES = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "curl": ("curl",),
    "iproute2": ("ip",),
    "postgresql": ("initdb",),
    "prometheus": ("prometheus",),
    "redis-server": ("redis-server",),
    "wrk": ("wrk",),
}
_PLACES = ("/usr/sbin", "/sbin", "/usr/lib/postgresql/*/bin")
"""Folders besides those of PATH."""
# Debian starts a server of its own when it installs a server's package; this keeps it from that.
_POLICY = Path("/usr/sbin/policy-rc.d")
_START_NOTHING = "#!/bin/sh\nexit 101\n"


def path_of(package: str) -> str | None:
    """Return the path of a package's program, None if it is not installed."""
    folders = [os.environ.get("PATH", os.defpath), *map(str, _places())]
    found = (shutil.which(name, path=os.pathsep.join(folders)) for name in PACKAGES[package])
    return next((path for path in found if path), None)


def require(package: str) -> str:
    """Return the path of a package's program; skip the test if it is not installed."""
    import pytest  # Late: this module also runs where only the standard library is needed.

    path = path_of(package)
    return path or pytest.skip(f"needs Debian's package {package}")


def promtool() -> str:
    """Return the path of Prometheus's checker of rules; skip the test if it is not installed."""
    return str(Path(require("prometheus")).with_name("promtool"))


def missing() -> list[str]:
    """Return the packages whose program is not installed."""
    return [package for package in PACKAGES if path_of(package) is None]


def install() -> None:
    """Install the missing packages where that is possible; otherwise name them."""
    packages = missing()
    if not packages:
        return
    as_root = _as_root()
    if as_root is None:
        print(f"tests that need these Debian packages are skipped: {' '.join(packages)}")
        return
    print(f"installing the system packages of the tests: {' '.join(packages)}", flush=True)
    holds_back = not _POLICY.exists()
    try:
        if holds_back:
            _run([*as_root, "tee", str(_POLICY)], stdin=_START_NOTHING)
            _run([*as_root, "chmod", "+x", str(_POLICY)])
        _run([*as_root, "apt-get", "update", "-qq"])
        _run(
            [*as_root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install"]
            + ["-y", "-qq", "--no-install-recommends", *packages]
        )
    finally:
        if holds_back:
            _run([*as_root, "rm", "-f", str(_POLICY)])


def _places() -> list[Path]:
    return [folder for place in _PLACES for folder in sorted(Path("/").glob(place[1:]))[::-1]]


def _as_root() -> list[str] | None:
    """Return what a command is prefixed with to run as root; None where apt or root is not had."""
    if shutil.which("apt-get") is None:
        return None
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") is None:
        return None
    allowed = subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False)
    return ["sudo", "-n"] if allowed.returncode == 0 else None


def _run(command: list[str], *, stdin: str | None = None) -> None:
    done = subprocess.run(
        command,
        input=stdin,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


if __name__ == "__main__":
    install()

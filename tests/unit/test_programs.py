"""The system programs of the tests: installed where that is allowed, otherwise named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import programs

ROOT = Path(__file__).resolve().parents[2]


def script(folder: Path, name: str, content: str = "exit 0") -> None:
    (folder / name).write_text(f"#!/bin/sh\n{content}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ordinary user with apt-get, and of all the programs only `curl`, `ip` and `wrk`."""
    for name in ("apt-get", "curl", "ip", "wrk"):
        script(tmp_path, name)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(programs, "_PLACES", ())
    return tmp_path


def test_without_root_or_sudo_the_packages_are_named(
    alone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.install()
    assert capsys.readouterr().out == (
        "tests that need these Debian packages are skipped: "
        "chromium postgresql prometheus redis-server\n"
    )
    with pytest.raises(pytest.skip.Exception, match="needs Debian's package chromium"):
        programs.require("chromium")


def test_with_passwordless_sudo_what_is_missing_is_installed_and_no_server_started(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_POLICY", alone / "policy-rc.d")
    log = alone / "log"
    # Runs the command, but of apt-get only keeps what it was asked, and the policy at that time.
    script(
        alone,
        "sudo",
        f"""PATH={alone}:/usr/bin:/bin; shift
case "$*" in *apt-get*) echo "$* $(cat {alone}/policy-rc.d | tail -n 1)" >> {log};; *) "$@";; esac
""",
    )
    programs.install()
    update, install = log.read_text().splitlines()
    assert update == "apt-get update -qq exit 101"
    assert install.endswith("chromium postgresql prometheus redis-server exit 101")
    assert not (alone / "policy-rc.d").exists()


def test_a_run_ends_with_the_packages_that_tests_were_skipped_for(tmp_path: Path) -> None:
    test = tmp_path / "test_it.py"
    test.write_text(
        "from tests import programs\nprograms._PLACES = ()\n"
        'def test_page() -> None: programs.require("chromium")\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
        + ["-p", "tests.conftest", test],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "PYTEST_ADDOPTS": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "for want of these Debian packages: chromium (as root:" in done.stdout

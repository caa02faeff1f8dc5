"""How environments are made, here, in the image and on nodes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "file", ["Makefile", "deploy/Dockerfile", "cluster.yaml", "deploy/cluster-local.yaml"]
)
def test_what_is_installed_has_its_bytecode(file: str) -> None:
    text = (ROOT / file).read_text()
    installs = text.split("uv pip install ")[1:]
    assert installs
    assert all("--compile-bytecode" in rest.split("-r ", 1)[0] for rest in installs)
    assert "__pycache__" not in text


@pytest.mark.parametrize(
    ("stamp", "given", "wanted", "stale"),
    [
        (None, "", "cpu", True),
        ("", "", "gpu", False),  # Of an older checkout: all was installed.
        ("cpu\n{venv}\n", "auto", "cpu", False),
        ("cpu\n{venv}\n", "gpu", "gpu", True),
        ("gpu\n{venv}\n", "auto", "gpu", False),
        ("gpu\n/elsewhere/.venv\n", "auto", "gpu", True),
    ],
)
def test_packages_are_installed_again_for_another_device_or_place(
    stamp: str | None, given: str, wanted: str, stale: bool, tmp_path: Path
) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("auto means gpu here")
    venv = tmp_path / ".venv"
    venv.mkdir()
    (tmp_path / "requirements.txt").touch()
    if stamp is not None:
        (venv / ".installed").write_text(stamp.format(venv=venv))
    (tmp_path / "show.mk").write_text(
        f"include {ROOT / 'Makefile'}\n$(info $(WANTED) [$(STALE)])\n"
    )
    # Started by `make test` it would be a sub-make, which inherits flags and names its folder.
    command = ["make", "--no-print-directory", "-n", "-f", "show.mk", "help"]
    done = subprocess.run(
        [*command, *([f"DEVICE={given}"] if given else [])],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k not in {"DEVICE", "MAKEFLAGS", "MAKELEVEL"}},
        capture_output=True,
        text=True,
        check=True,
    )
    # Without a stamp the target is made anyway.
    assert done.stdout.splitlines()[0] == f"{wanted} [{'yes' if stale else ''}]"


def test_a_device_that_is_none_is_refused_and_not_run(tmp_path: Path) -> None:
    command = ["make", "-n", "-f", str(ROOT / "Makefile"), "help"]
    env = {**os.environ, "DEVICE": "$(shell touch made)"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "DEVICE is auto, cpu or gpu" in done.stderr
    assert not (tmp_path / "made").exists()

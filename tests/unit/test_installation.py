"""How environments are made, here, in the image and on nodes."""

from __future__ import annotations

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

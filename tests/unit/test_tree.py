"""What git has in its tree: no links to elsewhere, and nothing that a test has downloaded."""

from __future__ import annotations

import subprocess

import pytest

from lib.line.layout import PROJECT_ROOT

LINK = "120000"
MAX_BYTES = 12 * 2**20
"""The largest file, MNIST's training images, has 9.3 MiB."""


def entries() -> list[tuple[str, str]]:
    """Mode and path of each file; skips where this is no checkout, as in an unpacked archive."""
    command = ["git", "ls-files", "-s", "-z"]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no git")
    if done.returncode != 0:
        pytest.skip(f"this is no checkout: {done.stderr.strip()}")
    rows = [entry.split("\t", 1) for entry in done.stdout.split("\0") if entry]
    return [(about.split()[0], path) for about, path in rows]


def test_the_tree_has_no_links_no_packages_and_nothing_large() -> None:
    found = entries()
    assert len(found) > 100
    assert [path for mode, path in found if mode == LINK] == []
    assert [path for _, path in found if path.endswith((".deb", ".rpm", ".whl"))] == []
    there = [PROJECT_ROOT / path for _, path in found if (PROJECT_ROOT / path).is_file()]
    assert [path for path in there if path.stat().st_size > MAX_BYTES] == []

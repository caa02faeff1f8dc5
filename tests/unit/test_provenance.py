from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lib import provenance
from lib.errors import ConfigError
from lib.provenance import Provenance, collect, current, describe, training_code_digest


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("one = 1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    found = collect(checkout)
    assert found.commit == git(checkout, "rev-parse", "HEAD")
    assert (found.dirty, found.diff) == (False, None)


def test_uncommitted_changes_travel_as_a_patch_that_applies(checkout: Path) -> None:
    (checkout / "code.py").write_text("one = 2\n")
    (checkout / "notes.txt").write_text("secret")
    found = Provenance.decode(collect(checkout).encode())
    assert found.dirty
    assert found.diff is not None
    assert "+one = 2" in found.diff
    assert "untracked: notes.txt" in found.diff
    assert "secret" not in found.diff
    git(checkout, "checkout", "-q", "code.py")
    patch = checkout / "p.patch"
    patch.write_text(found.diff.split("untracked:")[0])
    git(checkout, "apply", "p.patch")
    assert (checkout / "code.py").read_text() == "one = 2\n"


def test_new_code_travels_with_its_content(checkout: Path) -> None:
    (checkout / "lib").mkdir()
    (checkout / "lib" / "new module.py").write_text("two = 2\n")
    git(checkout, "config", "diff.noprefix", "true")
    found = collect(checkout)
    assert found.diff is not None
    assert "untracked" not in found.diff
    patch = checkout / "p.patch"
    patch.write_text(found.diff)
    (checkout / "lib" / "new module.py").unlink()
    git(checkout, "apply", "p.patch")
    assert (checkout / "lib" / "new module.py").read_text() == "two = 2\n"


def test_a_change_too_large_for_a_variable_leaves_its_digest(checkout: Path) -> None:
    (checkout / "code.py").write_text(os.urandom(200_000).hex())
    collected = collect(checkout)
    encoded = collected.encode()
    assert len(encoded) < 2 * provenance.MAX_DIFF_BYTES
    found = Provenance.decode(encoded)
    assert found.dirty
    assert found.diff is None
    assert found.diff_sha256 == collected.diff_sha256 is not None
    assert "too many to record" in describe(found)


def test_ignored_files_are_no_change(checkout: Path) -> None:
    (checkout / ".git" / "info" / "exclude").write_text("*.log\n")
    (checkout / "run.log").write_text("x")
    assert not collect(checkout).dirty


def test_a_copy_below_another_checkout_has_no_commit(checkout: Path) -> None:
    copy = checkout / "unpacked"
    copy.mkdir()
    (copy / "code.py").write_text("one = 1\n")
    assert collect(copy).commit is None


def test_a_run_without_a_commit_says_so_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    env = {provenance.VARIABLE: Provenance(commit=None, owner="test-once").encode()}
    assert current(env).commit is None
    assert current(env).owner == "test-once"
    assert capsys.readouterr().out.count("WARNING") == 1


def test_the_variable_wins_over_the_checkout() -> None:
    sent = Provenance(commit="c" * 40, owner="someone")
    assert current({provenance.VARIABLE: sent.encode()}) == sent


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"commit": "x"}', '{"diff": "!!", "commit": 1}']
)
def test_a_damaged_variable_is_refused(damage: str) -> None:
    with pytest.raises(ConfigError, match="RAYLINE_PROVENANCE is damaged"):
        Provenance.decode(damage)


def test_all_that_a_trial_imports_is_in_the_digest_of_the_training_code(tmp_path: Path) -> None:
    code = "import sys, lib.train.trial; print(*(m for m in sys.modules if m.startswith('lib.')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    root = Path(provenance.__file__).parents[1]
    digests = {training_code_digest(tmp_path)}
    # Texts of errors and progress, the cards of models that are served, and settings, of which the
    # preset stands in what the step is keyed by.
    served = {"lib.serving.bundle", "lib.serving"}
    settings = {"lib.config", "lib.secrets", "lib.selector", "lib.leases", "lib.leases.owners"}
    for name in set(done.stdout.split()) - {"lib.errors", "lib.cli"} - served - settings:
        source = root / name.replace(".", "/")
        source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
        copy = tmp_path / source.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(source.read_text())
        training_code_digest.cache_clear()
        assert (digest := training_code_digest(tmp_path)) not in digests, name
        digests.add(digest)
    copy.write_text(copy.read_text() + "# Changed.\n")
    training_code_digest.cache_clear()
    assert training_code_digest(tmp_path) not in digests

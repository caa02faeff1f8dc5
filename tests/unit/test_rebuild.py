from __future__ import annotations

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from lib import rebuild
from lib.errors import RefusedError
from lib.provenance import collect
from lib.rebuild import checked_out, ensure_venv, installed


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=T", "-c", "user.email=t@localhost"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project in a folder of a repository, changed in every way that a diff may have to carry."""
    root = tmp_path / "repository"
    project = root / "the project"
    (project / "lib").mkdir(parents=True)
    git(root, "init", "-q")
    (project / "lib" / "code.py").write_text("old\n")
    (project / "picture.bin").write_bytes(bytes(range(256)))
    (project / "gone.txt").write_text("gone\n")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (project / "lib" / "code.py").write_text("new \r\nwithout an end")
    (project / "lib" / "added.py").write_text("untracked: yes\n")
    (project / "picture.bin").write_bytes(bytes(reversed(range(256))))
    (project / "gone.txt").unlink()
    (project / "notes.txt").write_text("no code")
    return project


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".git")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_recorded_checkout_comes_back_to_the_byte(project: Path) -> None:
    recorded = collect(project)
    now = files(project)
    assert recorded.commit is not None
    assert recorded.diff is not None
    # The user goes on meanwhile: what was recorded counts, not what is there.
    git(project, "add", "-A")
    git(project, "commit", "-q", "-m", "second")
    (project / "lib" / "code.py").write_text("newer\n")

    with checked_out(project, recorded.commit, recorded.diff) as tree:
        rebuilt = files(tree)
        assert len(git(project, "worktree", "list").splitlines()) == 2

    assert rebuilt == {name: content for name, content in now.items() if name != "notes.txt"}
    assert not tree.exists()
    assert len(git(project, "worktree", "list").splitlines()) == 1
    assert (project / "lib" / "code.py").read_text() == "newer\n"
    with checked_out(project, recorded.commit, None) as tree:
        assert (tree / "lib" / "code.py").read_text() == "old\n"


def test_a_diff_that_lacks_code_or_does_not_apply_is_refused(project: Path) -> None:
    commit = git(project, "rev-parse", "HEAD")
    lacking = "untracked: notes.txt\nuntracked: lib/lost.py\n"
    refused = pytest.raises(RefusedError, match="not recorded: lib/lost.py")
    with refused, checked_out(project, commit, lacking):
        pass
    with checked_out(project, commit, "untracked: notes.txt\n") as tree:
        assert (tree / "gone.txt").exists()
    other = "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n-a\n+b\n"
    with pytest.raises(RefusedError, match="do not apply"), checked_out(project, commit, other):
        pass
    assert len(git(project, "worktree", "list").splitlines()) == 1


def wheel(folder: Path, name: str) -> Path:
    """The smallest package that can be installed without a network."""
    file = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as content:
        content.writestr(f"{name}.py", "value = 7\n")
        content.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        content.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        content.writestr(f"{info}/RECORD", "")
    return file


def test_a_venv_has_the_pins_and_is_made_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = ".".join(str(part) for part in sys.version_info[:3])
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"{wheel(tmp_path, 'pinned')}\n")

    interpreter = ensure_venv(requirements, python, tmp_path / "cache")

    script = "import json, pinned, sys; print(json.dumps([pinned.value, sys.prefix]))"
    said = subprocess.run([interpreter, "-c", script], check=True, capture_output=True, text=True)
    value, prefix = json.loads(said.stdout)
    assert value == 7
    assert Path(prefix).is_relative_to(tmp_path / "cache")
    assert ensure_venv(requirements, python, tmp_path / "cache") == interpreter
    assert capsys.readouterr().out.count("installing") == 1
    there = installed(interpreter, ["pinned", "absent"])
    assert there == {"pinned": "1.0", "absent": None, "python": python}
    with pytest.raises(RefusedError, match="is no version"):
        ensure_venv(requirements, "/bin/sh", tmp_path / "cache")

    requirements.write_text(f"{tmp_path}/absent-1.0-py3-none-any.whl\n")
    with pytest.raises(RefusedError, match="absent"):
        ensure_venv(requirements, python, tmp_path / "cache")
    with pytest.raises(RefusedError, match="absent"):
        ensure_venv(requirements, python, tmp_path / "cache")


def test_two_at_once_make_one_venv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("pinned==1.0\n")
    found: list[Path] = []
    calls: list[str] = []

    def ensure() -> None:
        found.append(ensure_venv(requirements, "3.11.2", tmp_path / "cache"))

    other = threading.Thread(target=ensure)

    def uv(*arguments: str) -> None:
        calls.append(arguments[0])
        if arguments[0] == "venv":
            Path(arguments[-1]).mkdir()
            return
        if len(calls) == 2:
            other.start()
            other.join(timeout=0.3)  # It waits for this one.
        assert Path(arguments[4]).parents[1].exists()

    monkeypatch.setattr(rebuild, "_uv", uv)
    ensure()
    other.join(timeout=30)

    assert calls == ["venv", "pip"]
    assert len(set(found)) == 1
    assert len(found) == 2


@pytest.mark.parametrize("commit", ["main", "--batch", "HEAD", "c0ffee"])
def test_only_a_commit_is_checked_out(project: Path, commit: str) -> None:
    refused = pytest.raises(RefusedError, match="is no commit")
    with refused, checked_out(project, commit, None):
        pass

"""Earlier states of the project: their code in a work tree, their packages in a venv."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.cli import progress
from lib.errors import RefusedError
from lib.provenance import CODE_FOLDERS, UNTRACKED

THIS_CODE = "add --this-code to train with the code of this checkout instead"
THIS_ENV = "add --this-env to go on with the packages of this environment"


@contextmanager
def checked_out(root: Path, commit: str, diff: str | None) -> Iterator[Path]:
    """Yield a temporary work tree of the project at a commit, with a recorded diff applied.

    The checkout at `root` keeps its branch, its index and its files. Raises RefusedError if the
    commit is not there, or the diff leaves out code or does not apply.
    """
    # It comes from a tag that anybody may write: no option, and no name of a branch.
    if not re.fullmatch("[0-9a-f]{7,64}", commit):
        raise RefusedError(f"{commit!r} is no commit; {THIS_CODE}")
    patch = _applicable(diff, commit) if diff else ""
    prefix = _git(root, "rev-parse", "--show-prefix")
    if prefix is None:
        raise RefusedError(
            f"{root} is no git checkout, so commit {commit[:12]} can't be checked out: run this "
            f"where the project was cloned, without submitting it as a job, or {THIS_CODE}"
        )
    if _git(root, "cat-file", "-e", f"{commit}^{{commit}}") is None:
        raise RefusedError(
            f"commit {commit} is not in the checkout at {root}: get it with `git fetch --all` "
            f"(`--unshallow` if the clone is shallow), or {THIS_CODE}"
        )
    folder = Path(tempfile.mkdtemp(prefix="rayline-code-"))
    tree = folder / "tree"
    try:
        # Hooks are made for people's own checkouts.
        hooks = ("-c", "core.hooksPath=/dev/null")
        added = [*hooks, "worktree", "add", "--quiet", "--detach", str(tree), commit]
        if _git(root, *added) is None:
            raise RefusedError(f"git can't make a work tree of {commit} at {tree}; try it by hand")
        if patch and _git(tree, "apply", "--whitespace=nowarn", "-", stdin=patch) is None:
            raise RefusedError(
                f"the recorded uncommitted changes do not apply to commit {commit}; {THIS_CODE}"
            )
        yield tree / prefix.strip()
    finally:
        _git(root, "worktree", "remove", "--force", str(tree))
        shutil.rmtree(folder, ignore_errors=True)


def ensure_venv(requirements: Path, python: str, cache: Path | None = None) -> Path:
    """Return the interpreter of a venv with these pins, made by uv if it is not there yet.

    Args:
        requirements: Exact pins; with the Python version they name the venv.
        python: Version, as `3.11.2`.
        cache: Where venvs are kept; the user's cache folder if None.
    """
    # As recorded in MLflow: uv would take a path as well, and run what is there.
    if not re.fullmatch(r"\d+\.\d+\.\d+\w*", python):
        raise RefusedError(f"the recorded Python {python!r} is no version; {THIS_ENV}")
    name = hashlib.sha256(python.encode() + requirements.read_bytes()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = (cache or base / "rayline" / "environments") / name
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        # Freed with the process: another one may be making the same venv.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if complete.exists():
            progress("reproduce", f"packages: {folder}, made before")
            return interpreter
        progress("reproduce", f"packages: installing {requirements.name} into {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        same = python == ".".join(str(part) for part in sys.version_info[:3])
        _uv("venv", "--quiet", "--python", sys.executable if same else python, str(folder))
        _uv("pip", "install", "--quiet", "--python", str(interpreter), "-r", str(requirements))
        complete.touch()
    return interpreter


_INSTALLED = """
import importlib.metadata, json, platform, sys
found = {name: None for name in sys.argv[1:]}
for name in found:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({**found, "python": platform.python_version()}))
"""


def installed(interpreter: Path, packages: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of packages, None of those that are missing, and of Python itself."""
    command = [str(interpreter), "-I", "-c", _INSTALLED, *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RefusedError(
            f"{interpreter} does not run: {done.stderr.strip()[-500:]}; delete "
            f"{interpreter.parents[1]}, or {THIS_ENV}"
        )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def _applicable(diff: str, commit: str) -> str:
    """Return what `git apply` takes of a recorded diff."""
    # The names of untracked files stand at the end, one a line.
    lines = diff.splitlines(keepends=True)
    count = 0
    while count < len(lines) and lines[-1 - count].startswith(UNTRACKED):
        count += 1
    names = [line.removeprefix(UNTRACKED).strip() for line in lines[len(lines) - count :]]
    missing = [name for name in names if name.endswith(".py") and name.startswith(CODE_FOLDERS)]
    if missing:
        raise RefusedError(
            f"the code had files beside commit {commit[:12]} whose content was not recorded: "
            f"{', '.join(missing)}; {THIS_CODE}"
        )
    return "".join(lines[: len(lines) - count])


def _git(root: Path, *arguments: str, stdin: str | None = None) -> str | None:
    """Return git's output; None if it says no."""
    # In a hook git names its own repository in the environment: it must not stand for `root`.
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],
        input=stdin.encode() if stdin is not None else b"",
        capture_output=True,
        env=env,
        check=False,
    )
    return done.stdout.decode(errors="replace") if done.returncode == 0 else None


def _uv(*arguments: str) -> None:
    found = shutil.which("uv")
    command = [found] if found else [sys.executable, "-m", "uv"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RefusedError(
            f"`uv {' '.join(arguments)}` failed: {done.stderr.strip()[-1500:]}; install uv, look "
            f"at the network, or {THIS_ENV}"
        )

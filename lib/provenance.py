"""Which code a job runs and who sent it, recorded where `.git` still is: at submission.

Ray leaves `.git` out of what it uploads, so the commit, the uncommitted changes and the owner
travel to the job in one environment variable.
"""

from __future__ import annotations

import base64
import binascii
import functools
import getpass
import hashlib
import json
import os
import subprocess
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lib.cli import progress
from lib.errors import ConfigError

VARIABLE = "RAYLINE_PROVENANCE"
MAX_DIFF_BYTES = 64 * 1024
"""Of the encoded diff: Linux limits one environment variable to 128 KiB."""

CODE_FOLDERS = ("lib/", "jobs/", "serve_apps/")
"""Where a new file is code: its content is recorded before it is committed."""
UNTRACKED = "untracked: "
"""How a diff names the other new files, whose content it does not have."""
_TRAINING_CODE = (
    "lib/data",
    "lib/train",
    "lib/device.py",
    "lib/storage.py",
    "lib/serving/predictor.py",
)
"""What a trial runs, and what searches: other sources may lead to other models."""

_ROOT = Path(__file__).resolve().parents[1]
_GIT_TIMEOUT_S = 30
# Whatever a user's git is set to, `git apply` must take it.
_DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff", "--no-relative")
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """The state of the code at submission."""

    commit: str | None
    """Full commit id; None when the code was in no git checkout."""
    dirty: bool = False
    """Whether files differed from the commit, or were not tracked."""
    diff: str | None = None
    """Uncommitted changes and new code as a patch, then the names of other new files; None if
    left out."""
    diff_sha256: str | None = None
    """Digest of the whole diff, kept also when the diff itself is too large to travel."""
    owner: str | None = None
    """User name of the person who submitted."""

    def encode(self) -> str:
        """Return the value of the environment variable."""
        return json.dumps({**asdict(self), "diff": _pack(self.diff) if self.diff else None})

    @classmethod
    def decode(cls, encoded: str) -> Provenance:
        """Rebuild from the environment variable; raise ConfigError if it is damaged."""
        try:
            fields = json.loads(encoded)
            if fields["diff"] is not None:
                fields["diff"] = zlib.decompress(base64.b64decode(fields["diff"])).decode()
            return cls(**fields)
        except (ValueError, KeyError, TypeError, zlib.error, binascii.Error) as error:
            raise ConfigError(
                f"{VARIABLE} is damaged ({error}); submit with `python -m jobs.submit`, "
                "which writes it"
            ) from error


def collect(root: Path = _ROOT) -> Provenance:
    """Read the state of the checkout at `root`; the commit is None where there is none."""
    owner = _owner()
    commit = _git(root, "rev-parse", "--verify", "HEAD")
    # A copy without .git, unpacked below someone else's checkout, is not that checkout's code.
    if not commit or not _git(root, "ls-files", "--", "."):
        return Provenance(commit=None, owner=owner)
    changes = _git(root, *_DIFF, *_PREFIXES, "HEAD", "--", ".") or ""
    names = (_git(root, "ls-files", "--others", "--exclude-standard", "--", ".") or "").splitlines()
    new_code = [name for name in names if name.endswith(".py") and name.startswith(CODE_FOLDERS)]
    changes += "".join(_new_file(root, name) for name in new_code)
    diff = changes + "".join(f"{UNTRACKED}{name}\n" for name in names if name not in new_code)
    if not diff:
        return Provenance(commit=commit.strip(), owner=owner)
    return Provenance(
        commit=commit.strip(),
        dirty=True,
        diff=diff if len(_pack(diff)) <= MAX_DIFF_BYTES else None,
        diff_sha256=hashlib.sha256(diff.encode()).hexdigest(),
        owner=owner,
    )


def current(env: Mapping[str, str] | None = None) -> Provenance:
    """Return what was recorded at submission; else what the running checkout says.

    When neither knows a commit, that is said loudly, once: the run can't be rebuilt.
    """
    return _current((os.environ if env is None else env).get(VARIABLE) or None)


@functools.cache
def training_code_digest(root: Path = _ROOT) -> str:
    """Return a digest of the sources that decide what a sweep finds."""
    found = [root / name for name in _TRAINING_CODE]
    files = sorted(f for each in found for f in ([each] if each.is_file() else each.rglob("*.py")))
    texts = [f"{file.relative_to(root)}\n{file.read_text(encoding='utf-8')}" for file in files]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:32]


def describe(provenance: Provenance) -> str:
    """Return one line for people: commit, whether it is dirty, owner."""
    if provenance.commit is None:
        return f"no git commit, by {provenance.owner or 'unknown'}"
    state = ""
    if provenance.dirty:
        state = " with uncommitted changes"
        if provenance.diff is None:
            state += " (too many to record: only their SHA-256 is kept)"
    return f"commit {provenance.commit[:12]}{state}, by {provenance.owner or 'unknown'}"


def diffstat(before: str, after: str, root: Path = _ROOT) -> str | None:
    """Return git's list of changed files between two commits; None if it lacks one of them."""
    # Commits come from tags that anybody may write: nothing of them may be taken for an option.
    if any(not set(commit) <= set("0123456789abcdef") for commit in (before, after)):
        return None
    return _git(root, "diff", "--stat=100", "--no-color", "--no-ext-diff", before, after, "--")


@functools.cache
def _current(encoded: str | None) -> Provenance:
    provenance = Provenance.decode(encoded) if encoded else collect()
    if provenance.commit is None:
        progress(
            "provenance",
            "WARNING: no git commit is recorded for this run, so nobody can rebuild it; submit "
            "from a git checkout with `python -m jobs.submit VERB ...`",
        )
    return provenance


def _pack(diff: str) -> str:
    return base64.b64encode(zlib.compress(diff.encode(), 9)).decode()


def _owner() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container's user id without a passwd entry.
        return None


def _new_file(root: Path, name: str) -> str:
    """Return a file that git does not know yet as a patch that adds it."""
    prefix = (_git(root, "rev-parse", "--show-prefix") or "").strip()
    places = (f"--src-prefix=a/{prefix}", f"--dst-prefix=b/{prefix}")
    return _git(root, *_DIFF, *places, "--no-index", "--", os.devnull, name, ok=(0, 1)) or ""


def _git(root: Path, *arguments: str, ok: tuple[int, ...] = (0,)) -> str | None:
    """Return git's output; None when git is missing or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode(errors="replace") if done.returncode in ok else None

"""What all jobs share: what goes to which output, exit codes, and a --help that takes no time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lib import cli, errors

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py"))
EXIT_CODES = {
    errors.ConfigError: 2,
    errors.DataError: 1,
    errors.TooFewError: 4,
    errors.StorageError: 5,
    errors.RefusedError: 3,
    errors.RegistryError: 1,
    errors.LineError: 5,
}


def run(
    job: Any, capsys: pytest.CaptureFixture[str], *, terminal: bool = False, **how: bool
) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        with pytest.raises(SystemExit) as ended:
            cli.run(job, **how)
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capsys.readouterr()


def versions() -> Mapping[str, Any]:
    cli.progress("step", "for people")
    return {"version": 3, "accuracy": float("nan"), "weights": {1: 90.0}}


@pytest.mark.parametrize("fails", [False, True])
def test_json_alone_is_on_the_output_if_asked_for(
    fails: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> Mapping[str, Any]:
        result = versions()
        if fails:
            raise errors.RegistryError("no such version")
        return result

    code, output, rest = run(job, capsys, only_json=True)
    assert code == int(fails)
    # NaN is no JSON.
    expected = {"version": 3, "accuracy": None, "weights": {"1": 90.0}}
    error = {"error": "RegistryError", "message": "no such version", "exit_code": 1}
    assert json.loads(output) == (error if fails else expected)
    assert "for people" in rest


def test_the_last_line_of_a_log_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = run(versions, capsys)
    first, last = output.splitlines()
    assert first.endswith("step: for people")
    assert json.loads(last)["version"] == 3


def test_a_terminal_shows_text(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(versions, capsys, terminal=True)
    assert code == 0
    assert "{" not in output
    row = output.splitlines()[1]
    assert "version" in row
    assert "3" in row
    _, output, _ = run(
        lambda: print("a table") or {"rows": 1}, capsys, terminal=True, has_text=True
    )
    assert output == "a table\n"


@pytest.mark.parametrize("kind", EXIT_CODES, ids=lambda kind: kind.__name__)
def test_exit_codes_tell_errors_apart(
    kind: type[errors.RaylineError], capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> Mapping[str, Any]:
        raise kind("why")

    code, output, error = run(job, capsys, terminal=True)
    assert (code, output, error) == (EXIT_CODES[kind], "", f"{kind.__name__}: why\n")


@pytest.mark.parametrize(("status", "code"), [("held", 4), ("rolled_back", 3), ("aborted", 1)])
def test_a_rollout_that_ends_otherwise_says_how(
    status: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> Mapping[str, Any]:
        raise errors.RolloutError("why", {"status": status})

    ended, output, _ = run(job, capsys)
    result = json.loads(output.splitlines()[-1])
    assert (ended, result["status"], result["exit_code"]) == (code, status, code)


@pytest.mark.parametrize(
    ("interrupt", "next_step"),
    [
        (KeyboardInterrupt(), "the same command goes on from what is there"),
        (KeyboardInterrupt("resume the sweep"), "resume the sweep"),
    ],
)
def test_an_interrupted_job_says_what_goes_on(
    interrupt: KeyboardInterrupt, next_step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def job() -> Mapping[str, Any]:
        raise interrupt

    assert run(job, capsys) == (130, "", f"\ninterrupted; {next_step}\n")


def test_what_reads_the_output_may_leave() -> None:
    code = (
        "from lib import cli, tables\n"
        "def job():\n"
        "    for _ in range(100000): print('a line of a long table')\n"
        "    return {}\n"
        "cli.run(job)"
    )
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("a line of a long table\n", "")


@pytest.mark.parametrize("job", JOBS)
def test_help_loads_nothing_and_knows_json(job: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{job}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('jobs.{job}', run_name='__main__')\n"
        "except SystemExit as ended:\n"
        "    assert not ended.code\n"
        "heavy = {'numpy', 'pyarrow', 'ray', 'mlflow', 'torch', 'PIL', 'requests', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *text, loaded = done.stdout.splitlines()
    assert loaded == "[]"
    assert any("--json" in line for line in text)
    assert any("usage: python -m jobs." in line for line in text)


def test_what_a_job_writes_is_its_users_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "folder" / "written"

    def job() -> Mapping[str, Any]:
        written.parent.mkdir()
        written.touch()
        return {}

    before = os.umask(0o022)
    try:
        run(job, capsys)
    finally:
        os.umask(before)
    assert not any(path.stat().st_mode & 0o077 for path in (written, written.parent))

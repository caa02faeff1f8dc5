"""The README's file map and commands, held against the project."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from functools import cache

import pytest

from lib.line.layout import PROJECT_ROOT
from lib.line.ports import variables
from tests.bench.__main__ import LONG_PARTS, PARTS

README = (PROJECT_ROOT / "README.md").read_text()
MAKEFILE = (PROJECT_ROOT / "Makefile").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
JOBS = [line for line in COMMANDS if "-m jobs." in line]
GIVEN_BY_USER = {
    "RAY_SERVE_ENABLE_HA_PROXY",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED",
    "RAY_REDIS_ADDRESS",
}
"""Ray's own settings, for the head of a cluster."""


@cache
def help_of(module: str) -> str:
    # In this process: starting one for each job takes minutes on a slow machine.
    said = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
    ):
        patch.setattr(sys, "argv", [module, "--help"])
        importlib.import_module(module).main()
    return said.getvalue()


def test_the_file_map_names_what_is_there_and_all_of_it() -> None:
    named = re.findall(r"^\| `([^`]+)` \|", README, re.MULTILINE)
    assert len(named) > 5
    assert [path for path in named if not (PROJECT_ROOT / path).exists()] == []
    folders = [*PROJECT_ROOT.glob("*/__init__.py"), *PROJECT_ROOT.glob("lib/*/__init__.py")]
    unnamed = [
        folder
        for folder in (str(init.parent.relative_to(PROJECT_ROOT)) + "/" for init in folders)
        if folder != "lib/" and folder not in named
    ]
    assert unnamed == []


def test_every_make_target_and_variable_is_real() -> None:
    used = [line.split()[1:] for line in COMMANDS if line.startswith("make ")]
    assert used
    known = set(re.findall(r"(RAY\w+|MLFLOW_\w+)  ", variables()))
    for target, *settings in used:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
        for name in (setting.partition("=")[0] for setting in settings):
            assert name in known or f"$({name})" in MAKEFILE, name


@pytest.mark.parametrize("line", JOBS)
def test_every_job_and_flag_is_real(line: str) -> None:
    words = line[line.index("jobs.") :].split()
    module, flags = words[0], words[1:]
    if module == "jobs.submit":
        assert help_of(module)
        module, flags = f"jobs.{words[1]}", words[2:]
    for flag in (word for word in flags if word.startswith("--")):
        assert flag in help_of(module), f"{module} has no {flag}"


def test_every_setting_it_names_is_one() -> None:
    named = set(re.findall(r"\b(?:RAYLINE|RAY|MLFLOW)_[A-Z_]+", README)) - GIVEN_BY_USER
    assert named <= set(re.findall(r"[A-Z_]{4,}", variables()))


def test_its_results_are_filled_in() -> None:
    results = README.partition("## Results")[2]
    assert "RESULTS" not in results
    # What it says of `make bench` is what that measures; the others it calls by name.
    (told,) = re.findall(r"`make bench` prints the tables of ([\w, ]+), with", results)
    assert tuple(re.findall(r"\w+", told.replace(" and ", ", "))) == PARTS
    measured = set(re.findall(r"python -m tests\.bench (\w+)", results))
    assert measured <= {*PARTS, *LONG_PARTS}
    for page in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (PROJECT_ROOT / page).exists(), page

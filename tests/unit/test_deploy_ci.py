"""CI's files: valid by the published schema, and calling what a person calls."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JENKINS = ROOT / "deploy" / "Jenkinsfile"
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CALLED = {"audit", "image", "train", "rollout", "rollback", "rayservice"}
# The part of issue 5 that rolls out is written beside this; its job comes with it.


def workflow(path: Path) -> dict[str, Any]:
    # `on` is a word for true in YAML 1.1, not in GitHub's.
    document = yaml.safe_load(path.read_text())
    return {"on" if key is True else key: value for key, value in document.items()}


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in workflow(path)["jobs"].values() for step in job["steps"]]


def named(text: str) -> tuple[set[str], set[str]]:
    """Make targets and jobs that a text calls outside of its comments."""
    text = re.sub(r"(^|\s)(#|//)[^\n]*", "", text)
    targets = set(re.findall(r"(?:^|[\s'\"])make ([a-z]+)", text, re.MULTILINE))
    jobs = set(re.findall(r"jobs\.submit ([a-z_]+)", text)) | set(
        re.findall(r"-m jobs\.([a-z_]+)", text)
    )
    return targets, jobs


def has_job(name: str) -> bool:
    return (ROOT / "jobs" / f"{name}.py").exists()


def test_there_are_the_four_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["deploy", "rollback", "test", "train"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_are_valid(path: Path) -> None:
    schema = json.loads((ROOT / "tests" / "schemas" / "github-workflow.json").read_text())
    found = [
        f"{error.json_path}: {error.message[:300]}"
        for error in Draft7Validator(schema).iter_errors(workflow(path))
    ]
    assert found == []


def test_a_misspelt_key_would_be_found() -> None:
    schema = json.loads((ROOT / "tests" / "schemas" / "github-workflow.json").read_text())
    wrong = workflow(WORKFLOWS[0])
    wrong["jobs"]["image"]["timeout-minute"] = 3
    assert list(Draft7Validator(schema).iter_errors(wrong))


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, JENKINS, ROOT / "Makefile"], ids=lambda path: path.name
)
def test_what_is_called_exists(path: Path) -> None:
    targets, jobs = named(path.read_text())
    assert targets <= TARGETS | {"lint"}
    assert all(has_job(job) for job in jobs), jobs


def test_both_systems_call_the_same() -> None:
    of_workflows = set().union(*(named(path.read_text())[0] for path in WORKFLOWS))
    of_jenkins, _ = named(JENKINS.read_text())
    # On GitHub a line of the run's own has to be ended; a Jenkins agent keeps its own.
    assert of_workflows - {"down"} == of_jenkins == CALLED
    for path in (ROOT / ".github" / "workflows" / "test.yml", JENKINS):
        assert re.search(r"\.ci/run", path.read_text())
    assert (ROOT / ".ci" / "run").exists()


def test_triggers_are_those_that_people_rely_on() -> None:
    on = {path.stem: workflow(path)["on"] for path in WORKFLOWS}
    assert on["train"]["pull_request"] == {"types": ["labeled"]}
    assert on["train"]["schedule"]
    assert on["deploy"] == {"push": {"tags": ["v*", "model/*/*"]}}
    assert set(on["rollback"]) == {"workflow_dispatch"}
    assert on["rollback"]["workflow_dispatch"]["inputs"]["why"]["required"] is True
    # Two rollouts never run at once, and going back waits for none of them.
    paths = {path.stem: workflow(path) for path in WORKFLOWS}
    assert paths["deploy"]["jobs"]["rollout"]["concurrency"] == {"group": "rollout"}
    assert paths["rollback"]["concurrency"] == {"group": "rollback"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_give_away_nothing(path: Path) -> None:
    document = workflow(path)
    assert document["permissions"] == {"contents": "read"}
    assert "pull_request_target" not in document["on"]
    for step in steps(path):
        script = step.get("run", "")
        # What others write (titles, branches, inputs) reaches scripts as variables, never as text.
        inside = re.findall(r"\$\{\{\s*(\S+?)\s*\}\}", script)
        assert set(inside) <= {"matrix.device"}, inside
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        if "uses" in step:
            assert re.search(r"@v\d+$", step["uses"])
        assert not re.search(
            r"echo .*(TOKEN|KEY|secrets\.)", script.replace("RAY_AUTH_TOKEN_PATH", "")
        )


def test_the_jenkinsfile_is_balanced_and_declarative() -> None:
    text = re.sub(r"//[^\n]*", "", JENKINS.read_text())
    bare = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"", "''", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert bare.count("(") == bare.count(")")
    assert bare.lstrip().startswith("pipeline {")
    assert re.findall(r"stage\('(\w+)'\)", text) == [
        "Test",
        "Image",
        "Train",
        "Rollout",
        "Rollback",
        "RayService",
    ]
    # Parameters reach scripts through the environment; Groovy never puts them into a command.
    assert not re.search(r"sh \"", text)


def test_make_runs_nothing_that_others_write() -> None:
    text = (ROOT / "Makefile").read_text()
    for name in ("WHY", "VERSION", "PRESET", "DEVICE"):
        for target in ("train", "rollout", "rollback", "image"):
            recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
            assert recipe
            assert f"$({name})" not in recipe.group(1)

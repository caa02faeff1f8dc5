"""CI's files: valid by the published schema, and calling what a person calls."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
JENKINS = ROOT / "deploy" / "Jenkinsfile"
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CALLED = {"audit", "image", "push", "train", "rollout", "rollback", "rayservice"}


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


def expressions(text: str) -> set[str]:
    """What GitHub would put into a text before any shell sees it."""
    return {found.strip() for found in re.findall(r"\$\{\{(.*?)\}\}", text, re.DOTALL)}


def has_job(name: str) -> bool:
    return (ROOT / "jobs" / f"{name}.py").exists()


def test_there_are_the_five_workflows() -> None:
    assert [path.stem for path in WORKFLOWS] == ["deploy", "drill", "rollback", "test", "train"]


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
    assert on["drill"]["pull_request"] == {"types": ["labeled"]}
    assert on["drill"]["schedule"]
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
        assert expressions(script) <= {"matrix.device"}
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
        "Drill",
        "Image",
        "Train",
        "Rollout",
        "Rollback",
        "RayService",
    ]
    # Parameters reach scripts through the environment; Groovy never puts them into a command.
    assert not re.search(r"(?m)^\s*sh \"", text)


def test_an_expression_with_spaces_in_it_would_be_found() -> None:
    script = "echo ${{ github.event.title || 'none' }} ${{matrix.device}}"
    assert expressions(script) == {"github.event.title || 'none'", "matrix.device"}


@pytest.mark.parametrize(("name", "verb"), [("deploy", "rollout"), ("rollback", "rollback")])
def test_what_changes_traffic_knows_where_it_is_and_gets_in(name: str, verb: str) -> None:
    (path,) = [path for path in WORKFLOWS if path.stem == name]
    job = workflow(path)["jobs"][verb]
    settings = ("SERVE_URL", "SERVE_API", "SERVE_LABELS", "STORAGE", "HTTP_HOST")
    for setting in (f"RAYLINE_{word}" for word in settings):
        assert expressions(job["env"][setting]) == {f"vars.{setting}"}
        assert setting in JENKINS.read_text()
    (step,) = [step for step in job["steps"] if f"make {verb}" in step.get("run", "")]
    keys = {"RAYLINE_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    keys |= {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    assert {key for key in keys if expressions(step["env"][key]) == {f"secrets.{key}"}} == keys


def test_the_cluster_is_tested_as_we_start_it_and_as_ray_does() -> None:
    nodes = workflow(ROOT / ".github" / "workflows" / "test.yml")["jobs"]["nodes"]
    assert sorted(nodes["strategy"]["matrix"]["haproxy"]) == ["0", "1"]
    step = nodes["steps"][-1]
    assert expressions(step["env"]["RAYLINE_CLUSTER_HAPROXY"]) == {"matrix.haproxy"}
    assert step["run"].endswith(".ci/run nodes")
    assert "RAYLINE_CLUSTER_HAPROXY=0 .ci/run nodes" in JENKINS.read_text()
    for path in (ROOT / ".github" / "workflows" / "drill.yml", JENKINS):
        assert ".ci/run drill" in path.read_text()
        assert "deploy/rehearse.sh" in path.read_text()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_image_is_pushed_by_the_name_that_the_overlays_have(tmp_path: Path, device: str) -> None:
    overlay = ROOT / "deploy" / "kubernetes" / "overlays" / {"cpu": "small"}.get(device, device)
    text = (overlay / "kustomization.yaml").read_text()
    (image,) = yaml.safe_load(text)["images"]
    wanted = f"{image['newName']}:{image['newTag']}"
    tag = f"v{image['newTag'].removesuffix(f'-{device}')}"
    assert (
        "# EDIT: where your image is (`make push`):\n#   kustomize edit set image rayline=" in text
    )
    found = re.search(r"^push:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\necho "$@"\n')
    docker.chmod(0o755)
    registry = image["newName"].removesuffix("/rayline").replace("example", "Example")
    done = subprocess.run(
        ["bash", "-c", found.group(1).removeprefix("\t@").replace("$$", "$")],
        env={
            "PATH": f"{tmp_path}:/usr/bin:/bin",
            "REGISTRY": registry,
            "TAG": tag,
            "DEVICE": device,
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"tag rayline:{device} {wanted}\npush {wanted}\n"


def test_make_runs_nothing_that_others_write() -> None:
    text = (ROOT / "Makefile").read_text()
    for name in ("WHY", "VERSION", "PRESET", "DEVICE", "TAG", "REGISTRY"):
        for target in ("train", "rollout", "rollback", "image", "push"):
            recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
            assert recipe
            assert f"$({name})" not in recipe.group(1)

"""The Kubernetes files as kustomize puts them together, by the published schemas, and by sense."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from ray.serve.schema import ServeDeploySchema

from lib.config import Settings
from lib.selector import matches, read_selector
from lib.serving import plan
from tests.kustomize import Manifest, build, load

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = ROOT / "tests" / "schemas"
OVERLAYS = ("small", "gpu")


@cache
def schema(api_version: str, kind: str) -> Draft202012Validator:
    group, _, version = api_version.rpartition("/")
    file = "kuberay.json" if group == "ray.io" else "kubernetes.json"
    if group.startswith("kueue"):
        file = "kueue.json"
    document = json.loads((SCHEMAS / file).read_text())
    name = f"{group or 'core'}/{version}/{kind}"
    return Draft202012Validator({"$ref": f"#/$defs/{name.replace('/', '~1')}", **document})


def errors(manifest: Manifest) -> list[str]:
    found = schema(manifest["apiVersion"], manifest["kind"]).iter_errors(manifest)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


def overlay(name: str) -> list[Manifest]:
    return build(KUBERNETES / "overlays" / name)


def one(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name]
    return found


def pod_specs(node: Any) -> list[Manifest]:
    """Every pod's spec below a node: what has containers."""
    if isinstance(node, dict):
        mine = [node] if "containers" in node else []
        return mine + [spec for value in node.values() for spec in pod_specs(value)]
    if isinstance(node, list):
        return [spec for item in node for spec in pod_specs(item)]
    return []


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_is_valid_by_its_published_schema(name: str) -> None:
    manifests = overlay(name)
    assert len(manifests) > 15
    wrong = {
        f"{m['kind']}/{m['metadata']['name']}": found for m in manifests if (found := errors(m))
    }
    assert wrong == {}


@pytest.mark.parametrize("file", ["pipeline.yaml", "kueue.yaml"])
def test_what_is_applied_by_hand_is_valid_too(file: str) -> None:
    assert [errors(manifest) for manifest in load(KUBERNETES / file)] == [
        [] for _ in load(KUBERNETES / file)
    ]


@pytest.mark.parametrize(
    ("kind", "name", "path"),
    [
        ("RayCluster", "rayline", ("spec", "headGroupSpec", "rayStartParam")),
        ("RayCluster", "rayline", ("spec", "headGroupSpec", "template", "spec", "volume")),
        ("RayService", "rayline-serve", ("spec", "rayClusterConfig", "rayVersionn")),
        ("Deployment", "rayline-mlflow", ("spec", "template", "spec", "securityContexts")),
        ("CronJob", "rayline-retrain", ("spec", "schedul")),
    ],
)
def test_a_misspelt_field_would_be_found(kind: str, name: str, path: tuple[str, ...]) -> None:
    manifest = copy.deepcopy(one(overlay("small"), kind, name))
    place = manifest
    for word in path[:-1]:
        place = place[word]
    place[path[-1]] = {}
    assert any(path[-1] in error for error in errors(manifest))


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_pod_is_root_or_takes_more_than_it_says(name: str) -> None:
    specs = [spec for manifest in overlay(name) for spec in pod_specs(manifest)]
    assert len(specs) >= 7
    for spec in specs:
        context = spec["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["runAsUser"] > 0
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert ":" in container["image"]
            assert not container["image"].endswith(":latest")


@pytest.mark.parametrize("name", OVERLAYS)
def test_volumes_secrets_and_settings_that_are_named_are_there(name: str) -> None:
    manifests = overlay(name)
    claims = {m["metadata"]["name"] for m in manifests if m["kind"] == "PersistentVolumeClaim"}
    settings = {m["metadata"]["name"] for m in manifests if m["kind"] == "ConfigMap"}
    made_by_hand = {"rayline-ray-token": "auth_token", "rayline-postgres": "password"}
    help_text = (KUBERNETES / "base" / "kustomization.yaml").read_text()
    for secret, key in made_by_hand.items():
        assert f"create secret generic {secret} --from-literal={key}=" in help_text
    assert not [m for m in manifests if m["kind"] == "Secret"]
    for spec in [spec for manifest in manifests for spec in pod_specs(manifest)]:
        volumes = {volume["name"]: volume for volume in spec.get("volumes", [])}
        for volume in volumes.values():
            if claim := volume.get("persistentVolumeClaim"):
                assert claim["claimName"] in claims
        for container in spec["containers"]:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted - {"data"} <= set(volumes)
            for source in container.get("envFrom", []):
                assert source["configMapRef"]["name"] in settings
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    assert made_by_hand[reference["name"]] == reference["key"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_both_ray_clusters_ask_for_the_token_and_run_the_pinned_ray(name: str) -> None:
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    version = next(pin.split("==")[1] for pin in pins if pin.startswith("ray=="))
    manifests = overlay(name)
    for spec in (
        one(manifests, "RayCluster", "rayline")["spec"],
        one(manifests, "RayService", "rayline-serve")["spec"]["rayClusterConfig"],
    ):
        assert spec["authOptions"] == {"mode": "token", "secretName": "rayline-ray-token"}
        assert spec["rayVersion"] == version
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_settings_are_whole_and_their_labels_find_the_groups() -> None:
    for name in OVERLAYS:
        manifests = overlay(name)
        env = one(manifests, "ConfigMap", "rayline-settings")["data"]
        settings = Settings.from_env(env)
        trials = read_selector("RAYLINE_TRIAL_LABELS", settings.trial_labels)
        serving = read_selector("RAYLINE_SERVE_LABELS", settings.serve_labels)
        groups = one(manifests, "RayCluster", "rayline")["spec"]["workerGroupSpecs"]
        service = one(manifests, "RayService", "rayline-serve")["spec"]["rayClusterConfig"]
        for_trials = [g for g in groups if matches(trials, g.get("labels", {}))]
        for_serving = service["workerGroupSpecs"]
        assert for_trials
        assert all(matches(serving, group.get("labels", {})) for group in for_serving)
        assert not any(matches(serving, group.get("labels", {})) for group in groups)
        gpus = [
            g["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            for g in for_trials
        ]
        assert gpus == (["1", "1"] if name == "gpu" else [None])
        # Addresses are those of services that this, or the operator for these names, makes.
        services = {m["metadata"]["name"] for m in manifests if m["kind"] == "Service"}
        services |= {"rayline-head-svc", "rayline-serve-head-svc", "rayline-serve-serve-svc"}
        for address in (settings.mlflow_uri, settings.ray_address, settings.serve_api):
            assert address.removeprefix("http://").partition(":")[0] in services


def test_spot_comes_first_and_the_cpu_groups_are_left_alone() -> None:
    groups = one(overlay("gpu"), "RayCluster", "rayline")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == ["cpu", "trials", "trials-on-demand"]
    cpu, spot, fallback = groups
    assert spot["priority"] > fallback["priority"]
    # Nobody pays for GPUs while nobody trains; either group alone has what a sweep counts on.
    env = one(overlay("gpu"), "ConfigMap", "rayline-settings")["data"]
    for group in (spot, fallback):
        assert group["replicas"] == group["minReplicas"] == 0
        assert group["maxReplicas"] >= int(env["RAYLINE_TRIAL_GPUS"])
    markets = [group["labels"]["ray.io/market-type"] for group in (spot, fallback)]
    assert markets == ["spot", "on-demand"]
    assert "nodeSelector" not in cpu["template"]["spec"]
    assert "nvidia.com/gpu" not in str(cpu)


def test_what_the_service_starts_with_is_what_a_deploy_would_make() -> None:
    spec = one(overlay("small"), "RayService", "rayline-serve")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    ServeDeploySchema.model_validate(config)
    env = one(overlay("small"), "ConfigMap", "rayline-settings")["data"]
    settings = Settings.from_env(env)
    made = plan.serve_config(settings, plan.applications(settings, {}, "code", {}))
    # The code is in the image; a deploy of new code brings its own.
    (application,) = made["applications"]
    application["runtime_env"].pop("working_dir")
    assert config == made
    assert env["PYTHONPATH"] == "/app"


def test_every_pod_that_is_asked_has_a_policy_that_lets_the_asker_in() -> None:
    manifests = overlay("small")
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    deny = one(manifests, "NetworkPolicy", "rayline-deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress"]}
    # No policy but these lets anything in from everywhere.
    for policy in policies:
        for rule in policy["spec"].get("ingress", []):
            assert rule["from"]
            assert all(source for source in rule["from"])
    database = one(manifests, "NetworkPolicy", "rayline-postgres")["spec"]["ingress"]
    assert database == [
        {
            "from": [
                {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "rayline-mlflow"}}}
            ],
            "ports": [{"protocol": "TCP", "port": 5432}],
        }
    ]
    retrain = one(manifests, "CronJob", "rayline-retrain")
    labels = retrain["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert labels["rayline/client"] == "true"


def test_servers_have_probes() -> None:
    manifests = overlay("small")
    for kind, name in (("Deployment", "rayline-mlflow"), ("StatefulSet", "rayline-postgres")):
        (container,) = one(manifests, kind, name)["spec"]["template"]["spec"]["containers"]
        assert container["readinessProbe"]
        assert container["livenessProbe"]
    service = one(manifests, "RayService", "rayline-serve")["spec"]["rayClusterConfig"]
    (container,) = service["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/v2/health/live"


def refused_by_kuberay(job: Manifest) -> list[str]:
    """What KubeRay 1.7.0 says of a RayJob beyond its schema (ValidateRayJobSpec)."""
    spec = job["spec"]
    chosen, shuts_down = spec.get("clusterSelector"), spec.get("shutdownAfterJobFinishes", False)
    rules = {
        "neither rayClusterSpec nor clusterSelector": not chosen and "rayClusterSpec" not in spec,
        "a ttl without shutdownAfterJobFinishes": spec.get("ttlSecondsAfterFinished", 0) > 0
        and not shuts_down,
        "suspend without shutdownAfterJobFinishes": spec.get("suspend", False) and not shuts_down,
        "suspend of a chosen cluster": bool(chosen) and spec.get("suspend", False),
        "a chosen cluster without a name": bool(chosen) and not chosen.get("ray.io/cluster"),
        "SidecarMode on a chosen cluster": bool(chosen)
        and spec.get("submissionMode") == "SidecarMode",
        "a backoffLimit on a chosen cluster": bool(chosen) and spec.get("backoffLimit", 0) > 0,
        "an activeDeadline of nothing": spec.get("activeDeadlineSeconds", 1) <= 0,
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def test_kuberay_takes_the_pipeline() -> None:
    (job,) = load(KUBERNETES / "pipeline.yaml")
    assert refused_by_kuberay(job) == []
    wrong = copy.deepcopy(job)
    wrong["spec"] |= {"ttlSecondsAfterFinished": 86400, "backoffLimit": 1}
    assert len(refused_by_kuberay(wrong)) == 2


def test_the_pipeline_runs_on_the_cluster_that_is_there() -> None:
    (job,) = load(KUBERNETES / "pipeline.yaml")
    cluster = one(overlay("small"), "RayCluster", "rayline")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
    assert job["metadata"]["namespace"] == cluster["metadata"]["namespace"]

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
OVERLAYS = ("small", "gpu", "kueue")


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
        assert gpus == ([None] if name == "small" else ["1", "1"])
        # Addresses are those of services that this, or the operator for these names, makes.
        services = {m["metadata"]["name"] for m in manifests if m["kind"] == "Service"}
        services |= {"rayline-head-svc", "rayline-serve-head-svc", "rayline-serve-serve-svc"}
        for address in (settings.mlflow_uri, settings.ray_address, settings.serve_api):
            assert address.removeprefix("http://").partition(":")[0] in services


def test_jobs_may_tell_the_service_what_is_live_and_nothing_else() -> None:
    manifests = overlay("small")
    name = one(manifests, "ConfigMap", "rayline-settings")["data"]["RAYLINE_RAYSERVICE"]
    service = one(manifests, "RayService", name)
    head = one(manifests, "RayCluster", "rayline")["spec"]["headGroupSpec"]["template"]["spec"]
    account = one(manifests, "ServiceAccount", head["serviceAccountName"])
    # Else nothing is mounted, for Ray's autoscaler neither.
    assert head.get("automountServiceAccountToken", True)
    (binding,) = [m for m in manifests if m["kind"] == "RoleBinding"]
    role = one(manifests, "Role", binding["roleRef"]["name"])
    place = {"name": account["metadata"]["name"], "namespace": account["metadata"]["namespace"]}
    assert binding["subjects"] == [{"kind": "ServiceAccount"} | place]
    (rule,) = role["rules"]
    assert rule["apiGroups"] == [service["apiVersion"].partition("/")[0]]
    assert (rule["resources"], rule["resourceNames"]) == (["rayservices"], [name])
    assert rule["verbs"] == ["get", "patch"]


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


Labels = dict[str, str]
HEAD = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "head"}
TRIALS = {"ray.io/is-ray-node": "yes", "ray.io/node-type": "worker", "ray.io/group": "trials"}
SERVING = TRIALS | {"ray.io/group": "serve"}
"""As KubeRay labels its pods."""
OPERATOR = {"app.kubernetes.io/name": "kuberay-operator"}
MLFLOW = {"app.kubernetes.io/name": "rayline-mlflow"}
POSTGRES = {"app.kubernetes.io/name": "rayline-postgres"}
CLIENT = {"rayline/client": "true"}
SUBMITTER = {"batch.kubernetes.io/job-name": "rayline-pipeline"}
HERE, ELSEWHERE = None, dict[str, str]()
"""The namespace of the asker: ours, or the labels of another."""
INGRESS, MONITORING = {"rayline/ingress": "true"}, {"rayline/monitoring": "true"}
ASKED: list[tuple[Labels | None, Labels, Labels, int]] = [
    (HERE, TRIALS, HEAD, 6379),
    (HERE, HEAD, TRIALS, 23456),
    (HERE, HEAD, SERVING, 8000),
    (HERE, CLIENT, HEAD, 8265),
    (HERE, SUBMITTER, HEAD, 8265),
    (ELSEWHERE, OPERATOR, HEAD, 8265),
    (ELSEWHERE, OPERATOR, HEAD, 8000),
    (INGRESS, {}, SERVING, 8000),
    (INGRESS, {}, SERVING, 8001),
    (MONITORING, {}, HEAD, 8080),
    (MONITORING, {}, SERVING, 9101),
    (HERE, TRIALS, MLFLOW, 5000),
    (HERE, HEAD, MLFLOW, 5000),
    (HERE, MLFLOW, POSTGRES, 5432),
]
"""Who asks whom, on which port."""
REFUSED: list[tuple[Labels | None, Labels, Labels, int]] = [
    (HERE, {}, HEAD, 8265),
    (HERE, {}, SERVING, 8000),
    (HERE, {}, MLFLOW, 5000),
    (HERE, TRIALS, POSTGRES, 5432),
    (ELSEWHERE, TRIALS, HEAD, 6379),
    (ELSEWHERE, CLIENT, HEAD, 8265),
    (ELSEWHERE, OPERATOR, MLFLOW, 5000),
    (INGRESS, {}, HEAD, 8265),
    (INGRESS, {}, MLFLOW, 5000),
    (MONITORING, {}, SERVING, 8000),
]


def selects(selector: Manifest, labels: Labels) -> bool:
    wanted = selector.get("matchLabels", {})
    there = [rule["key"] for rule in selector.get("matchExpressions", [])]
    assert all(rule["operator"] == "Exists" for rule in selector.get("matchExpressions", []))
    return wanted.items() <= labels.items() and all(key in labels for key in there)


def lets_in(
    policies: list[Manifest], place: Labels | None, asker: Labels, target: Labels, port: int
) -> bool:
    """Whether one of the policies of a pod lets another one in, as Kubernetes reads them."""

    def comes_from(source: Manifest) -> bool:
        named = source.get("namespaceSelector")
        right_place = place is None if named is None else selects(named, place or {})
        return right_place and selects(source.get("podSelector", {}), asker)

    rules = [
        rule
        for policy in policies
        if selects(policy["spec"]["podSelector"], target)
        for rule in policy["spec"].get("ingress", [])
    ]
    return any(
        port in [told["port"] for told in rule.get("ports", [{"port": port}])]
        and any(comes_from(source) for source in rule["from"])
        for rule in rules
    )


def test_every_pod_that_is_asked_has_a_policy_that_lets_the_asker_in() -> None:
    manifests = overlay("small")
    deny = one(manifests, "NetworkPolicy", "rayline-deny")
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    policies = [m for m in manifests if m["kind"] == "NetworkPolicy"]
    assert [asked for asked in ASKED if not lets_in(policies, *asked)] == []
    assert [asked for asked in REFUSED if lets_in(policies, *asked)] == []
    for policy in policies:
        # No policy lets anything in from everywhere, and none is there for nothing.
        for rule in policy["spec"].get("ingress", []):
            assert all(source for source in rule["from"])
        others = [other for other in policies if other is not policy]
        needed = not all(lets_in(others, *asked) for asked in ASKED)
        assert needed or policy is deny, policy["metadata"]["name"]
    # The labels above are those of the pods here.
    for kind, name, labels in (
        ("Deployment", "rayline-mlflow", MLFLOW),
        ("StatefulSet", "rayline-postgres", POSTGRES),
    ):
        template = one(manifests, kind, name)["spec"]["template"]
        assert labels.items() <= template["metadata"]["labels"].items()
    retrain = one(manifests, "CronJob", "rayline-retrain")
    labels = retrain["spec"]["jobTemplate"]["spec"]["template"]["metadata"]["labels"]
    assert CLIENT.items() <= labels.items()


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


def refused_by_kueue(cluster: Manifest) -> list[str]:
    """What Kueue 0.19.2 says of a new RayCluster in a queue (validateCreate of its webhook)."""
    spec, about = cluster["spec"], cluster["metadata"]
    groups = [group["groupName"] for group in spec["workerGroupSpecs"]]
    is_elastic = about.get("annotations", {}).get("kueue.x-k8s.io/elastic-job") == "true"
    rules = {
        "no queue": not about.get("labels", {}).get("kueue.x-k8s.io/queue-name"),
        "an autoscaler, and not elastic": spec.get("enableInTreeAutoscaling") and not is_elastic,
        "more than 17 groups": len(groups) > 17,
        "a group with the name of the head's": "head" in groups,
    }
    return [rule for rule, is_broken in rules.items() if is_broken]


def test_kueue_takes_the_training_cluster_and_leaves_serving_alone() -> None:
    manifests = overlay("kueue")
    cluster = one(manifests, "RayCluster", "rayline")
    assert refused_by_kueue(cluster) == []
    assert len(refused_by_kueue(one(overlay("gpu"), "RayCluster", "rayline"))) == 2
    label = "kueue.x-k8s.io/queue-name"
    queue = one(load(KUBERNETES / "kueue.yaml"), "LocalQueue", cluster["metadata"]["labels"][label])
    assert queue["metadata"]["namespace"] == cluster["metadata"]["namespace"]
    # By which it alone can be applied again: no other object has this label.
    assert [m["kind"] for m in manifests if label in m["metadata"].get("labels", {})] == [
        "RayCluster"
    ]
    assert "kueue.x-k8s.io" not in str(one(manifests, "RayService", "rayline-serve"))


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

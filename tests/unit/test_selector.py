"""Trials and gateways go to the nodes that are labelled for them, and anywhere without labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from ray.tune import PlacementGroupFactory

from lib.config import Settings
from lib.errors import ConfigError
from lib.line.layout import Line
from lib.selector import matches, read_selector
from lib.serving import plan
from lib.serving.client import ServeClient
from lib.serving.reach import serve_url
from lib.serving.traffic import ModelTraffic
from lib.train.resources import grown, share

SETTINGS = Settings(storage="/data", mlflow_uri="http://127.0.0.1:5000")
TRAFFIC = {"digits": ModelTraffic(weights={1: 100.0}, bundles={1: "b/1"}, champion=1)}


def test_labels_are_read_as_ray_takes_them() -> None:
    text = " rayline/pool=trials, market=!spot "
    assert read_selector("X", text) == {"rayline/pool": "trials", "market": "!spot"}
    assert read_selector("X", "") == {}


@pytest.mark.parametrize("text", ["trials", "a=", "=b", "a=b c", "a=in(x)", "-a=b", "a==b"])
def test_what_is_no_label_is_refused_with_the_variable_s_name(text: str) -> None:
    with pytest.raises(ConfigError, match="RAYLINE_TRIAL_LABELS=.*key=value"):
        replace(SETTINGS, trial_labels=text)


def test_a_node_matches_by_all_of_its_labels() -> None:
    selector = {"pool": "trials", "market": "!spot"}
    assert matches(selector, {"pool": "trials"})
    assert matches(selector, {"pool": "trials", "market": "on-demand", "zone": "a"})
    assert not matches(selector, {"pool": "trials", "market": "spot"})
    assert not matches(selector, {"market": "on-demand"})
    assert matches({}, {"pool": "serve"})


def test_trials_ask_for_labelled_nodes_and_for_nothing_more_on_one_machine() -> None:
    plain = share(free_cpus=2.0, free_gpus=0.0, num_nodes=1, gpus_per_trial=0.25)
    assert plain.request() == {"CPU": 1.0}
    labelled = replace(plain, selector={"rayline/pool": "trials"})
    request = labelled.request()
    assert isinstance(request, PlacementGroupFactory)
    assert request.bundles == [{"CPU": 1.0}]
    assert request._bound.kwargs == {"bundle_label_selector": [{"rayline/pool": "trials"}]}
    assert labelled.describe().endswith("on nodes with rayline/pool=trials")


def test_a_pool_that_grows_is_counted_as_grown() -> None:
    shares = grown(4, 0.25, {"rayline/pool": "trials"})
    assert (shares.cpus, shares.gpus, shares.num_parallel) == (1.0, 0.25, 16)
    # A trial does not span GPUs, and may need more than one.
    assert grown(4, 0.3).num_parallel == 12
    assert grown(4, 2.0).num_parallel == 2


def test_serve_gets_the_label_on_every_deployment_and_takes_it() -> None:
    settings = replace(SETTINGS, serve_labels="rayline/pool=serve")
    applications = plan.applications(settings, {}, "file:///code.zip", TRAFFIC)
    deployments = [d for application in applications for d in application["deployments"]]
    assert {d["name"] for d in deployments} == {"Gateway", "Version"}
    for deployment in deployments:
        assert deployment["ray_actor_options"]["label_selector"] == {"rayline/pool": "serve"}
    ServeDeploySchema.model_validate(plan.serve_config(settings, applications))
    without = plan.applications(SETTINGS, {}, "file:///code.zip", TRAFFIC)
    assert "label_selector" not in str(without)


def test_the_cluster_that_serves_can_be_another_than_the_one_with_the_jobs() -> None:
    settings = Settings.from_env(
        {
            "RAYLINE_STORAGE": "/data",
            "MLFLOW_TRACKING_URI": "http://mlflow",
            "RAYLINE_SERVE_API": "http://serving:8265/",
            "RAYLINE_SERVE_URL": "http://models:8000/",
            "RAYLINE_TRIAL_GPUS": "4",
        }
    )
    assert serve_url(settings) == "http://models:8000"
    assert ServeClient(settings)._url == "http://serving:8265/api/serve/applications/"
    assert settings.trial_gpus == 4
    assert serve_url(SETTINGS) == "http://127.0.0.1:8000"


def test_a_ray_service_is_patched_with_all_that_is_live() -> None:
    live = {a["name"]: a for a in plan.applications(SETTINGS, {}, "s3://b/code.zip", TRAFFIC)}
    config = yaml.safe_load(plan.ray_service_patch(SETTINGS, live)["spec"]["serveConfigV2"])
    assert config == plan.serve_config(SETTINGS, list(live.values()))


def test_a_line_passes_on_what_it_was_given_and_nothing_else(tmp_path: Path) -> None:
    env = {"RAYLINE_HOME": str(tmp_path), "RAYLINE_TRIAL_LABELS": "rayline/pool=trials"}
    passed = Line.from_env(env).settings_env()
    assert passed["RAYLINE_TRIAL_LABELS"] == "rayline/pool=trials"
    # Else an empty value would hide what the cluster's nodes were started with.
    assert "RAYLINE_SERVE_LABELS" not in passed


def test_code_in_an_object_store_is_named_without_the_options_of_its_address() -> None:
    class Store:
        uri, is_local = "s3://bucket/line?endpoint_override=10.0.0.4:9000&scheme=http", False

        def exists(self, relative: str) -> bool:
            return True

    uri = plan.publish_code(Store())  # type: ignore[arg-type]
    assert uri.startswith("s3://bucket/line/code/")
    assert uri.endswith(".zip")

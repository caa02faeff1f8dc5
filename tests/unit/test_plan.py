"""Which Serve applications a policy becomes."""

from __future__ import annotations

from lib.config import Settings
from lib.serving import plan
from lib.serving.traffic import ModelTraffic

SETTINGS = Settings(storage="/nowhere", mlflow_uri="http://127.0.0.1:9")


def test_only_versions_that_get_nothing_but_pinned_requests_may_go_to_zero() -> None:
    traffic = ModelTraffic(
        weights={1: 90, 2: 10, 5: 0, 6: 0},
        bundles={version: f"models/shapes/{version}-x" for version in range(1, 7)},
        champion=1,
        previous_champion=3,
        shadows={4: 100},
        pins={"user-7": 6},
    )
    least = {
        application["name"]: application["deployments"][0]["autoscaling_config"]["min_replicas"]
        for application in plan.applications(SETTINGS, {}, "file:///c.zip", {"shapes": traffic})
    }
    assert least.pop(plan.GATEWAY) == 2
    assert least == {
        "shapes-v1": 1,
        "shapes-v2": 1,
        "shapes-v3": 1,
        "shapes-v4": 1,
        "shapes-v5": 0,
        "shapes-v6": 0,
    }

"""Real nodes with labels: trials run where they are asked to, and only those nodes count."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lib.line.layout import PROJECT_ROOT

pytestmark = pytest.mark.long

TIMEOUT_S = 180
# A cluster of its own: labels are given to a node when it starts.
SCRIPT = """
import json
import ray
from ray import tune
from ray.util.placement_group import placement_group

from lib.config import Settings
from lib.train.resources import trial_resources

ray.init(num_cpus=2, labels={"rayline/pool": "trials"}, include_dashboard=False,
         logging_level="error", log_to_driver=False, object_store_memory=100 * 2**20)

def settings(labels):
    return Settings(storage="/tmp", mlflow_uri="http://127.0.0.1:1", trial_labels=labels)

class Trial(tune.Trainable):
    def step(self):
        return {"labels": ray.get_runtime_context().get_node_labels(), "done": True}
    def save_checkpoint(self, folder): pass
    def load_checkpoint(self, folder): pass

here = trial_resources(0.0, settings("rayline/pool=trials"))
nowhere = trial_resources(0.0, settings("rayline/pool=serve"))
results = tune.Tuner(
    tune.with_resources(Trial, here.request()),
    run_config=tune.RunConfig(verbose=0),
).fit()
group = placement_group([{"CPU": 1}], bundle_label_selector=[{"rayline/pool": "serve"}])
print(json.dumps({
    "here": [here.cpus, here.num_parallel],
    "nowhere": [nowhere.cpus, nowhere.num_parallel],
    "errors": results.num_errors,
    "ran_on": results[0].metrics["labels"].get("rayline/pool"),
    "serve_was_placed": group.wait(2),
}))
"""


def test_trials_run_on_labelled_nodes_and_count_those_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "here": [1.0, 2],
        "nowhere": [0.0, 1],
        "errors": 0,
        "ran_on": "trials",
        "serve_was_placed": False,
    }

"""cluster.yaml and its variant for machines that are there: what `ray up` refuses, and more."""

from __future__ import annotations

import copy
import os
import re
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from lib.config import Settings
from lib.selector import matches, read_selector

ROOT = Path(__file__).resolve().parents[2]
FILES = ("cluster.yaml", "deploy/cluster-local.yaml")
SECRET = re.compile(r"(?i)(password|secret|aws_access|begin [a-z ]*private key|akia[0-9a-z]{12})")


def cluster(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / name).read_text()))


@pytest.fixture(autouse=True)
def private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the folder of sockets another place than a node's."""
    monkeypatch.setenv("RAYLINE_PRIVATE_DIR", str(tmp_path / "private"))
    return tmp_path / "private"


def sourced(home: str = "/home/ubuntu", **env: str) -> dict[str, str]:
    """The environment that a node gets from deploy/cluster.env."""
    env.setdefault("RAYLINE_PRIVATE_DIR", os.environ["RAYLINE_PRIVATE_DIR"])
    script = 'set -eu; . "$1"; env -0'
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(ROOT / "deploy" / "cluster.env")],
        env={"PATH": "/usr/bin:/bin", "HOME": home, "RAY_HEAD_IP": "10.0.0.7", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file(name: str) -> None:
    validate_config(prepare_config(cluster(name)))


def test_a_misspelt_option_would_be_found() -> None:
    wrong = prepare_config(cluster("cluster.yaml"))
    wrong["available_node_types"]["cpu"]["min_worker"] = 1
    with pytest.raises(ValidationError, match="min_worker"):
        validate_config(wrong)


@pytest.mark.parametrize("name", FILES)
def test_every_process_of_ray_starts_with_the_token_and_the_settings(name: str) -> None:
    config = cluster(name)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all(c.startswith(". ~/rayline/deploy/cluster.env; ") for c in commands)
    assert any("ray start --head" in c for c in config["head_start_ray_commands"])
    head = next(c for c in commands if "ray start --head" in c)
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head
    tokens = [p for p in config["file_mounts"] if p.endswith("/.ray/auth_token")]
    assert tokens == [f"/home/{config['auth']['ssh_user']}/.ray/auth_token"]
    assert any("chmod 600 ~/.ray/auth_token" in c for c in config["setup_commands"])
    env = sourced()
    assert (env["RAY_AUTH_MODE"], env["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")


def test_sessions_and_sockets_are_in_a_folder_that_only_the_nodes_user_may_enter(
    private: Path, tmp_path: Path
) -> None:
    private.mkdir()
    private.chmod(0o777)
    env = sourced()
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    names = ("RAY_TMPDIR", "RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC")
    assert all(env[name].startswith(str(private)) for name in names)
    (tmp_path / "link").symlink_to(private)
    assert sourced(RAYLINE_PRIVATE_DIR=str(tmp_path / "link"))["RAY_TMPDIR"] == "/dev/null/taken"


@pytest.mark.parametrize("name", [*FILES, "deploy/cluster.env"])
def test_no_secret_is_in_the_files(name: str) -> None:
    assert not SECRET.search((ROOT / name).read_text())


@pytest.mark.parametrize("name", FILES)
def test_setup_installs_the_pins_from_requirements(name: str) -> None:
    setup = "\n".join(cluster(name)["setup_commands"])
    assert "--no-deps -r ~/rayline/requirements.txt" in setup
    found = re.search(r'"\$\((sed .*?)\)"', setup)
    assert found
    shown = subprocess.run(
        ["sh", "-c", found.group(1).replace("~/rayline", str(ROOT))],
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"uv==[\d.]+\n", shown.stdout)


def test_the_settings_of_a_node_are_whole() -> None:
    env = sourced()
    settings = Settings.from_env(env)
    assert settings.storage == "/mnt/rayline/storage"
    assert settings.mlflow_uri == "http://10.0.0.7:5000"
    assert env["PATH"].startswith("/home/ubuntu/venv/bin:")


def node_types() -> dict[str, Any]:
    return dict(cluster("cluster.yaml")["available_node_types"])


def test_trials_find_gpu_pools_and_gateways_others() -> None:
    env = sourced()
    types = node_types()
    trials = read_selector("RAYLINE_TRIAL_LABELS", env["RAYLINE_TRIAL_LABELS"])
    serving = read_selector("RAYLINE_SERVE_LABELS", env["RAYLINE_SERVE_LABELS"])
    for_trials = {name for name, kind in types.items() if matches(trials, kind["labels"])}
    for_serving = {name for name, kind in types.items() if matches(serving, kind["labels"])}
    assert for_trials == {"gpu_spot", "gpu_on_demand"}
    assert for_serving == {"cpu"}
    spot, fallback = types["gpu_spot"], types["gpu_on_demand"]
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["priority"] > fallback["priority"]
    # Without a GPU when nobody trains; either pool alone has what a sweep counts on.
    for pool in (spot, fallback):
        assert pool["min_workers"] == 0
        assert pool["max_workers"] >= int(env["RAYLINE_TRIAL_GPUS"])


def pools(command: str, home: Path) -> Settings:
    """The settings of a node whose setup was that command of cluster-local.yaml."""
    subprocess.run(["sh", "-ec", command], env={"HOME": str(home)}, check=True)
    return Settings.from_env(sourced(str(home)))


def test_machines_without_a_gpu_can_train(tmp_path: Path) -> None:
    commands = cluster("deploy/cluster-local.yaml")["setup_commands"]
    (command,) = [command for command in commands if ".rayline.env" in command]
    plain = pools(command, tmp_path)
    assert (plain.trial_gpus, plain.trial_labels, plain.serve_labels) == (0, "", "")
    # The line for machines that have some: to the pools that their nodes are labelled with.
    text = (ROOT / "deploy" / "cluster-local.yaml").read_text()
    (other,) = re.findall(r"^  #   - (echo .*\.rayline\.env)$", text, re.MULTILINE)
    with_gpus = pools(other, tmp_path)
    assert with_gpus.trial_gpus == 2
    assert with_gpus.trial_labels == "rayline/pool=trials"
    assert with_gpus.serve_labels == "rayline/pool=serve"
    # What a shell says for itself stays, an empty one too.
    assert sourced(RAYLINE_TRIAL_LABELS="")["RAYLINE_TRIAL_LABELS"] == ""


def test_what_has_to_be_there_before_the_first_ray_up_is_marked() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    # The head's role may ask EC2, and not SSM, for which image that is.
    images = [kind["node_config"]["ImageId"] for kind in node_types().values()]
    assert all(re.fullmatch(r"ami-[0-9a-f]{17}", image) for image in images)
    assert len(set(images)) == 2
    for image in set(images):
        before = text[: text.index(image)].splitlines()[-5:]
        assert any("EDIT" in line for line in before)
    assert text.count("/ami-id\n") == 2
    mount = text[: text.index("mount -t nfs4")].splitlines()[-6:]
    assert any("EDIT" in line and "storage root" in line for line in mount)
    assert any("port 2049" in line for line in mount)


def test_local_nodes_get_the_same_labels() -> None:
    text = "\n".join(cluster("deploy/cluster-local.yaml")["worker_start_ray_commands"])
    found = re.search(r"--labels=(\S+?)=\$\((.*)\) --", text)
    assert found
    assert found.group(1) == "rayline/pool"
    shown = subprocess.run(
        ["/bin/sh", "-c", found.group(2)], env={"PATH": ""}, capture_output=True, check=True
    )
    assert shown.stdout == b"serve\n"


def test_preparing_leaves_the_file_as_it_is() -> None:
    config = cluster("cluster.yaml")
    before = copy.deepcopy(config)
    prepare_config(config)
    assert config == before

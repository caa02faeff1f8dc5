"""Real heads and servers, beside another Ray on the same machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from lib.errors import LineError
from lib.line.layout import PROJECT_ROOT, Line
from lib.line.parts import answers, bring_up, parts, take_down
from lib.line.ports import FIXED_PORTS, PORTS, holder, is_free, variable
from lib.line.processes import LINE_VARIABLE, end, find
from lib.line.submission import follow, submit_job
from tests.lines import OBJECT_STORE_BYTES, free_offset, line_env

DEAD_PROXY = {
    **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY"), "http://127.0.0.1:9"),
    "NO_PROXY": "example.org",
    "no_proxy": "",
}
"""Nothing of a line may be asked for by way of it."""
SERVE = """
import os, ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Hello:
    async def __call__(self, request):
        return "hello"

ray.init(logging_level="error", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["RAYLINE_HTTP_PORT"])})
serve.run(Hello.bind(), name="hello")
"""
TELL = """
import json, os
print("a line of progress")
names = ("RAYLINE_STORAGE", "MLFLOW_TRACKING_URI", "RAYLINE_PROVENANCE", "RAY_ADDRESS")
print(json.dumps({"root": os.path.exists("lib/line/layout.py"), "tests": os.path.exists("tests"),
                  "venv": os.path.exists(".venv"), **{n: os.environ.get(n) for n in names}}))
"""


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    # Starting parts reads os.environ, as `make up` does.
    before = dict(os.environ)
    env = line_env(tmp_path_factory.mktemp("line") / "home") | DEAD_PROXY
    os.environ.clear()
    os.environ.update(env)
    yield env
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def line(env: dict[str, str]) -> Iterator[Line]:
    made = Line.from_env(env)
    os.environ.update(made.no_proxy_env(os.environ))
    started = bring_up(made)
    assert started == [part.name for part in parts(made)]
    yield made
    take_down(made)
    assert not find(made.line_id, made.private_dir)
    subprocess.run(["rm", "-rf", made.private_dir], check=True)


@dataclass(frozen=True)
class OtherRay:
    mark: str
    health_url: str


@pytest.fixture(scope="module")
def other_ray(env: dict[str, str]) -> Iterator[OtherRay]:
    """Another user's head, started as they would, on ports of its own."""
    mark = f"other-{uuid.uuid4().hex[:6]}"
    offset = free_offset()
    dashboard = PORTS["dashboard"].default + offset
    with tempfile.TemporaryDirectory(prefix="rl-other-", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.write_text("f" * 64)
        subprocess.run(
            [
                str(Path(sys.executable).with_name("ray")),
                *("start", "--head", "--num-cpus=1", f"--temp-dir={folder}/ray"),
                f"--object-store-memory={OBJECT_STORE_BYTES}",
                f"--port={PORTS['ray'].default + offset}",
                f"--dashboard-port={dashboard}",
                f"--ray-client-server-port={PORTS['ray_client'].default + offset}",
                f"--dashboard-agent-listen-port={PORTS['agent'].default + offset}",
                "--min-worker-port=0",
                "--max-worker-port=0",
            ],
            env={**env, "RAY_AUTH_TOKEN_PATH": str(token), LINE_VARIABLE: mark},
            check=True,
            capture_output=True,
        )
        yield OtherRay(mark, f"http://127.0.0.1:{dashboard}/api/gcs_healthz")
        end(mark, f"{folder}/ray")


def haproxies(line: Line) -> list[psutil.Process]:
    return [
        process for process in find(line.line_id, line.private_dir) if process.name() == "haproxy"
    ]


def kill(line: Line, command: str) -> None:
    matches = [
        process
        for process in find(line.line_id, line.private_dir)
        if command in " ".join(process.cmdline())
    ]
    assert matches
    for process in matches:
        process.kill()
    psutil.wait_procs(matches, timeout=10)


def test_a_line_that_is_up_starts_nothing(line: Line) -> None:
    assert bring_up(line) == []


def test_the_dashboard_needs_the_token_and_listens_on_loopback(line: Line) -> None:
    url = f"{line.dashboard_url}/api/version"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=10)
    token = (line.home / "auth_token").read_text()
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    assert urllib.request.urlopen(request, timeout=10).status == 200
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in (
            line.ports["dashboard"],
            line.ports["mlflow"],
            line.ports["prometheus"],
        ):
            assert connection.laddr.ip == "127.0.0.1"


def test_a_job_gets_code_settings_and_provenance(
    line: Line, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = follow(line, submit_job(line, ["-c", TELL]))
    assert ended.status == "SUCCEEDED"
    assert ended.result["root"] is True
    assert (ended.result["tests"], ended.result["venv"]) == (False, False)
    assert ended.result["RAYLINE_STORAGE"] == line.storage
    assert ended.result["MLFLOW_TRACKING_URI"] == line.tracking_uri
    assert '"commit"' in ended.result["RAYLINE_PROVENANCE"]
    assert "a line of progress" in capsys.readouterr().out


def test_a_job_that_fails_is_seen_to_fail(line: Line, env: dict[str, str]) -> None:
    ended = follow(line, submit_job(line, ["-c", "raise SystemExit(3)"]))
    assert ended.status == "FAILED"
    assert ended.result == {}


def test_a_plain_submission_finds_its_settings(line: Line) -> None:
    script = '. "$1/env"; cd "$2"; ray job submit --working-dir lib/line -- python -c "$3"'
    code = "import os; print('storage is', os.environ['RAYLINE_STORAGE'])"
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(line.home), str(PROJECT_ROOT), code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"storage is {line.storage}" in done.stdout


def test_what_died_is_started_again(line: Line) -> None:
    kill(line, "gcs_server")
    assert bring_up(line) == ["ray"]
    kill(line, "mlflow")
    assert bring_up(line) == ["mlflow"]
    assert all(answers(url) for part in parts(line) for url in part.health_urls)


def test_down_ends_all_of_it_and_nothing_else(line: Line, other_ray: OtherRay) -> None:
    assert follow(line, submit_job(line, ["-c", SERVE])).status == "SUCCEEDED"
    assert urllib.request.urlopen(line.serve_url, timeout=10).read() == b"hello"
    assert len(haproxies(line)) >= 1
    others = {process.pid for process in find(other_ray.mark, "/nowhere")}
    assert others
    take_down(line)
    assert not find(line.line_id, line.private_dir)
    taken = [line.ports[name] for name in FIXED_PORTS if not is_free(line.ports[name])]
    assert [(port, holder(port)) for port in taken] == []
    assert answers(other_ray.health_url)
    assert {process.pid for process in find(other_ray.mark, "/nowhere")} >= others
    # And it comes back, with the same state.
    assert bring_up(line) == [part.name for part in parts(line)]


def test_haproxy_left_behind_by_a_dead_head_does_not_keep_the_port(line: Line) -> None:
    assert follow(line, submit_job(line, ["-c", SERVE])).status == "SUCCEEDED"
    # As `ray stop` does: all of Ray but HAProxy.
    kept = {process.pid for process in haproxies(line)}
    assert kept
    for process in find(line.line_id, line.private_dir, "ray"):
        if process.pid not in kept:
            process.kill()
    assert not is_free(line.ports["http"])
    assert bring_up(line) == ["ray"]
    assert is_free(line.ports["http"])


def test_a_taken_port_is_named_before_anything_starts(env: dict[str, str], tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        own = {variable("dashboard"): str(taken), "RAYLINE_PORT_OFFSET": str(free_offset())}
        other = Line.from_env({**env, "RAYLINE_HOME": str(tmp_path / "home"), **own})
        with pytest.raises(LineError, match="RAYLINE_DASHBOARD_PORT"):
            bring_up(other)
    assert not find(other.line_id, other.private_dir)
    # Nor are ports recorded that it never had.
    assert other.recorded_ports() == {}
    assert not (other.home / "env").exists()
    os.rmdir(other.private_dir)

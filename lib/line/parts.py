"""The parts of a line: how each is started, and how it is seen to be alive."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lib.cli import progress
from lib.errors import LineError
from lib.line.layout import Line
from lib.line.ports import RAY_PORTS, check_free
from lib.line.processes import end, find
from lib.serving.channel import channel_folder
from lib.watch.alerts import rules

_START_S = 120.0
_RECOVER_S = 5.0
_SAY_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """One part of the line."""

    name: str
    title: str
    command: tuple[str, ...]
    """Program to start; `ray start` returns, the others stay."""
    health_urls: tuple[str, ...]
    """All answer 200 when the part is alive."""
    ports: tuple[str, ...]


def parts(line: Line) -> list[Part]:
    """Return the parts that this line runs itself."""
    wanted = []
    if line.ray_url is None:
        wanted.append(_ray(line))
    if line.mlflow_url is None:
        wanted.append(_mlflow(line))
    if line.starts_prometheus:
        wanted.append(_prometheus(line))
    return wanted


def bring_up(line: Line) -> list[str]:
    """Start the parts that are missing or dead, and wait for them; return which those were.

    Raises:
        LineError: A port is taken, or a part does not come up.
    """
    missing = [part for part in parts(line) if not _is_up(line, part)]
    for part in missing:
        if num_ended := end(line.line_id, line.ray_temp_dir, part.name):
            progress("up", f"{part.title} was not answering: ended its {num_ended} processes")
    for part in missing:
        check_free(line.ports, part.ports)
    if any(part.name == "ray" for part in missing):
        _tidy_ray(line)
    if missing:
        progress("up", f"starting {', '.join(part.title for part in missing)}")
    started = [(part, _start(line, part)) for part in missing]
    for part, process in started:
        _await(line, part, process)
    return [part.name for part in missing]


def take_down(line: Line) -> int:
    """End everything that the line started; return how many processes that were."""
    ended = end(line.line_id, line.ray_temp_dir)
    if line.ray_url is None:
        cluster = f"{line.node_ip}:{line.ports['ray']}"
        shutil.rmtree(channel_folder(cluster), ignore_errors=True)
    return ended


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Whether a URL answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError, ValueError):
        return False


def _ray(line: Line) -> Part:
    command = [
        _program("ray"),
        "start",
        "--head",
        "--disable-usage-stats",
        "--log-color=false",
        "--dashboard-host=127.0.0.1",
        f"--node-ip-address={line.node_ip}",
        f"--temp-dir={line.ray_temp_dir}",
        f"--port={line.ports['ray']}",
        f"--dashboard-port={line.ports['dashboard']}",
        f"--dashboard-agent-listen-port={line.ports['agent']}",
        f"--metrics-export-port={line.ports['ray_metrics']}",
        f"--ray-client-server-port={line.ports['ray_client']}",
        # Zero: the system chooses. Ray's own range, 10002–19999, takes ports that others are given.
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    for option, name in (
        ("--num-cpus", "RAYLINE_NUM_CPUS"),
        ("--num-gpus", "RAYLINE_NUM_GPUS"),
        ("--object-store-memory", "RAYLINE_OBJECT_STORE_BYTES"),
    ):
        if os.environ.get(name):
            command.append(f"{option}={os.environ[name]}")
    return Part(
        name="ray",
        title="Ray",
        command=tuple(command),
        health_urls=(
            f"http://127.0.0.1:{line.ports['dashboard']}/api/gcs_healthz",
            f"http://127.0.0.1:{line.ports['agent']}/api/local_raylet_healthz",
        ),
        ports=RAY_PORTS,
    )


def _mlflow(line: Line) -> Part:
    port = line.ports["mlflow"]
    return Part(
        name="mlflow",
        title="MLflow",
        command=(
            _program("mlflow"),
            "server",
            "--host=127.0.0.1",
            f"--port={port}",
            "--workers=1",
            f"--backend-store-uri=sqlite:///{line.home / 'mlflow.db'}",
            f"--artifacts-destination={line.home / 'artifacts'}",
        ),
        health_urls=(f"http://127.0.0.1:{port}/health",),
        ports=("mlflow",),
    )


def _prometheus(line: Line) -> Part:
    port = line.ports["prometheus"]
    return Part(
        name="prometheus",
        title="Prometheus",
        command=(
            "prometheus",
            f"--config.file={line.home / 'prometheus.json'}",
            f"--storage.tsdb.path={line.home / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ),
        health_urls=(f"http://127.0.0.1:{port}/-/ready",),
        ports=("prometheus",),
    )


def _program(name: str) -> str:
    """Return a program of this virtual environment, activated or not."""
    return str(Path(sys.executable).with_name(name))


def _write_prometheus_config(line: Line) -> None:
    # Ray's own config names one session's folder; its list of targets is also kept beside the
    # sessions, where it outlives a restart of Ray. JSON is YAML.
    config = {
        "global": {"scrape_interval": "10s", "evaluation_interval": "10s"},
        "rule_files": [str(line.home / "alerts.yml")],
        "scrape_configs": [
            {
                "job_name": "ray",
                "file_sd_configs": [
                    {"files": [f"{line.ray_temp_dir}/prom_metrics_service_discovery.json"]}
                ],
            },
            {
                "job_name": "haproxy",
                "static_configs": [{"targets": [f"127.0.0.1:{line.ports['haproxy_metrics']}"]}],
            },
        ],
    }
    (line.home / "prometheus.json").write_text(json.dumps(config, indent=2) + "\n")
    (line.home / "alerts.yml").write_text(rules())


def _is_up(line: Line, part: Part) -> bool:
    """Whether the part runs and answers; one that is busy gets a moment."""
    if not find(line.line_id, line.ray_temp_dir, part.name):
        return False
    return _wait(lambda: _is_healthy(part), _RECOVER_S)


def _is_healthy(part: Part) -> bool:
    return all(answers(url) for url in part.health_urls)


def _start(line: Line, part: Part) -> subprocess.Popen[bytes]:
    if part.name == "prometheus":
        _write_prometheus_config(line)
    with open(line.logs / f"{part.name}.log", "ab") as log:
        log.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')} {part.command[0]}\n".encode())
        log.flush()
        return subprocess.Popen(
            part.command,
            cwd=line.home,
            env=line.part_env(part.name),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C in the terminal ends `make up`, not what is already running.
            start_new_session=True,
        )


def _await(line: Line, part: Part, process: subprocess.Popen[bytes]) -> None:
    start = said = time.monotonic()

    def settled() -> bool:
        nonlocal said
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            progress("up", f"waiting for {part.title}")
        return _is_healthy(part) or process.poll() not in {None, 0}

    if _wait(settled, _START_S) and _is_healthy(part):
        progress("up", f"{part.title} is up after {time.monotonic() - start:.0f} s")
        return
    log = line.logs / f"{part.name}.log"
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise LineError(f"{part.title} did not come up; the end of its log {log}:\n{tail}")


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _tidy_ray(line: Line) -> None:
    """Drop the logs of earlier heads, except the last one's, and what HAProxy left behind."""
    root = Path(line.ray_temp_dir)
    sessions = sorted(path for path in root.glob("session_2*") if path.is_dir())
    for folder in (*sessions[:-1], root / "ha"):
        shutil.rmtree(folder, ignore_errors=True)
    link = line.logs / "ray-sessions"
    if not link.is_symlink():
        link.symlink_to(root)

"""Where a line keeps its state, and the environments that its parts, jobs and users get."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lib.config import MAX_BODY_BYTES, MLFLOW_SECRETS, STORAGE_SECRETS, is_loopback
from lib.errors import ConfigError, LineError
from lib.line.ports import RANGE_SIZE, read_ports
from lib.line.processes import LINE_VARIABLE, PART_VARIABLE
from lib.secrets import PRIVATE_DIR_VARIABLE, make_private, refuse_password
from lib.watch.dashboards import embedding

PROJECT_ROOT = Path(__file__).resolve().parents[2]
PRIVATE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}
"""Nothing is reported to anyone."""

_PASSED_ON = (
    "RAYLINE_SERVE_API",
    "RAYLINE_SERVE_URL",
    "RAYLINE_RAYSERVICE",
    "RAYLINE_TRIAL_LABELS",
    "RAYLINE_TRIAL_GPUS",
    "RAYLINE_SERVE_LABELS",
    "RAYLINE_SERVE_CPUS",
    "RAYLINE_OWNER_LIMITS",
)
"""Settings of a cluster; where they are not given, jobs see what its nodes were started with."""
# Of another cluster, or of the shell that a line was started from.
_NOT_INHERITED = (
    "RAY_ADDRESS",
    "RAY_AUTH_TOKEN",
    "RAYLINE_API_KEY",
    "RAY_NAMESPACE",
    "RAYLINE_PROVENANCE",
    "RAYLINE_MODEL",
    "PYTHONPATH",
    # Secrets of who provisions; no part of the line needs them.
    "GRAFANA_TOKEN",
    "GRAFANA_PASSWORD",
)


_NO_PROXY = ("no_proxy", "NO_PROXY")
# For the env file, which can't know what the shell that reads it excepts from its proxy.
_EXTEND_NO_PROXY = """\
no_proxy="${{no_proxy:-${{NO_PROXY-}}}}"
for rayline_host in {hosts}; do
  case ",$no_proxy," in
    *",$rayline_host,"* | ",*,") ;;
    *) no_proxy="${{no_proxy:+$no_proxy,}}$rayline_host" ;;
  esac
done
unset rayline_host
export no_proxy NO_PROXY="$no_proxy"
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One line: what it runs itself, and what was given to it."""

    home: Path
    """RAYLINE_HOME: folder of its state."""
    ports: Mapping[str, int]
    host: str | None
    """RAYLINE_HTTP_HOST: address that the inference port binds; None: what a given cluster's nodes
    were started with, since on several machines loopback is nobody's."""
    ray_url: str | None
    """RAY_API_SERVER_ADDRESS, if a cluster was given; else this line starts a head."""
    mlflow_url: str | None
    """MLFLOW_TRACKING_URI, if a server was given; else this line starts one."""
    storage_uri: str | None
    """RAYLINE_STORAGE, if given; else a folder in `home`."""
    prometheus_url: str | None = None
    """RAYLINE_PROMETHEUS_URL, if given; else this line starts one where it is installed."""
    grafana_url: str | None = None
    """GRAFANA_URL: the Grafana whose dashboards Ray's dashboard is to embed."""
    passed_on: Mapping[str, str] = field(default_factory=dict)
    """Settings of a cluster that were given, by variable."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Line:
        """Read the settings; what this line's own env file says is not taken as given by a user."""
        home = Path(env.get("RAYLINE_HOME") or PROJECT_ROOT / ".rayline").resolve()
        line = cls(
            home=home,
            ports=read_ports(env, _read_json(home / "ports.json")),
            host=env.get("RAYLINE_HTTP_HOST") or None,
            ray_url=None,
            mlflow_url=None,
            storage_uri=env.get("RAYLINE_STORAGE") or None,
        )
        ray_url = (env.get("RAY_API_SERVER_ADDRESS") or "").rstrip("/")
        mlflow_url = (env.get("MLFLOW_TRACKING_URI") or "").rstrip("/")
        given_ray = ray_url if ray_url not in {"", line.dashboard_url} else None
        # Beside a cluster that was given this line starts none, so one at that address is given.
        own_prometheus = line.own_prometheus_url if given_ray is None else ""
        prometheus_url = (env.get("RAYLINE_PROMETHEUS_URL") or "").rstrip("/")
        return cls(
            home=home,
            ports=line.ports,
            host=line.host or ("127.0.0.1" if given_ray is None else None),
            ray_url=given_ray,
            mlflow_url=mlflow_url if mlflow_url not in {"", line.tracking_uri} else None,
            storage_uri=line.storage_uri,
            prometheus_url=prometheus_url if prometheus_url not in {"", own_prometheus} else None,
            grafana_url=(env.get("GRAFANA_URL") or "").rstrip("/") or None,
            passed_on={name: env[name] for name in _PASSED_ON if env.get(name)},
        )

    def __post_init__(self) -> None:
        """Check that a cluster elsewhere can reach what it is given, and that all may be told."""
        for name, value, instead in (
            ("RAY_API_SERVER_ADDRESS", self.ray_url, "RAY_AUTH_TOKEN_PATH"),
            ("MLFLOW_TRACKING_URI", self.mlflow_url, MLFLOW_SECRETS),
            ("RAYLINE_STORAGE", self.storage_uri, STORAGE_SECRETS),
        ):
            refuse_password(name, value or "", instead)
        if self.ray_url is None or is_loopback(urlsplit(self.ray_url).hostname or ""):
            return
        for name, value in (
            ("MLFLOW_TRACKING_URI", self.mlflow_url),
            ("RAYLINE_STORAGE", self.storage_uri),
        ):
            if value is None:
                raise ConfigError(
                    f"the cluster at {self.ray_url} can't reach this machine's loopback: set "
                    f"{name} to one that it can reach"
                )

    @property
    def line_id(self) -> str:
        """Mark of this line's processes: one line per home folder."""
        return hashlib.sha256(str(self.home).encode()).hexdigest()[:10]

    @property
    def private_dir(self) -> str:
        """Folder of sessions and sockets; short, as paths of Unix sockets have at most 107 bytes.

        Nobody else may enter it: Ray gives everybody the right to write into its own folders, and
        HAProxy's admin socket is open to all.
        """
        return f"/tmp/rayline-{self.line_id}"

    @property
    def ray_temp_dir(self) -> str:
        """Ray's folder."""
        return f"{self.private_dir}/ray"

    @property
    def logs(self) -> Path:
        """Folder of the parts' logs."""
        return self.home / "logs"

    @property
    def dashboard_url(self) -> str:
        """Ray's dashboard, which takes jobs and the Serve config."""
        return self.ray_url or f"http://127.0.0.1:{self.ports['dashboard']}"

    @property
    def tracking_uri(self) -> str:
        """The MLflow server."""
        return self.mlflow_url or f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def own_prometheus_url(self) -> str:
        """The Prometheus that this line starts, if it does."""
        return f"http://127.0.0.1:{self.ports['prometheus']}"

    @property
    def starts_prometheus(self) -> bool:
        """Whether this line starts a Prometheus: none was given, and the program is there."""
        wanted = self.ray_url is None and self.prometheus_url is None
        return wanted and shutil.which("prometheus") is not None

    @property
    def storage(self) -> str:
        """The storage root."""
        return self.storage_uri or str(self.home / "storage")

    @property
    def serve_url(self) -> str:
        """Where the models answer; a given cluster is called at its dashboard's host."""
        if given := self.passed_on.get("RAYLINE_SERVE_URL"):
            return given.rstrip("/")
        host = self.host if self.ray_url is None else urlsplit(self.ray_url).hostname
        return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{self.ports['http']}"

    @property
    def node_ip(self) -> str:
        """Address of the head. Ray swaps 127.0.0.1 for the machine's own; 127.0.0.2 it leaves."""
        if sys.platform != "linux":
            return "127.0.0.1"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.2", 0))
            except OSError:
                return "127.0.0.1"
        return "127.0.0.2"

    @property
    def token(self) -> str | None:
        """Ray's token, if this line's head made one; for a given cluster Ray finds the user's."""
        if self.ray_url is not None:
            return None
        try:
            return (self.home / "auth_token").read_text()
        except FileNotFoundError:
            return None

    def settings_env(self) -> dict[str, str]:
        """Return what `lib.config.Settings` reads: for jobs, replicas and users alike."""
        return {
            **PRIVATE,
            "RAYLINE_STORAGE": self.storage,
            "MLFLOW_TRACKING_URI": self.tracking_uri,
            **({"RAYLINE_HTTP_HOST": self.host} if self.host else {}),
            "RAYLINE_HTTP_PORT": str(self.ports["http"]),
            "RAYLINE_GRPC_PORT": str(self.ports["grpc"]),
            "RAY_API_SERVER_ADDRESS": self.dashboard_url,
            **self._watch_env(),
            **self.passed_on,
        }

    def _watch_env(self) -> dict[str, str]:
        url = self.own_prometheus_url if self.starts_prometheus else self.prometheus_url
        # Without one, a rollout reads Ray's metrics directly (`lib.watch.prometheus`).
        return {"RAYLINE_PROMETHEUS_URL": url} if url else {}

    def client_env(self) -> dict[str, str]:
        """Return what a shell needs for `ray`, `serve`, `mlflow` and the jobs."""
        env = {**self.settings_env(), "RAY_DASHBOARD_ADDRESS": self.dashboard_url}
        if self.ray_url is None:
            env |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN_PATH": str(self.home / "auth_token"),
                "RAY_ADDRESS": f"{self.node_ip}:{self.ports['ray']}",
            }
        return env

    def no_proxy_env(self, env: Mapping[str, str]) -> dict[str, str]:
        """Return what makes HTTP clients reach this machine past a proxy that `env` names.

        Both spellings get the same value: of two that differ, clients do not read the same one.
        """
        given = env.get("no_proxy") or env.get("NO_PROXY") or ""
        hosts = [host.strip() for host in given.split(",") if host.strip()]
        if "*" not in hosts:
            hosts += [host for host in self._own_hosts() if host not in hosts]
        return dict.fromkeys(_NO_PROXY, ",".join(hosts))

    def _own_hosts(self) -> list[str]:
        host = [self.host] if self.host and self.host != "0.0.0.0" else []
        return list(dict.fromkeys(["localhost", "127.0.0.1", "127.0.0.2", self.node_ip, *host]))

    def part_env(self, part: str) -> dict[str, str]:
        """Return the whole environment of a part: marked, and deaf to other clusters."""
        env = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
        env |= self.client_env()
        env.pop("RAY_ADDRESS", None)
        env |= self.no_proxy_env(env)
        env["PATH"] = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
        env |= {LINE_VARIABLE: self.line_id, PART_VARIABLE: part}
        if part == "mlflow":
            env["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
            env.pop("MLFLOW_TRACKING_URI")
        return env | self._ray_env() if part == "ray" else env

    def _ray_env(self) -> dict[str, str]:
        ports = {name: str(port) for name, port in self.ports.items()}
        haproxy = f"{self.private_dir}/ha"
        return {
            PRIVATE_DIR_VARIABLE: self.private_dir,
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            # Ray's own limit, 30 s, is too short for a machine that is busy.
            "RAY_gcs_server_port_wait_time_s": "120",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            # HAProxy that crashed answers again after 8 s (measured); with the default, after 33.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
            # Ray kills a proxy that has not started after this, and serve.start fails with it. The
            # default, 5 s, is too short for a machine that is busy.
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "45",
            # For each request HAProxy would tell a Python process, and a syslog that isn't there,
            # which costs a fifth of the answer; the gateway counts its requests itself.
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:514 sample 1:1000",
            # How long a client may send nothing of its headers or body, or leave a connection idle;
            # the default is an hour. A gateway gives a whole body 30 s (serve_apps/bodies.py).
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
            # Longer than a gateway takes for a body and then its answer, 30 s each, so that
            # callers get its answer; the default is for ever.
            "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": "75",
            "RAY_SERVE_HAPROXY_MAXCONN": str(_max_connections()),
            "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{haproxy}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{haproxy}/admin.sock",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{haproxy}/metrics.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": haproxy,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{haproxy}/server-state",
            "RAY_SERVE_HAPROXY_STATS_PORT": ports["haproxy_stats"],
            "RAY_SERVE_HAPROXY_METRICS_PORT": ports["haproxy_metrics"],
            # The limit of HTTP's bodies, and some room for what surrounds the tensor.
            "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MAX_BODY_BYTES + 65536),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports["fallback"],
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": ports["fallback_grpc"],
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": ports["replicas"],
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(self.ports["replicas"] + RANGE_SIZE - 1),
            "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": ports["replicas_grpc"],
            "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(self.ports["replicas_grpc"] + RANGE_SIZE),
            "AUTOSCALER_METRIC_PORT": ports["autoscaler_metrics"],
            "DASHBOARD_METRIC_PORT": ports["dashboard_metrics"],
            "RAY_PROMETHEUS_HOST": self.prometheus_url or self.own_prometheus_url,
            **(embedding(self.grafana_url) if self.grafana_url else {}),
        }

    def prepare(self) -> None:
        """Make the folders and the token."""
        self.home.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.home, self.logs, Path(self.private_dir)):
            try:
                make_private(folder)
            except PermissionError as error:
                raise LineError(f"{error}; set RAYLINE_HOME to a folder of your own") from error
        token = self.home / "auth_token"
        if not token.exists():
            _write(token, os.urandom(32).hex())

    def recorded_ports(self) -> dict[str, int]:
        """Return the ports that the line had when its parts were last started."""
        return _read_json(self.home / "ports.json")

    def recorded_model(self) -> tuple[str, str] | None:
        """Return the model that the env file names and the source of its data."""
        recorded = _read_json(self.home / "model.json")
        return (recorded["model"], recorded["source"]) if recorded else None

    def write_settings(self, model: str | None = None, source: str = "") -> None:
        """Record the ports, the model if one is given, and write the file that a shell sources."""
        _write(self.home / "ports.json", json.dumps(dict(self.ports), indent=2) + "\n")
        if model is not None:
            recorded = {"model": model, "source": source}
            _write(self.home / "model.json", json.dumps(recorded, indent=2) + "\n")
        env = self.client_env()
        if current := self.recorded_model():
            env["RAYLINE_MODEL"] = current[0]
        exports = [f"export {name}={shlex.quote(value)}\n" for name, value in env.items()]
        exports.append(_EXTEND_NO_PROXY.format(hosts=" ".join(self._own_hosts())))
        path = shlex.quote(str(Path(sys.executable).parent))
        exports.append(f'case ":$PATH:" in *:{path}:*) ;; *) export PATH={path}:"$PATH" ;; esac\n')
        header = "# Written by `make up`; read it into a shell with:  . .rayline/env\n"
        _write(self.home / "env", header + "".join(exports))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write(path: Path, content: str) -> None:
    descriptor, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(content)
    os.replace(temporary, path)


def _max_connections() -> int:
    """Return how many clients HAProxy lets in at once.

    While more than a fifth of the files that this number stands for are open it connects to a
    gateway anew for every request, which doubles what a request costs: so, as many as the limit
    on open files allows, at two and a half files a client.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 16384 if hard == resource.RLIM_INFINITY else min(16384, int((hard - 400) / 2.5))

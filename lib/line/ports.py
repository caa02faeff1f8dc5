"""Every port of the line, each a setting, and the error for one that is taken."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import psutil

from lib.errors import ConfigError, LineError

OFFSET_VARIABLE = "RAYLINE_PORT_OFFSET"


@dataclass(frozen=True, slots=True)
class Port:
    """One port: what listens there, and where by default."""

    default: int
    use: str


PORTS: dict[str, Port] = {
    "http": Port(8000, "inference"),
    "grpc": Port(8001, "inference, gRPC"),
    "dashboard": Port(8265, "Ray dashboard and jobs"),
    "mlflow": Port(5000, "MLflow"),
    "prometheus": Port(9090, "Prometheus"),
    "ray": Port(6379, "Ray's control store"),
    "ray_client": Port(10001, "Ray Client"),
    "agent": Port(52365, "Ray's dashboard agent"),
    "ray_metrics": Port(8085, "Ray's metrics"),
    "autoscaler_metrics": Port(44217, "metrics of Ray's autoscaler"),
    "dashboard_metrics": Port(44227, "metrics of Ray's dashboard"),
    "haproxy_stats": Port(8404, "HAProxy's statistics"),
    "haproxy_metrics": Port(9101, "HAProxy's metrics"),
    "fallback": Port(8500, "Serve's fallback proxy"),
    "fallback_grpc": Port(9600, "Serve's fallback proxy, gRPC"),
    "replicas": Port(30000, "replicas, HTTP: first of 1,000"),
    "replicas_grpc": Port(40000, "replicas, gRPC: first of 1,000"),
}

_RANGES = {"replicas", "replicas_grpc"}
"""Serve takes the next port of these that is free."""
FIXED_PORTS = tuple(name for name in PORTS if name not in _RANGES)
RAY_PORTS = tuple(name for name in FIXED_PORTS if name not in {"mlflow", "prometheus"})
RANGE_SIZE = 1000


def variable(name: str) -> str:
    """Return the environment variable that sets a port."""
    return f"RAYLINE_{name.upper()}_PORT"


_PLACES = {
    "RAYLINE_HOME": "folder of the line's state (.rayline)",
    "RAYLINE_STORAGE": "data sets, models and policy: a folder or URI (.rayline/storage)",
    "RAY_API_SERVER_ADDRESS": "a Ray cluster that is up, instead of starting one",
    "MLFLOW_TRACKING_URI": "an MLflow server that is up, instead of starting one",
    "RAYLINE_PROMETHEUS_URL": "a Prometheus that reads Ray's metrics, instead of starting one",
    "GRAFANA_URL": "a Grafana with Rayline's dashboards, which Ray's dashboard then embeds",
    "RAYLINE_HTTP_HOST": "address that inference binds (127.0.0.1; of a given cluster: its own)",
    "RAYLINE_LOG_IMAGES": "percent of requests with image in the log; at the head's start (100)",
    "RAYLINE_ACCESS_LOG": "share of requests in the access log, to 1; at the head's start (0)",
    "OTEL_EXPORTER_OTLP_ENDPOINT": "collector for gateways' spans; at the head's start (none)",
    "RAYLINE_LOG_DAYS": "days that the log of predictions is kept; at the head's start (30)",
    "RAYLINE_CORS_ORIGINS": "web pages that may call the gateways; at the head's start (none)",
    "RAYLINE_ALLOWED_HOSTS": "names of this line in URLs; at the head's start (this machine's)",
    "RAYLINE_SERVE_API": "Ray dashboard of the cluster that serves, if it is not the jobs' one",
    "RAYLINE_SERVE_URL": "address of the models (the inference port of this machine or cluster)",
    "RAYLINE_RAYSERVICE": "Kubernetes RayService that jobs there tell what is live (none)",
    "RAYLINE_TRIAL_LABELS": "labels of the nodes for trials, as key=value or key=!value (any)",
    "RAYLINE_TRIAL_GPUS": "GPUs that these nodes can grow to (those that are there)",
    "RAYLINE_SERVE_LABELS": "labels of the nodes for gateways and versions (any)",
    "RAYLINE_SERVE_CPUS": "CPUs that no trial takes, for replicas to come (what these reserve now)",
    "RAYLINE_OWNER_LIMITS": "trials at a time by owner, as ann=2,*=4 (any number)",
    "RAYLINE_MODEL": "name of the model (digits, or after the folder)",
    "RAYLINE_NUM_CPUS": "cores that Ray gives out (all)",
    "RAYLINE_NUM_GPUS": "GPUs that Ray gives out (all)",
    "RAYLINE_OBJECT_STORE_BYTES": "memory of Ray's object store",
}


def variables() -> str:
    """Return every environment variable of a line with its meaning and default, for people."""
    rows = {
        **_PLACES,
        OFFSET_VARIABLE: "added to every port's default",
        **{variable(name): f"port: {port.use} ({port.default})" for name, port in PORTS.items()},
    }
    width = max(map(len, rows))
    lines = [f"  {name:{width}}  {use}" for name, use in rows.items()]
    return "\n".join(["environment variables:", *lines])


def read_ports(env: Mapping[str, str], recorded: Mapping[str, int]) -> dict[str, int]:
    """Return every port: its own variable, else the offset, else as last time, else the default.

    Raises:
        ConfigError: A variable is not a number, or the port is out of range or given twice.
    """
    offset = env.get(OFFSET_VARIABLE)
    ports = {}
    for name, port in PORTS.items():
        if env.get(variable(name)):
            ports[name] = _number(env, variable(name))
        elif offset:
            ports[name] = port.default + _number(env, OFFSET_VARIABLE)
        else:
            ports[name] = recorded.get(name, port.default)
        last = ports[name] + (RANGE_SIZE if name in _RANGES else 0)
        if not 0 < ports[name] <= last < 65536:
            raise ConfigError(
                f"port {ports[name]} ({port.use}) is out of range; change {variable(name)} or "
                f"{OFFSET_VARIABLE}"
            )
    for name, number in ports.items():
        for other, first in ports.items():
            if name != other and first <= number < first + (RANGE_SIZE if other in _RANGES else 1):
                raise ConfigError(
                    f"port {number} is given to both {variable(name)} and {variable(other)}"
                )
    return ports


def check_free(ports: Mapping[str, int], names: Iterable[str]) -> None:
    """Raise LineError for the first port that something listens on, naming the process."""
    for name in names:
        if is_free(ports[name]):
            continue
        raise LineError(
            f"port {ports[name]} ({PORTS[name].use}) is taken by {holder(ports[name])}; end that, "
            f"or set {variable(name)} to a free port{_or_offset()}"
        )


def free_offset(candidates: Iterable[int]) -> int | None:
    """Return the first offset at which every port of a line is free; None if there is none."""
    for offset in candidates:
        ports = read_ports({OFFSET_VARIABLE: str(offset)}, {})
        if all(map(is_free, ports.values())):
            return offset
    return None


def _or_offset() -> str:
    # Thousands first: with them the replicas' ports of two lines do not overlap.
    largest = 65535 - max(port.default for port in PORTS.values())
    offset = free_offset([*range(1000, largest, 1000), *range(100, largest, 100)])
    if offset is None:
        return ""
    return (
        f", or move all ports of the line with {OFFSET_VARIABLE}={offset}, where all are free now"
    )


def is_free(port: int) -> bool:
    """Whether nothing listens on a port, on any address of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Else connections that have just ended would count as a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen(1)
        except OSError:
            return False
    return True


def _number(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise ConfigError(f"{name}={env[name]!r} is not a number") from None


def holder(port: int) -> str:
    """Return who listens on a port, for people."""
    try:
        for connection in psutil.net_connections(kind="tcp"):
            if connection.status != psutil.CONN_LISTEN or not connection.laddr:
                continue
            if connection.laddr.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} ({command[:80].strip()})"
    except psutil.Error:
        pass
    return "a process of another user"

"""What a live line listens on, against the table of what may, and that it asks who comes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import requests
from tritonclient.grpc import service_pb2 as messages

from lib.line.layout import Line
from lib.line.listeners import KEYS, LISTENERS, REPLICAS, TOKEN, Socket, name_of, unexpected
from tests.data_sources import mnist
from tests.e2e.clients import RAW, until
from tests.e2e.conftest import MODEL, LiveLine

TIMEOUT_S = 30
LIST_NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
CLUSTER_INFO = "/ray.rpc.RayletDriver/ClusterInfo"
METADATA = "/inference.GRPCInferenceService/ModelMetadata"
ASKING = (TOKEN, KEYS, REPLICAS)
"""What a port may ask for; the others have numbers to read, or no login at all."""
LOST = grpc.StatusCode.UNKNOWN
"""From a proxy that could not pass a call on."""
GONE = "gone"
"""Of a port that nobody listens on any more: a replica may leave while it is asked."""


def sockets(line: LiveLine) -> list[Socket]:
    """All that the line's processes listen on."""
    found = []
    for process in line.processes():
        try:
            command = " ".join(process.cmdline())[:200]
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address, port = connection.laddr
                    found.append(Socket(address=address, port=port, process=command))
        except psutil.Error:
            # It ended while we looked.
            continue
    return found


def test_nothing_listens_for_others_that_the_table_does_not_name(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    expected = {"http", "grpc", "dashboard", "mlflow", "ray", "agent", "ray_metrics"}
    expected |= {"haproxy_stats", "replicas", "autoscaler_metrics", "dashboard_metrics"}
    names: set[str | None] = set()

    def all_seen() -> bool:
        seen = sockets(line)
        assert unexpected(seen, state.ports, host=state.host, node_ip=state.node_ip) == []
        names.update(name_of(socket.port, state.ports) for socket in seen)
        return names >= expected

    # Most ports are open, so the scan did look at the right processes. Not at one glance: while
    # replicas come and go, a new HAProxy takes the sockets of the one before between two looks.
    until(all_seen, deadline_s=30, what="a look at all that the table names")


def refuses(url: str, method: str = "GET", **options: Any) -> bool:
    return requests.request(method, url, timeout=TIMEOUT_S, **options).status_code in (401, 403)


def test_what_runs_code_or_changes_anything_refuses_who_has_no_token(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    agent = f"http://127.0.0.1:{state.ports['agent']}"
    job = {"entrypoint": "id"}
    assert refuses(f"{state.dashboard_url}/api/jobs/", "POST", json=job)
    assert refuses(f"{state.dashboard_url}/api/jobs/")
    assert refuses(f"{state.dashboard_url}/api/serve/applications/", "PUT", json={})
    assert refuses(f"{agent}/api/job_agent/jobs/", "POST", json=job)
    wrong = {"Authorization": "Bearer wrong"}
    assert refuses(f"{state.dashboard_url}/api/jobs/", headers=wrong)
    right = {"Authorization": f"Bearer {state.token}"}
    answer = requests.get(f"{state.dashboard_url}/api/jobs/", headers=right, timeout=TIMEOUT_S)
    assert answer.status_code == 200


def grpc_status(
    address: str, token: str | None = None, *, method: str = LIST_NODES
) -> grpc.StatusCode:
    """The status of a plain call to Ray, by default to its control store."""
    return called(address, method, b"", {"authorization": f"Bearer {token}"} if token else {})


def called(
    address: str, method: str, message: bytes, metadata: Mapping[str, str]
) -> grpc.StatusCode:
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(method)(message, timeout=TIMEOUT_S, metadata=list(metadata.items()))
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_ray_s_grpc_refuses_who_has_no_token(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    address = f"{state.node_ip}:{state.ports['ray']}"
    assert grpc_status(address) == grpc.StatusCode.UNAUTHENTICATED
    assert grpc_status(address, "wrong") == grpc.StatusCode.UNAUTHENTICATED
    assert grpc_status(address, state.token) == grpc.StatusCode.OK


def by_http(url: str, key: str | None) -> int | str:
    """The status of a prediction that somebody with that key, or without one, asks for."""
    image = mnist("test")[0][0].tobytes()
    headers = RAW | ({"X-API-Key": key} if key else {})
    try:
        return requests.post(
            f"{url}/predict", image, headers=headers, timeout=TIMEOUT_S
        ).status_code
    except requests.ConnectionError:
        return GONE


def by_grpc(address: str, key: str | None, **metadata: str) -> grpc.StatusCode | str:
    """The status of a question about the model, over gRPC."""
    question = messages.ModelMetadataRequest(name=MODEL).SerializeToString()
    status = called(address, METADATA, question, metadata | ({"x-api-key": key} if key else {}))
    return GONE if status == grpc.StatusCode.UNAVAILABLE else status


@pytest.fixture
def key(line: LiveLine) -> Iterator[str]:
    """The only key that the line takes: while there is one, everybody is asked for it."""

    def all_say(status: int) -> None:
        # Several times: each gateway reads for itself that there are keys.
        until(
            lambda: {by_http(line.url, None) for _ in range(8)} == {status},
            deadline_s=10,
            what=f"{status} from every gateway",
        )

    made = line.run("jobs.keys", "add", "sockets")
    try:
        assert made.returncode == 0, made.stdout + made.stderr
        all_say(401)
        yield str(json.loads(made.stdout.splitlines()[-1])["key"])
    finally:
        (Path(line.storage) / "keys.json").unlink(missing_ok=True)
    all_say(200)


def test_every_port_that_asks_who_comes_refuses_who_has_nothing(line: LiveLine, key: str) -> None:
    state = Line.from_env(line.env)
    at = {name: f"127.0.0.1:{port}" for name, port in state.ports.items()}
    node = {name: f"{state.node_ip}:{port}" for name, port in state.ports.items()}
    job = {"entrypoint": "id"}
    unknown = grpc.StatusCode.UNAUTHENTICATED
    # Serve's own proxy has to be told which application a call is for.
    to_gateway = {"application": "gateway"}
    asked = set()
    for wrong in (None, "wrong"):
        bearer = {"Authorization": f"Bearer {wrong}"} if wrong else {}
        refused = {
            "dashboard": refuses(f"http://{at['dashboard']}/api/jobs/", headers=bearer),
            "agent": refuses(
                f"http://{at['agent']}/api/job_agent/jobs/", "POST", json=job, headers=bearer
            ),
            "ray": grpc_status(node["ray"], wrong) == unknown,
            "ray_client": grpc_status(node["ray_client"], wrong, method=CLUSTER_INFO) == unknown,
            "http": by_http(f"http://{at['http']}", wrong) == 401,
            "grpc": by_grpc(at["grpc"], wrong) == unknown,
            "fallback": by_http(f"http://{at['fallback']}", wrong) == 401,
            "fallback_grpc": by_grpc(at["fallback_grpc"], wrong, **to_gateway) in (unknown, LOST),
        }
        # A gateway's asks for a key, a version's has nothing for anybody.
        seen = {(name_of(s.port, state.ports), s.port) for s in sockets(line)}
        over_http = {by_http(f"http://127.0.0.1:{p}", wrong) for n, p in seen if n == "replicas"}
        over_grpc = {by_grpc(f"127.0.0.1:{p}", wrong) for n, p in seen if n == "replicas_grpc"}
        refused["replicas"] = {401, 403} <= over_http <= {401, 403, GONE}
        refused["replicas_grpc"] = unknown in over_grpc and grpc.StatusCode.OK not in over_grpc
        assert [name for name, is_refused in refused.items() if not is_refused] == []
        asked |= set(refused)
    assert asked == {name for name, about in LISTENERS.items() if about.auth in ASKING}
    # It was the key that they missed, and nothing else about the call.
    assert by_http(line.url, key) == by_http(f"http://{at['fallback']}", key) == 200
    assert by_grpc(at["grpc"], key) == grpc.StatusCode.OK
    # Serve's own proxy can't carry these messages: it pickles them, and no module is there under
    # the name that they bear. Once it can, README need not say that gRPC wants HAProxy.
    assert by_grpc(at["fallback_grpc"], key, **to_gateway) == LOST


def test_no_token_is_in_any_log_of_the_line(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    assert state.token
    token = state.token.strip().encode()

    def logs() -> list[str]:
        found = []
        for folder in (state.logs, *state.logs.glob("ray-sessions/session_2*/logs")):
            for path in folder.glob("**/*"):
                if path.is_file() and token in path.read_bytes():
                    found.append(str(path))
        return found

    until(lambda: any(state.logs.iterdir()), what="a log")
    assert logs() == []

"""What a live line listens on, against the table of what may, and that it asks who comes."""

from __future__ import annotations

from typing import Any

import grpc
import psutil
import requests

from lib.line.layout import Line
from lib.line.listeners import Socket, name_of, unexpected
from tests.e2e.clients import until
from tests.e2e.conftest import LiveLine

TIMEOUT_S = 30
LIST_NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"


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
    seen = sockets(line)
    assert unexpected(seen, state.ports, host=state.host, node_ip=state.node_ip) == []
    # Most ports are open, so the scan did look at the right processes.
    names = {name_of(socket.port, state.ports) for socket in seen}
    assert names >= {"http", "grpc", "dashboard", "mlflow", "ray", "agent", "ray_metrics"}
    assert names >= {"haproxy_stats", "replicas", "autoscaler_metrics", "dashboard_metrics"}


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


def grpc_status(address: str, token: str | None = None) -> grpc.StatusCode:
    """The status of a plain call to Ray's control store."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(LIST_NODES)(b"", timeout=TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_ray_s_grpc_refuses_who_has_no_token(line: LiveLine) -> None:
    state = Line.from_env(line.env)
    address = f"{state.node_ip}:{state.ports['ray']}"
    assert grpc_status(address) == grpc.StatusCode.UNAUTHENTICATED
    assert grpc_status(address, "wrong") == grpc.StatusCode.UNAUTHENTICATED
    assert grpc_status(address, state.token) == grpc.StatusCode.OK


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

from __future__ import annotations

import os
import re
import socket

import pytest

from lib.errors import ConfigError, LineError
from lib.line.ports import PORTS, check_free, free_offset, is_free, read_ports


def test_defaults_are_all_different() -> None:
    assert read_ports({}, {}) == {name: port.default for name, port in PORTS.items()}


def test_the_offset_moves_every_port() -> None:
    moved = read_ports({"RAYLINE_PORT_OFFSET": "1000"}, {"http": 9})
    assert moved == {name: port.default + 1000 for name, port in PORTS.items()}


def test_a_port_of_its_own_wins_over_offset_and_record() -> None:
    env = {"RAYLINE_PORT_OFFSET": "1000", "RAYLINE_HTTP_PORT": "8123"}
    assert read_ports(env, {"http": 8010})["http"] == 8123


def test_the_last_ports_are_kept() -> None:
    assert read_ports({}, {"http": 8010})["http"] == 8010


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RAYLINE_HTTP_PORT": "x"}, "RAYLINE_HTTP_PORT='x' is not a number"),
        ({"RAYLINE_HTTP_PORT": "70000"}, "change RAYLINE_HTTP_PORT"),
        ({"RAYLINE_PORT_OFFSET": "60000"}, "RAYLINE_PORT_OFFSET"),
        ({"RAYLINE_HTTP_PORT": "8265"}, "both RAYLINE_HTTP_PORT and RAYLINE_DASHBOARD_PORT"),
        ({"RAYLINE_HTTP_PORT": "30500"}, "both RAYLINE_HTTP_PORT and RAYLINE_REPLICAS_PORT"),
    ],
)
def test_a_bad_port_names_its_variable(env: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_ports(env, {})


def test_a_taken_port_names_the_process_and_the_variable() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert not is_free(port)
        with pytest.raises(LineError) as error:
            check_free({"http": port}, ["http"])
    assert is_free(port)
    proposed = re.search("RAYLINE_PORT_OFFSET=([0-9]+)", str(error.value))
    assert proposed
    moved = read_ports({"RAYLINE_PORT_OFFSET": proposed[1]}, {})
    assert [name for name in moved if not is_free(moved[name])] == []
    for part in (f"port {port} (inference)", f"process {os.getpid()}", "RAYLINE_HTTP_PORT"):
        assert part in str(error.value)


def test_an_offset_is_proposed_only_where_all_ports_are_free() -> None:
    offset = free_offset(range(150, 1500))
    assert offset
    with socket.socket() as listener:
        # As if another line had moved its gRPC port here.
        listener.bind(("127.0.0.1", PORTS["ray_client"].default + offset))
        listener.listen()
        assert free_offset([offset]) is None

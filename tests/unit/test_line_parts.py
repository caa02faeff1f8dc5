"""Parts that stand in for Ray and MLflow: started, waited for, locked and upgraded."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sqlite3
import stat
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from lib.errors import LineError
from lib.line import parts
from lib.line.layout import Line
from lib.line.parts import Part, bring_up, take_down
from lib.line.processes import find
from lib.serving.client import wait_until

SLOW_SERVER = """
import http.server, sys, time
time.sleep(float(sys.argv[2]))
class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ok).serve_forever()
"""


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line.from_env({"RAYLINE_HOME": str(tmp_path / "home")})
    yield made
    take_down(made)
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(made.private_dir)


def part(monkeypatch: pytest.MonkeyPatch, *, starts_in_s: float, name: str = "ray") -> Part:
    """Make the line consist of one server that answers after some time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "-c", SLOW_SERVER, str(port), str(starts_in_s))
    made = Part(name, "Slow", command, (f"http://127.0.0.1:{port}/",), ())
    monkeypatch.setattr(parts, "parts", lambda line: [made])
    monkeypatch.setattr(parts, "_RECOVER_S", 0.2)
    return made


def test_of_two_at_once_the_second_waits_and_starts_nothing(
    line: Line, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part(monkeypatch, starts_in_s=2)
    with ThreadPoolExecutor() as pool:
        started = list(pool.map(bring_up, [line, line]))
    assert sorted(started) == [[], ["ray"]]
    assert f"process {os.getpid()} (" in capsys.readouterr().out
    assert len(find(line.line_id, line.private_dir)) == 1


def test_down_waits_for_a_start_and_then_ends_it(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(monkeypatch, starts_in_s=2)
    up = threading.Thread(target=bring_up, args=[line])
    up.start()
    wait_until(lambda: bool(find(line.line_id, line.private_dir)), deadline_s=30, what="a part")
    assert take_down(line) == 1
    up.join()
    assert not find(line.line_id, line.private_dir)


def test_a_part_that_an_interrupted_start_left_is_waited_for(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = part(monkeypatch, starts_in_s=2)
    line.prepare()
    left = parts._start(line, slow)
    assert bring_up(line) == []
    assert left.process.poll() is None


def test_a_part_has_its_time_once(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = part(monkeypatch, starts_in_s=600)
    line.prepare()
    left = psutil.Process(parts._start(line, slow).process.pid)
    assert parts._is_starting(slow, [left])
    monkeypatch.setattr(parts, "_START_S", 0.0)
    assert not parts._is_up(line, slow)


def test_a_large_log_is_put_aside_at_the_next_start(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(monkeypatch, starts_in_s=0)
    monkeypatch.setattr(parts, "_MAX_LOG_BYTES", 1000)
    line.prepare()
    log = line.logs / "ray.log"
    log.write_text("old\n" * 1000)
    bring_up(line)
    assert "old" not in log.read_text()
    assert (line.logs / "ray.log.1").read_text().startswith("old")


def test_a_start_that_fails_shows_its_own_output_and_for_ray_a_hint(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = "raise SystemExit('The current node timed out during startup. This could')"
    failing = Part("ray", "Ray", (sys.executable, "-c", says), ("http://127.0.0.1:9/",), ())
    monkeypatch.setattr(parts, "parts", lambda line: [failing])
    line.prepare()
    (line.logs / "ray.log").write_text("of an earlier start\n")
    with pytest.raises(LineError, match="(?s)run `make up` again.*timed out during") as error:
        bring_up(line)
    assert "earlier" not in str(error.value)


def test_a_port_that_is_taken_ends_nothing_that_runs(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(monkeypatch, starts_in_s=0)
    bring_up(line)
    (running,) = find(line.line_id, line.private_dir)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = str(listener.getsockname()[1])
        moved = Line.from_env({"RAYLINE_HOME": str(line.home), "RAYLINE_HTTP_PORT": taken})
        other = Part("ray", "Ray", ("false",), ("http://127.0.0.1:9/",), ("http",))
        monkeypatch.setattr(parts, "parts", lambda line: [other])
        with pytest.raises(LineError, match="RAYLINE_HTTP_PORT"):
            bring_up(moved)
    assert running.is_running()
    assert moved.recorded_ports() == line.ports


def test_an_older_database_of_mlflow_is_copied_and_upgraded(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(monkeypatch, starts_in_s=0, name="mlflow")
    line.prepare()
    database = line.home / "mlflow.db"
    older = make_older_database(database)
    bring_up(line)
    newest = parts._newest_revision()
    assert revision(database) == newest
    assert revision(line.home / f"mlflow.db.before-{newest}") == older


def test_what_mlflow_can_t_upgrade_is_kept_with_the_way_back(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(monkeypatch, starts_in_s=0, name="mlflow")
    line.prepare()
    database = line.home / "mlflow.db"
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.execute("create table alembic_version (version_num text)")
        connection.execute("insert into alembic_version values ('of_tomorrow')")
        connection.commit()
    copy = line.home / f"mlflow.db.before-{parts._newest_revision()}"
    with pytest.raises(LineError, match=f"(?s)mv {copy} {database}.*of_tomorrow"):
        bring_up(line)
    assert revision(copy) == "of_tomorrow"
    assert not find(line.line_id, line.private_dir)


def make_older_database(path: Path) -> str:
    """Make a database of MLflow without the newest step of its schema; return its revision."""
    from alembic import command
    from alembic.script import ScriptDirectory
    from mlflow.store.db import utils
    from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase

    engine = utils.create_sqlalchemy_engine_with_retry(f"sqlite:///{path}")
    config = utils._get_alembic_config(str(engine.url))
    script = ScriptDirectory.from_config(config)
    older = str(script.get_revision(str(script.get_current_head())).down_revision)
    with engine.begin() as connection:
        InitialBase.metadata.create_all(connection)
        config.attributes["connection"] = connection
        command.upgrade(config, older)
    engine.dispose()
    return older


def revision(database: Path) -> str:
    with contextlib.closing(sqlite3.connect(database)) as connection:
        return str(connection.execute("select version_num from alembic_version").fetchone()[0])


def test_what_older_code_left_of_ray_is_tidied_and_the_logs_are_found(line: Line) -> None:
    line.prepare()
    private = Path(line.private_dir)
    try:
        for name in ("session_2026-01-01_00-00-00_000000_1", "ha", "ray/session_2026-02-01"):
            (private / name).mkdir(parents=True)
        (line.logs / "ray-sessions").symlink_to(private)
        parts._tidy_ray(line)
        assert {path.name for path in private.iterdir()} == {"ray"}
        assert (line.logs / "ray-sessions").readlink() == private / "ray"
        assert (line.logs / "serve").readlink().is_relative_to(private / "ray" / "session_latest")
    finally:
        shutil.rmtree(private)


def test_what_a_part_writes_is_its_users_alone_and_an_open_storage_root_is_named(
    line: Line,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    slow = part(monkeypatch, starts_in_s=0)
    written = tmp_path / "written"
    script = f"open({str(written)!r}, 'w').close()\n{SLOW_SERVER}"
    command = (*slow.command[:2], script, *slow.command[3:])
    monkeypatch.setattr(parts, "parts", lambda line: [replace(slow, command=command)])
    storage = tmp_path / "storage"
    storage.mkdir()
    storage.chmod(0o755)
    bring_up(replace(line, storage_uri=str(storage)))
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    assert f"chmod 700 {storage}" in capsys.readouterr().out
    storage.chmod(0o700)
    bring_up(replace(line, storage_uri=f"file://{storage}"))
    assert "chmod" not in capsys.readouterr().out

"""A monitor that is killed, as a process of its own."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib.line.layout import PROJECT_ROOT
from lib.storage import Storage
from lib.watch import memory
from tests.watch_parts import prepare, serve

HISTORY = "watch/digits/history"
KILLED = """
import sys, numpy as np
from lib.storage import Storage
from lib.watch.monitor import Monitor, Options
from lib.watch.windows import Cutting
from tests.watch_parts import FakeLog, FakeRetrains, digits, predict

log = FakeLog()
images = digits("test")[0][:1200]
log.add(images, predict(images), from_s=1_700_000_000.0)
now_s = 1_700_000_060.0
monitor = Monitor(storage=Storage(sys.argv[1]), model="digits", log=log,
                  retrains=FakeRetrains(clock=lambda: now_s), clock=lambda: now_s,
                  options=Options(cutting=Cutting(rows=50, most_windows=1000)))
# One window a look, so that there is much to be killed in.
read = log.read
def a_window(*given, start_us, end_us, columns=None):
    rows = read(*given, start_us=start_us, end_us=end_us, columns=columns)
    return rows if columns is None or "index" in columns else rows.slice(0, 50)
log.read = a_window
print("ready", flush=True)
while True:
    state = monitor.look()
    if state["drift"]["evidence"]["windows"] == 24:
        break
print("done", flush=True)
"""


def test_killed_at_any_point_it_goes_on_where_it_was(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    serve(storage, prepare(tmp_path)[1], champion=1)
    rng = random.Random(0)
    done, kills = False, 0
    deadline = time.monotonic() + 240
    while not done:
        assert time.monotonic() < deadline
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, storage.uri],
            cwd=PROJECT_ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout
        assert process.stdout.readline().strip() == "ready"
        # At most three kills: starting a process takes longest here.
        if kills < 3:
            before = len(storage.list(HISTORY))
            wanted = before + rng.randint(2, 6)
            while len(storage.list(HISTORY)) < wanted and process.poll() is None:
                time.sleep(rng.random() * 0.005)
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.wait()
        else:
            done = process.stdout.readline().strip() == "done"
            process.wait()
        state = storage.read_json(memory.state_path("digits"))
        assert state["model"] == "digits"
    assert kills == 3
    looks = [storage.read_json(path) for path in storage.list(HISTORY)]
    windows = [window for look in looks for window in look["windows"]]
    assert len(windows) == 24
    assert sum(window["rows"] for window in windows) == 1200
    for earlier, later in zip(windows, windows[1:], strict=False):
        assert earlier["end"] < later["start"]
    assert looks[-1]["memory"]["evidence"]["windows"] == 24

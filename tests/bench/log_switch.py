"""In a gateway of the bench: the prediction log, on or off by a file, with no restart in between.

Ray calls `gateway` in every replica of the gateway, as it otherwise calls that of
`serve_apps.fast_lane`. A thread follows the file, and says in one of its own what it follows.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

from starlette.middleware import Middleware

from serve_apps import fast_lane

VARIABLE = "BENCH_LOG_SWITCH"
"""The file that says how to log; beside it lie the files that say who does, by process id."""
ALL, NO_IMAGES, OFF = "all", "no-images", "off"
_LOOK_EVERY_S = 0.2


def gateway() -> list[Middleware]:
    """Return the middlewares of a gateway's replicas, and follow the file from now on."""
    threading.Thread(target=_follow, args=(Path(os.environ[VARIABLE]),), daemon=True).start()
    return fast_lane.gateway()


def followed_by(file: Path) -> dict[int, str]:
    """Return what each gateway follows."""
    return {
        int(said.suffix[1:]): said.read_text()
        for said in file.parent.glob(f"{file.name}.*")
        if said.suffix[1:].isdigit()
    }


def _follow(file: Path) -> None:
    recorder: Any = None
    followed = ""
    while True:
        time.sleep(_LOOK_EVERY_S)
        serving = fast_lane._gateway
        if serving is None:
            continue
        app: Any = serving.app
        recorder = recorder or app.recorder
        wanted = file.read_text()
        if wanted and wanted != followed:
            recorder._image_share = 0.0 if wanted == NO_IMAGES else 1.0
            app.recorder = None if wanted == OFF else recorder
            followed = wanted
            file.with_name(f"{file.name}.{os.getpid()}").write_text(followed)

"""Keeps tests away from a line that is up, and from the user's own Ray token."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before any test imports Ray: it reads these once.
_HOME = tempfile.mkdtemp(prefix="rayline-test-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": os.path.join(_HOME, "auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
)
for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "RAYLINE_STORAGE"):
    os.environ.pop(name, None)
with open(os.environ["RAY_AUTH_TOKEN_PATH"], "w") as token:
    token.write(os.urandom(32).hex())

"""The direction of the arrows between modules, and that importing a module does nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lib.line.layout import PRIVATE

ROOT = Path(__file__).resolve().parents[2]
PURE = (
    "lib.config",
    "lib.errors",
    "lib.secrets",
    "lib.selector",
    "lib.leases.owners",
    "lib.leases.ledger",
    "lib.leases.share",
    "lib.leases.usage",
    "lib.line.listeners",
    "lib.storage",
    "lib.steps",
    "lib.tables",
    "lib.data.checks",
    "lib.data.manifest",
    "lib.data.direct",
    "lib.train.model",
    "lib.train.augment",
    "lib.train.loop",
    "lib.train.experiment",
    "lib.train.axes",
    "lib.train.pictures",
    "lib.registry.gaps",
    "lib.train.environment",
    "lib.train.retrain",
    "lib.rebuild",
    "lib.registry.verdict",
    "lib.serving.traffic",
    "lib.serving.predictor",
    "lib.serving.payload",
    "lib.serving.bundle",
    "lib.serving.record",
    "lib.serving.samples",
    "lib.watch.metrics",
    "lib.watch.drift",
    "lib.watch.distances",
    "lib.watch.populations",
    "lib.watch.sequence",
    "lib.watch.quality",
    "lib.watch.triggers",
    "lib.watch.rows",
    "lib.watch.windows",
    "lib.watch.view",
    "lib.watch.live_gate",
    "lib.watch.lineage",
    "lib.watch.retrain_record",
    "lib.watch.scorecard",
    "lib.watch.scorecard_checks",
    "lib.watch.features",
    "lib.watch.segments",
    "lib.watch.labels",
    "lib.watch.predictions",
    "lib.watch.answers",
    "lib.watch.recorder",
    "lib.watch.counts",
    "lib.watch.reported",
    "lib.watch.panels",
    "lib.watch.dashboards",
    "lib.watch.alerts",
    "lib.watch.overview",
    "lib.watch.stats",
    "lib.watch.betting",
    "lib.watch.gates",
    "lib.watch.evidence",
    "lib.watch.replay",
    "lib.watch.logged",
    "lib.watch.rollout",
)
IMPURE = {"ray", "mlflow", "requests", "aiohttp", "httpx", "http", "urllib", "fastapi", "starlette"}

# Run with the network cut off, in an empty folder that is also home and temporary folder.
IMPORT_ALL = """
import importlib, os, socket, sys, threading
def refuse(*args, **kwargs): raise OSError("importing must not use the network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
# What these set up when they are imported is theirs.
import logging, mlflow, mlflow.pytorch, ray
before, handlers = dict(os.environ), list(logging.getLogger().handlers)
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not ray.is_initialized()
assert not mlflow.active_run()
changed = {k for k in os.environ.keys() | before.keys() if os.environ.get(k) != before.get(k)}
assert not {k for k in changed if k.startswith(("RAYLINE_", "RAY_", "MLFLOW_"))}, changed
assert logging.getLogger().handlers == handlers
assert "serve_apps" in sys.modules and "jobs" in sys.modules
"""


def modules() -> dict[str, Path]:
    found = {}
    for package in ("lib", "jobs", "serve_apps"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


@cache
def imports(name: str) -> frozenset[str]:
    """Full names that a module imports, wherever in its code; those for type checks alone not."""
    found: set[str] = set()
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def tops(name: str) -> set[str]:
    return {imported.split(".")[0] for imported in imports(name)}


def reachable(name: str) -> set[str]:
    """The module and all of the project that it imports, directly or not."""
    seen: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        if module not in seen:
            seen.add(module)
            todo += [imported for imported in imports(module) if imported in MODULES]
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_imports_follow_the_arrows(name: str) -> None:
    package = name.split(".")[0]
    allowed = {"lib": {"lib"}, "jobs": {"lib"}, "serve_apps": {"lib", "serve_apps"}}[package]
    assert tops(name) & {"lib", "jobs", "serve_apps", "tests"} <= allowed
    if not name.startswith("lib.registry"):
        assert "mlflow" not in tops(name), "MLflow is imported in lib/registry alone"
    if package != "serve_apps":
        assert not {i for i in imports(name) if i.startswith("ray.serve")}
    private = {i for i in imports(name) if i.startswith("ray.") and "._" in i}
    assert not private, f"private parts of Ray: {private}"


@pytest.mark.parametrize("name", PURE)
def test_pure_modules_reach_neither_ray_nor_mlflow_nor_http(name: str) -> None:
    for module in reachable(name):
        assert not tops(module) & IMPURE, f"{name} → {module}"


def test_importing_has_no_effect(tmp_path: Path) -> None:
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        # Else MLflow itself writes a file for its telemetry.
        **PRIVATE,
    }
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *MODULES],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
    left = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert left == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("jobs.submit", {"numpy", "PIL", "torch"}),
        ("jobs.models", {"torch", "matplotlib"}),
        ("jobs.tune", {"sklearn", "matplotlib"}),
    ],
)
def test_a_job_says_its_first_word_without_what_it_needs_later(
    module: str, unwanted: set[str]
) -> None:
    code = f"import sys, {module}; print(sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"

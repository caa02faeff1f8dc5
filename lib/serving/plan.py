"""From the traffic policy to Serve's declarative config: one application per model version."""

from __future__ import annotations

import copy
import hashlib
import io
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from lib.config import Settings
from lib.errors import ServingError
from lib.selector import read_selector
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage

GATEWAY = "gateway"
VERSION_DEPLOYMENT = "Version"
_SERVICER = "tritonclient.grpc.service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
"""By which Serve, whose own processes do not have our code, learns what gRPC calls there are."""
_MIDDLEWARES = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"

_ROOT = Path(__file__).parents[2]


def version_application(name: str, version: int) -> str:
    """Return the name of a version's Serve application."""
    return f"{name}-v{version}"


def is_ours(settings: Settings, config: Mapping[str, Any]) -> bool:
    """Whether a Serve application, by its deployed config, belongs to this line.

    The mark is what only this line deploys: Rayline's import path with this line's storage root.
    Everything else on a cluster is somebody else's, another line's applications included.
    """
    root = str((config.get("args") or {}).get("storage", ""))
    return config.get("import_path") in _IMPORT_PATHS and _place(root) == _place(settings.storage)


def check_names(settings: Settings, details: Mapping[str, Any], wanted: Collection[str]) -> None:
    """Raise ServingError if a name or the route `/` belongs to an application that is not ours.

    Args:
        settings: Of this line.
        details: Serve's state, with applications of any origin.
        wanted: Names of the applications that this line is about to deploy.
    """
    for name, application in details.get("applications", {}).items():
        config = application.get("deployed_app_config") or {}
        is_going = application.get("status") == "DELETING"
        if is_going or is_ours(settings, config):
            continue
        route = application.get("route_prefix")
        if name in wanted or route == "/":
            what = config.get("import_path") or "made with serve.run"
            storage = (config.get("args") or {}).get("storage")
            line = f", of the line with storage {storage}" if storage else ""
            raise ServingError(
                f"Serve has an application {name!r} at route {route!r} that is not this line's "
                f"({what}{line}); it is left as it is and nothing was changed. Delete or rename "
                "it, or give this line a Ray cluster of its own"
            )


def is_version_of(model: str, application: str) -> bool:
    """Whether an application's name is that of a version of a model."""
    name, _, version = application.rpartition("-v")
    return name == model and version.isdecimal()


def _place(root: str) -> str:
    """Return a storage root without what may be spelled in several ways."""
    return root.partition("?")[0].removeprefix("file://").rstrip("/")


_IMPORT_PATHS = ("serve_apps.gateway:build", "serve_apps.version:build")
_SERVED = (".py", ".yaml", ".html", ".css", ".js", ".svg")
"""Kinds of files that replicas need: code, options, and the console's pages."""


def publish_code(storage: Storage) -> str:
    """Put the code that replicas run under the storage root and return its URI.

    The archive is named by its content: an application keeps the URI that it was first deployed
    with, so deploying one version never restarts another. Ray would drop an uploaded working
    directory once no replica uses it; this one is there when a version comes back from zero.
    """
    files = sorted(
        path
        for folder in ("lib", "serve_apps")
        for path in (_ROOT / folder).rglob("*")
        if path.suffix in _SERVED
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            # A fixed date, so that equal code gives equal bytes.
            entry = zipfile.ZipInfo(path.relative_to(_ROOT).as_posix(), (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
    content = buffer.getvalue()
    relative = f"code/{hashlib.sha256(content).hexdigest()[:16]}.zip"
    if not storage.exists(relative):
        storage.write(relative, content)
    if storage.is_local:
        return f"file://{storage.path(relative)}"
    # Options after `?` are pyarrow's; Ray fetches the archive with boto3, which has its own.
    return f"{storage.uri.partition('?')[0].rstrip('/')}/{relative}"


def names(models: Mapping[str, ModelTraffic]) -> set[str]:
    """Return the names of all applications that a policy needs."""
    versions = {
        version_application(name, version)
        for name, traffic in models.items()
        for version in traffic.isolated()
    }
    return {GATEWAY} | versions


def replica_gpus() -> float:
    """Return the GPUs, or the part of one, that serve_apps/config.yaml gives a replica."""
    template = yaml.safe_load((_ROOT / "serve_apps" / "config.yaml").read_text())
    deployments = [each for kind in template.values() for each in kind["deployments"]]
    return max(float(each["ray_actor_options"].get("num_gpus", 0)) for each in deployments)


def applications(
    settings: Settings,
    live: Mapping[str, Any],
    code_uri: str,
    models: Mapping[str, ModelTraffic],
) -> list[dict[str, Any]]:
    """Return the configs of the gateway and of every version that is an application of its own.

    An application that is live keeps its code and options, but for its least number of replicas: a
    version that gets nothing but pinned requests may go to zero, the others never do.
    """
    template = yaml.safe_load((_ROOT / "serve_apps" / "config.yaml").read_text())
    wanted = [_application(settings, live, code_uri, template, name=GATEWAY, bundle=None)]
    for name, traffic in models.items():
        for version in traffic.isolated():
            application = _application(
                settings,
                live,
                code_uri,
                template,
                name=version_application(name, version),
                bundle=traffic.bundles[version],
            )
            is_champion = version in (traffic.champion, traffic.previous_champion)
            is_warm = is_champion or traffic.weights.get(version) or version in traffic.shadows
            for deployment in application["deployments"]:
                deployment["autoscaling_config"]["min_replicas"] = int(bool(is_warm))
            wanted.append(application)
    return wanted


def _application(
    settings: Settings,
    live: Mapping[str, Any],
    code_uri: str,
    template: Mapping[str, Any],
    *,
    name: str,
    bundle: str | None,
) -> dict[str, Any]:
    args = {"storage": settings.storage} | ({"bundle": bundle} if bundle else {})
    if name in live and is_ours(settings, live[name]) and live[name]["args"] == args:
        return copy.deepcopy(dict(live[name]))
    kind = "version" if bundle else "gateway"
    options = copy.deepcopy(template[kind])
    if selector := read_selector("RAYLINE_SERVE_LABELS", settings.serve_labels):
        for deployment in options["deployments"]:
            deployment["ray_actor_options"]["label_selector"] = selector
    return {
        **options,
        "name": name,
        "route_prefix": None if bundle else "/",
        "args": args,
        "runtime_env": {
            "working_dir": code_uri,
            "env_vars": {
                _MIDDLEWARES: f"serve_apps.fast_lane:{kind}",
                # Which names a gateway answers to depends on it (serve_apps/browsers.py).
                **({} if bundle else {"RAYLINE_HTTP_HOST": settings.http_host}),
            },
        },
    }


def serve_config(settings: Settings, applications: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the whole document for Serve's REST API."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": settings.http_host, "port": settings.http_port},
        # Bound like HTTP's.
        "grpc_options": {"port": settings.grpc_port, "grpc_servicer_functions": [_SERVICER]},
        "applications": sorted(applications, key=lambda config: str(config["name"])),
    }


def ray_service_patch(settings: Settings, live: Mapping[str, Any]) -> dict[str, Any]:
    """Return the change that makes a Kubernetes RayService ask for what is live.

    Its operator sends its own text again when it restarts or makes a new cluster; versions that are
    missing there would go.
    """
    config = serve_config(settings, list(live.values()))
    return {"spec": {"serveConfigV2": yaml.safe_dump(config, sort_keys=False)}}

"""Settings, read from the environment once per process, and the frozen search presets."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lib.errors import ConfigError
from lib.leases.owners import read_limits
from lib.secrets import refuse_password
from lib.selector import read_selector

MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}"
MAX_BODY_BYTES = 16 * 2**20
"""Of one request for an inference, over HTTP or gRPC."""
STORAGE_SECRETS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the file that AWS_PROFILE names"
MLFLOW_SECRETS = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Where the line's parts are. Every field has an environment variable of its own."""

    storage: str
    """RAYLINE_STORAGE: absolute path or pyarrow file-system URI of the storage root."""
    mlflow_uri: str
    """MLFLOW_TRACKING_URI: the MLflow server, also its registry."""
    model: str = "digits"
    """RAYLINE_MODEL: name of the registered model that jobs act on."""
    http_host: str = "127.0.0.1"
    """RAYLINE_HTTP_HOST: address that the inference port binds."""
    http_port: int = 8000
    """RAYLINE_HTTP_PORT: inference port."""
    grpc_port: int = 8001
    """RAYLINE_GRPC_PORT: inference port of gRPC."""
    log_images: float = 100.0
    """RAYLINE_LOG_IMAGES: percent of the requests whose images go into the prediction log."""
    log_days: int = 30
    """RAYLINE_LOG_DAYS: whole days that the prediction log is kept, with its images and labels."""
    cors_origins: tuple[str, ...] = ()
    """RAYLINE_CORS_ORIGINS: origins of web pages that may call the gateways; `*`: all."""
    allowed_hosts: tuple[str, ...] = ()
    """RAYLINE_ALLOWED_HOSTS: names that gateways are called by, beside this machine's own."""
    ray_address: str = "http://127.0.0.1:8265"
    """RAY_API_SERVER_ADDRESS: Ray dashboard, which takes jobs and the Serve config."""
    serve_api: str = ""
    """RAYLINE_SERVE_API: Ray dashboard of the cluster that serves; empty: the one that has jobs."""
    serve_url: str = ""
    """RAYLINE_SERVE_URL: where callers reach the models; empty: `lib.serving.reach` says."""
    rayservice: str = ""
    """RAYLINE_RAYSERVICE: name of the Kubernetes RayService that is told what is live, by jobs in
    its namespace; empty: none."""
    trial_labels: str = ""
    """RAYLINE_TRIAL_LABELS: labels of the nodes that trials run on; empty: any node."""
    serve_labels: str = ""
    """RAYLINE_SERVE_LABELS: labels of the nodes that gateways and versions run on; empty: any."""
    trial_gpus: int = 0
    """RAYLINE_TRIAL_GPUS: GPUs that the nodes for trials can grow to; 0: those there are now."""
    owner_limits: str = ""
    """RAYLINE_OWNER_LIMITS: trials that an owner may have running; empty: any number."""
    serve_cpus: float = 0.0
    """RAYLINE_SERVE_CPUS: CPUs of the nodes for trials that are kept for serving, however few its
    replicas reserve now."""

    def __post_init__(self) -> None:
        """Check what can be checked without touching a network or disk."""
        if "://" not in self.storage and not os.path.isabs(self.storage):
            raise ConfigError(
                f"RAYLINE_STORAGE={self.storage!r} is relative; give an absolute path or a URI "
                "such as s3://bucket/rayline"
            )
        check_model_name(self.model)
        refuse_password("RAYLINE_STORAGE", self.storage, STORAGE_SECRETS)
        refuse_password("MLFLOW_TRACKING_URI", self.mlflow_uri, MLFLOW_SECRETS)
        for name, port in (("HTTP", self.http_port), ("GRPC", self.grpc_port)):
            if not 0 < port < 65536:
                raise ConfigError(f"RAYLINE_{name}_PORT={port} is not a port")
        for name in ("trial_labels", "serve_labels"):
            read_selector(f"RAYLINE_{name.upper()}", getattr(self, name))
        read_limits("RAYLINE_OWNER_LIMITS", self.owner_limits)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        """Read the settings; raise ConfigError naming the variable that is missing or wrong."""
        env = os.environ if env is None else env
        for name in ("RAYLINE_STORAGE", "MLFLOW_TRACKING_URI"):
            if not env.get(name):
                raise ConfigError(
                    f"{name} is not set; `make up` writes .rayline/env: run `. .rayline/env` first"
                )
        ports = {}
        for name, default in (("RAYLINE_HTTP_PORT", "8000"), ("RAYLINE_GRPC_PORT", "8001")):
            port = env.get(name, default)
            if not port.isdigit():
                raise ConfigError(f"{name}={port!r} is not a number")
            ports[name] = int(port)
        gpus = env.get("RAYLINE_TRIAL_GPUS") or "0"
        if not gpus.isdigit():
            raise ConfigError(f"RAYLINE_TRIAL_GPUS={gpus!r} is not a number")
        return cls(
            storage=env["RAYLINE_STORAGE"],
            mlflow_uri=env["MLFLOW_TRACKING_URI"],
            model=env.get("RAYLINE_MODEL") or "digits",
            http_host=env.get("RAYLINE_HTTP_HOST") or "127.0.0.1",
            http_port=ports["RAYLINE_HTTP_PORT"],
            grpc_port=ports["RAYLINE_GRPC_PORT"],
            log_images=log_images_percent(env),
            log_days=log_days(env),
            cors_origins=cors_origins(env),
            allowed_hosts=allowed_hosts(env),
            ray_address=env.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265",
            serve_api=(env.get("RAYLINE_SERVE_API") or "").rstrip("/"),
            serve_url=(env.get("RAYLINE_SERVE_URL") or "").rstrip("/"),
            rayservice=env.get("RAYLINE_RAYSERVICE") or "",
            trial_labels=env.get("RAYLINE_TRIAL_LABELS") or "",
            serve_labels=env.get("RAYLINE_SERVE_LABELS") or "",
            trial_gpus=int(gpus),
            owner_limits=env.get("RAYLINE_OWNER_LIMITS") or "",
            serve_cpus=_serve_cpus(env),
        )


def check_model_name(name: str) -> str:
    """Return a model's name; raise ConfigError unless it can be part of paths and queries."""
    if not re.fullmatch(MODEL_NAME, name):
        raise ConfigError(
            f"model name {name!r} may hold only letters, digits, `_`, `.` and `-`, must begin with "
            "a letter or digit and have at most 200; give another with MODEL=name or RAYLINE_MODEL"
        )
    return name


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is the machine that asks."""
    return host in {"localhost", "::1"} or host.startswith("127.")


def log_images_percent(env: Mapping[str, str]) -> float:
    """Return RAYLINE_LOG_IMAGES, 100 by default.

    All, since only a request with its image can be trained on once its label comes; what a busy
    line writes is bounded by `lib.watch.recorder`.
    """
    given = env.get("RAYLINE_LOG_IMAGES") or "100"
    try:
        percent = float(given)
    except ValueError:
        percent = math.nan
    if not 0 <= percent <= 100:
        raise ConfigError(f"RAYLINE_LOG_IMAGES={given!r} is not a percentage, 0 to 100")
    return percent


def log_days(env: Mapping[str, str]) -> int:
    """Return RAYLINE_LOG_DAYS, 30 by default."""
    given = env.get("RAYLINE_LOG_DAYS") or "30"
    if not (given.isdecimal() and int(given) >= 1):
        raise ConfigError(f"RAYLINE_LOG_DAYS={given!r} is not a number of days, 1 or more")
    return int(given)


def cors_origins(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return RAYLINE_CORS_ORIGINS, a list with commas: none by default, `*` for all."""
    origins = _listed(env, "RAYLINE_CORS_ORIGINS")
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise ConfigError(
                f"RAYLINE_CORS_ORIGINS: {origin!r} is no origin such as https://app.example.com, "
                "without a path, nor `*`"
            )
    return origins


def allowed_hosts(env: Mapping[str, str]) -> tuple[str, ...]:
    """Return RAYLINE_ALLOWED_HOSTS, a list with commas; `*.example.com` has all names below it."""
    hosts = _listed(env, "RAYLINE_ALLOWED_HOSTS")
    for host in hosts:
        if host != "*" and not re.fullmatch(r"(\*\.)?[a-z0-9_.-]+", host):
            raise ConfigError(
                f"RAYLINE_ALLOWED_HOSTS: {host!r} is no name of a host, without scheme and port"
            )
    return hosts


def _listed(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    parts = (part.strip().lower() for part in env.get(name, "").split(","))
    return tuple(part for part in parts if part)


def _serve_cpus(env: Mapping[str, str]) -> float:
    given = env.get("RAYLINE_SERVE_CPUS") or "0"
    try:
        cpus = float(given)
    except ValueError:
        cpus = math.nan
    if not 0 <= cpus < math.inf:
        raise ConfigError(f"RAYLINE_SERVE_CPUS={given!r} is not a number of CPUs, 0 or more")
    return cpus


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """How large a search is. One name on the command line instead of thirty options."""

    name: str
    num_trials: int
    """Trials at most; the time budget may end the sweep earlier."""
    rungs: tuple[int, ...]
    """Epochs at which the learning rate has come down to zero and trials are compared."""
    time_budget_s: float
    """Wall-clock seconds for the whole sweep."""
    widths: tuple[int, ...]
    """Channels of the first stage."""
    depths: tuple[int, ...]
    """Convolutions per stage."""
    growths: tuple[int, ...] = (4,)
    """Channels of the widest stage, as a multiple of the first one's."""
    first_guesses: tuple[Mapping[str, float], ...] = ()
    """What is tried first, one trial each: where it differs from the usual first guess."""
    min_epoch_steps: int = 0
    """Steps of an epoch at least: one over few images goes over them again. With 5 images of each
    digit, 9 steps in all left a net at 21 % on held-out images, three epochs of 100 steps at 83 %,
    of 200 at 86 % (means of five draws)."""
    num_views: int = 1
    """Of an image: every trial's net answers with the mean over them; training is the same."""
    gpus_per_trial: float = 0.25
    """Share of a GPU for a trial where the cluster has GPUs; else a trial takes one CPU."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges that a sweep relies on."""
        if self.num_trials < 1 or self.time_budget_s <= 0:
            raise ConfigError(f"preset {self.name}: num_trials and time_budget_s must be positive")
        if not self.rungs or list(self.rungs) != sorted(set(self.rungs)) or self.rungs[0] < 1:
            raise ConfigError(f"preset {self.name}: rungs={self.rungs} must be increasing epochs")


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            name="smoke", num_trials=3, rungs=(1, 2), time_budget_s=60, widths=(8,), depths=(1,)
        ),
        Preset(
            name="quick",
            num_trials=8,
            rungs=(1, 3),
            time_budget_s=150,
            widths=(24, 32),
            depths=(1,),
            min_epoch_steps=200,
        ),
        Preset(
            name="full",
            num_trials=32,
            # The first guess takes a quarter of an hour for them, on one core with AVX2.
            rungs=(2, 6, 18),
            time_budget_s=1700,
            # The widest and deepest of these has 492,906 parameters on MNIST.
            widths=(6, 16, 24, 32),
            depths=(1, 2, 3),
            growths=(2, 4),
            min_epoch_steps=200,
            # An eighth less loss on held-out images than one view; five gain hardly more.
            num_views=3,
            # 170,626 and 9,196 parameters: both ends of the Pareto front have a start. A net so
            # small has little to spare for being regularised: of 10,000 held-out images 63 were
            # wrong with this augmentation, 75 with half of it, 64 with half as much again (two
            # seeds each). The third has 298,922, and the time for them where the processor
            # multiplies bfloat16.
            first_guesses=(
                {"stage_width": 24, "depth": 2, "growth": 4, "augmentation": 0.75},
                {
                    "stage_width": 6,
                    "depth": 3,
                    "growth": 2,
                    "augmentation": 0.5,
                    "label_smoothing": 0.0,
                    "weight_decay": 1e-4,
                },
                {"stage_width": 32, "depth": 2, "growth": 4, "augmentation": 0.75},
            ),
        ),
    )
}


def preset(name: str) -> Preset:
    """Return a preset by name; raise ConfigError with the known names otherwise."""
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; choose one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]

"""The gateway: every request comes in here, and goes to the version that the policy names."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RequestCancelledError
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from lib.config import log_days, log_images_percent
from lib.device import granted_device
from lib.secrets import PRIVATE_DIR_VARIABLE
from lib.serving.bundle import Card
from lib.serving.channel import ChannelClosed, Channels, channel_folder
from lib.serving.keys import Keys, authenticate, read_keys
from lib.serving.plan import GATEWAY, VERSION_DEPLOYMENT, version_application
from lib.serving.policy import acknowledge, current
from lib.serving.predictor import load_predictor
from lib.serving.record import Record
from lib.serving.router import (
    Images,
    Probabilities,
    Replicas,
    Router,
    unless_gone,
    with_retries,
)
from lib.serving.tracing import Tracing
from lib.serving.traffic import COLOCATED
from lib.storage import Storage
from lib.watch.predictions import Retention
from lib.watch.recorder import Recorder
from lib.watch.stats import Stats
from serve_apps import exposition, fast_lane, logs
from serve_apps.asgi import App
from serve_apps.browsers import BrowserRules
from serve_apps.endpoints import Endpoints, routes
from serve_apps.exposition import Exposition
from serve_apps.grpc_lane import GrpcLane
from serve_apps.reporter import Reporter
from serve_apps.scaling import BUSY, CALLS, BusyMeter

POLICY_POLL_S = 0.3
STATUS_POLL_S = 2.0
"""Between questions to Serve's controller which applications there are."""
ACKNOWLEDGE_RETRY_S = 2.0
REPORT_EVERY_S = 5.0
CALL_DEADLINE_S = 30.0
START_DEADLINE_S = 120.0
"""For a gateway to load its first policy, before Serve starts another in its place."""
MAX_INLINE_IMAGES = 64
"""A colocated batch up to this size is answered on the event loop: a thread would cost more."""

_GONE = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DELETING)

_log = logging.getLogger(__name__)


@serve.ingress()
class Gateway(GrpcLane):
    """Serve's side of the gateway: handles to the versions, and the policy's followers."""

    def __init__(self, storage: str) -> None:
        logs.start_for_replica()
        self._storage = Storage(storage)
        self._recorder = Recorder(self._storage, image_percent=log_images_percent(os.environ))
        self._retention = Retention(self._storage, log_days(os.environ))
        self._router = Router(
            self._storage,
            self._make_replicas,
            deadline_s=CALL_DEADLINE_S,
            recorder=self._recorder,
        )
        self._keys: Keys | None = None
        self._channels: dict[str, Channels] = {}
        self._gone: dict[str, asyncio.Event] = {}
        """Application → set while it is gone."""
        self._num_running: dict[str, int] = {}
        """Application → its running replicas, on any node, as Serve said last."""
        self._has_new_table = asyncio.Event()
        self._acknowledging: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._meter: BusyMeter | None = None

    def __serve_build_asgi_app__(self) -> App:
        """Return the ASGI application; Serve calls this once, inside its event loop."""
        loop = asyncio.get_running_loop()
        self._meter = BusyMeter()
        replica = serve.get_replica_context().replica_id.unique_id
        self._exposition = Exposition(
            replica, lambda: self._app.record, lambda: self._app.in_flight
        )
        endpoints = Endpoints(self._router, self._storage, counts=self._exposition.counts)
        self._repository = endpoints.repository
        self._app = App(
            [*routes(endpoints), exposition.route(self._exposition)],
            title="Rayline",
            description="Image classification, several model versions behind one address.",
            authenticate=lambda headers: authenticate(self._keys, headers),
            recorder=self._recorder,
            browsers=BrowserRules.from_env(os.environ),
            access_share=logs.access_share(os.environ),
            tracing=Tracing.from_env(os.environ, replica),
        )
        self._tasks = [
            loop.create_task(self._follow_policy()),
            loop.create_task(self._follow_applications()),
            loop.create_task(self._keep_records()),
            loop.create_task(self._recorder.run()),
        ]
        fast_lane.register(self._app)
        return self._app

    def __del__(self) -> None:
        """Write what is not in the prediction log yet, when Serve stops this gateway."""
        self._recorder.close()

    async def check_health(self) -> None:
        """Fail Serve's health check if the policy is no longer followed.

        Serve sends a gateway no requests before its first check has passed, so that one waits until
        the policy is loaded, if there is any.
        """
        async with asyncio.timeout(START_DEADLINE_S):
            while not self._router.has_table:
                if await asyncio.to_thread(current, self._storage) is None:
                    break
                await asyncio.sleep(POLICY_POLL_S)
        if any(task.done() for task in self._tasks):
            raise RuntimeError("a task that the gateway lives by has ended; see its log")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `serve_apps.scaling` goes by."""
        return {BUSY: self._meter.read() if self._meter else 0.0, CALLS: self._app.in_flight}

    async def _follow_policy(self) -> None:
        while True:
            try:
                self._keys = await asyncio.to_thread(read_keys, self._storage)
                for channels in list(self._channels.values()):
                    await channels.refresh()
                if await self._router.refresh():
                    self._has_new_table.set()
                    # Not waited for here: what drains must not hold the next policy back.
                    self._acknowledging = asyncio.create_task(
                        self._acknowledge(self._acknowledging)
                    )
            except Exception:
                # The last policy stays in force, and the next round tries again.
                _log.exception("the traffic policy could not be read")
            await asyncio.sleep(POLICY_POLL_S)

    async def _acknowledge(self, before: asyncio.Task[None] | None) -> None:
        """Say that this policy is in force and nothing is in flight by the ones before it."""
        generation = self._router.table.policy.generation
        if before:
            await asyncio.wait({before})
        await self._router.drained()
        replica = serve.get_replica_context().replica_id.unique_id
        while True:
            try:
                await asyncio.to_thread(acknowledge, self._storage, replica, generation)
                return
            except Exception:
                _log.exception("policy generation %d can't be acknowledged yet", generation)
                await asyncio.sleep(ACKNOWLEDGE_RETRY_S)

    async def _follow_applications(self) -> None:
        """Tell the router which versions' applications are gone, so that nobody waits for them."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_new_table.wait(), STATUS_POLL_S)
            self._has_new_table.clear()
            if not self._router.has_table:
                continue
            try:
                # Applications are up before the policy needs them, so what is asked for after
                # reading the policy and is missing was deleted.
                needed = {
                    key: version_application(*key)
                    for key, version in self._router.table.versions.items()
                    if version.placement != COLOCATED
                }
                status = await asyncio.to_thread(serve.status)
                there = {n for n, app in status.applications.items() if app.status not in _GONE}
                if GATEWAY not in there:
                    # Serve lists nothing while its store is away.
                    continue
                self._num_running = {
                    name: _num_running(status.applications[name])
                    for name in there.intersection(needed.values())
                }
                gone = {key for key, application in needed.items() if application not in there}
                for key, application in needed.items():
                    event = self._gone.setdefault(application, asyncio.Event())
                    if key in gone and not event.is_set():
                        _log.error("Serve has no application %s; run jobs.deploy", application)
                        event.set()
                    elif key not in gone:
                        event.clear()
                self._router.set_gone(gone)
            except Exception:
                # Requests are answered on; only a version that goes now is waited for.
                _log.exception("Serve's applications could not be listed")

    async def _keep_records(self) -> None:
        """Report counts, with one log line for many requests; delete what is too old."""
        reporter = Reporter()
        stats = Stats(self._storage, serve.get_replica_context().replica_id.unique_id)
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            record, self._app.record = self._app.record, Record()
            for (model, version, caller, status), count in sorted(record.requests.items()):
                what = f"{model} version {version}" if model else "no version"
                _log.info("%d requests of %s to %s: %d", count, caller, what, status)
            others = [*self._router.shadows.increments(), *self._recorder.increments()]
            reporter.report([*record.increments(), *others])
            self._exposition.add(record, others)
            try:
                stats.add(record)
                await asyncio.to_thread(stats.flush)
            except Exception:
                _log.exception("the counts for the console could not be written; they are kept")
            await asyncio.to_thread(self._retention.look)

    async def _make_replicas(self, card: Card, bundle: str, placement: str) -> Replicas:
        if placement == COLOCATED:
            return await self._load_here(card, bundle)
        application = version_application(card.name, card.version)
        # Finding the application asks the controller and blocks, so not on the event loop.
        handle = await asyncio.to_thread(
            serve.get_deployment_handle, VERSION_DEPLOYMENT, application
        )

        folder = channel_folder(
            ray.get_runtime_context().gcs_address, os.environ.get(PRIVATE_DIR_VARIABLE)
        )
        channels = Channels(folder, application, len(card.class_names))
        await channels.refresh()
        self._channels[application] = channels
        gone = self._gone.setdefault(application, asyncio.Event())

        def num_ready() -> int:
            return max(channels.num_open, self._num_running.get(application, 0))

        def close() -> None:
            channels.close()
            if self._channels.get(application) is channels:
                del self._channels[application]

        async def predict(images_NHWC: Images) -> Probabilities:
            channel = channels.pick()
            # While all here are busy, Serve knows of those on other nodes.
            if channel and (not channel.in_flight or num_ready() == channels.num_open):
                return await channel.call(images_NHWC)
            return await unless_gone(gone, handle.predict.remote(images_NHWC))

        busy = (ChannelClosed, BackPressureError, RequestCancelledError)
        call = with_retries(predict, busy, (RayActorError,), deadline_s=CALL_DEADLINE_S)
        return Replicas(call, num_ready, close)

    async def _load_here(self, card: Card, bundle: str) -> Replicas:
        predictor = await asyncio.to_thread(
            load_predictor, self._storage, bundle, card, device=granted_device()
        )

        async def predict(images_NHWC: Images) -> Probabilities:
            if len(images_NHWC) <= MAX_INLINE_IMAGES:
                return predictor.predict(images_NHWC)
            return await asyncio.to_thread(predictor.predict, images_NHWC)

        return Replicas(predict)


def _num_running(application: ApplicationStatusOverview) -> int:
    """Return the number of a version's running replicas."""
    if (deployment := application.deployments.get(VERSION_DEPLOYMENT)) is None:
        return 0
    return sum(n for state, n in deployment.replica_states.items() if state == "RUNNING")


def build(args: dict[str, str]) -> Application:
    """Build the gateway application; args: `storage`, the storage root."""
    return serve.deployment()(Gateway).bind(args["storage"])

"""The gateway's core: choose a version, batch for it, answer. No HTTP and no Serve in here."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lib.errors import ServingError
from lib.serving import policy as policies
from lib.serving.batcher import (
    Batcher,
    NotFinite,
    Predict,
    QueueFull,
    ReplicaLost,
    Unavailable,
)
from lib.serving.bundle import Card, read_card
from lib.serving.feedback import PROBE_ID
from lib.serving.payload import PayloadError
from lib.serving.shadow import Shadows
from lib.serving.tracing import Trace
from lib.serving.traffic import COLOCATED, ModelTraffic, Policy, choose, is_shadowed
from lib.storage import Storage
from lib.watch.recorder import Recorder

Images = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Replicas:
    """What answers for a version."""

    predict: Predict
    num_ready: Callable[[], int] = lambda: 1
    """How many replicas can be called now."""
    close: Callable[[], None] = lambda: None
    """Ends the connections to them."""


MakeReplicas = Callable[[Card, str, str], Awaitable[Replicas]]
"""Connects to the replicas of a version, of its card, bundle and placement."""

RETRY_AFTER_S = 1
MAX_REOPEN_S = 10.0
"""Longest pause between tries to open a version whose bundle or application is missing."""
MAX_DEATHS = 4
"""Of replicas behind a Serve handle during one call, until the call is taken for the cause: Serve
may send it to several that are dead already."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Version:
    """A version that answers: its card, and the batcher in front of its replicas."""

    card: Card
    bundle: str
    placement: str
    replicas: Replicas
    batcher: Batcher


@dataclass(frozen=True, slots=True)
class Table:
    """One consistent state of routing; a request uses the table that it started with."""

    policy: Policy
    versions: Mapping[tuple[str, int], Version]
    gone: frozenset[tuple[str, int]] = frozenset()
    """Versions whose Serve applications are not there, though the policy needs them."""
    unopened: frozenset[tuple[str, int]] = frozenset()
    """Versions that this gateway could not open, such as one whose bundle is missing."""

    def listed(self) -> list[tuple[str, int]]:
        """Return every model's name with each of its versions, also those that can't be asked."""
        models = self.policy.models
        return sorted((name, number) for name in models for number in models[name].bundles)

    def is_away(self, name: str, number: int) -> bool:
        """Whether a version of the policy can't be asked."""
        return (name, number) in self.gone or (name, number) in self.unopened

    def model(self, name: str | None) -> tuple[str, ModelTraffic]:
        """Return a model's name and traffic; raise PayloadError 404 for an unknown one."""
        name = name or self.policy.default_model
        traffic = self.policy.models.get(name)
        if traffic is None:
            known = ", ".join(sorted(self.policy.models))
            raise PayloadError(404, f"no model {name!r} is served; there are: {known}")
        return name, traffic

    def pick(self, name: str | None, pin: str | None, key: str) -> Version:
        """Return the version for a request.

        Raises PayloadError 404 for an unknown one, and 503 for one whose application is gone;
        requests that name no version go to the others then, by their weights.
        """
        name, traffic = self.model(name)
        if pin is None:
            pinned, weights = traffic.pins.get(key), traffic.weights
            if self.gone or self.unopened:
                pinned = None if pinned is None or self.is_away(name, pinned) else pinned
                weights = {n: w for n, w in weights.items() if not self.is_away(name, n)}
            number = pinned or choose(weights, key)
        elif pin.isdecimal() and len(pin) < 10 and int(pin) in traffic.bundles:
            number = int(pin)
        else:
            known = ", ".join(str(version) for version in sorted(traffic.bundles))
            raise PayloadError(404, f"no version {pin!r} of {name} is served; there are: {known}")
        if number < 0 or self.is_away(name, number):
            which = f"version {pin} of {name} is" if pin else f"the versions of {name} are"
            raise PayloadError(503, f"{which} not up in Serve; `python -m jobs.deploy` repairs it")
        return self.versions[name, number]

    def champion(self, name: str | None) -> Version:
        """Return a model's champion, also while it answers nobody.

        Raises PayloadError 404 for an unknown model, and 503 if its champion could not be opened.
        """
        name, traffic = self.model(name)
        version = self.versions.get((name, traffic.champion))
        if version is None:
            raise PayloadError(
                503, f"the champion of {name} can't be loaded; `python -m jobs.deploy` repairs it"
            )
        return version

    def is_ready(self, name: str, pin: str | None = None) -> bool:
        """Whether a version has a replica; without `pin`, one of those that share the requests.

        Raises PayloadError 404 for an unknown model or version.
        """
        name, traffic = self.model(name)
        if pin is None:
            return any(
                weight > 0 and self.is_ready(name, str(number))
                for number, weight in traffic.weights.items()
            )
        try:
            return self.pick(name, pin, "").replicas.num_ready() > 0
        except PayloadError as error:
            if error.status != 503:
                raise
            return False


class Router:
    """Follows the traffic policy and answers images."""

    def __init__(
        self,
        storage: Storage,
        make_replicas: MakeReplicas,
        *,
        deadline_s: float = 30.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._storage = storage
        self._make_replicas = make_replicas
        self._deadline_s = deadline_s
        self._table: Table | None = None
        self._retired: list[Version] = []
        self._reopen_at = 0.0
        self._reopen_pause_s = 0.0
        self.recorder = recorder or Recorder(storage)
        self.shadows = Shadows(self.recorder)

    @property
    def table(self) -> Table:
        """The state of routing now; raises PayloadError 503 before the first deploy."""
        if self._table is None:
            raise PayloadError(503, "no model is deployed yet; run jobs.deploy")
        return self._table

    @property
    def has_table(self) -> bool:
        """Whether a policy is loaded."""
        return self._table is not None

    @property
    def is_ready(self) -> bool:
        """Whether a policy is loaded and each of its models has a version that answers."""
        return self._table is not None and all(map(self._table.is_ready, self._table.policy.models))

    def set_gone(self, gone: Collection[tuple[str, int]]) -> None:
        """Take versions out of the routing whose applications are gone, and put others back."""
        if self._table is not None and gone != self._table.gone:
            self._table = replace(self._table, gone=frozenset(gone))

    async def refresh(self) -> bool:
        """Read the policy and, if it is newer, build the next table; return whether it changed.

        Requests go on with the old table until the new one is whole. A version that can't be opened
        is left out, which is logged, and is tried again by later calls.
        """
        known = self._table.policy if self._table else None
        policy = await asyncio.to_thread(policies.current, self._storage, known=known)
        if policy is None:
            return False
        is_new = known is None or policy.generation != known.generation
        now = asyncio.get_running_loop().time()
        if is_new:
            self._reopen_pause_s = 0.25
        elif not (self._table and self._table.unopened) or now < self._reopen_at:
            return False
        self._reopen_pause_s = min(2 * self._reopen_pause_s, MAX_REOPEN_S)
        self._reopen_at = now + self._reopen_pause_s
        old = self._table.versions if self._table else {}
        versions: dict[tuple[str, int], Version] = {}
        unopened: set[tuple[str, int]] = set()
        for name, traffic in policy.models.items():
            for number, bundle in traffic.bundles.items():
                version = old.get((name, number))
                placement = traffic.placement_of(number)
                if version is None or (version.bundle, version.placement) != (bundle, placement):
                    try:
                        version = await self._open(bundle, placement)
                    except Exception as error:
                        what = "version %d of %s can't be opened and is tried again: %r"
                        _log.error(what, number, name, error)
                        unopened.add((name, number))
                        continue
                versions[name, number] = version
        gone = self._table.gone if self._table else frozenset()
        gone = frozenset(key for key in gone if versions.get(key) is old.get(key))
        kept = {id(version) for version in versions.values()}
        for (name, number), version in old.items():
            if id(version) not in kept:
                self._retired.append(version)
                if known and _is_only_shadow(known.models[name], number):
                    # Nobody waits for its answers.
                    version.batcher.drop_queue()
        self._table = Table(policy, versions, gone, frozenset(unopened))
        return is_new

    async def _open(self, bundle: str, placement: str) -> Version:
        card = await asyncio.to_thread(read_card, self._storage, bundle)
        replicas = await self._make_replicas(card, bundle, placement)
        batcher = Batcher(replicas.predict, num_replicas=replicas.num_ready)
        return Version(card, bundle, placement, replicas, batcher)

    async def drained(self) -> None:
        """Wait until versions that left the policy have nothing queued or in flight, close them."""
        retired, self._retired = self._retired, []
        for version in retired:
            await version.batcher.wait_idle()
            version.replicas.close()

    async def answer(
        self, version: Version, images_NHWC: Images, trace: Trace | None = None
    ) -> Probabilities:
        """Return probabilities; raise PayloadError 503 if the version is overloaded or away."""
        if trace:
            trace.mark("decode")
        try:
            if version.placement == COLOCATED:
                # Here is nothing that could be waited for in vain, so no timer is paid for.
                return await version.batcher.submit(images_NHWC, trace)
            async with asyncio.timeout(self._deadline_s):
                return await version.batcher.submit(images_NHWC, trace)
        except QueueFull:
            raise PayloadError(
                503, f"version {version.card.version} is overloaded; try again"
            ) from None
        except (TimeoutError, Unavailable):
            raise PayloadError(
                503,
                f"version {version.card.version} gave no answer in time; "
                "try again, and look at `serve status`",
            ) from None
        except (NotFinite, ReplicaLost) as error:
            card = version.card
            raise ServingError(f"version {card.version} of {card.name}: {error}") from error
        finally:
            if trace:
                trace.mark("predict")

    def copy_to_shadows(
        self,
        version: Version,
        images_NHWC: Images,
        answer_NK: Probabilities,
        request_id: str,
        caller: str,
    ) -> None:
        """Give the shadows of this request's model their copies; returns at once.

        The policy of now counts: one that left while the request was answered gets no copy.
        """
        name, table = version.card.name, self._table
        traffic = table.policy.models.get(name) if table else None
        if table is None or traffic is None or request_id == PROBE_ID:
            return
        for number, percent in traffic.shadows.items():
            if number == version.card.version or not is_shadowed(percent, number, request_id):
                continue
            if shadow := table.versions.get((name, number)):
                self.shadows.send(
                    shadow,
                    images_NHWC,
                    answer_NK,
                    request_id=request_id,
                    caller=caller,
                    run=_submit,
                )


def _is_only_shadow(traffic: ModelTraffic, number: int) -> bool:
    is_asked = traffic.weights.get(number) or number in traffic.pins.values()
    return number in traffic.shadows and not is_asked


async def _submit(version: Version, images_NHWC: Images) -> Probabilities:
    return await version.batcher.submit(images_NHWC)


async def unless_gone(gone: asyncio.Event, answer: Awaitable[Probabilities]) -> Probabilities:
    """Return an answer; raise Unavailable as soon as the application is gone.

    A call of a Serve handle to an application that was deleted never ends by itself.
    """
    call, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone.wait())
    try:
        await asyncio.wait({call, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if call.done():
            return call.result()
        raise Unavailable("its Serve application is gone")
    finally:
        call.cancel()
        leaving.cancel()


def with_retries(
    predict: Predict,
    busy: tuple[type[BaseException], ...],
    died: tuple[type[BaseException], ...] = (),
    *,
    deadline_s: float,
    first_pause_s: float = 0.05,
) -> Predict:
    """Repeat calls that no replica could take, or that lost theirs, until a deadline.

    Inference changes nothing, so a call can be repeated safely on another replica, or on the one
    that takes the lost one's place.

    Args:
        predict: The call. Its ReplicaLost is passed on: the batch may be the cause.
        busy: What it raises if no replica takes it now.
        died: What it raises if a replica is dead; after MAX_DEATHS of them ReplicaLost is raised.
        deadline_s: For all tries together; after it Unavailable is raised.
        first_pause_s: Before the second try; it doubles up to 1 s.
    """

    async def call(images_NHWC: Images) -> Probabilities:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        pause_s = first_pause_s
        deaths = 0
        while True:
            try:
                async with asyncio.timeout_at(end):
                    return await predict(images_NHWC)
            except (*busy, *died) as error:
                deaths += isinstance(error, died)
                if deaths == MAX_DEATHS:
                    raise ReplicaLost(f"{deaths} replicas died on it: {error}") from error
                if loop.time() + pause_s > end:
                    raise Unavailable(str(error)) from error
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, 1.0)

    return call

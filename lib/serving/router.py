"""The gateway's core: choose a version, batch for it, answer. No HTTP and no Serve in here."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from lib.serving import policy as policies
from lib.serving.batcher import Batcher, Predict, QueueFull, Unavailable
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
MakePredict = Callable[[Card, str, str], Awaitable[Predict]]
"""Makes the function that answers for a version, of its card, bundle and placement."""

RETRY_AFTER_S = 1
MAX_CALLS = 4
"""To the replicas of a version at once, from one gateway."""


@dataclass(frozen=True, slots=True)
class Version:
    """A version that answers: its card, and the batcher in front of its replicas."""

    card: Card
    bundle: str
    placement: str
    batcher: Batcher


@dataclass(frozen=True, slots=True)
class Table:
    """One consistent state of routing; a request uses the table that it started with."""

    policy: Policy
    versions: Mapping[tuple[str, int], Version]
    gone: frozenset[tuple[str, int]] = frozenset()
    """Versions whose Serve applications are not there, though the policy needs them."""

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
            if self.gone:
                pinned = None if (name, pinned) in self.gone else pinned
                weights = {n: w for n, w in weights.items() if (name, n) not in self.gone}
            number = pinned or choose(weights, key)
        elif pin.isdecimal() and len(pin) < 10 and int(pin) in traffic.bundles:
            number = int(pin)
        else:
            known = ", ".join(str(version) for version in sorted(traffic.bundles))
            raise PayloadError(404, f"no version {pin!r} of {name} is served; there are: {known}")
        if number < 0 or (name, number) in self.gone:
            which = f"version {pin} of {name} is" if pin else f"the versions of {name} are"
            raise PayloadError(503, f"{which} not up in Serve; `python -m jobs.deploy` repairs it")
        return self.versions[name, number]

    def answers(self, name: str) -> bool:
        """Whether requests for a model that name no version are answered."""
        weights = self.policy.models[name].weights
        return any(weight > 0 and (name, n) not in self.gone for n, weight in weights.items())


class Router:
    """Follows the traffic policy and answers images."""

    def __init__(
        self,
        storage: Storage,
        make_predict: MakePredict,
        *,
        deadline_s: float = 30.0,
        recorder: Recorder | None = None,
    ) -> None:
        self._storage = storage
        self._make_predict = make_predict
        self._deadline_s = deadline_s
        self._table: Table | None = None
        self._retired: list[Batcher] = []
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
        """Whether a policy is loaded and each of its models answers."""
        return self._table is not None and all(map(self._table.answers, self._table.policy.models))

    def set_gone(self, gone: Collection[tuple[str, int]]) -> None:
        """Take versions out of the routing whose applications are gone, and put others back."""
        if self._table is not None and gone != self._table.gone:
            self._table = replace(self._table, gone=frozenset(gone))

    async def refresh(self) -> bool:
        """Read the policy and, if it is newer, build the next table; return whether it changed.

        Requests go on with the old table until the new one is whole.
        """
        known = self._table.policy if self._table else None
        policy = await asyncio.to_thread(policies.current, self._storage, known=known)
        if policy is None or (known and policy.generation == known.generation):
            return False
        old = self._table.versions if self._table else {}
        versions: dict[tuple[str, int], Version] = {}
        for name, traffic in policy.models.items():
            for number, bundle in traffic.bundles.items():
                version = old.get((name, number))
                placement = traffic.placement_of(number)
                if version is None or (version.bundle, version.placement) != (bundle, placement):
                    version = await self._open(bundle, placement)
                versions[name, number] = version
        gone = self._table.gone if self._table else frozenset()
        gone = frozenset(key for key in gone if versions.get(key) is old.get(key))
        kept = {id(version) for version in versions.values()}
        self._retired += [version.batcher for version in old.values() if id(version) not in kept]
        self._table = Table(policy, versions, gone)
        return True

    async def _open(self, bundle: str, placement: str) -> Version:
        card = await asyncio.to_thread(read_card, self._storage, bundle)
        predict = await self._make_predict(card, bundle, placement)
        max_calls = 1 if placement == COLOCATED else MAX_CALLS
        return Version(card, bundle, placement, Batcher(predict, max_calls=max_calls))

    async def drained(self) -> None:
        """Wait until versions that left the policy have nothing queued or in flight."""
        retired, self._retired = self._retired, []
        for batcher in retired:
            await batcher.wait_idle()

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
        finally:
            if trace:
                trace.mark("predict")

    def copy_to_shadows(
        self,
        table: Table,
        version: Version,
        images_NHWC: Images,
        answer_NK: Probabilities,
        request_id: str,
        caller: str,
    ) -> None:
        """Give the shadows of this request's model their copies; returns at once."""
        name = version.card.name
        shadows = table.policy.models[name].shadows if request_id != PROBE_ID else {}
        for number, percent in shadows.items():
            if number != version.card.version and is_shadowed(percent, number, request_id):
                self.shadows.send(
                    table.versions[name, number],
                    images_NHWC,
                    answer_NK,
                    request_id=request_id,
                    caller=caller,
                    run=_submit,
                )


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
    retriable: tuple[type[BaseException], ...],
    *,
    deadline_s: float,
    first_pause_s: float = 0.05,
) -> Predict:
    """Repeat calls that failed because a replica went away; at the deadline raise Unavailable.

    Inference changes nothing, so a call can be repeated safely on another replica, or on the one
    that takes the lost one's place.
    """

    async def call(images_NHWC: Images) -> Probabilities:
        loop = asyncio.get_running_loop()
        end = loop.time() + deadline_s
        pause_s = first_pause_s
        while True:
            try:
                async with asyncio.timeout_at(end):
                    return await predict(images_NHWC)
            except retriable as error:
                if loop.time() + pause_s > end:
                    raise Unavailable(str(error)) from error
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(2 * pause_s, 1.0)

    return call

"""What serving costs beside inference: choosing, the policy, the router's table, Serve's config."""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path

from lib.config import Settings
from lib.data.manifest import Preprocess
from lib.serving import plan, policy
from lib.serving.bundle import Card, write_bundle
from lib.serving.channel import Channel, Channels
from lib.serving.router import Replicas, Router
from lib.serving.traffic import ModelTraffic, Policy, choose
from lib.storage import Storage
from tests.bench.scale_cost import MS, US, Cost, seconds

VERSIONS = (5, 50, 500)
REPLICAS = (10, 100, 1_000)
CHANGES = (10, 100, 1_000)
_MODEL = "digits"


def costs(folder: Path) -> list[Cost]:
    """Measure what grows with versions, replicas and changes of the traffic."""
    chosen_us, picked_us, policy_kb, read_ms, table_ms, config_ms, change_ms = (
        [] for _ in range(7)
    )
    for num in VERSIONS:
        storage = Storage(str(folder / f"versions-{num}"))
        traffic = _traffic(storage, num)
        keys = itertools.cycle([f"user-{n}" for n in range(997)])
        weights = traffic.weights
        chosen_us.append(
            US * seconds(lambda w=weights, k=keys: choose(w, next(k)), repeat=20_000 // num)
        )
        document = policy.commit(
            storage, None, {_MODEL: traffic}, default_model=_MODEL, who="bench", why="bench"
        )
        text = json.dumps(document.to_json())
        policy_kb.append(len(text) / 1e3)
        read_ms.append(MS * seconds(lambda t=text: Policy.from_json(json.loads(t)), repeat=5))
        table_ms.append(MS * asyncio.run(_first_table_s(storage)))
        router, change_s = asyncio.run(_change_s(storage, document))
        change_ms.append(MS * change_s)
        table = router.table
        picked_us.append(
            US * seconds(lambda t=table, k=keys: t.pick(None, None, next(k)), repeat=20_000 // num)
        )
        settings = Settings(storage=storage.uri, mlflow_uri="http://127.0.0.1:1", model=_MODEL)
        models = {_MODEL: traffic}
        config_ms.append(
            MS
            * seconds(
                lambda s=settings, m=models: plan.applications(s, {}, "file:///code.zip", m),
                rounds=1,
            )
        )
    return [
        Cost(what="choosing a version, all with a weight", by="versions", unit="µs", sizes=VERSIONS,
             values=chosen_us, bound=100,
             then="weights for those alone that get traffic; weight 0 costs next to nothing"),
        Cost(what="the same in the gateway's table", by="versions", unit="µs", sizes=VERSIONS,
             values=picked_us, bound=100),
        Cost(what="policy document", by="versions", unit="kB", sizes=VERSIONS, values=policy_kb,
             bound=1_000, then="versions that nobody asks for are taken down (`jobs.deploy`)"),
        Cost(what="reading the policy", by="versions", unit="ms", sizes=VERSIONS, values=read_ms,
             bound=100),
        Cost(what="a gateway's start: all cards and routes", by="versions", unit="ms",
             sizes=VERSIONS, values=table_ms, bound=5_000,
             then="read cards in parallel; on an object store each is a request"),
        Cost(what="a change of weights in a gateway", by="versions", unit="ms", sizes=VERSIONS,
             values=change_ms, bound=250),
        Cost(what="Serve's config, nothing live yet", by="versions", unit="ms", sizes=VERSIONS,
             values=config_ms, bound=5_000),
        _replicas(),
        *_changes(folder),
    ]  # fmt: skip


def _traffic(storage: Storage, num: int) -> ModelTraffic:
    bundles = {}
    for version in range(1, num + 1):
        card = Card(
            name=_MODEL, version=version, run_id=f"{version:032x}", data_digest="d" * 32,
            height=28, width=28, channels=1, class_names=tuple("0123456789"),
            preprocess=Preprocess(mode="L", fill=(0,)), runtime="onnxruntime",
            git_commit="c" * 40, test_accuracy=0.99,
        )  # fmt: skip
        bundles[version] = write_bundle(storage, card, b"onnx", None)
    return ModelTraffic(weights={version: 1.0 for version in bundles}, bundles=bundles, champion=1)


async def _predict(card: Card, bundle: str, placement: str) -> Replicas:
    async def predict(images_NHWC):  # type: ignore[no-untyped-def]
        raise NotImplementedError

    return Replicas(predict)


async def _first_table_s(storage: Storage) -> float:
    loop = asyncio.get_running_loop()
    router = Router(storage, _predict)
    start_s = loop.time()
    await router.refresh()
    return loop.time() - start_s


async def _change_s(storage: Storage, base: Policy) -> tuple[Router, float]:
    loop = asyncio.get_running_loop()
    router = Router(storage, _predict)
    await router.refresh()
    policy.commit(
        storage, base, base.models, default_model=_MODEL, who="bench", why="other weights"
    )
    start_s = loop.time()
    assert await router.refresh()
    return router, loop.time() - start_s


def _replicas() -> Cost:
    values = []
    for num in REPLICAS:
        channels = Channels(Path("/nowhere"), _MODEL, 10)
        channels._open = {str(n): Channel(10, tells_cause=True) for n in range(num)}
        values.append(US * seconds(channels.pick, repeat=200))
    return Cost(what="choosing a replica", by="replicas of a version on a node", unit="µs",
                sizes=REPLICAS, values=values, bound=200,
                then="look at two replicas at random instead of all")  # fmt: skip


def _changes(folder: Path) -> list[Cost]:
    found_ms, next_ms = [], []
    for num in CHANGES:
        storage = Storage(str(folder / f"changes-{num}"))
        traffic = {_MODEL: _traffic(storage, 2)}
        last: Policy | None = None
        for _ in range(num):
            last = policy.commit(
                storage, last, traffic, default_model=_MODEL, who="bench", why="bench"
            )
        found_ms.append(MS * seconds(lambda s=storage: policy.current(s), repeat=3))
        next_ms.append(
            MS * seconds(lambda s=storage, k=last: policy.current(s, known=k), repeat=100)
        )
    return [
        Cost(what="finding the newest policy at a start", by="changes ever", unit="ms",
             sizes=CHANGES, values=found_ms, bound=1_000,
             then="move old generations' files out of `traffic/`; the newest alone counts"),
        Cost(what="looking for the next policy", by="changes ever", unit="ms", sizes=CHANGES,
             values=next_ms, bound=50),
    ]  # fmt: skip

"""What the steps of a retrain do: each is kept by the digest of its inputs, and can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from lib.config import Preset, Settings
from lib.data.direct import read_split
from lib.data.extend import ExtendConfig, extend
from lib.data.manifest import LIVE, load_manifest
from lib.errors import DataError
from lib.pipeline import tune_once
from lib.registry.candidate import mark, parameters, served_champion, withdraw
from lib.registry.evaluate import predict_all
from lib.registry.models import ensure_bundle, resolve, versions
from lib.registry.registration import register
from lib.serving.bundle import read_card
from lib.serving.predictor import load_predictor
from lib.steps import Step, run_step
from lib.storage import Storage
from lib.train.experiment import DISCRETE, Parameter
from lib.train.presets import search_space
from lib.watch import rollout_state
from lib.watch.labelled import Joined, labelled_requests
from lib.watch.live_gate import judge
from lib.watch.retrain_asked import Options
from lib.watch.retrain_record import Record

Result = Mapping[str, Any]
Rollout = Callable[[Settings, Storage, int, rollout_state.Options], Result]
"""Takes settings, storage, version and how; returns how it ended, with `status`. A rollout of that
version that is under way goes on."""
_ENDED = ("promoted", "rolled_back", "aborted")
"""How a rollout ends for good; any other status is one to go on with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrainSteps:
    """The steps on a real line. Ray must be initialised."""

    settings: Settings
    storage: Storage
    preset: Preset
    joined: Joined
    rollout_of: Rollout
    config: ExtendConfig = field(default_factory=ExtendConfig)

    def champion(self) -> Result:
        """Return the served version and what it was trained on and with."""
        version = served_champion(self.settings, self.storage)
        return {
            "version": version.version,
            "run_id": version.run_id,
            "data_digest": version.data_digest,
            "params": dict(parameters(self.settings, version)),
        }

    def extend(self, champion: Result, start_us: int, end_us: int) -> Step:
        """Make the champion's data set with the labelled requests of that time."""
        parent = load_manifest(self.storage, champion["data_digest"])
        found = labelled_requests(
            self.storage, self.settings.model, parent, self.joined, start_us, end_us
        )
        inputs = {"parent": parent.digest, "rows": found.digest, "config": asdict(self.config)}
        return run_step(
            self.storage,
            "extend",
            inputs,
            lambda: extend(self.storage, parent, found, self.config).summary(),
            lambda result: self.is_there("data", result),
        )

    def search(self, digest: str, params: Result) -> Step:
        """Search with the champion's parameters as the first guess."""
        manifest = load_manifest(self.storage, digest)
        return tune_once(self.settings, self.storage, manifest, warm(self.preset, params))

    def register(self, digest: str, sweep_run_id: str, record: Record) -> Step:
        """Register the best trial, without an alias, and mark it with the retrain."""

        def work() -> Result:
            manifest = load_manifest(self.storage, digest)
            (version,) = register(
                self.settings,
                self.storage,
                manifest,
                sweep_run_id,
                num_versions=1,
                challenges=False,
            )
            mark(self.settings, version.version, record.id, record.reason)
            return {
                "version": version.version,
                "run_id": version.run_id,
                "val_accuracy": version.val_accuracy,
                "test_accuracy": version.test_accuracy,
            }

        inputs = {"model": self.settings.model, "data_digest": digest, "sweep": sweep_run_id}
        return run_step(
            self.storage, "register", inputs, work, lambda made: self.is_there("register", made)
        )

    def judge(self, digest: str, candidate: Result) -> Step:
        """Let candidate and champion answer the held-out live requests."""
        champion = served_champion(self.settings, self.storage)
        manifest = load_manifest(self.storage, digest)

        def work() -> Result:
            images, labels = read_split(self.storage, manifest, LIVE)
            answers = [
                self._answers(number, images)
                for number in (int(candidate["version"]), champion.version)
            ]
            verdict = judge(labels, *answers)
            return {
                **verdict.to_json(),
                "why": verdict.explain(),
                "champion": champion.version,
                "champion_test_accuracy": champion.test_accuracy,
                "candidate_test_accuracy": candidate.get("test_accuracy"),
            }

        inputs = {
            "data_digest": digest,
            "candidate": [candidate["version"], candidate["run_id"]],
            "champion": [champion.version, champion.run_id],
        }
        return run_step(self.storage, "live-gate", inputs, work, lambda verdict: True)

    def withdraw(self, candidate: Result, why: str) -> None:
        """Take the alias back that registration gave it."""
        withdraw(self.settings, int(candidate["version"]), why)

    def rollout(self, candidate: Result, record: Record) -> Step:
        """Hand the version over; what it came to is kept once it has ended."""
        number = int(candidate["version"])
        how = Options.from_json(record.options).rollout(record.by)
        return run_step(
            self.storage,
            "rollout",
            {"model": self.settings.model, "version": number, "run_id": candidate["run_id"]},
            lambda: self.rollout_of(self.settings, self.storage, number, how),
            lambda result: result.get("status") in _ENDED,
        )

    def is_there(self, step: str, result: Result) -> bool:
        """Whether a data set, or a version, is still there; other results are facts."""
        if step == "data":
            try:
                manifest = load_manifest(self.storage, result["digest"])
            except DataError:
                return False
            return all(self.storage.exists(shard.path) for shard in manifest.shards)
        if step == "register":
            pairs = {(found.version, found.run_id) for found in versions(self.settings)}
            return (int(result["version"]), str(result["run_id"])) in pairs
        return True

    def _answers(self, number: int, images: np.ndarray[Any, Any]) -> Any:
        version = resolve(self.settings, self.settings.model, str(number))
        bundle = ensure_bundle(self.settings, self.storage, version)
        predictor = load_predictor(self.storage, bundle, read_card(self.storage, bundle))
        return predict_all(predictor, images).argmax(axis=1)


def warm(preset: Preset, params: Mapping[str, str]) -> Preset:
    """Return the preset with these parameters tried first, then what it would have tried.

    They are moved into the search space where they lie outside; widths and depths that it lacks
    are added to it. Without usable parameters, such as of other people's models, nothing changes.
    """
    space = {parameter.name: parameter for parameter in search_space(preset)}
    guess: dict[str, float] = {}
    for name, text in params.items():
        try:
            value = float(text)
        except ValueError:
            continue
        if name in space:
            guess[name] = _nearest(space[name], value)
    if not guess:
        return preset
    usual = preset.first_guesses or ({},)
    added: dict[str, Any] = {
        plural: tuple(sorted({*getattr(preset, plural), int(guess[name])}))
        for plural, name in (("widths", "stage_width"), ("depths", "depth"), ("growths", "growth"))
        if name in guess
    }
    # Else the usual guess would be the widest net of the widened space.
    kept = {
        "stage_width": max(preset.widths),
        "depth": min(preset.depths),
        "growth": max(preset.growths),
    }
    return replace(preset, **added, first_guesses=(guess, *({**kept, **other} for other in usual)))


def _nearest(parameter: Parameter, value: float) -> float:
    if parameter.kind == DISCRETE:
        return int(value)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.step is not None:
        value = parameter.low + round((value - parameter.low) / parameter.step) * parameter.step
    return min(max(value, parameter.low), parameter.high)

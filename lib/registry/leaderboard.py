"""Which model was best, and the third best: versions and finished trials in one ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lib.config import Settings
from lib.data.manifest import load_manifest
from lib.errors import DataError, RegistryError
from lib.registry import gaps
from lib.registry.gaps import Verdict
from lib.registry.models import CHAMPION, Foreign, Version, survey, way_back
from lib.registry.server import connect, explained
from lib.registry.trials import (
    ACCURACY,
    Trial,
    finished_trials,
    ranked_trials,
)
from lib.serving import policy
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage
from lib.train.experiment import MAXIMIZE, VAL_LOSS, Objective

SPLITS = ("val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the leaderboard: a version, or a trial that is none."""

    version: int | None
    run_id: str
    aliases: tuple[str, ...] = ()
    ready: bool = True
    score: float | None = None
    """What ranks it. On validation it is the trial's own, whether a version was made of it or not:
    the rank of a trial does not change when it is registered."""
    val_loss: float | None = None
    """What the search measured: the lower one wins a tie."""
    val_accuracy: float | None
    """Of a version the exported model's, of a trial what the search measured."""
    test_accuracy: float | None = None
    """None for a trial: test is opened at registration."""
    gap: float | None = None
    gap_holds: bool | None = None
    """None where it can't be judged: a trial, or the data set's manifest is gone."""
    served: str = ""
    """Its part in the traffic now, in words."""
    data_digest: str
    git_commit: str | None
    git_dirty: bool
    images_per_s: float | None = None
    """By the serving runtime at the largest batch measured."""
    created_ms: int
    trained_ms: int = 0
    """When its trial began: the earlier one wins a tie of the loss too."""
    rank: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {**asdict(self), "aliases": list(self.aliases)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """The leaderboard of a model."""

    model: str
    split: str
    objective: Objective = ACCURACY
    """What ranks on validation: the objective of the newest sweep on the board."""
    entries: tuple[Entry, ...]
    """Best first; those without a score last, with rank 0."""
    trials: Mapping[str, Trial] = field(default_factory=dict)
    """By run: what a version can be made of."""
    foreign: tuple[Foreign, ...]
    notes: tuple[str, ...]
    """What a reader should know beside the numbers, such as a champion whose gap did not hold."""

    @property
    def metric(self) -> str:
        """The metric that ranks."""
        return self.objective.metric if self.split == "val" else "test_accuracy"

    def to_json(self, top: int) -> dict[str, Any]:
        """Return the best rows as JSON types."""
        return {
            "model": self.model,
            "split": self.split,
            "metric": self.metric,
            "entries": [entry.to_json() for entry in self.entries[:top]],
            "total": len(self.entries),
            "foreign": [asdict(other) for other in self.foreign],
            "notes": list(self.notes),
        }


def leaderboard(
    settings: Settings,
    storage: Storage,
    *,
    split: str = "val",
    data: str | None = None,
    sweep: str | None = None,
    with_trials: bool = False,
    comparable: bool = False,
) -> Board:
    """Rank a model's versions, and its other finished trials if asked to.

    On validation they are ranked by the objective of their newest sweep, on test by accuracy.

    Args:
        settings: Names the model and the server.
        storage: Holds manifests and the traffic policy.
        split: `val` or `test`.
        data: Digest of a data set, or the start of one; all by default.
        sweep: Run of a sweep: its trials alone.
        with_trials: Whether to rank trials that no registration took.
        comparable: Whether to rank on one data set: without `data` the champion's, else that of
            the newest version or trial.
    """
    if with_trials and split == "test":
        raise RegistryError(
            "trials have no test accuracy: test is opened at registration; rank them with "
            "--split val, or leave --trials out"
        )
    known, foreign = survey(settings)
    client = connect(settings)
    with explained(settings, "listing trials"):
        trials = ranked_trials(client, sweep) if sweep else finished_trials(client, settings.model)
    by_run = {trial.run_id: trial for trial in trials}
    taken = {version.trial_run_id for version in known}
    if sweep:
        known = [version for version in known if version.trial_run_id in by_run]
    loose = [t for t in trials if t.run_id not in taken] if with_trials else []
    verdicts = judged(storage, known)
    served = policy.current(storage)
    traffic = served.models.get(settings.model) if served else None
    entries = [version_entry(version, verdicts.get(version.version), traffic) for version in known]
    entries += [_trial_entry(trial) for trial in loose]
    digest = _whole_digest(data, [entry.data_digest for entry in entries])
    if comparable and digest is None:
        digest = standing_digest(entries)
    chosen = [entry for entry in entries if digest in (None, entry.data_digest)]
    runs = {entry.run_id for entry in chosen}
    measured = sorted((t for t in trials if t.run_id in runs), key=lambda t: t.created_ms)
    objective = measured[-1].objective if measured else ACCURACY
    scored = [_scored(entry, by_run.get(entry.run_id), split, objective) for entry in chosen]
    return Board(
        model=settings.model,
        split=split,
        objective=objective,
        entries=ranked(scored, objective.goal if split == "val" else MAXIMIZE),
        trials=by_run,
        foreign=tuple(foreign),
        notes=tuple(_notes(settings, storage, known, verdicts, traffic, scored)),
    )


def best(board: Board, rank: int) -> Entry:
    """Return the entry of a rank."""
    found = next((entry for entry in board.entries if entry.rank == rank), None)
    if found is None or rank < 1:
        number = sum(entry.rank > 0 for entry in board.entries)
        kind = "finished trials" if board.split == "val" else "versions"
        raise RegistryError(
            f"{board.model} has {number} {kind} with {board.metric} on this data set, so none of "
            f"rank {rank}; `python -m jobs.models list --trials` shows all, jobs.tune makes more"
        )
    return found


def standing_digest(entries: Sequence[Entry]) -> str | None:
    """Return the data set to compare on: the champion's, else the newest version's or trial's."""
    champions = [entry for entry in entries if CHAMPION in entry.aliases]
    newest = sorted(entries, key=lambda e: (e.version or 0, e.created_ms, e.run_id))[-1:]
    return next((entry.data_digest for entry in champions + newest), None)


def ranked(entries: Iterable[Entry], goal: str = MAXIMIZE) -> tuple[Entry, ...]:
    """Return entries best first, then those without a score.

    Equal ones are ordered by their loss on validation, then as they were trained, whether they
    are versions or not.
    """
    sign = -1 if goal == MAXIMIZE else 1
    ordered = sorted(
        entries,
        key=lambda e: (
            e.score is None,
            sign * (e.score or 0.0),
            math.inf if e.val_loss is None else e.val_loss,
            e.trained_ms,
            e.run_id,
        ),
    )
    return tuple(
        replace(entry, rank=0 if entry.score is None else rank)
        for rank, entry in enumerate(ordered, start=1)
    )


def _scored(entry: Entry, trial: Trial | None, split: str, objective: Objective) -> Entry:
    value: float | None
    if split == "test":
        value = entry.test_accuracy
    elif trial is not None:
        value = trial.metrics.get(objective.metric)
    else:
        # A model from elsewhere, or one whose run is gone.
        value = entry.val_accuracy if objective.metric == ACCURACY.metric else None
    return replace(
        entry,
        score=value if value is not None and math.isfinite(value) else None,
        val_loss=trial.metrics.get(VAL_LOSS) if trial else None,
        trained_ms=trial.created_ms if trial else entry.created_ms,
    )


def judged(storage: Storage, known: Sequence[Version]) -> dict[int, Verdict]:
    """Return the verdict on each version's gap, given the earlier ones on the same data."""
    verdicts: dict[int, Verdict] = {}
    for digest in {version.data_digest for version in known}:
        try:
            manifest = load_manifest(storage, digest)
        except DataError:
            continue  # Without the number of rows nothing can be said of chance.
        verdicts |= gaps.judge_all(
            {v.version: v.scores for v in known if v.data_digest == digest},
            val_rows=manifest.rows("val"),
            test_rows=manifest.rows("test"),
        )
    return verdicts


def version_entry(version: Version, verdict: Verdict | None, traffic: ModelTraffic | None) -> Entry:
    """Return a version's row."""
    rates = version.images_per_s.get(version.runtime, {})
    return Entry(
        version=version.version,
        run_id=version.run_id,
        aliases=version.aliases,
        ready=version.ready,
        val_accuracy=version.val_accuracy,
        test_accuracy=version.test_accuracy,
        gap=version.val_test_gap,
        gap_holds=verdict.holds if verdict else None,
        served=", ".join(parts_in(traffic, version.version, version.bundle)),
        data_digest=version.data_digest,
        git_commit=version.git_commit,
        git_dirty=version.git_dirty,
        images_per_s=rates[max(rates, key=int)] if rates else None,
        created_ms=version.created_ms,
    )


def parts_in(traffic: ModelTraffic | None, version: int, bundle: str) -> list[str]:
    """Return, in words, what a version does in the traffic now."""
    if traffic is None or traffic.bundles.get(version) != bundle:
        return []
    share = 100 * traffic.weights.get(version, 0.0) / sum(traffic.weights.values())
    parts = [f"{share:g} %"] if share else []
    if version == traffic.previous_champion:
        parts.append("previous")
    if version in traffic.shadows:
        parts.append(f"shadow {traffic.shadows[version]:g} %")
    pins = sum(pinned == version for pinned in traffic.pins.values())
    if pins:
        parts.append(f"{pins} pin{'s' * (pins > 1)}")
    return parts or ["up"]


def _trial_entry(trial: Trial) -> Entry:
    return Entry(
        version=None,
        run_id=trial.run_id,
        val_accuracy=trial.metrics.get(ACCURACY.metric),
        data_digest=trial.data_digest,
        git_commit=trial.git_commit,
        git_dirty=trial.git_dirty,
        created_ms=trial.created_ms,
    )


def _whole_digest(data: str | None, known: Sequence[str]) -> str | None:
    if data is None:
        return None
    matches = sorted({digest for digest in known if data and digest.startswith(data)})
    if len(matches) != 1:
        there = ", ".join(sorted({digest[:12] for digest in known})) or "none"
        found = "no data set" if not matches else "more than one data set"
        raise RegistryError(f"{found} {data!r} among the versions; there is: {there}")
    return matches[0]


def _notes(
    settings: Settings,
    storage: Storage,
    known: Sequence[Version],
    verdicts: Mapping[int, Verdict],
    traffic: ModelTraffic | None,
    chosen: Sequence[Entry],
) -> Iterable[str]:
    num_sets = len({entry.data_digest for entry in chosen})
    if num_sets > 1:
        yield (
            f"measured on {num_sets} data sets: accuracies compare within one; "
            "--data DIGEST shows one alone"
        )
    if num_unranked := sum(entry.score is None for entry in chosen):
        yield f"{num_unranked} not ranked: they lack what the others are ranked by"
    aliased = next((v.version for v in known if CHAMPION in v.aliases), None)
    champion = traffic.champion if traffic else aliased
    verdict = verdicts.get(champion) if champion is not None else None
    if verdict is not None and not verdict.holds:
        back = way_back(settings, storage, known, verdicts)
        yield f"version {champion}, the champion: {verdict.explain()}; {back}"

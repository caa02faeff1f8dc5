"""Which version was best, and the third best: versions and trials, ranked by one split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lib.config import Settings
from lib.data.manifest import load_manifest
from lib.errors import DataError, RegistryError
from lib.registry import gaps
from lib.registry.gaps import Verdict
from lib.registry.models import CHAMPION, Foreign, Version, survey, way_back
from lib.registry.server import connect, explained
from lib.registry.trials import finished_runs
from lib.serving import policy
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage

SPLITS = ("val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row of the leaderboard: a version, or a trial that is none."""

    version: int | None
    run_id: str
    aliases: tuple[str, ...] = ()
    ready: bool = True
    val_accuracy: float
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
    rank: int = 0

    def accuracy(self, split: str) -> float | None:
        """Return the accuracy on a split."""
        return self.val_accuracy if split == "val" else self.test_accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the row as JSON types."""
        return {**asdict(self), "aliases": list(self.aliases)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Board:
    """The leaderboard of a model."""

    model: str
    split: str
    entries: tuple[Entry, ...]
    """Best first."""
    foreign: tuple[Foreign, ...]
    notes: tuple[str, ...]
    """What a reader should know beside the numbers, such as a champion whose gap did not hold."""

    def to_json(self, top: int) -> dict[str, Any]:
        """Return the best rows as JSON types."""
        return {
            "model": self.model,
            "split": self.split,
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
    with_trials: bool = False,
) -> Board:
    """Rank a model's versions, and its other finished trials if asked to, by accuracy on a split.

    Args:
        settings: Names the model and the server.
        storage: Holds manifests and the traffic policy.
        split: `val` or `test`.
        data: Digest of a data set, or the start of one; all by default.
        with_trials: Whether to rank trials that no registration took.
    """
    if with_trials and split == "test":
        raise RegistryError(
            "trials have no test accuracy: test is opened at registration; rank them with "
            "--split val, or leave --trials out"
        )
    known, foreign = survey(settings)
    trials = _trials(settings, known) if with_trials else []
    digest = _whole_digest(data, [v.data_digest for v in known] + [t.data_digest for t in trials])
    verdicts = judged(storage, known)
    served = policy.current(storage)
    traffic = served.models.get(settings.model) if served else None
    entries = [version_entry(version, verdicts.get(version.version), traffic) for version in known]
    chosen = [entry for entry in entries + trials if digest in (None, entry.data_digest)]
    return Board(
        model=settings.model,
        split=split,
        entries=ranked(chosen, split),
        foreign=tuple(foreign),
        notes=tuple(_notes(settings, storage, known, verdicts, traffic, chosen)),
    )


def best(board: Board, rank: int) -> Entry:
    """Return the version of a rank among those measured on one data set and ready to serve.

    With several data sets on the board it is the champion's, else the newest version's.
    """
    ready = [entry for entry in board.entries if entry.version is not None and entry.ready]
    digest = standing_digest(ready)
    comparable = [entry for entry in ready if entry.data_digest == digest]
    if not 1 <= rank <= len(comparable):
        raise RegistryError(
            f"{board.model} has {len(comparable)} versions to rank on one data set, so none of "
            f"rank {rank}; `python -m jobs.models list` shows all, jobs.register makes more"
        )
    return replace(comparable[rank - 1], rank=rank)


def standing_digest(entries: Sequence[Entry]) -> str | None:
    """Return the data set that versions are compared on: the champion's, else the newest's."""
    champions = [entry for entry in entries if CHAMPION in entry.aliases]
    newest = sorted(entries, key=lambda entry: entry.version or 0)[-1:]
    return next((entry.data_digest for entry in champions + newest), None)


def ranked(entries: Iterable[Entry], split: str) -> tuple[Entry, ...]:
    """Return entries best first; equal ones in the order in which they were made."""
    measured = [(entry.accuracy(split), entry) for entry in entries]
    ordered = sorted(
        ((accuracy, entry) for accuracy, entry in measured if accuracy is not None),
        key=lambda pair: (
            -pair[0],
            pair[1].version is None,
            pair[1].version or pair[1].created_ms,
            pair[1].run_id,
        ),
    )
    return tuple(replace(entry, rank=rank) for rank, (_, entry) in enumerate(ordered, start=1))


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


def _trials(settings: Settings, known: Sequence[Version]) -> list[Entry]:
    client = connect(settings)
    taken = {version.trial_run_id for version in known}
    with explained(settings, "listing trials"):
        runs = finished_runs(client, settings.model)
    return [
        Entry(
            version=None,
            run_id=run.info.run_id,
            val_accuracy=run.data.metrics["val_accuracy"],
            data_digest=run.data.tags.get("rayline.data_digest", ""),
            git_commit=run.data.tags.get("rayline.git_commit"),
            git_dirty=run.data.tags.get("rayline.git_dirty") == "true",
            created_ms=run.info.start_time,
        )
        for run in runs
        if run.info.run_id not in taken
    ]


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
    aliased = next((v.version for v in known if CHAMPION in v.aliases), None)
    champion = traffic.champion if traffic else aliased
    verdict = verdicts.get(champion) if champion is not None else None
    if verdict is not None and not verdict.holds:
        back = way_back(settings, storage, known, verdicts)
        yield f"version {champion}, the champion: {verdict.explain()}; {back}"

"""From what `jobs.tune` is given to an experiment and its work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lib.cli import progress as say
from lib.config import preset
from lib.data.manifest import load_manifest
from lib.errors import ConfigError
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.katib import COMMAND, KatibSearch, load_experiment
from lib.train.presets import preset_experiment
from lib.train.work import Work, command_work, image_work, with_rungs

_PRESET, _SEARCH, _OBJECTIVE = "quick", "tpe/asha", "val_accuracy"


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """The flags that say what is searched; None where one was left out."""

    data: str | None = None
    preset: str | None = None
    search: str | None = None
    objectives: str | None = None
    """Metrics, separated by commas."""
    seed: int | None = None
    experiment: str | None = None
    """Path of a Katib file."""
    trainable: str | None = None

    def __post_init__(self) -> None:
        """Refuse flags that would say nothing beside the others."""
        if self.experiment is None:
            if self.trainable is not None:
                raise ConfigError("--trainable tells how an experiment file is run: give "
                                  "--experiment FILE too")  # fmt: skip
            return
        if self.search is not None:
            raise ConfigError("--search and --experiment exclude each other: the file names its "
                              "algorithm")  # fmt: skip
        if self.objectives is not None:
            raise ConfigError("--objectives and --experiment exclude each other: the file names "
                              "its objective")  # fmt: skip
        unused = [f"--{name}" for name in ("data", "preset") if getattr(self, name) is not None]
        if self.trainable in (None, COMMAND) and unused:
            raise ConfigError(
                f"{', '.join(unused)} would change nothing: the file's command reads its own data; "
                "leave it out, or train Rayline's nets with --trainable rayline"
            )


def search_asked_for(asked: Asked, storage: Storage) -> tuple[Experiment, Work]:
    """Return what is to be searched and what trials do; raise ConfigError if it is not said."""
    if asked.experiment is not None:
        return _of_file(asked, _load(asked, asked.experiment), storage)
    chosen = replace(preset(asked.preset or _PRESET), seed=asked.seed or 0)
    sampler, _, scheduler = (asked.search or _SEARCH).partition("/")
    experiment = preset_experiment(
        chosen,
        sampler=sampler,
        scheduler=scheduler or "asha",
        objectives=(asked.objectives or _OBJECTIVE).split(","),
    )
    manifest = load_manifest(storage, _data(asked))
    return experiment, image_work(storage, manifest, chosen, experiment)


def limits_asked_for(asked: Asked) -> tuple[Experiment, Mapping[str, Any]] | None:
    """Return what a resumed sweep is to go on under, if a file says so, and what must be as was."""
    if asked.experiment is None:
        if given := [name for name, value in asdict(asked).items() if value is not None]:
            raise ConfigError(
                f"--{given[0]} would change nothing: a resumed sweep goes on as it was asked for; "
                "leave it out, or give --experiment FILE with other trial counts"
            )
        return None
    search = _load(asked, asked.experiment)
    experiment = _seeded(asked, search)
    if search.template is None:
        same: dict[str, Any] = {"settings": dict(search.settings)}
        if asked.data is not None:
            same["data_digest"] = asked.data
        if asked.preset is not None:
            rungs = with_rungs(preset(asked.preset), search.rungs, search.most_epochs)
            same["preset"] = asdict(rungs)
        return experiment, same
    return experiment, _command(search, experiment).spec


def _of_file(asked: Asked, search: KatibSearch, storage: Storage) -> tuple[Experiment, Work]:
    for note in search.notes:
        say("tune", note)
    experiment = _seeded(asked, search)
    if search.template is not None:
        return experiment, _command(search, experiment)
    rungs = with_rungs(preset(asked.preset or _PRESET), search.rungs, search.most_epochs)
    _check_start(experiment, rungs.rungs)
    manifest = load_manifest(storage, _data(asked))
    return experiment, image_work(storage, manifest, rungs, experiment, search.settings)


def _check_start(experiment: Experiment, rungs: Sequence[int]) -> None:
    """Refuse an early stopping that would never compare two trials before they end."""
    stopping = experiment.early_stopping
    start = stopping.settings.get("start_step") if stopping else None
    if start is not None and not any(rung >= int(start) for rung in rungs[:-1]):
        raise ConfigError(
            f"spec.earlyStopping: medianstop would stop nothing: it begins at start_step {start} "
            f"(4 if left out), and trials can be compared at {', '.join(map(str, rungs))} epochs, "
            "of which the last is their end; give a smaller start_step, more epochs or another "
            "preset"
        )


def _load(asked: Asked, path: str) -> KatibSearch:
    return load_experiment(path, asked.trainable or COMMAND)


def _seeded(asked: Asked, search: KatibSearch) -> Experiment:
    """Return the experiment; a seed in the file stands before one of the command line."""
    experiment = search.experiment
    if asked.seed is None:
        return experiment
    if "random_state" in experiment.algorithm.settings:
        raise ConfigError("--seed and the file's random_state exclude each other; take one out")
    return replace(experiment, seed=asked.seed)


def _command(search: KatibSearch, experiment: Experiment) -> Work:
    assert search.template is not None
    resources = search.resources
    return command_work(search.template, experiment, cpus=resources.cpus, gpus=resources.gpus)


def _data(asked: Asked) -> str:
    if not asked.data:
        raise ConfigError("give --data DIGEST, which jobs.ingest printed, or --resume SWEEP_RUN_ID")
    return asked.data

"""What the trials of a sweep do, apart from how they are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

from lib.cli import progress
from lib.config import Preset, Settings
from lib.data.loader import Split, read_splits
from lib.data.manifest import Manifest, load_manifest
from lib.data.stream import fits_in_memory
from lib.errors import DataError, SearchError
from lib.registry.trials import CHECKPOINT_PATH
from lib.storage import Storage
from lib.train.command import CommandTemplate
from lib.train.command_trial import LOG_FILE, CommandTrial
from lib.train.experiment import LATENCY_MS, Experiment, Value
from lib.train.loop import TrainConfig
from lib.train.presets import first_guesses, search_space
from lib.train.resources import Room, TrialResources, asked_resources, trial_resources
from lib.train.streamed import StreamedExamples
from lib.train.trainable import SweepTrial
from lib.train.trial import MODEL_FILE, Trial, confusion, examples

IMAGES, COMMAND = "images", "command"
_MOST_REPEATED_PIXELS = 60_000 * 28 * 28
"""Of an epoch that goes over its images again: so it takes no longer than one over MNIST, for which
the time budgets of the presets are made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A trainable and all that its trials share."""

    kind: str
    """What `work_of` knows it by when the sweep is resumed."""
    spec: Mapping[str, Any]
    """What `work_of` makes it from again; JSON."""
    trainable: type[SweepTrial]
    shared: Callable[[TrialResources], Mapping[str, Any]]
    """Returns what `SweepTrial.prepare` gets; called once a driver, it may take its time."""
    resources: Callable[[Settings, Room], TrialResources] = partial(trial_resources, 0.0)
    """Returns what a trial takes of the cluster, and of what all sweeps share; called once a
    driver."""
    rungs: tuple[int, ...] = ()
    """Epochs at which trials are comparable, the last one their end; none: at every report."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Name of a file that trials keep → its path among the artifacts of the trial's run."""
    confusion: Callable[[Callable[[str], bytes | None]], list[list[int]] | None] | None = None
    """Returns rows by true class, then by predicted class, of a model on validation images, from
    what reads the files that its trial kept; None if the trials make no classifier."""
    manifest: Manifest | None = None
    """The data set, if there is one."""
    images_per_epoch: int = 0
    """Images that a trial trains on in an epoch, if it trains on images."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the runs of the sweep and of all trials."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of the sweep's run."""


def image_work(
    storage: Storage,
    manifest: Manifest,
    preset: Preset,
    experiment: Experiment,
    settings: Mapping[str, Value] | None = None,
) -> Work:
    """Return the training of Rayline's own nets on a data set, at the preset's rungs.

    `settings` are those that no trial varies; what is not among them either is the preset's.
    """
    metrics = {*(o.metric for o in experiment.objectives), *experiment.additional_metrics}
    splits: dict[str, Split] = {}
    settings = dict(settings or {})
    num_train = manifest.rows("train")
    step_images = min(num_train, TrainConfig(rungs=preset.rungs).batch_size)
    min_steps = min(
        preset.min_epoch_steps,
        _MOST_REPEATED_PIXELS // (step_images * manifest.height * manifest.width),
    )

    def read(*names: str) -> Mapping[str, Split]:
        if missing := [name for name in names if name not in splits]:
            splits.update(read_splits(storage, manifest, missing))
        return splits

    def shared(resources: TrialResources) -> Mapping[str, Any]:
        held = [name for name in ("train", "val") if fits_in_memory(manifest, name)]
        read(*held)
        for name in ("train", "val"):
            how = "read" if name in held else "trials stream"
            progress("tune", f"{how} {manifest.rows(name):,} {name} images")
        return {
            "storage": storage,
            "manifest": manifest,
            "splits": dict(splits),
            "rungs": preset.rungs,
            "min_epoch_steps": min_steps,
            "settings": {
                **first_guesses(preset)[0],
                "num_views": preset.num_views,
                **settings,
            },
            "num_threads": resources.num_threads,
            "train_seed": experiment.seed,
            "measure_latency": LATENCY_MS in metrics,
        }

    def confused(kept: Callable[[str], bytes | None]) -> list[list[int]] | None:
        content = kept(MODEL_FILE)
        if content is None:
            return None
        if fits_in_memory(manifest, "val"):
            return confusion(content, examples(read("val")["val"]))
        return confusion(content, StreamedExamples(storage=storage, manifest=manifest, split="val"))

    return Work(
        kind=IMAGES,
        spec={
            "data_digest": manifest.digest,
            "preset": asdict(preset),
            "settings": settings,
        },
        trainable=Trial,
        shared=shared,
        resources=partial(
            trial_resources,
            preset.gpus_per_trial,
            num_trials=min(experiment.num_parallel or experiment.num_trials, experiment.num_trials),
        ),
        rungs=preset.rungs,
        artifacts={MODEL_FILE: CHECKPOINT_PATH},
        confusion=confused,
        manifest=manifest,
        images_per_epoch=max(num_train, min_steps * step_images),
        tags={
            "rayline.preset": preset.name,
            "rayline.rungs": ",".join(map(str, preset.rungs)),
        },
        facts=_fixed(preset, experiment, settings),
    )


def command_work(
    template: CommandTemplate,
    experiment: Experiment,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
) -> Work:
    """Return trials that run a command; `cpus` and `gpus` are what each asks for, if it does."""
    return Work(
        kind=COMMAND,
        spec={"template": asdict(template), "cpus": cpus, "gpus": gpus},
        trainable=CommandTrial,
        shared=lambda resources: {"template": template, "experiment": experiment.name},
        resources=partial(asked_resources, cpus, gpus),
        artifacts={LOG_FILE: LOG_FILE},
        tags={"rayline.trainable": COMMAND},
    )


def work_of(storage: Storage, experiment: Experiment, kind: str, spec: Mapping[str, Any]) -> Work:
    """Return the work of a sweep that is resumed."""
    if kind == IMAGES:
        # A preset may have had fields that it has no more.
        known = {field.name for field in fields(Preset)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in spec["preset"].items()
            if name in known
        }
        manifest = load_manifest(storage, spec["data_digest"])
        if manifest.digest != spec["data_digest"]:
            raise DataError(
                f"rows were erased from data set {spec['data_digest']}; start a new sweep with "
                f"{manifest.digest}"
            )
        return image_work(
            storage, manifest, Preset(**values), experiment, spec.get("settings") or {}
        )
    if kind == COMMAND:
        template = CommandTemplate.from_dict(spec["template"])
        return command_work(template, experiment, cpus=spec["cpus"], gpus=spec["gpus"])
    raise SearchError(f"trials of kind {kind!r} can't be resumed by this version")


def with_rungs(preset: Preset, rungs: tuple[int, ...], most_epochs: int | None) -> Preset:
    """Return a preset with these rungs, or with its own cut or lengthened to so many epochs."""
    if rungs:
        return replace(preset, rungs=rungs)
    if most_epochs is None:
        return preset
    kept = tuple(rung for rung in preset.rungs if rung < most_epochs)
    return replace(preset, rungs=(*kept, most_epochs))


def _fixed(
    preset: Preset, experiment: Experiment, settings: Mapping[str, Value]
) -> dict[str, Value]:
    """Return what all trials share of the settings that a preset would vary, or a file names."""
    varied = {parameter.name for parameter in experiment.parameters}
    usual = {p.name: first_guesses(preset)[0][p.name] for p in search_space(preset)}
    return {name: value for name, value in {**usual, **settings}.items() if name not in varied}

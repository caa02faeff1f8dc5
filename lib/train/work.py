"""What the trials of a sweep do, apart from how they are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lib.cli import progress
from lib.config import Preset
from lib.data.loader import read_splits
from lib.data.manifest import Manifest, load_manifest
from lib.errors import SearchError
from lib.registry.trials import CHECKPOINT_PATH
from lib.storage import Storage
from lib.train.experiment import Experiment
from lib.train.resources import TrialResources
from lib.train.trainable import SweepTrial
from lib.train.trial import EAGER_LATENCY_MS, MODEL_FILE, Trial

IMAGES = "images"


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
    rungs: tuple[int, ...] = ()
    """Epochs at which trials are comparable, the last one their end; none: at every report."""
    artifacts: Mapping[str, str] = field(default_factory=dict)
    """Name of a file that trials keep → its path among the artifacts of the trial's run."""
    manifest: Manifest | None = None
    """The data set, if there is one."""
    gpus_per_trial: float = 0.0
    tags: Mapping[str, str] = field(default_factory=dict)
    """For the runs of the sweep and of all trials."""

    @property
    def images_per_epoch(self) -> int:
        """Images that a trial trains on in an epoch."""
        return self.manifest.rows("train") if self.manifest else 0


def image_work(
    storage: Storage, manifest: Manifest, preset: Preset, experiment: Experiment
) -> Work:
    """Return the training of Rayline's own nets on a data set, at the preset's rungs."""
    metrics = {*(o.metric for o in experiment.objectives), *experiment.additional_metrics}

    def shared(resources: TrialResources) -> Mapping[str, Any]:
        splits = read_splits(storage, manifest, ("train", "val"))
        rows = ", ".join(f"{len(split.labels_N):,} {name}" for name, split in splits.items())
        progress("tune", f"read {rows} images")
        return {
            "manifest": manifest,
            "splits": dict(splits),
            "rungs": preset.rungs,
            "num_threads": resources.num_threads,
            "train_seed": experiment.seed,
            "measure_latency": EAGER_LATENCY_MS in metrics,
        }

    return Work(
        kind=IMAGES,
        spec={"data_digest": manifest.digest, "preset": asdict(preset)},
        trainable=Trial,
        shared=shared,
        rungs=preset.rungs,
        artifacts={MODEL_FILE: CHECKPOINT_PATH},
        manifest=manifest,
        gpus_per_trial=preset.gpus_per_trial,
        tags={
            "rayline.preset": preset.name,
            "rayline.rungs": ",".join(map(str, preset.rungs)),
        },
    )


def work_of(storage: Storage, experiment: Experiment, kind: str, spec: Mapping[str, Any]) -> Work:
    """Return the work of a sweep that is resumed."""
    if kind == IMAGES:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in spec["preset"].items()
        }
        manifest = load_manifest(storage, spec["data_digest"])
        return image_work(storage, manifest, Preset(**fields), experiment)
    raise SearchError(f"trials of kind {kind!r} can't be resumed by this version")

"""Versions of a registered model: what is known of each, how to name one, its serving bundle."""

from __future__ import annotations

import functools
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from lib.cli import progress
from lib.config import Settings
from lib.errors import FilesError, RefusedError, RegistryError, StorageError
from lib.registry import gaps
from lib.registry.gaps import Scores, Verdict
from lib.registry.server import connect, download, explained, pages
from lib.serving import policy
from lib.serving.bundle import (
    CARD_FILE,
    ONNX_FILE,
    PT2_FILE,
    Card,
    bundle_path,
    check_model_file,
    file_sha256,
    write_bundle,
)
from lib.serving.traffic import ModelTraffic
from lib.storage import Storage

PT2_PATH = "data/model.pt2"
"""Where MLflow keeps the torch.export program inside a model's folder."""
CHAMPION = "champion"
CHALLENGER = "challenger"
TRIAL_TAG = "rayline.trial_run_id"
"""Also what makes registering twice find the version of the first time."""
READY_TAG = "rayline.ready"
"""Set when a registration has done all it does: bundle published, aliases moved."""
READY_ALONE = "alone"
"""Its value on a version that was made of one trial: complete, but for aliases by its sweep's."""
MODEL_NAME_TAG = "rayline.model"
"""On a logged model: the registered model that it was logged for."""
CREATED_TAG = "rayline.created_ms"
"""When a restored version was first made: MLflow takes no time of creation."""
_PAGE = 200
_TAG_CHARS = 5000
"""Registries on other databases than SQLite take no more in a tag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model comes from that no sweep of Rayline trained."""

    uri: str
    """As it was given to `jobs.register`."""
    sha256: str
    """Over the model's files: what makes registering twice find the version of the first time."""
    framework: str
    owner: str | None
    max_difference: float
    """Of a probability, between the owner's model and what is served."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What registration found out about a trial; each field is a tag `rayline.…` of the version.

    Fields with a default may lack their tag: older versions do.
    """

    trial_run_id: str
    sweep_run_id: str
    data_digest: str
    git_commit: str | None
    git_dirty: bool
    val_accuracy: float
    """Of the exported model, like all the numbers here; the trial's own may be in bfloat16."""
    test_accuracy: float
    test_macro_accuracy: float
    test_macro_f1: float
    val_test_gap: float
    per_class_accuracy: Mapping[str, float]
    """On the test split. Of many classes its tag has the worst that fit; the evaluation has all."""
    baseline_val_accuracy: float
    onnx_max_difference: float
    """Largest difference of a probability between the ONNX and the torch export on test."""
    runtime: str
    """What serves it: the faster one of those below."""
    device: str
    """Where the runtimes were compared."""
    images_per_s: Mapping[str, Mapping[str, float]]
    """Runtime → batch size → images/s, when it was registered."""
    owner: str | None = None
    """Who trained it."""
    framework: str = "rayline"
    origin_uri: str | None = None
    """Where it came from; None if a sweep of Rayline trained it."""
    origin_sha256: str | None = None
    """Over the files of the model that came from there."""
    onnx_sha256: str | None = None
    """Of the file `model.onnx`; None of versions from before digests were kept."""
    pt2_sha256: str | None = None
    """Of the torch.export program; None where there is none."""

    @property
    def scores(self) -> Scores:
        """The two accuracies that the generalisation guard compares."""
        return Scores(val_accuracy=self.val_accuracy, test_accuracy=self.test_accuracy)

    def to_tags(self) -> dict[str, str]:
        """Return the tags of a version: text as it is, all else as JSON."""
        tags = {}
        for field in fields(Facts):
            value = getattr(self, field.name)
            if field.name == "per_class_accuracy":
                value = _worst(value)
            tags[f"rayline.{field.name}"] = value if isinstance(value, str) else json.dumps(value)
        return tags


@dataclass(frozen=True, kw_only=True, slots=True)
class Version(Facts):
    """A version of a registered model."""

    name: str
    version: int
    aliases: tuple[str, ...]
    created_ms: int
    ready: bool
    """False while its registration goes on, or after it was interrupted."""

    @property
    def run_id(self) -> str:
        """MLflow run of the trial that trained it."""
        return self.trial_run_id

    @property
    def bundle(self) -> str:
        """Its serving bundle, relative to the storage root."""
        return bundle_path(self.name, self.version, self.trial_run_id)

    @property
    def is_external(self) -> bool:
        """Whether it came from elsewhere; it is kept as ONNX alone then."""
        return self.origin_uri is not None

    def summary(self) -> dict[str, Any]:
        """Return what a job prints about a version, as JSON types."""
        return {
            "name": self.name,
            "version": self.version,
            "aliases": list(self.aliases),
            "run_id": self.run_id,
            "val_accuracy": self.val_accuracy,
            "test_accuracy": self.test_accuracy,
            "gap": self.val_test_gap,
            "runtime": self.runtime,
            "bundle": self.bundle,
            "framework": self.framework,
            "owner": self.owner,
            "origin": self.origin_uri,
        }

    @classmethod
    def from_mlflow(cls, found: ModelVersion, aliases: tuple[str, ...]) -> Self:
        """Read a version from its tags; raise RegistryError if it is not one of Rayline's."""
        try:
            facts = {
                field.name: _decode(field.name, field.type, found.tags[f"rayline.{field.name}"])
                for field in fields(Facts)
                if f"rayline.{field.name}" in found.tags or field.default is MISSING
            }
            created_ms = int(found.tags.get(CREATED_TAG, found.creation_timestamp))
            bundle_path(found.name, int(found.version), facts["trial_run_id"])
            if found.run_id and found.run_id != facts["trial_run_id"]:
                raise ValueError(f"{TRIAL_TAG} is not its run {found.run_id}")
        except (KeyError, ValueError, StorageError) as error:
            raise RegistryError(
                f"version {found.version} of {found.name!r} was not made by `jobs.register`, or "
                f"its tags were changed ({error}); serve only versions that it made, and set a "
                "changed tag back in MLflow"
            ) from error
        return cls(
            name=found.name,
            version=int(found.version),
            aliases=aliases,
            created_ms=created_ms,
            ready=found.tags.get(READY_TAG) in ("true", READY_ALONE),
            **facts,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Foreign:
    """A version beside Rayline's that something else made, or whose tags were changed."""

    version: int
    aliases: tuple[str, ...]
    why: str
    trial_run_id: str | None = None
    """By its tag; None if no registration wrote one."""
    model_id: str | None = None


def survey(settings: Settings, name: str | None = None) -> tuple[list[Version], list[Foreign]]:
    """Return a model's versions, oldest first, and those that Rayline can't read."""
    client = connect(settings)
    ours: list[Version] = []
    foreign: list[Foreign] = []
    with explained(settings, "listing versions"):
        everything = _all_versions(client, name or settings.model)
    for found, aliases in everything:
        try:
            ours.append(Version.from_mlflow(found, aliases))
        except RegistryError as error:
            foreign.append(
                Foreign(
                    version=int(found.version),
                    aliases=aliases,
                    why=str(error),
                    trial_run_id=found.tags.get(TRIAL_TAG),
                    model_id=logged_model_id(found),
                )
            )
    return ours, foreign


def way_back(
    settings: Settings,
    storage: Storage,
    known: Sequence[Version],
    verdicts: Mapping[int, Verdict],
) -> str:
    """Return which version's gap held, and the command that makes it serve."""
    served = policy.current(storage)
    traffic = served.models.get(settings.model) if served else None
    if traffic:
        return gaps.way_back(verdicts, traffic.champion, traffic.previous_champion)
    champion = next((v.version for v in known if CHAMPION in v.aliases), None)
    return gaps.way_back(verdicts, champion, None)


def versions(settings: Settings, name: str | None = None) -> list[Version]:
    """Return a model's versions, oldest first; none if there is no such model.

    Versions that Rayline can't read are left out, and named once.
    """
    ours, foreign = survey(settings, name)
    if foreign:
        _say_once(
            f"{len(foreign)} of {len(ours) + len(foreign)} versions are left out: "
            + "; ".join(other.why for other in foreign)
        )
    return ours


@functools.cache  # Once for a command that lists versions several times.
def _say_once(message: str) -> None:
    progress("registry", f"WARNING: {message}")


def check_same(traffic: ModelTraffic | None, known: Iterable[Version]) -> None:
    """Refuse to go on where policy and registry mean different versions by the same number.

    A registered model that was deleted and made again counts from 1 again. Bundles are named after
    number and run, so they tell the two apart.
    """
    for version in known:
        served = traffic.bundles.get(version.version) if traffic else None
        if served is not None and served != version.bundle:
            raise RefusedError(
                f"version {version.version} of {version.name!r} is two different models: callers "
                f"get bundle {served}; the registry has run {version.run_id} (bundle "
                f"{version.bundle}, data {version.data_digest[:12]}). Its registered model was "
                "deleted and made again, or MLFLOW_TRACKING_URI is another registry. Nothing was "
                "changed: serve the registry's as another model (MODEL=another-name), or bring the "
                "registry of what is served back (`python -m jobs.models restore DIR`)"
            )


def resolve(settings: Settings, name: str, ref: str) -> Version:
    """Return the version that an alias or a number names, as it is now.

    Raises RegistryError with what there is.
    """
    client = connect(settings)
    with explained(settings, f"looking up {name!r}"):
        known = _all_versions(client, name)
    for found, aliases in known:
        if ref in (str(found.version), *aliases):
            return Version.from_mlflow(found, aliases)
    there = ", ".join(
        f"{found.version} ({', '.join(aliases)})" if aliases else str(found.version)
        for found, aliases in known
    )
    raise RegistryError(
        f"model {name!r} has no version {ref!r}; "
        + (f"it has {there}" if there else "it has none: run jobs.tune, then jobs.register")
    )


def ensure_bundle(settings: Settings, storage: Storage, version: Version) -> str:
    """Publish a version's serving bundle from MLflow unless it is there; return its path.

    Raises FilesError or StorageError if a file, of MLflow or of the bundle, is not the one that was
    registered.
    """
    if storage.exists(f"{version.bundle}/{CARD_FILE}"):
        for name, sha256 in ((ONNX_FILE, version.onnx_sha256), (PT2_FILE, version.pt2_sha256)):
            if sha256:
                check_model_file(storage, version.bundle, name, sha256)
        return version.bundle
    with tempfile.TemporaryDirectory(prefix="rayline-bundle-") as folder:
        model = download_model(settings, version, Path(folder) / "model")
        onnx = (model / ONNX_FILE).read_bytes()
        pt2 = None if version.is_external else (model / PT2_PATH).read_bytes()
        try:
            content = json.loads((model / CARD_FILE).read_text())
            card = Card.from_json({**content, "name": version.name, "version": version.version})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FilesError(
                f"{CARD_FILE} of version {version.version} of {version.name!r} can't be read "
                f"({error!r}); {_RESTORE}"
            ) from error
    return write_bundle(storage, card, onnx, pt2)


_RESTORE = "restore a backup, or delete the version and register its sweep again"


def download_model(settings: Settings, version: Version, folder: Path) -> Path:
    """Copy the files of a version, as MLflow keeps them, and return the folder with `MLmodel`.

    Raises FilesError if they are gone, or are not those that were registered.
    """
    client = connect(settings)
    which = f"version {version.version} of {version.name!r}"
    with explained(settings, f"finding the files of {which}"):
        try:
            source = model_location(client, version.name, version.version)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise FilesError(f"{which} has no model in MLflow any more; {_RESTORE}") from error
        there = get_artifact_repository(source, tracking_uri=settings.mlflow_uri).list_artifacts()
    if not there:
        raise FilesError(f"the files of {which} at {source} were deleted; {_RESTORE}")
    folder.mkdir(parents=True)
    model = download(settings, source, folder)
    wanted = {"MLmodel": None, ONNX_FILE: version.onnx_sha256}
    if not version.is_external:
        wanted[PT2_PATH] = version.pt2_sha256
    for path, sha256 in wanted.items():
        if not (model / path).is_file():
            raise FilesError(f"{which} has no file {path} at {source}; {_RESTORE}")
        if sha256 and (found := file_sha256(model / path)) != sha256:
            raise FilesError(
                f"{path} of {which} at {source} is not the file that was registered: its SHA-256 "
                f"is {found}, not {sha256}; {_RESTORE}"
            )
    if not version.onnx_sha256:
        _say_once(f"{which} was registered before digests were kept: its files aren't checked")
    return model


def _worst(per_class: Mapping[str, float]) -> Mapping[str, float]:
    """Return all classes, or the worst of them that fit in a tag."""
    if len(json.dumps(dict(per_class))) <= _TAG_CHARS:
        return per_class
    kept: dict[str, float] = {}
    chars = 2
    for name, value in sorted(per_class.items(), key=lambda item: (item[1], item[0])):
        chars += len(json.dumps({name: value}))
        if chars > _TAG_CHARS:
            break
        kept[name] = value
    return kept


def logged_model_id(version: ModelVersion) -> str | None:
    """Return the id of the logged model that a version was made of.

    MLflow's SQL store takes a version's `model_id` and does not keep it; the source says it too.
    """
    kind, _, model_id = str(version.source).partition("models:/")
    return version.model_id or (model_id if not kind and model_id.startswith("m-") else None)


def model_location(client: MlflowClient, name: str, version: int) -> str:
    """Return the URI of the folder in which MLflow keeps a version's files."""
    source = str(client.get_model_version_download_uri(name, str(version)))
    if source.startswith("models:/"):
        source = str(client.get_logged_model(source.removeprefix("models:/")).artifact_location)
    return source


def set_champion(settings: Settings, name: str, version: int) -> bool:
    """Make the alias `champion` name a version; return whether it named another one before.

    A challenger that became champion is no challenger any more.
    """
    client = connect(settings)
    with explained(settings, f"setting the champion of {name!r}"):
        aliases = client.get_registered_model(name).aliases
        if str(aliases.get(CHALLENGER)) == str(version):
            client.delete_registered_model_alias(name, CHALLENGER)
        if str(aliases.get(CHAMPION)) == str(version):
            return False
        client.set_registered_model_alias(name, CHAMPION, str(version))
    return True


def _all_versions(client: MlflowClient, name: str) -> list[tuple[ModelVersion, tuple[str, ...]]]:
    try:
        alias_of = client.get_registered_model(name).aliases
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return []
        raise
    # The filter knows no escapes; it takes either kind of quotes.
    quote = next((quote for quote in "'\"" if quote not in name), None)
    query = f"name = {quote}{name}{quote}" if quote else None
    found: list[ModelVersion] = [
        version
        for version in pages(client.search_model_versions, filter_string=query, max_results=_PAGE)
        if version.name == name
    ]
    # The search leaves the aliases out.
    return [
        (
            version,
            tuple(
                sorted(a for a, number in alias_of.items() if str(number) == str(version.version))
            ),
        )
        for version in sorted(found, key=lambda version: int(version.version))
    ]


def _decode(name: str, annotation: Any, text: str) -> Any:
    """Return a tag's value; raise ValueError if it is none of the field's type."""
    # Annotations are not evaluated here: `annotation` is their source text.
    if annotation == "str" or (annotation == "str | None" and text != "null"):
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    kinds: dict[Any, tuple[type, ...]] = {"float": (int, float), "bool": (bool,)}
    kind = kinds.get(annotation, (type(None),) if annotation == "str | None" else (dict,))
    if not isinstance(value, kind) or isinstance(value, bool) != (annotation == "bool"):
        raise ValueError(f"rayline.{name} is {text[:40]!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"rayline.{name} is {text[:40]!r}")
    return value

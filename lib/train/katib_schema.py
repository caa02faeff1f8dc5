"""The form of a Katib file: `kubeflow.org/v1beta1 Experiment` with a `batch/v1 Job` as its trial.

Whatever is not written down here is refused by name: nothing of a file is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from lib.errors import ConfigError

NOT_OFFERED: Mapping[str, str] = {
    "nasConfig": "architectures are not searched; give widths and depths as `parameters`",
    "configMap": "there is no Kubernetes to read it from; put its content under `trialSpec`",
    "initContainers": "prepare what they prepare before the search",
    "primaryPodLabels": "a trial is one process on one node; take it out",
    "valueFrom": "there is no Kubernetes to ask; give the `value`",
    "envFrom": "there is no Kubernetes to ask; give each variable under `env`",
    "volumes": "the command sees this machine's files; name them in its arguments",
    "volumeMounts": "the command sees this machine's files; name them in its arguments",
    "httpGet": "metrics are read from the output or from a file, not over HTTP",
    "customCollector": "metrics are read from the output or from a file; use StdOut or File",
    "nodeSelector": "Ray places the trials; take it out",
    "tolerations": "Ray places the trials; take it out",
    "affinity": "Ray places the trials; take it out",
    "securityContext": "the command runs as the user that runs Ray; take it out",
    "serviceAccountName": "there is no Kubernetes to log in to; take it out",
    "livenessProbe": "a trial that hangs is ended by the sweep's time budget; take it out",
    "lifecycle": "make it part of the command",
    "activeDeadlineSeconds": "use the command `timeout` around the container's command",
    "parallelism": "a trial is one process; parallel trials are `parallelTrialCount`",
    "completions": "a trial is one process; the number of trials is `maxTrialCount`",
    "status": "it is Kubernetes' own record, not part of what is asked for; take it out",
}
"""Why a field that Kubernetes or Katib knows can't be honoured, and what to do instead."""

_Model = TypeVar("_Model", bound="FileModel")
_Text = Annotated[str, Field(min_length=1)]


class FileModel(BaseModel):
    """A part of the file: no unknown field, no guessed type."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        alias_generator=to_camel,
        hide_input_in_errors=True,
    )


class Setting(FileModel):
    """A setting of an algorithm; its value is text."""

    name: _Text
    value: str


class AlgorithmSpec(FileModel):
    """An algorithm of sampling or early stopping."""

    algorithm_name: _Text
    algorithm_settings: list[Setting] = []


class MetricStrategy(FileModel):
    """Which of a metric's values counts."""

    name: _Text
    value: Literal["min", "max", "latest"]


class ObjectiveSpec(FileModel):
    """What is improved, and what else is collected."""

    type: Literal["minimize", "maximize"]
    goal: float | None = None
    objective_metric_name: _Text
    additional_metric_names: list[_Text] = []
    metric_strategies: list[MetricStrategy] = []


class FeasibleSpace(FileModel):
    """Where a parameter may lie; numbers are text, as in Katib."""

    min: str | None = None
    max: str | None = None
    values: Annotated[list[str], Field(alias="list")] = []
    step: str | None = None
    distribution: Literal["uniform", "logUniform", "normal", "logNormal"] | None = None


class ParameterSpec(FileModel):
    """One dimension of the search space."""

    name: _Text
    parameter_type: Literal["double", "int", "discrete", "categorical"]
    feasible_space: FeasibleSpace


class TrialParameter(FileModel):
    """A placeholder of the template."""

    name: Annotated[str, Field(pattern=r"^[^{}]+$")]
    description: str = ""
    reference: _Text


class TrialTemplate(FileModel):
    """How a trial is made."""

    retain: bool = False
    """What a trial wrote is kept either way."""
    primary_container_name: _Text
    success_condition: str | None = None
    failure_condition: str | None = None
    trial_parameters: list[TrialParameter] = []
    trial_spec: dict[str, Any]


class FileSystemPath(FileModel):
    """The file that metrics are read from."""

    path: str = "/var/log/katib/metrics.log"
    kind: Literal["File", "Directory"] = "File"
    format: Literal["TEXT", "JSON"] = "TEXT"


class Filter(FileModel):
    """How a line names metrics: regular expressions with two groups, name and value."""

    metrics_format: list[_Text] = []


class Source(FileModel):
    """Where metrics come from."""

    file_system_path: FileSystemPath | None = None
    filter: Filter | None = None


class Collector(FileModel):
    """Who collects them."""

    kind: str


class MetricsCollectorSpec(FileModel):
    """How metrics get from a trial to the search."""

    source: Source | None = None
    collector: Collector = Collector(kind="StdOut")


class Spec(FileModel):
    """What a Katib experiment asks for."""

    objective: ObjectiveSpec
    algorithm: AlgorithmSpec
    early_stopping: AlgorithmSpec | None = None
    parameters: Annotated[list[ParameterSpec], Field(min_length=1)]
    parallel_trial_count: Annotated[int, Field(gt=0)] | None = None
    max_trial_count: Annotated[int, Field(gt=0)] | None = None
    max_failed_trial_count: Annotated[int, Field(ge=0)] | None = None
    resume_policy: Literal["Never", "LongRunning", "FromVolume"] = "Never"
    metrics_collector_spec: MetricsCollectorSpec = MetricsCollectorSpec()
    trial_template: TrialTemplate


class Metadata(FileModel):
    """Names and marks."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, content: Any) -> Any:
        """Take the start of a generated name for the name: no two experiments meet here."""
        if isinstance(content, dict) and "name" not in content and "generateName" in content:
            content = {**content, "name": str(content["generateName"]).rstrip("-")}
            del content["generateName"]
        return content

    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=40)]
    namespace: str = "default"
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class KatibExperiment(FileModel):
    """The whole file."""

    api_version: Literal["kubeflow.org/v1beta1"]
    kind: Literal["Experiment"]
    metadata: Metadata
    spec: Spec


class TemplateMetadata(FileModel):
    """Marks of a job or pod; Katib names it."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class EnvVar(FileModel):
    """A variable of the command's environment."""

    name: _Text
    value: str = ""


class Resources(FileModel):
    """What a trial takes of a node."""

    limits: dict[str, str | int | float] = {}
    requests: dict[str, str | int | float] = {}


class Container(FileModel):
    """The command of a trial."""

    name: _Text
    image: str = ""
    image_pull_policy: str = ""
    command: Annotated[list[str], Field(min_length=1)]
    args: list[str] = []
    env: list[EnvVar] = []
    working_dir: str | None = None
    resources: Resources = Resources()


class PodSpec(FileModel):
    """A pod of one container."""

    containers: Annotated[list[Container], Field(min_length=1)]
    restart_policy: Literal["Never"] = "Never"


class PodTemplate(FileModel):
    """The pod of a job."""

    metadata: TemplateMetadata = TemplateMetadata()
    spec: PodSpec


class JobSpec(FileModel):
    """What a job runs, once."""

    template: PodTemplate
    backoff_limit: Literal[0] = 0
    ttl_seconds_after_finished: int | None = None
    """Of the job's pods, of which there are none."""


class Job(FileModel):
    """The trial of a Katib experiment as a Kubernetes job."""

    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: TemplateMetadata = TemplateMetadata()
    spec: JobSpec


class _Loader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: no key twice, and 1e-3 is a number."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    # Merged keys (`<<`) give way to the mapping's own.
    own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
    keys = [loader.construct_object(key, deep=True) for key in own]
    if twice := {str(key) for key in keys if keys.count(key) > 1}:
        raise yaml.constructor.ConstructorError(
            None, None, f"{', '.join(sorted(twice))} is given twice", node.start_mark
        )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_file(text: str, name: str, unused: Sequence[Sequence[str]] = ()) -> KatibExperiment:
    """Return the experiment of a YAML text; raise ConfigError naming what is at fault.

    `unused` are paths of fields that nothing will be made of, so they are not looked at.
    """
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except yaml.YAMLError as error:
        raise ConfigError(f"{name} is no YAML: {error}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(
            f"{name} holds {len(documents)} YAML documents; give one file an Experiment"
        )
    content = _without_nulls(documents[0])
    for *parents, field in unused:
        part = content
        for step in parents:
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.pop(field, None)
    return parse(KatibExperiment, content, name)


def _without_nulls(content: Any) -> Any:
    """Return the content without fields of null, which to Kubernetes are not there."""
    if isinstance(content, dict):
        return {key: _without_nulls(value) for key, value in content.items() if value is not None}
    return [_without_nulls(each) for each in content] if isinstance(content, list) else content


def parse(model: type[_Model], content: Any, name: str, prefix: str = "") -> _Model:
    """Return the content as a model; raise ConfigError that names every field at fault."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        faults = [_fault(prefix, dict(fault)) for fault in error.errors()]
        # What can't be honoured first: a missing field is often what stands in its place.
        faults.sort(key=lambda fault: "is refused" not in fault)
        raise ConfigError(f"{name}: {'; '.join(faults)}") from error


def _fault(prefix: str, fault: Mapping[str, Any]) -> str:
    steps = [str(step) for step in fault["loc"]]
    path = ".".join(([prefix] if prefix else []) + steps)
    if fault["type"] == "extra_forbidden":
        why = NOT_OFFERED.get(steps[-1], "this is no field that can be honoured here; take it out")
        return f"{path} is refused: {why}"
    if fault["type"] == "string_type" and steps[-1] in ("min", "max", "step", "value"):
        return f"{path}: Katib takes it as text; put the number in quotes"
    if steps[-1] == "backoffLimit":
        return f"{path} is refused: a trial that fails is not repeated; write 0"
    if steps[-1] == "restartPolicy":
        return f"{path} is refused: a trial that fails is not repeated; write Never"
    message = str(fault["msg"])
    return f"{path}: {message[0].lower()}{message[1:]}"

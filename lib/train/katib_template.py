"""The trial template of a Katib file as a local command."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lib.errors import ConfigError
from lib.train.collector import DEFAULT_FILTER, CollectorConfig, Strategy
from lib.train.command import PLACEHOLDER, CommandTemplate
from lib.train.katib_schema import Container, Job, KatibExperiment, MetricsCollectorSpec, parse

_CONDITIONS = {
    "successCondition": 'status.conditions.#(type=="Complete")#|#(status=="True")#',
    "failureCondition": 'status.conditions.#(type=="Failed")#|#(status=="True")#',
}
_META = re.compile(r"\$\{trialSpec\.(.+?)\}")
_INDEXED = re.compile(r"(Labels|Annotations)\[(.+)\]")
_METRIC_NAME = re.compile(r"[\w.\-: /]+")
_OWN_METRICS = frozenset(
    ("epoch", "done", "config", "trial_id", "training_iteration", "timestamp", "pid", "date",
     "hostname", "node_ip", "rung_count", "at_rung", "time_total_s", "time_this_iter_s")
)  # fmt: skip
"""Names in a report that Tune or Rayline gives."""
_MEMORY = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12,
           "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Resources:
    """What a trial takes of a node; None: its share of what is free."""

    cpus: float | None = None
    gpus: float | None = None
    memory_bytes: int | None = None
    """Of all of a trial's processes together; a trial that holds more fails."""


def command_template(
    file: KatibExperiment,
    strategies: Mapping[str, Strategy],
    constants: Mapping[str, str],
) -> tuple[CommandTemplate, Resources, tuple[str, ...]]:
    """Return what the trials of a file run, what they take, and notes for people.

    `constants` are parameters that are the same in every trial.
    """
    job = _job(file)
    pod = job.spec.template.spec
    container = pod.containers[0]
    primary = file.spec.trial_template.primary_container_name
    if container.name != primary:
        raise ConfigError(f"spec.trialTemplate.primaryContainerName={primary!r} is not the name of "
                          f"the container, {container.name!r}")  # fmt: skip
    collector = _collector(file.spec, strategies)
    resources = _resources(container)
    references, fixed, trial_name = _placeholders(file, job, constants)
    template = CommandTemplate(
        arguments=(*container.command, *container.args),
        env={variable.name: variable.value for variable in container.env},
        working_dir=container.working_dir,
        references=references,
        constants=fixed,
        trial_name=trial_name,
        collector=collector,
        memory_bytes=resources.memory_bytes,
    )
    _check_places(file, template, {*references, *fixed, *([trial_name] if trial_name else [])})
    if collector.file is not None and not template.names(collector.file):
        raise ConfigError(
            f"spec.metricsCollectorSpec: the path {collector.file} is in no argument or variable "
            "of the container, so all trials would write one file; hand it to the command, and "
            "every trial gets a file of its own"
        )
    image = f"the image {container.image} is not pulled; " if container.image else ""
    notes = [f"{image}commands run here, with this environment's python"]
    if file.spec.metrics_collector_spec.collector.kind == "Push":
        notes.append("Push: metrics are read from the output, for there is no database to push "
                     "them to; print `name=value`")  # fmt: skip
    return template, resources, tuple(notes)


def _job(file: KatibExperiment) -> Job:
    template, path = file.spec.trial_template, "spec.trialTemplate"
    content: dict[str, Any] = template.trial_spec
    kind = (content.get("apiVersion"), content.get("kind"))
    if kind != ("batch/v1", "Job"):
        raise ConfigError(
            f"{path}.trialSpec: {kind[0]} {kind[1]} is refused: only a batch/v1 Job can run "
            "without Kubernetes; write the program's command as a Job"
        )
    for name, given in (
        ("successCondition", template.success_condition),
        ("failureCondition", template.failure_condition),
    ):
        if given not in (None, _CONDITIONS[name]):
            raise ConfigError(
                f"{path}.{name} is refused: a trial succeeds with exit code 0; take it out"
            )
    containers = content.get("spec", {}).get("template", {}).get("spec", {}).get("containers")
    if isinstance(containers, list) and len(containers) > 1:
        names = ", ".join(str(each.get("name")) for each in containers if isinstance(each, dict))
        raise ConfigError(
            f"{path}.trialSpec: sidecars are refused: a trial is one process, and there are "
            f"{len(containers)} containers ({names}); leave the primary one"
        )
    return parse(Job, content, file.metadata.name, f"{path}.trialSpec")


def _collector(spec: Any, strategies: Mapping[str, Strategy]) -> CollectorConfig:
    given: MetricsCollectorSpec = spec.metrics_collector_spec
    where, kind = "spec.metricsCollectorSpec", given.collector.kind
    for name in strategies:
        if name in _OWN_METRICS or not _METRIC_NAME.fullmatch(name):
            raise ConfigError(f"spec.objective: a metric can't be called {name!r} here: the name "
                              "is taken, or no name that MLflow takes")  # fmt: skip
    if kind == "Push":
        # The program's text tells the metrics; there is no database that it could push them to.
        kind = "StdOut"
    if kind not in ("StdOut", "File"):
        raise ConfigError(
            f"{where}.collector.kind: {kind} is refused: metrics are read from the output or from "
            "a file; use StdOut or File"
        )
    source = given.source
    place = source.file_system_path if source else None
    filters = tuple(source.filter.metrics_format) if source and source.filter else ()
    objective = spec.objective.objective_metric_name
    if kind == "StdOut":
        if place is not None:
            raise ConfigError(f"{where}.source.fileSystemPath: StdOut reads no file; use File")
        return CollectorConfig(
            objective=objective, strategies=strategies, filters=filters or (DEFAULT_FILTER,)
        )
    if place is None or place.kind != "File" or not place.path.startswith("/"):
        raise ConfigError(f"{where}.source.fileSystemPath: File needs an absolute path of a File")
    if place.format == "JSON" and filters:
        raise ConfigError(f"{where}.source.filter: the format JSON takes no filter")
    return CollectorConfig(
        objective=objective,
        strategies=strategies,
        filters=filters or (DEFAULT_FILTER,),
        file=place.path,
        is_json=place.format == "JSON",
    )


def _resources(container: Container) -> Resources:
    where = "spec.trialTemplate.trialSpec: resources"
    # A limit alone is the request too, as in Kubernetes.
    wanted = {**container.resources.limits, **container.resources.requests}
    known = {"cpu": "cpus", "nvidia.com/gpu": "gpus", "memory": "memory_bytes"}
    if unknown := sorted(set(wanted) - set(known)):
        raise ConfigError(
            f"{where}: {', '.join(unknown)} is refused; Rayline knows {', '.join(known)}"
        )
    return Resources(
        cpus=_cpus(wanted["cpu"], where) if "cpu" in wanted else None,
        gpus=_cpus(wanted["nvidia.com/gpu"], where) if "nvidia.com/gpu" in wanted else None,
        memory_bytes=_bytes(container.resources.limits["memory"], where)
        if "memory" in container.resources.limits
        else None,
    )


def _cpus(quantity: str | float, where: str) -> float:
    text = str(quantity)
    try:
        value = float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r} is no number of processors") from error
    return value


def _bytes(quantity: str | float, where: str) -> int:
    match = re.fullmatch(r"([\d.]+(?:[eE]\d+)?)([kMGT]i?|Ki)?", str(quantity))
    if match is None or (match[2] or "") not in _MEMORY:
        raise ConfigError(f"{where}: {quantity!r} is no amount of memory, such as 512Mi or 2Gi")
    return int(float(match[1]) * _MEMORY[match[2] or ""])


def _placeholders(
    file: KatibExperiment, job: Job, constants: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str], str | None]:
    """Return placeholder → parameter, placeholder → text, and the one for the trial's name."""
    where = "spec.trialTemplate.trialParameters"
    given = file.spec.trial_template.trial_parameters
    for field in ("name", "reference"):
        values = [getattr(each, field) for each in given]
        if twice := sorted({value for value in values if values.count(value) > 1}):
            raise ConfigError(f"{where}: the {field} {', '.join(twice)} is given twice")
    parameters = {parameter.name for parameter in file.spec.parameters}
    references, fixed = {}, {}
    trial_name = None
    for each in given:
        meta = _META.fullmatch(each.reference)
        if meta is not None:
            if meta[1] == "Name":
                trial_name = each.name
            else:
                fixed[each.name] = _metadata(meta[1], file, job, where)
        elif each.reference in constants:
            fixed[each.name] = constants[each.reference]
        elif each.reference in parameters:
            references[each.name] = each.reference
        else:
            raise ConfigError(f"{where} {each.name}: {each.reference!r} is none of spec.parameters")
    if unused := sorted(parameters - set(references.values()) - set(constants)):
        raise ConfigError(f"{where}: the parameters {', '.join(unused)} reach no placeholder")
    return references, fixed, trial_name


def _metadata(key: str, file: KatibExperiment, job: Job, where: str) -> str:
    plain = {"Namespace": file.metadata.namespace, "Kind": job.kind, "APIVersion": job.api_version}
    if key in plain:
        return plain[key]
    indexed = _INDEXED.fullmatch(key)
    if indexed is not None:
        marks = job.metadata.labels if indexed[1] == "Labels" else job.metadata.annotations
        if indexed[2] in marks:
            return marks[indexed[2]]
    raise ConfigError(f"{where}: ${{trialSpec.{key}}} is nothing that the trial's job has")


def _check_places(file: KatibExperiment, template: CommandTemplate, known: set[str]) -> None:
    """Refuse placeholders that stand for nothing, or where nothing is put in for them."""
    used = {match for text in template.texts() for match in PLACEHOLDER.findall(text)}
    anywhere = set(PLACEHOLDER.findall(str(file.spec.trial_template.trial_spec)))
    if missing := sorted(used - known):
        raise ConfigError(f"spec.trialTemplate: ${{trialParameters.{missing[0]}}} is none of the "
                          "trialParameters")  # fmt: skip
    if elsewhere := sorted(anywhere - used):
        raise ConfigError(
            f"spec.trialTemplate: ${{trialParameters.{elsewhere[0]}}} stands where it can't be "
            "honoured; it can in command, args, env and workingDir"
        )
    if unused := sorted(known - used):
        raise ConfigError(f"spec.trialTemplate.trialParameters: {', '.join(unused)} is nowhere in "
                          "the trialSpec")  # fmt: skip

"""A Katib experiment file as a search: the same experiment without Kubernetes.

A trial is either the container's command as a local process, or Rayline's own training with the
file's parameters as its settings. What can't be honoured is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lib.errors import ConfigError
from lib.train import katib_algorithms
from lib.train.collector import Strategy
from lib.train.command import CommandTemplate
from lib.train.experiment import (
    CATEGORICAL,
    CONSTANT_METRICS,
    DISCRETE,
    DOUBLE,
    INT,
    LOG_NORMAL,
    LOG_UNIFORM,
    MAXIMIZE,
    UNIFORM,
    Experiment,
    Named,
    Objective,
    Parameter,
    Value,
)
from lib.train.katib_algorithms import HYPERBAND, PBT
from lib.train.katib_rayline import (
    is_epochs,
    most_epochs,
    rayline_metric,
    rayline_parameters,
    rayline_settings,
)
from lib.train.katib_schema import (
    FeasibleSpace,
    KatibExperiment,
    ObjectiveSpec,
    ParameterSpec,
    Spec,
    read_file,
)
from lib.train.katib_template import Resources, command_template
from lib.train.space import grid_values

COMMAND, RAYLINE = "command", "rayline"
TRAINABLES = (COMMAND, RAYLINE)
_DEFAULT_PARALLEL = 3
_UNUSED = (("spec", "metricsCollectorSpec"), ("spec", "trialTemplate", "primaryPodLabels"))
"""Fields that Rayline's own training has no use for, whatever they ask for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KatibSearch:
    """What an experiment file asks for."""

    experiment: Experiment
    template: CommandTemplate | None
    """What a trial runs; None: Rayline's own training."""
    resources: Resources = field(default_factory=Resources)
    settings: Mapping[str, Value] = field(default_factory=dict)
    """Of Rayline's training: what the file fixes, `epochs` foremost."""
    rungs: tuple[int, ...] = ()
    """Epochs of Rayline's training at which trials are compared; none: the preset's."""
    most_epochs: int | None = None
    """Of Rayline's training: the epochs of the longest trial; None: the preset's."""
    notes: tuple[str, ...] = ()
    """What works in another way than under Kubernetes, for people."""


def load_experiment(path: str, trainable: str = COMMAND) -> KatibSearch:
    """Return what a Katib file asks for; raise ConfigError naming whatever can't be honoured."""
    if trainable not in TRAINABLES:
        raise ConfigError(f"trainable={trainable!r} is none of {', '.join(TRAINABLES)}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the experiment file {path} can't be read: {error}") from error
    name = Path(path).name
    file = read_file(text, name, _UNUSED if trainable == RAYLINE else ())
    try:
        return _for_rayline(file) if trainable == RAYLINE else _for_command(file)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def _for_command(file: KatibExperiment) -> KatibSearch:
    spec = file.spec
    experiment = _experiment(file)
    if experiment.algorithm.name == PBT:
        raise ConfigError(
            "spec.algorithm.algorithmName: pbt hands the checkpoint of one trial to another, which "
            "a command can't take; use --trainable rayline or another algorithm"
        )
    strategies = _strategies(spec.objective)
    notes = []
    constants: dict[str, str] = {}
    if experiment.algorithm.name == HYPERBAND:
        settings = dict(experiment.algorithm.settings)
        resource = settings.pop("resource_name")
        constants[resource] = str(settings["r_l"])
        seed = {name: settings.pop(name) for name in ("random_state",) if name in settings}
        experiment = replace(
            experiment,
            parameters=_without(experiment.parameters, resource),
            algorithm=Named(name="random", settings=seed),
            early_stopping=Named(name="asha", settings=settings),
        )
        notes.append(
            f"hyperband: every trial starts with {resource}={settings['r_l']} and is stopped where "
            "it falls behind (asynchronous successive halving); none is run again for longer"
        )
    texts = {each.name: tuple(each.feasible_space.values) for each in spec.parameters}
    experiment = replace(
        experiment,
        # A command gets the text of the file, as in Katib: 0.10, 010 or 1e-2.
        parameters=tuple(
            replace(each, values=texts[each.name]) if each.kind == DISCRETE else each
            for each in experiment.parameters
        ),
    )
    template, resources, template_notes = command_template(file, strategies, constants)
    settles = strategies[spec.objective.objective_metric_name] == _best(spec.objective)
    return KatibSearch(
        experiment=replace(
            experiment,
            # A command's reports hold what counts so far, so the last one is the whole result.
            objectives=tuple(
                replace(each, by_last=True, settles=settles) for each in experiment.objectives
            ),
        ),
        template=template,
        resources=resources,
        notes=(*katib_algorithms.notes(spec.algorithm), *notes, *template_notes),
    )


def _for_rayline(file: KatibExperiment) -> KatibSearch:
    spec, objective = file.spec, file.spec.objective
    experiment = _experiment(file)
    rungs: tuple[int, ...] = ()
    notes = [
        "trials train Rayline's own nets; the template's command and metrics collector are not "
        "used",
        *katib_algorithms.notes(spec.algorithm),
        *_check_best_epoch(objective),
    ]
    if "'resources': " in str(spec.trial_template.trial_spec):
        notes.append("the template's resources are not used: a trial takes its share of what the "
                     "cluster has free")  # fmt: skip
    placeholders = {each.reference: each.name for each in spec.trial_template.trial_parameters}
    if experiment.algorithm.name == HYPERBAND:
        resource = experiment.algorithm.settings["resource_name"]
        if not is_epochs(resource, placeholders):
            raise ConfigError(
                f"spec.algorithm hyperband: resource_name={resource!r} is not Rayline's epochs, "
                "the one resource that its trials can be given more of"
            )
        experiment, rungs = _hyperband_rungs(experiment)
    if experiment.algorithm.name == PBT:
        experiment = _pbt(experiment)
        notes.append(
            f"pbt: a population of {experiment.num_trials} trials lives through the rungs of the "
            "preset as its generations; no trial is made anew for one"
        )
    parameters = rayline_parameters(experiment.parameters, placeholders)
    parameters, settings = rayline_settings(parameters)
    return KatibSearch(
        experiment=replace(
            experiment,
            objectives=tuple(
                replace(each, metric=metric, constant=metric in CONSTANT_METRICS)
                for each in experiment.objectives
                for metric in [rayline_metric(each.metric)]
            ),
            additional_metrics=tuple(map(rayline_metric, experiment.additional_metrics)),
            parameters=parameters,
        ),
        template=None,
        settings=settings,
        rungs=rungs,
        most_epochs=most_epochs(parameters, settings),
        notes=tuple(notes),
    )


def _check_best_epoch(objective: ObjectiveSpec) -> list[str]:
    """Refuse a strategy under which another epoch than the best one would count.

    Returns notes on strategies of other metrics.
    """
    best, notes = _best(objective), []
    for strategy in objective.metric_strategies:
        if strategy.name != objective.objective_metric_name:
            notes.append(
                f"{strategy.value} of {strategy.name} is not used: of metrics that are not "
                "searched by, every epoch is recorded"
            )
        elif strategy.value != best:
            raise ConfigError(
                f"spec.objective.metricStrategies: {strategy.value} of {strategy.name}: Rayline "
                f"keeps the model of a trial's best epoch; write {best}"
            )
    return notes


def _experiment(file: KatibExperiment) -> Experiment:
    spec = file.spec
    parameters = tuple(_parameter(parameter) for parameter in spec.parameters)
    num_numeric = sum(parameter.kind in (DOUBLE, INT) for parameter in parameters)
    algorithm = katib_algorithms.algorithm(spec.algorithm, num_numeric=num_numeric)
    if algorithm.name == HYPERBAND and spec.early_stopping is not None:
        raise ConfigError("spec.earlyStopping: hyperband stops trials itself; take it out")
    num_trials = _num_trials(spec, algorithm, parameters)
    failed = spec.max_failed_trial_count
    _check_parallel(spec, num_trials)
    return Experiment(
        name=file.metadata.name,
        objectives=(
            Objective(
                metric=spec.objective.objective_metric_name,
                goal=spec.objective.type,
                target=spec.objective.goal,
            ),
        ),
        parameters=parameters,
        algorithm=algorithm,
        early_stopping=katib_algorithms.early_stopping(spec.early_stopping),
        num_trials=num_trials,
        num_parallel=min(spec.parallel_trial_count or _DEFAULT_PARALLEL, num_trials),
        # Katib ends at this many failed trials, but never before the first one.
        max_failed_trials=None if failed is None else max(failed - 1, 0),
        additional_metrics=tuple(spec.objective.additional_metric_names),
        resume_policy=spec.resume_policy,
        seed=int(algorithm.settings.get("random_state", 0)),
    )


def _parameter(spec: ParameterSpec) -> Parameter:
    space, name, kind = spec.feasible_space, spec.name, spec.parameter_type
    where = f"spec.parameters {name}: feasibleSpace"
    if kind in (DISCRETE, CATEGORICAL):
        if space.min or space.max or space.step or space.distribution not in (None, UNIFORM):
            raise ConfigError(f"{where} of a {kind} parameter has a list, nothing else")
        values: tuple[Value, ...] = tuple(space.values)
        if kind == DISCRETE:
            values = tuple(_number(text, f"{where}.list") for text in space.values)
        if len(set(values)) != len(values):
            raise ConfigError(f"{where}.list names a value twice")
        return Parameter(name=name, kind=kind, values=values)
    if space.values:
        raise ConfigError(f"{where}.list: a {kind} parameter has min and max instead")
    if space.min is None or space.max is None:
        raise ConfigError(f"{where} of a {kind} parameter needs min and max")
    low, high, step = _range(space, kind, where)
    return Parameter(
        name=name,
        kind=kind,
        low=low,
        high=high,
        step=step,
        distribution=space.distribution or UNIFORM,
    )


def _range(space: FeasibleSpace, kind: str, where: str) -> tuple[float, float, float | None]:
    assert space.min is not None
    assert space.max is not None
    low, high = _number(space.min, f"{where}.min"), _number(space.max, f"{where}.max")
    step = None if space.step is None else _number(space.step, f"{where}.step")
    for edge, value in (("min", low), ("max", high), ("step", step)):
        if kind == INT and value is not None and not float(value).is_integer():
            raise ConfigError(f"{where}.{edge}={value} of an int parameter is no whole number")
    if space.distribution in (LOG_UNIFORM, LOG_NORMAL) and low <= 0:
        raise ConfigError(f"{where}.min={space.min}: {space.distribution} needs a positive number")
    return low, high, step


def _number(text: str, where: str) -> float | int:
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"{where}={text!r} is no number") from error
    if not math.isfinite(value):
        raise ConfigError(f"{where}={text!r} is not finite")
    return int(text) if text.strip().lstrip("+-").isdigit() else value


def _strategies(spec: ObjectiveSpec) -> dict[str, Strategy]:
    """Return which value of each collected metric counts; by default the best one, as in Katib."""
    names = [spec.objective_metric_name, *spec.additional_metric_names]
    if len(set(names)) != len(names):
        raise ConfigError("spec.objective: a metric is named twice")
    given = {strategy.name: strategy.value for strategy in spec.metric_strategies}
    if unknown := sorted(set(given) - set(names)):
        raise ConfigError(f"spec.objective.metricStrategies: {', '.join(unknown)} is not collected")
    return {name: given.get(name, _best(spec)) for name in names}


def _best(spec: ObjectiveSpec) -> Strategy:
    return "max" if spec.type == MAXIMIZE else "min"


def _num_trials(spec: Spec, algorithm: Named, parameters: Sequence[Parameter]) -> int:
    if spec.max_trial_count is not None:
        return spec.max_trial_count
    if algorithm.name != "grid":
        raise ConfigError("spec.maxTrialCount is missing: without it the search has no end")
    return math.prod(len(grid_values(parameter)) for parameter in parameters)


def _check_parallel(spec: Spec, num_trials: int) -> None:
    if (count := spec.parallel_trial_count or 0) > num_trials:
        raise ConfigError(
            f"spec.parallelTrialCount={count} is more than maxTrialCount={num_trials}"
        )


def _without(parameters: Sequence[Parameter], name: str) -> tuple[Parameter, ...]:
    if name not in {parameter.name for parameter in parameters}:
        raise ConfigError(f"spec.algorithm hyperband: resource_name={name!r} is no parameter")
    return tuple(parameter for parameter in parameters if parameter.name != name)


def _hyperband_rungs(experiment: Experiment) -> tuple[Experiment, tuple[int, ...]]:
    """Return the experiment with Rayline's epochs as its resource, and the epochs of its rungs."""
    settings = dict(experiment.algorithm.settings)
    resource, most, eta = settings.pop("resource_name"), settings.pop("r_l"), settings.get("eta", 3)
    parameters = _without(experiment.parameters, resource)
    rungs = [most]
    while rungs[0] >= eta:
        rungs.insert(0, rungs[0] // eta)
    return replace(
        experiment, parameters=parameters, algorithm=Named(name=HYPERBAND, settings=settings)
    ), tuple(rungs)


def _pbt(experiment: Experiment) -> Experiment:
    """Return the experiment with its population as its trials, which live through generations."""
    settings = dict(experiment.algorithm.settings)
    settings.pop("suggestion_trial_dir", None)  # Rayline's trials have their checkpoints already.
    population = min(
        int(settings.pop("n_population", experiment.num_trials)), experiment.num_trials
    )
    return replace(
        experiment,
        algorithm=Named(name=PBT, settings=settings),
        num_trials=population,
        num_parallel=min(experiment.num_parallel or population, population),
    )

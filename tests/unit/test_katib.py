"""Katib's experiment files: what they become, and what is refused by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib.errors import ConfigError, SearchError
from lib.train.experiment import Parameter
from lib.train.katib import COMMAND, RAYLINE, KatibSearch, load_experiment
from lib.train.samplers import Study
from lib.train.schedulers import SCHEDULERS, scheduler_of

TEMPLATE = """
apiVersion: kubeflow.org/v1beta1
kind: Experiment
metadata: {namespace: kubeflow, name: shape}
spec:
  objective: {type: minimize, goal: 1e-3, objectiveMetricName: loss}
  algorithm: {algorithmName: random}
  parallelTrialCount: 3
  maxTrialCount: 12
  maxFailedTrialCount: 3
  parameters:
    - {name: lr, parameterType: double, feasibleSpace: {min: "0.01", max: "0.05"}}
    - {name: momentum, parameterType: double, feasibleSpace: {min: "0.5", max: "0.9"}}
  trialTemplate:
    primaryContainerName: training
    trialParameters:
      - {name: learningRate, description: of the optimizer, reference: lr}
      - {name: momentum, reference: momentum}
    trialSpec:
      apiVersion: batch/v1
      kind: Job
      spec:
        template:
          spec:
            containers:
              - name: training
                image: example.com/mnist:latest
                command:
                  - python3
                  - /opt/mnist.py
                  - --lr=${trialParameters.learningRate}
                  - --momentum=${trialParameters.momentum}
            restartPolicy: Never
"""

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., KatibSearch]:
    """Load the template after changes to its spec."""

    def load(*changes: Change, trainable: str = COMMAND) -> KatibSearch:
        content = copy.deepcopy(yaml.safe_load(TEMPLATE.replace("1e-3", "0.001")))
        for change in changes:
            change(content["spec"])
        file = tmp_path / "experiment.yaml"
        file.write_text(json.dumps(content))  # YAML too, with every text in quotes.
        return load_experiment(str(file), trainable)

    return load


def setting(name: str, value: Any) -> Change:
    return lambda spec: spec.update({name: value})


def algorithm(name: str, **settings: str) -> Change:
    given = [{"name": key, "value": value} for key, value in settings.items()]
    return setting("algorithm", {"algorithmName": name, "algorithmSettings": given})


def parameter(kind: str, /, name: str = "lr", **space: Any) -> Change:
    def change(spec: dict[str, Any]) -> None:
        spec["parameters"][0] = {"name": name, "parameterType": kind, "feasibleSpace": space}
        spec["trialTemplate"]["trialParameters"][0]["reference"] = name

    return change


def container(**fields: Any) -> Change:
    def change(spec: dict[str, Any]) -> None:
        pod = spec["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"]
        pod["containers"][0].update(fields)

    return change


def pod(**fields: Any) -> Change:
    return lambda spec: spec["trialTemplate"]["trialSpec"]["spec"]["template"]["spec"].update(
        fields
    )


def job(**fields: Any) -> Change:
    return lambda spec: spec["trialTemplate"]["trialSpec"].update(fields)


def collector(kind: str, **source: Any) -> Change:
    content: dict[str, Any] = {"collector": {"kind": kind}}
    if source:
        content["source"] = source
    return setting("metricsCollectorSpec", content)


def objective(**fields: Any) -> Change:
    return lambda spec: spec["objective"].update(fields)


def test_a_file_becomes_an_experiment_and_a_command(tmp_path: Path) -> None:
    file = tmp_path / "random.yaml"
    file.write_text(TEMPLATE)
    search = load_experiment(str(file), COMMAND)
    experiment = search.experiment
    assert experiment.name == "shape"
    assert (experiment.objective.metric, experiment.objective.goal) == ("loss", "minimize")
    assert experiment.objective.target == 0.001  # 1e-3 is a number in Kubernetes' YAML.
    assert experiment.algorithm.name == "random"
    assert (experiment.num_trials, experiment.num_parallel) == (12, 3)
    assert experiment.resume_policy == "Never"
    lr, momentum = experiment.parameters
    assert lr == Parameter(name="lr", kind="double", low=0.01, high=0.05)
    assert search.template is not None
    command = search.template.render({"lr": 0.1 + 0.2, "momentum": 0.5}, "shape-1", "/trial")
    assert command.arguments == (
        "python3",
        "/opt/mnist.py",
        "--lr=0.30000000000000004",
        "--momentum=0.5",
    )
    assert any("example.com/mnist:latest is not pulled" in note for note in search.notes)


@pytest.mark.parametrize(("given", "allowed"), [(0, 0), (1, 0), (3, 2)])
def test_as_many_failed_trials_as_katib_allows(
    load: Callable[..., KatibSearch], given: int, allowed: int
) -> None:
    """Katib fails an experiment when the count is reached, and not before the first failure."""
    assert load(setting("maxFailedTrialCount", given)).experiment.max_failed_trials == allowed


def test_defaults_are_katibs(load: Callable[..., KatibSearch]) -> None:
    def shorten(spec: dict[str, Any]) -> None:
        del spec["parallelTrialCount"], spec["maxFailedTrialCount"]

    experiment = load(shorten).experiment
    assert experiment.num_parallel == 3
    assert experiment.max_failed_trials is None
    stopping = load(setting("earlyStopping", {"algorithmName": "medianstop"})).experiment
    assert stopping.early_stopping is not None
    assert stopping.early_stopping.settings == {"min_trials_required": 3, "start_step": 4}


@pytest.mark.parametrize(
    ("change", "kind", "low", "high", "step", "distribution", "values"),
    [
        (parameter("int", min="1", max="9"), "int", 1, 9, None, "uniform", ()),
        (parameter("int", min="1", max="9", step="2"), "int", 1, 9, 2, "uniform", ()),
        (parameter("double", min="1e-4", max="1", distribution="logUniform"),
         "double", 1e-4, 1, None, "logUniform", ()),
        (parameter("double", min="0", max="1", step="0.1", distribution="normal"),
         "double", 0, 1, 0.1, "normal", ()),
        (parameter("int", min="32", max="64", distribution="logNormal"),
         "int", 32, 64, None, "logNormal", ()),
        (parameter("discrete", list=["16", "0.5"]),
         "discrete", None, None, None, "uniform", ("16", "0.5")),
        (parameter("categorical", list=["sgd", "16"]),
         "categorical", None, None, None, "uniform", ("sgd", "16")),
    ],
)  # fmt: skip
def test_parameters(
    load: Callable[..., KatibSearch], change: Change, kind: str, low: float, high: float,
    step: float, distribution: str, values: tuple[Any, ...],
) -> None:  # fmt: skip
    assert load(change).experiment.parameters[0] == Parameter(
        name="lr", kind=kind, low=low, high=high, step=step, distribution=distribution,
        values=values,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (algorithm("grid"), {}),
        (algorithm("sobol"), {}),
        (algorithm("tpe", n_startup_trials="5", random_state="7"),
         {"n_startup_trials": 5, "random_state": 7}),
        (algorithm("tpe", gamma="0.25", prior_weight="1.1", n_EI_candidates="24"),
         {"n_ei_candidates": 24}),
        (algorithm("multivariate-tpe", n_ei_candidates="8"), {"n_ei_candidates": 8}),
        (algorithm("cmaes", sigma="0.2", restart_strategy="none"), {"sigma": 0.2}),
        (algorithm("bayesianoptimization", random_state="10", base_estimator="GP"),
         {"random_state": 10}),
    ],
)  # fmt: skip
def test_algorithms(
    load: Callable[..., KatibSearch], change: Change, settings: dict[str, Any]
) -> None:
    assert load(change).experiment.algorithm.settings == settings


def test_a_command_gets_a_listed_number_as_the_file_writes_it(
    load: Callable[..., KatibSearch],
) -> None:
    texts = ["0.10", "1e-2", "010"]
    search = load(parameter("discrete", list=texts))
    assert search.template is not None
    given = []
    for _ in range(20):
        params = Study(search.experiment).ask()[1]
        assert params["lr"] in texts
    for text in texts:
        command = search.template.render({"lr": text, "momentum": 0.5}, "t", "/trial")
        given.append(command.arguments[2])
    assert given == ["--lr=0.10", "--lr=1e-2", "--lr=010"]
    with pytest.raises(ConfigError, match="names a value twice"):
        load(parameter("discrete", list=["0.10", "0.1"]))
    trained = load(parameter("discrete", list=texts), trainable=RAYLINE)
    assert trained.experiment.parameters[0].values == (0.1, 0.01, 10)


@pytest.mark.parametrize(
    ("change", "trainable", "note"),
    [
        (algorithm("tpe", gamma="0.25"), COMMAND, "gamma are hyperopt's"),
        (algorithm("tpe", prior_weight="1"), RAYLINE, "prior_weight are hyperopt's"),
        (collector("Push"), COMMAND, "metrics are read from the output"),
        (container(resources={"limits": {"cpu": 4}}), RAYLINE, "resources are not used"),
        (
            objective(
                additionalMetricNames=["accuracy"],
                metricStrategies=[{"name": "accuracy", "value": "max"}],
            ),
            RAYLINE,
            "max of accuracy is not used",
        ),
    ],
)
def test_what_changes_nothing_here_is_said(
    load: Callable[..., KatibSearch], change: Change, trainable: str, note: str
) -> None:
    assert any(note in said for said in load(change, trainable=trainable).notes)
    assert not any(note in said for said in load(trainable=trainable).notes)


def test_a_metrics_name_may_hold_a_colon(load: Callable[..., KatibSearch]) -> None:
    search = load(objective(objectiveMetricName="eval:loss"))
    assert search.experiment.objective.metric == "eval:loss"


def test_yaml_is_read_as_kubernetes_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    text = TEMPLATE.replace(
        "metadata: {namespace: kubeflow, name: shape}",
        "metadata: {generateName: shape-, labels: null, creationTimestamp: null}",
    )
    text = text.replace(
        '- {name: lr, parameterType: double, feasibleSpace: {min: "0.01", max: "0.05"}}',
        '- &base {name: lr, parameterType: double, feasibleSpace: {min: "0.01", max: "0.05"}}',
    ).replace(
        '- {name: momentum, parameterType: double, feasibleSpace: {min: "0.5", max: "0.9"}}',
        "- {<<: *base, name: momentum}",
    )
    text = text.replace(
        "        template:\n",
        "        ttlSecondsAfterFinished: 60\n        template:\n"
        "          metadata: {creationTimestamp: null}\n",
    )
    file.write_text(text)
    experiment = load_experiment(str(file), COMMAND).experiment
    assert experiment.name == "shape"
    assert [(p.name, p.low, p.high) for p in experiment.parameters] == [
        ("lr", 0.01, 0.05),
        ("momentum", 0.01, 0.05),
    ]
    file.write_text(text.replace("maxTrialCount: 12", "maxTrialCount: 12\n  maxTrialCount: 13"))
    with pytest.raises(ConfigError, match="maxTrialCount is given twice"):
        load_experiment(str(file), COMMAND)


def test_a_seed_of_the_file_is_the_searchs(load: Callable[..., KatibSearch]) -> None:
    assert load(algorithm("random", random_state="7")).experiment.seed == 7


def epochs(**space: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        spec["parameters"].append(
            {"name": "epochs", "parameterType": "int", "feasibleSpace": space}
        )
        spec["trialTemplate"]["trialParameters"].append({"name": "n", "reference": "epochs"})
        container(args=["--epochs=${trialParameters.n}"])(spec)

    return change


def hyperband(spec: dict[str, Any]) -> None:
    algorithm("hyperband", resource_name="epochs", eta="2", r_l="8")(spec)
    epochs(min="1", max="8")(spec)


def test_hyperband_gives_a_command_all_of_the_resource_and_stops_it_early(
    load: Callable[..., KatibSearch],
) -> None:
    search = load(hyperband)
    assert [parameter.name for parameter in search.experiment.parameters] == ["lr", "momentum"]
    assert search.experiment.early_stopping is not None
    assert search.experiment.early_stopping.settings == {"eta": 2, "r_l": 8}
    assert search.template is not None
    command = search.template.render({"lr": 0.1, "momentum": 0.5}, "t", "/trial")
    assert command.arguments[-1] == "--epochs=8"
    assert any("hyperband" in note for note in search.notes)


def test_hyperband_on_raylines_training_compares_at_powers_of_eta(
    load: Callable[..., KatibSearch],
) -> None:
    search = load(hyperband, trainable=RAYLINE)
    assert search.rungs == (1, 2, 4, 8)
    assert search.experiment.algorithm.name == "hyperband"
    assert search.experiment.algorithm.settings == {"eta": 2}


def test_epochs_of_a_file_are_how_long_trials_train(load: Callable[..., KatibSearch]) -> None:
    assert load(trainable=RAYLINE).most_epochs is None
    search = load(epochs(min="4", max="4"), trainable=RAYLINE)
    assert (search.most_epochs, search.settings) == (4, {"epochs": 4})
    search = load(epochs(min="2", max="6"), trainable=RAYLINE)
    assert (search.most_epochs, dict(search.settings)) == (6, {})
    assert "epochs" in {parameter.name for parameter in search.experiment.parameters}


def test_a_population_lives_through_the_rungs(load: Callable[..., KatibSearch]) -> None:
    given = algorithm("pbt", n_population="5", truncation_threshold="0.2",
                      suggestion_trial_dir="/var/log/katib/checkpoints/")  # fmt: skip
    search = load(given, trainable=RAYLINE)
    assert search.experiment.num_trials == 5
    assert search.experiment.algorithm.settings == {"truncation_threshold": 0.2}
    assert any("a population of 5 trials" in note for note in search.notes)


def test_raylines_settings_go_by_many_names(load: Callable[..., KatibSearch]) -> None:
    search = load(
        parameter("categorical", name="x", list=["0.1", "0.2"]),  # The template: learningRate.
        lambda spec: spec["parameters"].append(
            {"name": "batch-size", "parameterType": "discrete", "feasibleSpace": {"list": ["64"]}}
        ),
        objective(type="maximize", goal=0.99, objectiveMetricName="Validation-accuracy"),
        trainable=RAYLINE,
    )
    names = [parameter.name for parameter in search.experiment.parameters]
    assert names == ["learning_rate", "momentum"]
    assert search.experiment.parameters[0].values == (0.1, 0.2)
    assert search.settings == {"batch_size": 64}
    assert search.experiment.objective.metric == "val_accuracy"
    assert search.template is None


def test_the_files_of_trials_do_not_meet(load: Callable[..., KatibSearch]) -> None:
    """The same path in every container; here each trial's own file stands for it."""
    search = load(
        container(args=["--log=/katib/m.log", "--copy=/old/katib/m.log", "/katib/m.log.old"]),
        collector("File", fileSystemPath={"path": "/katib/m.log", "kind": "File"}),
    )
    assert search.template is not None
    command = search.template.render({"lr": 0.1, "momentum": 0.5}, "t", "/trial")
    assert command.metrics_file == "/trial/katib/m.log"
    assert command.arguments[-3:] == (
        "--log=/trial/katib/m.log",
        "--copy=/old/katib/m.log",
        "/katib/m.log.old",
    )


def test_a_trials_own_names_and_kubernetes_variables(load: Callable[..., KatibSearch]) -> None:
    def describe(spec: dict[str, Any]) -> None:
        template = spec["trialTemplate"]
        template["trialSpec"]["metadata"] = {"labels": {"team": "night"}}
        template["trialParameters"] += [
            {"name": "me", "reference": "${trialSpec.Name}"},
            {"name": "team", "reference": "${trialSpec.Labels[team]}"},
        ]

    search = load(
        describe,
        container(
            env=[
                {"name": "WHO", "value": "${trialParameters.me}"},
                {"name": "OUT", "value": "$(WHO)/${trialParameters.team}"},
            ],
            args=["$(OUT)", "$$(OUT)", "$(ELSEWHERE)"],
        ),
    )
    assert search.template is not None
    command = search.template.render({"lr": 0.1, "momentum": 0.5}, "shape-3", "/trial")
    assert command.env == {"WHO": "shape-3", "OUT": "shape-3/night"}
    assert command.arguments[-3:] == ("shape-3/night", "$(OUT)", "$(ELSEWHERE)")
    with pytest.raises(SearchError, match="no parameter 'lr'"):
        search.template.render({}, "shape-3", "/trial")


def test_limits_and_strategies(load: Callable[..., KatibSearch]) -> None:
    search = load(
        container(resources={"limits": {"cpu": "500m", "memory": "1Gi"}}),
        objective(
            additionalMetricNames=["accuracy"],
            metricStrategies=[{"name": "loss", "value": "latest"}],
        ),
    )
    assert search.resources.cpus == 0.5
    assert search.template is not None
    assert search.template.memory_bytes == 2**30
    assert search.template.collector.strategies == {"loss": "latest", "accuracy": "min"}
    assert search.experiment.objective.by_last
    assert not search.experiment.objective.settles, "the last loss may be above the goal again"
    assert load().experiment.objective.settles
    assert not load(trainable=RAYLINE).experiment.objective.by_last


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([setting("nasConfig", {"graphConfig": {}})], "spec.nasConfig is refused"),
        ([algorithm("enas")], "enas searches for architectures"),
        ([algorithm("hyperopt-tpe")], "'hyperopt-tpe' is not offered"),
        ([algorithm("tpe", lucky="1")], "the setting 'lucky' is not offered"),
        ([algorithm("tpe", random_state="x")], "random_state='x'"),
        ([algorithm("cmaes", restart_strategy="ipop")], "restart_strategy='ipop'"),
        ([algorithm("bayesianoptimization", base_estimator="RF")], "only GP is offered"),
        ([algorithm("cmaes"), parameter("categorical", list=["a"])], "cmaes needs two or more"),
        ([algorithm("hyperband", r_l="9")], "hyperband needs the settings resource_name"),
        ([algorithm("hyperband", r_l="9", resource_name="epochs")], "'epochs' is no parameter"),
        ([algorithm("pbt", n_population="5", truncation_threshold="0.2")], "--trainable rayline"),
        ([algorithm("pbt", truncation_threshold="0.6")], "at most at 0.5"),
        ([setting("earlyStopping", {"algorithmName": "asha"})], "spec.earlyStopping"),
        ([pod(initContainers=[{"name": "a"}])], "initContainers is refused: prepare"),
        ([pod(volumes=[])], "volumes is refused"),
        ([pod(containers=[{"name": "training"}, {"name": "proxy"}])], r"sidecars .*proxy"),
        ([pod(restartPolicy="OnFailure")], "restartPolicy is refused"),
        ([container(command=[])], "command: list should have at least 1 item"),
        ([container(env=[{"name": "A", "valueFrom": {}}])], "valueFrom is refused"),
        ([container(envFrom=[])], "envFrom is refused"),
        ([container(ports=[])], "ports is refused: this is no field"),
        ([container(resources={"limits": {"fpga": 1}})], "fpga is refused"),
        ([container(name="other")], "primaryContainerName='training' is not the name"),
        ([container(args=["${trialParameters.more}"])], "more} is none of the trialParameters"),
        ([container(image="x:${trialParameters.learningRate}", command=["true"])],
         "stands where it can't be honoured"),
        ([collector("TensorFlowEvent")], "TensorFlowEvent is refused"),
        ([collector("PrometheusMetric")], "PrometheusMetric is refused"),
        ([collector("Custom")], "Custom is refused"),
        ([collector("File", fileSystemPath={"path": "/m.log"})], "all trials would write one file"),
        ([collector("File", fileSystemPath={"path": "m.log"})], "needs an absolute path"),
        ([collector("File", fileSystemPath={"path": "/m", "format": "JSON"},
                    filter={"metricsFormat": ["(a)(b)"]})], "JSON takes no filter"),
        ([collector("StdOut", filter={"metricsFormat": ["loss"]})], "needs two groups"),
        ([collector("StdOut", filter={"metricsFormat": ["(loss"]})], "no regular expression"),
        ([objective(type="maximise")], "spec.objective.type"),
        ([objective(additionalMetricNames=["loss"])], "a metric is named twice"),
        ([objective(objectiveMetricName="epoch")], "can't be called 'epoch'"),
        ([objective(metricStrategies=[{"name": "acc", "value": "max"}])], "acc is not collected"),
        ([objective(metricStrategies=[{"name": "loss", "value": "mean"}])], "metricStrategies"),
        ([parameter("double", min=0.1, max="1")], "put the number in quotes"),
        ([parameter("double", min="a", max="1")], "min='a' is no number"),
        ([parameter("double", min="1")], "needs min and max"),
        ([parameter("double", min="1", max="0")], "must be numbers in order"),
        ([parameter("double", list=["1"])], "has min and max instead"),
        ([parameter("int", min="0.5", max="1")], "no whole number"),
        ([parameter("double", min="0", max="1", distribution="logUniform")], "positive number"),
        ([parameter("discrete", list=["a"])], "'a' is no number"),
        ([parameter("categorical", list=["a", "a"])], "names a value twice"),
        ([parameter("categorical", list=["a"], min="1")], "has a list, nothing else"),
        ([setting("maxTrialCount", 2)], "parallelTrialCount=3 is more than maxTrialCount=2"),
        ([lambda spec: spec.pop("maxTrialCount")], "the search has no end"),
        ([setting("resumePolicy", "Sometimes")], "spec.resumePolicy"),
        ([lambda spec: spec["trialTemplate"]["trialParameters"].pop()], "reach no placeholder"),
        ([lambda spec: spec["trialTemplate"].update(configMap={})], "configMap is refused"),
        ([job(kind="TFJob")], "TFJob is refused"),
        ([lambda spec: spec["trialTemplate"].update(successCondition="x")], "successCondition"),
        ([lambda spec: spec["trialTemplate"]["trialSpec"]["spec"].update(backoffLimit=3)],
         "backoffLimit is refused"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(
    load: Callable[..., KatibSearch], changes: list[Change], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        load(*changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (parameter("double", name="num-leaves", min="1", max="2"), "'learningRate'|num-leaves"),
        (parameter("double", name="batch_size", min="1", max="2"), "takes whole numbers"),
        (parameter("categorical", list=["a", "b"]), "takes numbers"),
        (objective(objectiveMetricName="auc"), "'auc' is none of the metrics"),
        (
            objective(metricStrategies=[{"name": "loss", "value": "latest"}]),
            "best epoch; write min",
        ),
        (algorithm("hyperband", resource_name="momentum", r_l="9"), "is not Rayline's epochs"),
    ],
)
def test_what_raylines_training_has_no_counterpart_for_is_refused_by_name(
    load: Callable[..., KatibSearch], change: Change, said: str
) -> None:
    def unplace(spec: dict[str, Any]) -> None:
        spec["trialTemplate"]["trialParameters"][0]["name"] = "given"

    with pytest.raises(ConfigError, match=said):
        load(change, unplace, trainable=RAYLINE)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is no YAML"),
        ("", "holds 0 YAML documents"),
        (f"{TEMPLATE}\n---\n{TEMPLATE}", "holds 2 YAML documents"),
        (TEMPLATE.replace("  parallelTrialCount: 3\n", "  parallelTrialCount: 3\n" * 2),
         "parallelTrialCount is given twice"),
        (TEMPLATE.replace("kubeflow.org/v1beta1", "kubeflow.org/v1alpha3"), "apiVersion"),
        (TEMPLATE.replace("name: shape", "name: Shape"), "metadata.name"),
    ],
)  # fmt: skip
def test_files_that_are_no_experiment(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_experiment(str(file))


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        load_experiment(str(tmp_path / "none.yaml"))


def steps(**each: str) -> Change:
    def change(spec: dict[str, Any]) -> None:
        for parameter in spec["parameters"]:
            parameter["feasibleSpace"]["step"] = each[parameter["name"]]

    return change


def marks(spec: dict[str, Any]) -> None:
    job(metadata={"annotations": {"key": "a"}, "labels": {"key": "b"}})(spec)
    references = ("Name", "Namespace", "Kind", "APIVersion", "Labels[key]", "Annotations[key]")
    names = [f"mark{index}" for index in range(len(references))]
    spec["trialTemplate"]["trialParameters"] += [
        {"name": name, "reference": f"${{trialSpec.{reference}}}"}
        for name, reference in zip(names, references, strict=True)
    ]
    env = [{"name": name, "value": f"${{trialParameters.{name}}}"} for name in names]
    container(env=env)(spec)


MEDIANSTOP = setting(
    "earlyStopping",
    {
        "algorithmName": "medianstop",
        "algorithmSettings": [
            {"name": "min_trials_required", "value": "1"}, {"name": "start_step", "value": "2"},
        ],
    },
)  # fmt: skip
ACCURACY = objective(
    type="maximize", goal=0.99, objectiveMetricName="accuracy", additionalMetricNames=["loss"]
)
LOG = container(args=["--log-path=/katib/mnist.log"])
# What the files under examples/v1beta1 of kubeflow/katib (33c8ff4, June 2026) have that the
# template above has not, in words of our own, and how each is taken: run (""), or refused saying
# this; as a command, and by Rayline's training.
PUBLISHED: dict[str, tuple[list[Change], str, str]] = {
    "hp-tuning/random": (
        [container(resources={"limits": {"memory": "1Gi", "cpu": "0.5"}})], "", ""),
    "hp-tuning/grid": ([algorithm("grid"), steps(lr="0.005", momentum="0.1")], "", ""),
    "hp-tuning/sobol": ([algorithm("sobol")], "", ""),
    "hp-tuning/tpe": ([algorithm("tpe")], "", ""),
    "hp-tuning/multivariate-tpe": ([algorithm("multivariate-tpe")], "", ""),
    "hp-tuning/bayesian-optimization": (
        [algorithm("bayesianoptimization", random_state="10")], "", ""),
    "hp-tuning/cma-es": ([algorithm("cmaes", restart_strategy="ipop")], "'ipop'", "'ipop'"),
    "hp-tuning/hyperband": (
        [algorithm("hyperband", resource_name="epochs", eta="2", r_l="2"),
         epochs(min="1", max="1")], "", ""),
    "hp-tuning/simple-pbt": (
        [algorithm("pbt", suggestion_trial_dir="/var/log/katib/checkpoints/", n_population="40",
                   truncation_threshold="0.2"), setting("resumePolicy", "FromVolume")],
        "pbt hands the checkpoint", ""),
    "hp-tuning/hyperopt-distribution": (
        [parameter("double", min="0.01", max="0.05", step="0.01", distribution="normal"),
         epochs(min="1", max="3", distribution="logUniform")], "", ""),
    "hp-tuning/optuna-distribution": (
        [algorithm("tpe"), parameter("double", min="1", max="5", step="0.1",
                                     distribution="uniform")], "", ""),
    "early-stopping/median-stop": (
        [MEDIANSTOP, lambda spec: spec["trialTemplate"].update(retain=True)], "", ""),
    "early-stopping/median-stop-with-json-format": (
        [MEDIANSTOP, ACCURACY, LOG, collector("File", fileSystemPath={
            "path": "/katib/mnist.log", "kind": "File", "format": "JSON"})], "", ""),
    "metrics-collector/file-metrics-collector": (
        [ACCURACY, LOG, collector("File", fileSystemPath={
            "path": "/katib/mnist.log", "kind": "File"}, filter={"metricsFormat": [
                r"{metricName: ([\w|-]+), metricValue: ((-?\d+)(\.\d+)?)}"]})], "", ""),
    "metrics-collector/metrics-collection-strategy": (
        [algorithm("tpe"), objective(additionalMetricNames=["accuracy"], metricStrategies=[
            {"name": "accuracy", "value": "max"}, {"name": "loss", "value": "min"}])],
        "", ""),
    "metrics-collector/custom-metrics-collector": (
        [setting("metricsCollectorSpec", {"collector": {"kind": "Custom", "customCollector": {}}})],
        "customCollector is refused", ""),
    "kubeflow-training-operator/mpijob-horovod": (
        [lambda spec: spec["trialTemplate"].update(primaryPodLabels={"role": "launcher"}),
         job(apiVersion="kubeflow.org/v1", kind="MPIJob")], "primaryPodLabels is refused", ""),
    "resume-experiment/from-volume-resume": ([setting("resumePolicy", "FromVolume")], "", ""),
    "resume-experiment/long-running-resume": ([setting("resumePolicy", "LongRunning")], "", ""),
    "trial-template/trial-metadata-substitution": ([marks], "", ""),
    "trial-template/trial-configmap-source": (
        [lambda spec: spec["trialTemplate"].update(configMap={"configMapName": "x"})],
        "configMap is refused", "configMap is refused"),
    "kubeflow-training-operator/pytorchjob-mnist": (
        [job(apiVersion="kubeflow.org/v1", kind="PyTorchJob")], "PyTorchJob is refused", ""),
    "nas/darts-cpu": (
        [setting("nasConfig", {"operations": []}), algorithm("darts"),
         lambda spec: spec.pop("parameters")], "nasConfig is refused", "nasConfig is refused"),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("trainable", [COMMAND, RAYLINE])
def test_published_examples_are_run_or_refused_by_name(
    load: Callable[..., KatibSearch], name: str, trainable: str
) -> None:
    changes, *refusals = PUBLISHED[name]
    refusal = refusals[trainable == RAYLINE]
    if refusal:
        with pytest.raises(ConfigError, match=refusal):
            load(*changes, trainable=trainable)
        return
    search = load(*changes, trainable=trainable)
    Study(search.experiment)  # Its sampler takes the algorithm and the space.
    assert scheduler_of(search.experiment).name in SCHEDULERS
    assert (search.template is None) == (trainable == RAYLINE)

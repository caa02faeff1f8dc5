"""The pictures that a sweep leaves on its run: drawn once, at its end, and never in its way."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import optuna
from optuna.trial import create_trial

from lib.cli import progress as say
from lib.train import pictures
from lib.train.axes import readable
from lib.train.experiment import MAXIMIZE, Experiment
from lib.train.pictures import Drawn
from lib.train.progress import CUT, FAILED, FINISHED, STOPPED, TrialState, traded_off
from lib.train.samplers import study_space

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "pictures"
_MIN_OBSERVATIONS = 5
"""With fewer, an importance says nothing."""
_MAX_OBSERVATIONS = 256
"""Of the importance: more take seconds, and change it little."""

Confusion = Callable[[], tuple[Sequence[Sequence[int]], Sequence[str]] | None]


def draw(
    experiment: Experiment,
    trials: Sequence[TrialState],
    front: Sequence[TrialState],
    *,
    by_epochs: bool,
    confusion: Confusion,
) -> dict[str, bytes]:
    """Return the pictures of a sweep by their path; those that can't be drawn are left out.

    `by_epochs` tells whether a trial's steps are epochs, and `confusion` counts for the best model
    rows by true class, then by predicted class, and names the classes. What fails is said once and
    fails nothing else.
    """
    shown = [drawn(trial) for trial in trials]
    results = [trial for trial in shown if trial.metrics]
    objectives = traded_off(experiment, [trial for trial in trials if trial.best])
    objective, step = experiment.objective, "epoch" if by_epochs else "report"
    makers: dict[str, Callable[[], Figure | None]] = {
        "curves": lambda: (
            pictures.curves(shown, objective, step) if any(trial.curve for trial in shown) else None
        ),
        "importance": lambda: _importance(experiment, trials, step),
        "parallel_coordinates": lambda: (
            pictures.parallel_coordinates(results, experiment.parameters, objective)
            if results and any(map(pictures.varies, experiment.parameters))
            else None
        ),
        "pareto": lambda: (
            pictures.pareto(results, {t.number + 1 for t in front}, objectives)
            if results and len(objectives) > 1
            else None
        ),
        "confusion": lambda: _confusion(experiment, results, confusion),
    }
    found: dict[str, bytes] = {}
    faults: list[str] = []
    for name, make in makers.items():
        try:
            figure = make()
            if figure is not None:
                found[f"{FOLDER}/{name}.png"] = pictures.png(figure)
        # Whatever it is, the sweep is what counts, and it is over and well.
        except Exception as error:
            faults.append(f"{name} ({type(error).__name__}: {error})")
    if faults:
        say("tune", f"WARNING: pictures that could not be drawn: {'; '.join(faults)}")
    return found


def comparable(
    trials: Sequence[TrialState], metric: str, step: str = "epoch"
) -> tuple[list[tuple[TrialState, float]], str]:
    """Return results that can be compared with each other, with their trials, and what they are.

    Where trials were stopped early, those that went on are better for that alone: then what counts
    is the value at the last rung that half of all trials came to.
    """
    with_result = [trial for trial in trials if trial.best and trial.ended != FAILED]
    if all(trial.ended == FINISHED for trial in with_result):
        return [(trial, trial.best[metric]) for trial in with_result], "result"
    at: dict[int, list[tuple[TrialState, float]]] = {}
    for trial in with_result:
        for epoch, _, metrics in trial.rungs:
            at.setdefault(epoch, []).append((trial, metrics[metric]))
    enough = max(_MIN_OBSERVATIONS, len(with_result) / 2)
    epochs = [epoch for epoch, found in at.items() if len(found) >= enough]
    if not epochs:
        return [], ""
    return at[max(epochs)], f"at {step} {max(epochs)}"


def importance(
    experiment: Experiment, observations: Sequence[tuple[TrialState, float]]
) -> dict[str, float]:
    """Return each parameter's share of what decides the result, by Optuna's fANOVA.

    Parameters of which no two values were tried are left out.
    """
    # With it come SciPy and scikit-learn: seconds that no start of a sweep should wait for.
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    space = study_space(experiment)
    observations = observations[-_MAX_OBSERVATIONS:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study = optuna.create_study(
            direction="maximize" if experiment.objective.goal == MAXIMIZE else "minimize"
        )
        study.add_trials(
            [
                create_trial(
                    params=dict(trial.sampled["drawn"]),
                    distributions=space.distributions,
                    value=value,
                )
                for trial, value in observations
            ]
        )
        return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def _importance(experiment: Experiment, trials: Sequence[TrialState], step: str) -> Figure | None:
    metric = experiment.objective.metric
    observations, what = comparable(trials, metric, step)
    varied = {str(trial.sampled["drawn"]) for trial, _ in observations}
    different = {value for _, value in observations}
    if min(len(observations), len(varied)) < _MIN_OBSERVATIONS or len(different) < 2:
        return None
    shares = importance(experiment, observations)
    of = f"{readable(metric)}, {what}, {len(observations)} trials, by fANOVA"
    return pictures.importance(shares, of) if shares else None


def _confusion(
    experiment: Experiment, results: Sequence[Drawn], confusion: Confusion
) -> Figure | None:
    best = pictures.best_of(results, experiment.objectives)
    counted = confusion() if best is not None else None
    if best is None or counted is None:
        return None
    counts, class_names = counted
    return pictures.confusion(counts, class_names, f"trial {best.number} on validation")


def drawn(trial: TrialState) -> Drawn:
    """Return a trial as pictures show it."""
    has_result = trial.ended in (FINISHED, STOPPED, CUT)
    metrics: Mapping[str, float] = trial.best if has_result else {}
    return Drawn(
        number=trial.number + 1,
        params=trial.params,
        curve=[(float(epoch), value) for epoch, value in trial.curve],
        metrics=metrics,
        stopped=trial.ended != FINISHED,
    )

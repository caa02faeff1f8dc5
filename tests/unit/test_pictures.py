"""The pictures of a sweep: what they show, and that none of them can fail a sweep."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lib.storage import Storage
from lib.train import album, pictures
from lib.train.axes import ParameterScale
from lib.train.experiment import (
    CATEGORICAL,
    DISCRETE,
    DOUBLE,
    LOG_UNIFORM,
    MAXIMIZE,
    MINIMIZE,
    Experiment,
    Named,
    Objective,
    Parameter,
)
from lib.train.journal import Journal
from lib.train.pictures import Drawn
from lib.train.progress import (
    ASKED,
    ENDED,
    FAILED,
    FINISHED,
    REPORTED,
    SESSION,
    STOPPED,
    Progress,
    TrialState,
    pareto_front,
)
from lib.train.samplers import Study

ACCURACY = Objective(metric="val_accuracy", goal=MAXIMIZE)
SIZE = Objective(metric="num_parameters", goal=MINIMIZE)
PARAMETERS = (
    Parameter(name="learning_rate", kind=DOUBLE, low=1e-3, high=1.0, distribution=LOG_UNIFORM),
    Parameter(name="width", kind=DISCRETE, values=(8, 16, 32)),
    Parameter(name="cost_$in_$", kind=CATEGORICAL, values=("a$b$", "c_d")),
)
EXPERIMENT = Experiment(
    name="drawn",
    objectives=(ACCURACY,),
    parameters=PARAMETERS,
    algorithm=Named("random"),
    num_trials=12,
)
COUNTS, CLASSES = [[50, 2, 0], [1, 40, 0], [0, 0, 0]], ("cat", "dog", "a_$rare$_class")


def trials_of(
    tmp_path: Path, experiment: Experiment, ends: Sequence[str] = (FINISHED, STOPPED) * 6
) -> Progress:
    """Return a sweep in which the learning rate alone decides."""
    progress = Progress(Journal(Storage(str(tmp_path)), "sweep"), experiment)
    study = Study(experiment)
    progress.add(SESSION)
    for how in ends:
        number, params, sampled = study.ask()
        progress.add(ASKED, trial=number, params=params, sampled=sampled)
        for epoch in range(1, 1 if how == FAILED else 4 if how == FINISHED else 2):
            metrics = {
                "val_accuracy": 1 - float(params["learning_rate"]) / (1 + epoch),
                "num_parameters": 1000.0 * float(params["width"]),
            }
            progress.add(REPORTED, trial=number, report=epoch, epoch=epoch, rung=epoch,
                         metrics=metrics)  # fmt: skip
        progress.add(ENDED, trial=number, how=how, why="")
        study.tell(progress.trials[number])
    return progress


def drawn(progress: Progress) -> list[Drawn]:
    return [album.drawn(trial) for trial in progress.trials.values()]


def album_of(
    experiment: Experiment, progress: Progress, confusion: Any = lambda: (COUNTS, CLASSES)
) -> dict[str, bytes]:
    trials = list(progress.trials.values())
    front = pareto_front(experiment.objectives, progress.ranked())
    return album.draw(experiment, trials, front, by_epochs=True, confusion=confusion)


def test_a_line_for_every_trial_and_the_best_one_named(tmp_path: Path) -> None:
    progress = trials_of(tmp_path, EXPERIMENT)
    (axes,) = pictures.curves(drawn(progress), ACCURACY).axes
    assert len(axes.lines) == 12
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "validation accuracy")
    best = progress.ranked()[0]
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    value = f"{best.best['val_accuracy']:.2%}"
    assert legend[-1] == f"best: trial {best.number + 1}, {value}"
    assert legend[0] == f"others, stopped early ({6 - (best.ended == STOPPED)})"
    assert [*zip(*axes.lines[-1].get_data(), strict=True)] == best.curve, "on top of the others"


def test_parameters_lie_on_their_axes(tmp_path: Path) -> None:
    progress = trials_of(tmp_path, EXPERIMENT)
    (axes,) = pictures.parallel_coordinates(drawn(progress), PARAMETERS, ACCURACY).axes
    (lines,) = axes.collections
    segments = lines.get_segments()
    assert len(segments) == 12
    assert all(
        len(segment) == 4 and np.all((segment > -0.02) & (segment <= 3)) for segment in segments
    )
    assert segments[-1][-1][1] == 1.0, "the best one ends on top, and is drawn last"
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names[0] == "learning\nrate"
    low = ParameterScale(PARAMETERS[0])
    assert low.place(0.0316227766) == pytest.approx(0.5), "on a logarithmic axis"


def test_the_parameter_that_decides_comes_out_first(tmp_path: Path) -> None:
    progress = trials_of(tmp_path, EXPERIMENT, [FINISHED] * 12)
    observations, what = album.comparable(list(progress.trials.values()), "val_accuracy")
    assert (len(observations), what) == (12, "result")
    shares = album.importance(EXPERIMENT, observations)
    assert next(iter(shares)) == "learning_rate"
    assert sum(shares.values()) == pytest.approx(1.0)
    (axes,) = pictures.importance(shares, "of 12 trials").axes
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "learning rate"
    assert [bar.get_width() for bar in axes.patches][-1] == max(shares.values())


def test_trials_that_were_stopped_are_compared_where_all_came_to(tmp_path: Path) -> None:
    progress = trials_of(tmp_path, EXPERIMENT, [FINISHED] * 3 + [STOPPED] * 8 + [FAILED])
    observations, what = album.comparable(list(progress.trials.values()), "val_accuracy")
    assert (len(observations), what) == (11, "at epoch 1")
    assert all(value == trial.curve[0][1] for trial, value in observations)


def test_the_front_is_told_from_those_it_beats(tmp_path: Path) -> None:
    experiment = Experiment(
        name="two",
        objectives=(ACCURACY, SIZE),
        parameters=PARAMETERS,
        algorithm=Named("random"),
        num_trials=12,
    )
    progress = trials_of(tmp_path, experiment)
    front = {t.number + 1 for t in pareto_front(experiment.objectives, progress.ranked())}
    (axes,) = pictures.pareto(drawn(progress), front, experiment.objectives).axes
    beaten, best = axes.collections
    assert (len(beaten.get_offsets()), len(best.get_offsets())) == (12 - len(front), len(front))
    assert axes.get_xlabel() == "parameters (less is better)"
    assert {text.get_text() for text in axes.texts} == {str(number) for number in front}
    assert set(album_of(experiment, progress)) == {
        f"pictures/{name}.png"
        for name in ("curves", "importance", "parallel_coordinates", "pareto", "confusion")
    }


def test_errors_are_coloured_and_counted() -> None:
    axes, _ = pictures.confusion(COUNTS, CLASSES, "trial 3 on validation").axes
    assert axes.get_title(loc="left") == "3 errors on 93 images (96.77% right)"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    shares = axes.images[0].get_array()
    assert shares is not None
    assert shares[0, 1] == pytest.approx(2 / 52)
    assert np.ma.is_masked(shares[0, 0]) or np.isnan(shares[0, 0])
    assert {text.get_text() for text in axes.texts if text.get_text().isdigit()} == {
        "50", "2", "1", "40",
    }  # fmt: skip


@pytest.mark.parametrize("num_classes", [2, 30, 100])
def test_many_classes_are_drawn_too(num_classes: int) -> None:
    counts = np.eye(num_classes, dtype=int).tolist()
    content = pictures.png(pictures.confusion(counts, [f"c{i}" for i in range(num_classes)], "x"))
    assert max(Image.open(io.BytesIO(content)).size) < 2500


@pytest.mark.parametrize(
    ("ends", "names"),
    [
        ([FINISHED], {"curves", "parallel_coordinates", "pareto", "confusion"}),
        ([STOPPED], {"curves", "parallel_coordinates", "pareto", "confusion"}),
        ([FAILED, FAILED], set()),
        ([FAILED] * 3 + [FINISHED] * 2, {"curves", "parallel_coordinates", "pareto", "confusion"}),
        ([FINISHED] * 6, {"curves", "parallel_coordinates", "pareto", "confusion", "importance"}),
    ],
)
def test_what_can_be_drawn_is_drawn(tmp_path: Path, ends: list[str], names: set[str]) -> None:
    found = album_of(EXPERIMENT, trials_of(tmp_path, EXPERIMENT, ends))
    assert set(found) == {f"pictures/{name}.png" for name in names}
    for content in found.values():
        assert Image.open(io.BytesIO(content)).size > (600, 200)


def test_a_picture_that_fails_fails_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise OSError("the model is gone")

    found = album_of(EXPERIMENT, trials_of(tmp_path, EXPERIMENT), broken)
    assert "pictures/curves.png" in found
    assert "pictures/confusion.png" not in found
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "WARNING" in line]
    assert "confusion (OSError: the model is gone)" in line


def test_drawing_leaves_pyplot_alone(tmp_path: Path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    album_of(EXPERIMENT, trials_of(tmp_path, EXPERIMENT))
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_loss_over_orders_of_magnitude_is_on_a_logarithmic_axis() -> None:
    loss = Objective(metric="val_loss", goal=MINIMIZE)
    trial = Drawn(number=1, params={}, curve=[(1, 2.0), (2, 0.01)], metrics={"val_loss": 0.01})
    (axes,) = pictures.curves([trial], loss).axes
    assert axes.get_yscale() == "log"


def test_a_trial_without_reports_has_no_result() -> None:
    state = TrialState(number=0, params={}, sampled={"drawn": {}}, ended=FAILED)
    assert not album.drawn(state).metrics

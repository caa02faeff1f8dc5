"""What jobs.tune makes of its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lib.config import PRESETS, Preset
from lib.errors import ConfigError, RaylineError
from lib.storage import Storage
from lib.train.asked import Asked, limits_asked_for, search_asked_for
from lib.train.trial import train_config
from lib.train.work import COMMAND, with_rungs
from tests.unit.test_katib import TEMPLATE


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "experiment.yaml"
    path.write_text(TEMPLATE)
    return str(path)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "storage"))


def test_an_experiment_file_runs_its_command(
    file: str, storage: Storage, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment, work = search_asked_for(Asked(experiment=file, seed=4), storage)
    assert (experiment.name, experiment.seed) == ("shape", 4)
    assert (work.kind, work.manifest) == (COMMAND, None)
    assert work.spec["template"]["arguments"][0] == "python3"
    assert "is not pulled" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"trainable": "rayline"}, "give --experiment FILE too"),
        ({"experiment": "x", "search": "tpe"}, "--search and --experiment exclude"),
        ({"experiment": "x", "objectives": "val_loss"}, "--objectives and --experiment exclude"),
        ({"experiment": "x", "data": "d"}, "--data would change nothing"),
        ({"experiment": "x", "preset": "full", "trainable": "command"}, "--preset would change"),
    ],
)
def test_flags_that_would_say_nothing_are_refused(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Asked(**flags)


def test_training_needs_data(file: str, storage: Storage) -> None:
    for asked in (Asked(), Asked(experiment=file, trainable="rayline")):
        with pytest.raises(ConfigError, match="give --data DIGEST"):
            search_asked_for(asked, storage)


def test_a_seed_is_given_once(tmp_path: Path, storage: Storage) -> None:
    path = tmp_path / "seeded.yaml"
    seeded = "{algorithmName: random, algorithmSettings: [{name: random_state, value: '3'}]}"
    path.write_text(TEMPLATE.replace("{algorithmName: random}", seeded))
    assert search_asked_for(Asked(experiment=str(path)), storage)[0].seed == 3
    with pytest.raises(ConfigError, match="exclude each other"):
        search_asked_for(Asked(experiment=str(path), seed=1), storage)


@pytest.mark.parametrize(("start", "is_refused"), [("3", True), ("1", False), ("", True)])
def test_an_early_stopping_that_would_never_compare_is_refused(
    tmp_path: Path, storage: Storage, start: str, is_refused: bool
) -> None:
    # Of preset quick, trials can be compared after one epoch, and end with the third.
    settings = f", algorithmSettings: [{{name: start_step, value: '{start}'}}]" if start else ""
    path = tmp_path / "stopping.yaml"
    line = f"  earlyStopping: {{algorithmName: medianstop{settings}}}\n  objective:"
    path.write_text(TEMPLATE.replace("  objective:", line, 1))
    asked = Asked(experiment=str(path), trainable="rayline", data="0" * 32)
    said = "medianstop would stop nothing" if is_refused else "0000"
    with pytest.raises(RaylineError, match=said):
        search_asked_for(asked, storage)


def test_a_resumed_sweep_takes_its_counts_from_a_file_alone(file: str) -> None:
    assert limits_asked_for(Asked()) is None
    with pytest.raises(ConfigError, match="--preset would change nothing"):
        limits_asked_for(Asked(preset="full"))
    limits = limits_asked_for(Asked(experiment=file))
    assert limits is not None
    assert limits[0].num_trials == 12
    assert set(limits[1]) == {"template", "cpus", "gpus"}
    settings = limits_asked_for(Asked(experiment=file, trainable="rayline"))
    assert settings is not None
    assert settings[1] == {"settings": {}}
    given = Asked(experiment=file, trainable="rayline", data="d", preset="smoke")
    same = limits_asked_for(given)
    assert same is not None
    assert (same[1]["data_digest"], same[1]["preset"]["name"]) == ("d", "smoke")


@pytest.mark.parametrize(
    ("rungs", "most_epochs", "found"),
    [((), None, (1, 3)), ((1, 4), None, (1, 4)), ((), 2, (1, 2)), ((), 1, (1,)),
     ((), 30, (1, 3, 30))],
)  # fmt: skip
def test_rungs_end_where_training_does(
    rungs: tuple[int, ...], most_epochs: int | None, found: tuple[int, ...]
) -> None:
    quick: Preset = PRESETS["quick"]
    assert with_rungs(quick, rungs, most_epochs).rungs == found


def test_a_trial_of_its_own_length_shares_the_rungs_before() -> None:
    params = {"learning_rate": 0.1, "weight_decay": 0.0, "label_smoothing": 0.0, "augmentation": 0}
    given = {**params, "epochs": 4, "momentum": 0.5, "batch_size": 32}
    config = train_config(given, rungs=(1, 3, 6), seed=0)
    assert config.rungs == (1, 3, 4)
    assert (config.momentum, config.batch_size) == (0.5, 32)
    assert train_config(params, rungs=(1, 3, 6), seed=0).rungs == (1, 3, 6)
    with pytest.raises(ValueError, match="epochs=0"):
        train_config({**params, "epochs": 0}, rungs=(1, 3), seed=0)

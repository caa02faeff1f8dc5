"""Ranking, comparing and printing, without a server."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.errors import RegistryError
from lib.provenance import diffstat
from lib.registry.inspection import difference
from lib.registry.leaderboard import Board, Entry, best, parts_in, ranked, standing_digest
from lib.registry.models import Foreign
from lib.registry.trials import ACCURACY
from lib.registry.views import print_board, print_difference
from lib.serving.traffic import ModelTraffic
from lib.tables import MAX_WIDTH, size
from lib.train.experiment import MINIMIZE, Objective


def entry(version: int | None, val: float, test: float | None = None, **values: Any) -> Entry:
    made: dict[str, Any] = {
        "run_id": f"run-{version}",
        "data_digest": "d" * 32,
        "git_commit": "c0ffee" * 6 + "abcd",
        "git_dirty": False,
        "created_ms": 1_700_000_000_000 + (version or 0),
    }
    return Entry(
        version=version,
        score=val,
        val_accuracy=val,
        test_accuracy=test,
        trained_ms=values.pop("trained_ms", version or 0),
        **{**made, **values},
    )


def board(*entries: Entry, split: str = "val", objective: Objective = ACCURACY) -> Board:
    return Board(
        model="digits",
        split=split,
        objective=objective,
        entries=ranked(entries, objective.goal),
        foreign=(Foreign(version=9, aliases=(), why="version 9 was not made by `jobs.register`"),),
        notes=("a note",),
    )


def test_the_best_comes_first_and_ties_go_to_the_earlier_trial_whether_registered_or_not() -> None:
    trial = entry(None, 0.98, run_id="trial", trained_ms=3)
    late, early, top, low = entry(4, 0.98), entry(2, 0.98), entry(3, 0.99), entry(1, 0.9)
    found = ranked([trial, late, low, early, top])
    assert [found.run_id for found in found] == ["run-3", "run-2", "trial", "run-4", "run-1"]
    assert [found.rank for found in found] == [1, 2, 3, 4, 5]
    assert found == ranked([low, top, early, late, trial])
    by_loss = ranked([late, low, top], MINIMIZE)
    assert [found.version for found in by_loss] == [1, 4, 3]


def test_ties_go_to_the_trial_with_the_lower_loss_on_validation() -> None:
    rows = [entry(1, 1.0), *(entry(n, 1.0, val_loss=loss) for n, loss in ((2, 0.3), (3, 0.1)))]
    assert [found.version for found in ranked(rows)] == [3, 2, 1]


def test_what_was_not_measured_comes_last_and_has_no_rank() -> None:
    rows = board(entry(1, 0.9), replace(entry(2, 0.98), score=None))
    assert [(found.version, found.rank) for found in rows.entries] == [(1, 1), (2, 0)]
    for rank in (0, 2):
        with pytest.raises(RegistryError, match=f"1 finished trials .* none of rank {rank}"):
            best(rows, rank)


def test_models_are_compared_on_the_champions_data_else_on_the_newest() -> None:
    here, there = "d" * 32, "e" * 32
    rows = [
        entry(1, 0.95, data_digest=here, aliases=("champion",)),
        entry(2, 0.99, data_digest=there),
        entry(None, 0.97, data_digest=here),
    ]
    assert standing_digest(rows) == here
    assert standing_digest(rows[1:]) == there
    assert standing_digest(rows[2:]) == here


def test_the_head_names_the_metric_that_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [replace(entry(None, 0.9, run_id=f"{loss}"), score=loss) for loss in (0.31, 0.12)]
    print_board(board(*rows, objective=Objective(metric="val_loss", goal=MINIMIZE)), top=9)
    head, _, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["#", "version", "alias", "val_loss", "▾"]
    assert first.split()[:3] == ["1", "trial", "0.12"]
    print_board(board(*rows), top=9)
    assert "val ▾" in capsys.readouterr().out.splitlines()[0]


def test_thousands_of_rows_print_within_the_width_and_say_how_many_are_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        entry(
            number,
            0.99,
            0.98,
            gap=0.01,
            gap_holds=False,
            served="90 %, previous, 2 pins",
            aliases=("champion", "challenger"),
            images_per_s=123_456.0,
        )
        for number in range(1, 3_001)
    ]
    print_board(board(*rows), top=2)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH
    text = "\n".join(lines)
    assert "99.00 %" in text
    assert "+1.00 !" in text
    assert "2,998 more" in text
    assert "not listed: version 9" in text
    assert "a note" in text


def test_the_parts_in_the_traffic_are_said_in_words() -> None:
    traffic = ModelTraffic(
        weights={3: 90, 4: 10, 2: 0},
        bundles={number: f"models/digits/{number}" for number in (2, 3, 4, 5, 6)},
        champion=3,
        previous_champion=2,
        shadows={5: 20},
        pins={"a": 4, "b": 4},
    )
    found = {
        number: parts_in(traffic, number, f"models/digits/{number}")
        for number in (1, 2, 3, 4, 5, 6)
    }
    assert found == {
        1: [],
        2: ["previous"],
        3: ["90 %"],
        4: ["10 %", "2 pins"],
        5: ["shadow 20 %"],
        6: ["up"],
    }
    assert parts_in(None, 3, "models/digits/3") == []
    # Another model of the same number, made after the first one's registered model was deleted.
    assert parts_in(traffic, 3, "models/digits/3-other") == []


def described(version: int, **changed: Any) -> dict[str, Any]:
    return {
        "version": version,
        "metrics": {"test_accuracy": 0.98, "val_accuracy": 0.99},
        "parameters": {"learning_rate": "0.1", "depth": "1"},
        "sweep": {"seed": "0"},
        "data": {"digest": "d" * 32, "source": "mnist", "rows": {"train": 10, "test": 5}},
        "code": {"commit": "a" * 40, "dirty": False},
        "packages": {"torch": "2.14.1"},
        **changed,
    }


def test_only_what_differs_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    other = described(
        4,
        metrics={"test_accuracy": 0.97, "val_accuracy": 0.99},
        parameters={"learning_rate": "0.2", "depth": "1", "augmentation": "0.5"},
        data={"digest": "e" * 32, "source": "mnist", "rows": {"train": 12, "test": 5}},
        packages={"torch": "2.15.0"},
    )
    found = difference(described(3), other)
    assert found["parameters"] == {
        "learning_rate": {"a": "0.1", "b": "0.2"},
        "augmentation": {"a": None, "b": "0.5"},
    }
    assert list(found["metrics"]) == ["test_accuracy"]
    assert found["metrics"]["test_accuracy"]["change"] == pytest.approx(-0.01)
    assert set(found["data"]) == {"digest", "train rows"}
    assert found["code"] == {}
    assert found["packages"] == {"torch": {"a": "2.14.1", "b": "2.15.0"}}
    print_difference(found)
    assert "-0.0100" in capsys.readouterr().out
    print_difference(difference(described(3), described(5)))
    assert "differ in nothing" in capsys.readouterr().out


def test_a_diffstat_needs_both_commits_and_takes_no_options(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=n", "-c", "user.email=e", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    git("init", "-q")
    commits = []
    for text in ("one\n", "two\nthree\n"):
        (tmp_path / "code.py").write_text(text)
        git("add", "code.py")
        git("commit", "-q", "-m", text)
        commits.append(git("rev-parse", "HEAD"))
    found = diffstat(*commits, root=tmp_path)
    assert found is not None
    assert "code.py | 3" in found
    assert diffstat(commits[0], "0" * 40, root=tmp_path) is None
    assert diffstat(commits[0], f"--output={tmp_path}/made", root=tmp_path) is None
    assert not (tmp_path / "made").exists()


def test_sizes_are_read_by_people() -> None:
    assert [size(n) for n in (0, 999, 1_500, 2_000_000, 3.5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.0 MB",
        "3500.0 GB",
    ]

"""What of the project is sent along with a job."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

from lib.errors import LineError
from lib.line import submission


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "project"
    for name in ("lib/x.py", "jobs/y.py", "notes.txt", "photos 2024/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    monkeypatch.setattr(submission, "PROJECT_ROOT", root)
    return root


def sent(project: Path, excludes: list[str]) -> set[str]:
    """Return the names of the files in the package that Ray makes."""
    package = project.parent / "package.zip"
    create_package(str(project), package, include_gitignore=True, excludes=excludes)
    with zipfile.ZipFile(package) as files:
        return {name for name in files.namelist() if not name.endswith("/")}


@pytest.mark.parametrize("name", ["photos [2024]", "#1?*!", " photos", "!x", "a#b"])
def test_a_folder_of_data_is_not_sent_whatever_its_name(project: Path, name: str) -> None:
    (project / name).mkdir()
    (project / name / "a.png").touch()
    excludes = submission._data_in_project(["--source", str(project / name)])
    assert sent(project, excludes) == {"lib/x.py", "jobs/y.py", "notes.txt", "photos 2024/a.png"}


def test_what_is_large_beside_the_code_stays_and_is_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (project / "set [1]").mkdir()
    for path in (project / "set [1]" / "x.bin", project / "dump.npy"):
        path.touch()
        os.truncate(path, 11 * 2**20)
    (project / "linked").symlink_to(project / "set [1]")
    excludes = submission._large_beside_code(project)
    assert sent(project, excludes) == {"lib/x.py", "jobs/y.py", "notes.txt", "photos 2024/a.png"}
    told = capsys.readouterr().out
    assert "set [1] is not sent along" in told
    assert "dump.npy is not sent along" in told
    assert "linked is not sent along" in told
    assert "photos" not in told


def test_code_that_ray_would_not_take_is_named_with_its_size(project: Path) -> None:
    submission._check_size(project)
    weights = project / "lib" / "weights.pt"
    weights.touch()
    os.truncate(weights, 200 * 2**20)
    with pytest.raises(LineError, match=r"200 MiB.*lib/weights.pt \(200 MiB\)"):
        submission._check_size(project)

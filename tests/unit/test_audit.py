from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def audit() -> Any:
    spec = importlib.util.spec_from_file_location("audit", ROOT / "deploy" / "audit.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit"] = module
    spec.loader.exec_module(module)
    return module


def test_our_own_pins_are_whole(audit: Any) -> None:
    pins = audit.read_pins((ROOT / "requirements.txt").read_text())
    assert len(pins) > 100
    assert audit.check_pins(pins, [Requirement("ray[default]==2.60.0"), Requirement("uv")]) == []


@pytest.mark.parametrize(
    ("pins", "direct", "said"),
    [
        ("a>=1", [], "pin it to one version"),
        ("a==1.*", [], "pin it to one version"),
        ("a==1\nA==2", [], "pinned twice"),
        ("a==1", ["b"], "b of pyproject.toml is not pinned"),
        ("a==1", ["a>=2"], "not what pyproject.toml asks for"),
    ],
)
def test_pins_that_are_not_whole_are_named(
    audit: Any, pins: str, direct: list[str], said: str
) -> None:
    (found,) = audit.check_pins(audit.read_pins(pins), [Requirement(line) for line in direct])
    assert said in found


def test_one_version_for_each_python_is_fine(audit: Any) -> None:
    pins = "a==1 ; python_full_version < '3.12'\na==2 ; python_full_version >= '3.12'"
    assert audit.check_pins(audit.read_pins(pins), [Requirement("a")]) == []


def test_another_version_than_the_pin_is_seen(audit: Any) -> None:
    (found,) = audit.check_installed([Requirement("packaging==0.1")])
    assert "is installed" in found
    (found,) = audit.check_installed([Requirement("no-such-package==1")])
    assert "make lint" in found
    assert audit.check_installed([Requirement("x==1 ; sys_platform == 'win32'")]) == []


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages})


def test_a_report_of_pip_audit_is_read(audit: Any) -> None:
    weakness = {"id": "PYSEC-1", "fix_versions": ["2.0"]}
    found = audit.read_report(
        report(
            {"name": "a", "version": "1.0", "vulns": [weakness]},
            {"name": "b", "version": "1.0", "vulns": []},
            {"name": "c", "skip_reason": "not found"},
        )
    )
    assert found.weaknesses == ["a 1.0: PYSEC-1, fixed in 2.0"]
    assert found.num_unknown == 1


def test_a_report_without_any_answer_is_refused(audit: Any) -> None:
    with pytest.raises(audit.LookUpError, match="no advisories"):
        audit.read_report(report({"name": "a", "skip_reason": "not found"}))


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo no route to the index >&2; exit 2", "no route to the index"), ("exit 0", "no report")],
)
def test_an_audit_that_looked_nothing_up_fails(
    audit: Any,
    script: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uv = tmp_path / "uv"
    uv.write_text(f"#!/bin/sh\n{script}\n")
    uv.chmod(0o755)
    monkeypatch.setattr(audit.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit) as ended:
        audit.main()
    assert ended.value.code == 5
    assert said in capsys.readouterr().out
    uv.unlink()
    with pytest.raises(SystemExit, match="5"):
        audit.main()

"""All that can be known of a version, made up: with it every automated check holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from lib.watch.dossier import DAY_S, Dossier

NOW_S = 1_790_000_000.0
NAMES = [str(digit) for digit in range(10)]


def full_dossier(**changes: Any) -> Dossier:
    random = np.random.default_rng(0)
    confusion = np.diag(random.integers(960, 1000, 10)) + random.integers(0, 4, (10, 10))
    truth = confusion.sum(axis=1)
    per_class = {n: float(confusion[i, i] / truth[i]) for i, n in enumerate(NAMES)}
    accuracy = float(np.trace(confusion) / truth.sum())
    evaluation = {
        "rows": int(truth.sum()),
        "accuracy": accuracy,
        "macro_accuracy": float(np.mean(list(per_class.values()))),
        "macro_f1": 0.987,
        "per_class_accuracy": per_class,
        "class_names": NAMES,
        "confusion": confusion.tolist(),
    }
    made: dict[str, Any] = {
        "model": "digits",
        "version": 4,
        "now_s": NOW_S,
        "facts": facts(accuracy),
        "evaluation": evaluation,
        "trials": [trial(number, random) for number in range(8)],
        "versions": [row(number, random) for number in (1, 2, 3, 4)],
        "manifests": [manifest("c" * 32, "p" * 32, 120), manifest("p" * 32, None, 0)],
        "policies": policies(),
        "watch": watch(random),
        "rollouts": [rollout()],
        "retrains": [retrain()],
        "requests": {
            "rows": 48213, "rows_of_a_day": 9120, "failed": 3, "not_finite": 0, "out_of_range": 0,
            "p50_ms": 2.1, "p99_ms": 8.7, "p50_before_ms": 2.0, "p99_before_ms": 8.1,
        },
        "files": frozenset(
            {
                "requirements.txt",
                ".github/dependabot.yml",
                "tests/e2e/test_line.py",
                "tests/integration/test_reproduce.py",
                *(f"tests/unit/test_{name}.py" for name in (
                    "data_pictures", "data_checks", "payload", "train_model", "train_loop")),
            }
        ),
        "ci": "make test",
        "samples": {
            "shape": (12, 12, 1),
            "train": [[random.integers(0, 255, 144, dtype=np.uint8).tobytes()] * 6] * 10,
            "live": [[random.integers(0, 255, 144, dtype=np.uint8).tobytes()] * 3] * 10,
        },
    }  # fmt: skip
    return Dossier(**{**made, **changes})


def facts(accuracy: float) -> dict[str, Any]:
    return {
        "name": "digits",
        "version": 4,
        "aliases": ["champion"],
        "ready": True,
        "created_ms": int((NOW_S - 3 * DAY_S) * 1000),
        "metrics": {
            "val_accuracy": accuracy + 0.001,
            "test_accuracy": accuracy,
            "baseline_val_accuracy": 0.921,
            "onnx_max_difference": 3e-7,
        },
        "gap": {"value": 0.001, "usual": 0.0008, "limit": 0.004, "holds": True},
        "runtime": {
            "serves": "onnxruntime",
            "device": "cpu",
            "images_per_s": {"onnxruntime": {"1": 11800.0, "128": 12200.0}},
        },
        "served": {"now": "100 %", "pins": [], "bundle": "models/x", "bundle_is_there": True},
        "data": {"digest": "c" * 32, "source": "mnist+live"},
        "code": {"commit": "c0ffee" * 6 + "abcd", "dirty": False, "owner": "ada"},
        "parameters": {"learning_rate": "0.0915", "stage_width": "32", "depth": "1"},
        "packages": {"ray": "2.60.0", "torch": "2.14.1"},
        "lineage": {"run_id": "r" * 32, "sweep_run_id": "s" * 32},
    }


def trial(number: int, random: np.random.Generator) -> dict[str, Any]:
    rate = float(10 ** random.uniform(-1.5, -0.5))
    params = {
        "learning_rate": f"{rate:.4f}",
        "weight_decay": f"{10 ** random.uniform(-4, -2.7):.6f}",
        "stage_width": str(random.choice([24, 32])),
        "label_smoothing": str(random.choice([0.0, 0.05, 0.1])),
        "depth": "1",
    }
    metrics = {} if number == 6 else {"val_accuracy": float(0.995 - abs(rate - 0.09) / 40)}
    run_id = "r" * 32 if number == 3 else f"{number}" * 32
    status = "KILLED" if number == 6 else "FINISHED"
    return {"run_id": run_id, "status": status, "params": params, "metrics": metrics}


def row(number: int, random: np.random.Generator) -> dict[str, Any]:
    val = 0.99 + float(random.uniform(0, 0.004))
    return {
        "version": number,
        "val_accuracy": val,
        "test_accuracy": val - float(random.uniform(-0.0005, 0.002)) - 0.004 * (number == 2),
        "gap_holds": number != 2,
        "data_digest": "c" * 32,
    }


def manifest(digest: str, parent: str | None, num_live: int) -> dict[str, Any]:
    counts = {
        "train": [5400 + 40 * (digit % 4) for digit in range(10)],
        "val": [600] * 10,
        "test": [1000] * 10,
    }
    if num_live:
        counts["live"] = [num_live // 10] * 10
    return {
        "digest": digest, "parent": parent, "source": "mnist+live" if parent else "mnist",
        "height": 28, "width": 28, "channels": 1, "class_names": NAMES, "counts": counts,
        "num_shards": 12, "group": "scanner",
    }  # fmt: skip


def policies() -> list[dict[str, Any]]:
    shares = [(3, {"3": 100.0}), (3, {"3": 99.0, "4": 1.0}), (3, {"3": 75.0, "4": 25.0}),
              (4, {"4": 100.0, "3": 0.0})]  # fmt: skip
    return [
        {
            "generation": number,
            "when": f"2026-09-20T1{number}:00:00+00:00",
            "who": "ada",
            "why": "rollout of version 4",
            "weights": weights,
            "champion": champion,
            "previous_champion": 3 if champion == 4 else None,
            "bundles": [3, 4],
        }
        for number, (champion, weights) in enumerate(shares, start=1)
    ]


def watch(random: np.random.Generator) -> dict[str, Any]:
    """What the monitor writes, see `lib.watch.view`."""
    seen = {"labels": 500, "accuracy": 0.988, "low": 0.974, "high": 0.994, "shadow": False}
    hour = [NOW_S - 3600 + 150 * step for step in range(24)]
    return {
        "time": NOW_S - 60,
        "champion": 4,
        "versions": {"4": seen},
        "drift": {
            "end": NOW_S - 60,
            "p_value": 0.41,
            "score": 0.1,
            "alarm": False,
            "moved": [],
            "evidence": {"alarm": False},
        },
        "history": [
            {
                "time": time,
                "drift": {
                    "p_value": float(random.uniform(0.02, 1)),
                    "score": 0.1,
                    "alarm": step == 9,
                },
                "versions": {
                    "4": {"accuracy": 0.985 + 0.004 * (step % 3), "low": 0.97, "high": 0.997},
                    "3": {"accuracy": 0.95, "low": 0.92, "high": 0.97},
                },
            }
            for step, time in enumerate(hour)
        ],
    }


def rollout() -> dict[str, Any]:
    events = ("started", "passed", "serving", "passed", "promoted")
    stages = ("replay", "replay", "shadow", "canary-1", "canary-100")
    return {
        "id": "1789999000000000-v4",
        "candidate": 4,
        "status": "promoted",
        "reason": "all gates passed",
        "history": [
            {"time": f"2026-09-20T1{n}:00:00.000+00:00", "stage": stage, "status": status,
             "reason": "accuracy 0.988 to 0.951"}
            for n, (stage, status) in enumerate(zip(stages, events, strict=True))
        ],
    }  # fmt: skip


def retrain() -> dict[str, Any]:
    results: dict[str, dict[str, Any]] = {
        "data": {"digest": "c" * 32, "rows": {"train": 240, "val": 40, "live": 120}},
        "tune": {"sweep_run_id": "s" * 32, "num_trials": 8},
        "register": {"version": 4, "run_id": "r" * 32, "test_accuracy": 0.988},
        "gate": {
            "passed": True, "why": "the candidate is better than the champion", "rows": 120,
            "candidate_accuracy": 0.98, "champion_accuracy": 0.31,
        },
        "rollout": {"status": "promoted"},
    }  # fmt: skip
    return {
        "id": "20260920T094500-1f0c2a",
        "reason": "drift: p = 1e-9",
        "who": "monitor",
        "why": "",
        "state": "done",
        "champion": {"version": 3, "data_digest": "p" * 32},
        "steps": [
            {"name": name, "state": "done", "seconds": 12.0, "result": result}
            for name, result in results.items()
        ],
    }

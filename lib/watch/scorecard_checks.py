"""What each check of the scorecard looks at. Pure: evidence in, a finding out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lib.watch.dossier import DAY_S, Dossier

FRESH_S = DAY_S
"""The monitor's state is out of date after that."""
STALE_DAYS = 30.0
"""Age of a version from which it counts as stale."""
WORST_CLASS = 0.1
"""How far the worst class may lie below the mean of all."""
ONLINE_MARGIN = 0.02
"""Accuracy on live requests may differ from that on test by so much, beyond chance."""
SKEW = 1e-3
"""Largest difference of a probability between what was trained and what serves."""
SLOWER = 2.0
"""p99 of the last day over that of the days before, from which it counts as regressed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Whether the evidence shows that a check holds, and what it says."""

    holds: bool
    what: str


def schema(dossier: Dossier) -> Finding:
    """The manifest says what an image is, and every row is there."""
    if not dossier.manifests:
        return Finding(False, "the data set's manifest is gone")
    manifest = dossier.manifests[0]
    shape = "×".join(str(manifest[side]) for side in ("height", "width", "channels"))
    what = f"manifest: {shape} uint8, {len(manifest['class_names'])} classes, digests of all rows"
    if dossier.num_missing_shards:
        return Finding(False, f"{what}; {dossier.num_missing_shards} shards are missing")
    return Finding(True, what)


def beneficial(dossier: Dossier) -> Finding:
    """The images, which are the only feature, beat knowing the commonest class."""
    accuracy = _metric(dossier, "test_accuracy")
    if accuracy is None or not dossier.manifests:
        return Finding(False, "no accuracy and class counts to compare")
    counts = dossier.manifests[0]["counts"]["test"]
    commonest = max(counts) / sum(counts)
    what = f"test accuracy {accuracy:.4f}; the commonest class alone would give {commonest:.4f}"
    return Finding(accuracy > commonest, what)


def cost(dossier: Dossier) -> Finding:
    """What an answer costs was measured at registration."""
    runtime = dossier.facts.get("runtime", {})
    rates = runtime.get("images_per_s", {}).get(runtime.get("serves"), {})
    if not rates:
        return Finding(False, "no speed was measured")
    shown = ", ".join(f"{rate:,.0f} images/s at batch {size}" for size, rate in rates.items())
    return Finding(True, f"{runtime['serves']} on one core: {shown}")


def agility(dossier: Dossier) -> Finding:
    """A retrain brought new rows into a version, and how long that took is on record."""
    for retrain in reversed(dossier.retrains):
        steps = _steps(retrain)
        if "data" in steps and "register" in steps:
            seconds = sum(float(step["seconds"]) for step in steps.values())
            rows = sum(steps["data"]["result"].get("rows", {}).values())
            return Finding(True, f"retrain {retrain['id']}: {rows} new rows in {seconds:.0f} s")
    return Finding(False, "no retrain has added rows")


def input_code(dossier: Dossier) -> Finding:
    """Ingest and request parsing have tests that CI runs."""
    ingest = ("tests/unit/test_data_pictures.py", "tests/unit/test_data_checks.py")
    return _in_ci(dossier, (*ingest, "tests/unit/test_payload.py"))


def submitted(dossier: Dossier) -> Finding:
    """The version was trained from a clean commit."""
    code = dossier.facts.get("code", {})
    if not code.get("commit"):
        return Finding(False, "no commit is recorded")
    what = f"commit {code['commit'][:12]}"
    if code.get("dirty"):
        return Finding(False, f"{what}, with changes that were not committed")
    return Finding(True, what)


def correlates(dossier: Dossier) -> Finding:
    """Accuracy on live requests is what test promised."""
    live = _online(dossier)
    offline = _metric(dossier, "test_accuracy")
    if live is None or offline is None:
        return Finding(False, "no labelled live requests of this version")
    low, high = live["low"] - ONLINE_MARGIN, live["high"] + ONLINE_MARGIN
    what = (
        f"{live['accuracy']:.4f} on {live['labels']} labelled live requests "
        f"({live['low']:.4f}–{live['high']:.4f}), {offline:.4f} on test"
    )
    return Finding(low <= offline <= high, what)


def tuned(dossier: Dossier) -> Finding:
    """The version is the best of several configurations."""
    values: dict[str, set[str]] = {}
    for trial in dossier.trials:
        for name, value in trial["params"].items():
            values.setdefault(name, set()).add(value)
    varied = sorted(name for name, seen in values.items() if len(seen) > 1)
    if not varied:
        return Finding(False, "no sweep with more than one configuration")
    return Finding(True, f"{len(dossier.trials)} trials over {', '.join(varied)}")


def staleness(dossier: Dossier) -> Finding:
    """A retrain's gate compared old and new on the same live requests."""
    for retrain in reversed(dossier.retrains):
        if gate := _steps(retrain).get("gate"):
            found = gate["result"]
            return Finding(
                True,
                f"retrain {retrain['id']}: on {found['rows']} live requests the old model "
                f"{found['champion_accuracy']:.4f}, the new one {found['candidate_accuracy']:.4f}",
            )
    return Finding(False, "no retrain has compared an old with a new model")


def simpler(dossier: Dossier) -> Finding:
    """Logistic regression on the same data is worse."""
    val, baseline = _metric(dossier, "val_accuracy"), _metric(dossier, "baseline_val_accuracy")
    if val is None or baseline is None:
        return Finding(False, "no baseline was trained")
    return Finding(val > baseline, f"validation {val:.4f}, logistic regression {baseline:.4f}")


def slices(dossier: Dossier) -> Finding:
    """Every class is in test, and none is far below the others."""
    evaluation = dossier.evaluation
    if not evaluation:
        return Finding(False, "no evaluation by class")
    found = evaluation["per_class_accuracy"]
    if lacking := [name for name in evaluation["class_names"] if name not in found]:
        return Finding(False, f"test has no rows of {', '.join(lacking)}")
    worst = min(found, key=lambda name: found[name])
    what = f"worst class {worst}: {found[worst]:.4f}, mean {evaluation['macro_accuracy']:.4f}"
    return Finding(found[worst] >= evaluation["macro_accuracy"] - WORST_CLASS, what)


def reproducible(dossier: Dossier) -> Finding:
    """All that training depends on is recorded, and CI trains a version again."""
    tested = _in_ci(dossier, ("tests/integration/test_reproduce.py",))
    facts = dossier.facts
    lacking = [
        name
        for name, there in (
            ("commit", facts.get("code", {}).get("commit")),
            ("parameters", facts.get("parameters")),
            ("packages", facts.get("packages")),
            ("data", dossier.manifests),
        )
        if not there
    ]
    if lacking:
        return Finding(False, f"not recorded: {', '.join(lacking)}")
    return Finding(tested.holds, f"commit, parameters, packages and data recorded; {tested.what}")


def unit_tested(dossier: Dossier) -> Finding:
    """Net and training loop have tests that CI runs."""
    return _in_ci(dossier, ("tests/unit/test_train_model.py", "tests/unit/test_train_loop.py"))


def integration_tested(dossier: Dossier) -> Finding:
    """CI runs the whole line."""
    return _in_ci(dossier, ("tests/e2e/test_line.py",))


def validated(dossier: Dossier) -> Finding:
    """Registration measured it, and its gap between validation and test is in line."""
    facts = dossier.facts
    if not facts.get("ready") or _metric(dossier, "test_accuracy") is None:
        return Finding(False, "its registration is not complete")
    gap = facts.get("gap", {})
    if gap.get("holds") is None:
        return Finding(False, "its gap between validation and test can't be judged")
    what = f"baseline, export and gap gates; gap {100 * gap['value']:+.2f} points"
    return Finding(bool(gap["holds"]), what + ("" if gap["holds"] else ", out of line"))


def debuggable(dossier: Dossier) -> Finding:
    """Answers are logged with version and request id, and lead back to run, data and code."""
    rows = dossier.requests.get("rows", 0)
    if not rows or not dossier.facts.get("lineage", {}).get("run_id"):
        return Finding(False, "no answer of this version is in the prediction log")
    return Finding(True, f"{rows:,} answers of a week in the log, with request id and version")


def canaried(dossier: Dossier) -> Finding:
    """It had a share of the traffic before it had all of it."""
    for made in dossier.policies:
        share = _share(made, dossier.version)
        if share == 1:
            return Finding(False, "it got all of the traffic without a smaller share before")
        if share:
            return Finding(True, f"{100 * share:g} % in generation {made['generation']} first")
    return Finding(False, "it never had a share of the traffic")


def can_roll_back(dossier: Dossier) -> Finding:
    """The champion before is up."""
    if not dossier.policies:
        return Finding(False, "nothing is served")
    newest = dossier.policies[-1]
    before = newest["previous_champion"]
    if before is None or before not in newest["bundles"]:
        return Finding(False, "no champion before this one is up")
    return Finding(True, f"version {before} is up, `jobs.deploy rollback` restores it")


def dependencies(dossier: Dossier) -> Finding:
    """A service proposes changes of what is pinned."""
    names = ("dependabot.yml", "dependabot.yaml", "renovate.json", ".renovaterc")
    found = sorted(file for file in dossier.files if file.rsplit("/", 1)[-1] in names)
    if not found or "requirements.txt" not in dossier.files:
        return Finding(False, "no service that reports new releases is set up")
    return Finding(True, f"requirements.txt pins all; {found[0]} reports changes")


def inputs(dossier: Dossier) -> Finding:
    """The monitor compared live images with the training data lately, and they are alike."""
    drift = dossier.watch.get("drift") or {}
    if not drift or not _is_fresh(dossier, drift["end"]):
        return Finding(False, "the monitor has not tested live images within a day")
    what = f"newest window: p = {drift['p_value']:.2g}"
    alarm = bool(drift["evidence"]["alarm"])
    return Finding(not alarm, what + ("; the live images have drifted" if alarm else ""))


def skew(dossier: Dossier) -> Finding:
    """What serves was compared with what was trained, on every test image."""
    difference = _metric(dossier, "onnx_max_difference")
    if difference is None or not dossier.facts.get("served", {}).get("bundle_is_there"):
        return Finding(False, "no served files that were compared with what was trained")
    what = f"same labels on all test images, probabilities differ by {difference:.1g} at most"
    return Finding(difference <= SKEW, what)


def stale(dossier: Dossier) -> Finding:
    """The monitor looks at the version's age, and it is young."""
    created_ms = dossier.facts.get("created_ms")
    if created_ms is None or not _is_fresh(dossier, dossier.watch.get("time")):
        return Finding(False, "no monitor has looked within a day")
    days = (dossier.now_s - created_ms / 1000) / DAY_S
    return Finding(days <= STALE_DAYS, f"{days:.1f} days old, {STALE_DAYS:g} are allowed")


def stable(dossier: Dossier) -> Finding:
    """No logged probability is infinite, not a number, or outside of 0–1."""
    requests = dossier.requests
    if not requests.get("rows"):
        return Finding(False, "no answer of this version is in the prediction log")
    wrong = requests["not_finite"] + requests["out_of_range"]
    return Finding(wrong == 0, f"{wrong} wrong numbers in {requests['rows']:,} answers")


def performance(dossier: Dossier) -> Finding:
    """The latency of the last day is that of the days before."""
    now, before = dossier.requests.get("p99_ms"), dossier.requests.get("p99_before_ms")
    if now is None or before is None:
        return Finding(False, "no answers of the last day and of days before to compare")
    return Finding(now <= SLOWER * before, f"p99 {now:.1f} ms of a day, {before:.1f} ms before")


def quality(dossier: Dossier) -> Finding:
    """Live accuracy, measured lately, is not below what test promised."""
    live, offline = _online(dossier), _metric(dossier, "test_accuracy")
    if live is None or offline is None or not _is_fresh(dossier, dossier.watch.get("time")):
        return Finding(False, "no live accuracy of this version within a day")
    what = f"{live['accuracy']:.4f} on {live['labels']} labelled requests, {offline:.4f} on test"
    return Finding(live["high"] >= offline - ONLINE_MARGIN, what)


def _metric(dossier: Dossier, name: str) -> float | None:
    value = dossier.facts.get("metrics", {}).get(name)
    return None if value is None else float(value)


def _steps(retrain: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {s["name"]: s for s in retrain.get("steps", ()) if s["state"] == "done"}


def _online(dossier: Dossier) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = dossier.watch.get("versions", {}).get(str(dossier.version))
    return found if found and found["labels"] and not found["shadow"] else None


def _is_fresh(dossier: Dossier, time_s: float | None) -> bool:
    return time_s is not None and dossier.now_s - time_s <= FRESH_S


def _share(made: Mapping[str, Any], version: int) -> float:
    weights: Mapping[str, float] = made["weights"]
    return weights.get(str(version), 0.0) / sum(weights.values())


def _in_ci(dossier: Dossier, tests: Sequence[str]) -> Finding:
    if lacking := [test for test in tests if test not in dossier.files]:
        return Finding(False, f"there is no {lacking[0]} here")
    if "make test" not in dossier.ci and "pytest" not in dossier.ci:
        return Finding(False, "no CI that runs the tests")
    return Finding(True, f"CI runs {', '.join(tests)}")

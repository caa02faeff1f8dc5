"""The ML Test Score of a version: 28 checks, each computed from evidence or done by hand.

Rubric: Breck, Cai, Nielsen, Salib, Sculley, "The ML Test Score: A Rubric for ML Production
Readiness and Technical Debt Reduction", IEEE Big Data 2017. A check that is done by hand, with the
result on record, counts half a point, one that runs by itself a whole one; the score is that of the
weakest of the four sections. Here a check counts only for what its evidence shows now: without it
there is nothing, whatever the code could do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lib.watch import scorecard_checks as checks
from lib.watch.dossier import DAY_S, Dossier
from lib.watch.scorecard_checks import Finding

DATA, MODEL, INFRASTRUCTURE, MONITORING = "data", "model", "infrastructure", "monitoring"
SECTIONS = (DATA, MODEL, INFRASTRUCTURE, MONITORING)
AUTOMATED, MANUAL, OPEN = "automated", "manual", "open"
POINTS = {AUTOMATED: 1.0, MANUAL: 0.5, OPEN: 0.0}
ATTESTED_DAYS = 180.0
"""For so long a check that was done by hand counts."""
MEANINGS = (
    (0.0, "more of a research project than a productionized system"),
    (1.0, "not totally untested, but serious holes in reliability are possible"),
    (2.0, "a first pass at basic productionization; more investment may be needed"),
    (3.0, "reasonably tested, but more of those tests and procedures may be automated"),
    (5.0, "strong levels of automated testing and monitoring"),
    (7.0, "exceptional levels of automated testing and monitoring"),
)
"""Highest score → what the paper says of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line of the rubric."""

    id: str
    section: str
    title: str
    """As the paper names it."""
    find: Callable[[Dossier], Finding] | None = None
    """Looks at the evidence; None where only a person can tell."""
    by_hand: str
    """What a person has to do where the evidence does not show it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """A check and what came of it."""

    id: str
    section: str
    title: str
    how: str
    """`automated`, `manual` or `open`."""
    points: float
    found: str
    """What the evidence says."""
    todo: str
    """Empty if it counts in full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorecard:
    """All checks of a version."""

    checked: tuple[Checked, ...]

    @property
    def sections(self) -> dict[str, float]:
        """Points by section."""
        return {
            section: sum(c.points for c in self.checked if c.section == section)
            for section in SECTIONS
        }

    @property
    def score(self) -> float:
        """The points of the weakest section."""
        return min(self.sections.values())

    @property
    def meaning(self) -> str:
        """What the paper says of such a score."""
        return next(meaning for highest, meaning in MEANINGS if self.score <= highest)

    def to_json(self) -> dict[str, Any]:
        """Return the scorecard as JSON types."""
        return {
            "score": self.score,
            "meaning": self.meaning,
            "sections": self.sections,
            "checks": [asdict(checked) for checked in self.checked],
        }


CHECKS: tuple[Check, ...] = (
    Check(
        id="data-schema",
        section=DATA,
        title="Feature expectations are captured in a schema",
        find=checks.schema,
        by_hand="ingest the data set again, or restore its manifest and shards",
    ),
    Check(
        id="data-beneficial",
        section=DATA,
        title="All features are beneficial",
        find=checks.beneficial,
        by_hand="show that the images tell the classes apart better than the commonest class does",
    ),
    Check(
        id="data-cost",
        section=DATA,
        title="No feature's cost is too much",
        find=checks.cost,
        by_hand="measure what an answer costs, and compare it with what it is worth",
    ),
    Check(
        id="data-requirements",
        section=DATA,
        title="Features adhere to meta-level requirements",
        by_hand="confirm that licence and contracts allow these images to be used for this purpose",
    ),
    Check(
        id="data-privacy",
        section=DATA,
        title="The data pipeline has appropriate privacy controls",
        by_hand="check who can read the storage root, and that logged images go when they must",
    ),
    Check(
        id="data-agility",
        section=DATA,
        title="New features can be added quickly",
        find=checks.agility,
        by_hand="add labelled live requests with jobs.retrain, and note how long it took",
    ),
    Check(
        id="data-code",
        section=DATA,
        title="All input feature code is tested",
        find=checks.input_code,
        by_hand="test how pictures become pixels, and run the tests in CI",
    ),
    Check(
        id="model-reviewed",
        section=MODEL,
        title="Model specs are reviewed and submitted",
        find=checks.submitted,
        by_hand="train from a clean commit that somebody else has reviewed",
    ),
    Check(
        id="model-correlates",
        section=MODEL,
        title="Offline and online metrics correlate",
        find=checks.correlates,
        by_hand="send labels to POST /feedback while the version is served, with jobs.monitor up",
    ),
    Check(
        id="model-tuned",
        section=MODEL,
        title="All hyperparameters have been tuned",
        find=checks.tuned,
        by_hand="register the best trial of a sweep of jobs.tune",
    ),
    Check(
        id="model-staleness",
        section=MODEL,
        title="The impact of model staleness is known",
        find=checks.staleness,
        by_hand="run jobs.retrain: its gate compares old and new on the same live requests",
    ),
    Check(
        id="model-simpler",
        section=MODEL,
        title="A simpler model is not better",
        find=checks.simpler,
        by_hand="compare with the baseline, and take the baseline if it is as good",
    ),
    Check(
        id="model-slices",
        section=MODEL,
        title="Model quality is sufficient on important data slices",
        find=checks.slices,
        by_hand="collect more images of the worst class, or decide that it may be as it is",
    ),
    Check(
        id="model-inclusion",
        section=MODEL,
        title="The model is tested for considerations of inclusion",
        by_hand="compare the quality for the groups of people that the images come from",
    ),
    Check(
        id="infra-reproducible",
        section=INFRASTRUCTURE,
        title="Training is reproducible",
        find=checks.reproducible,
        by_hand="run jobs.reproduce on the version, and note its verdict",
    ),
    Check(
        id="infra-unit",
        section=INFRASTRUCTURE,
        title="Model specs are unit tested",
        find=checks.unit_tested,
        by_hand="test net and training loop, and run the tests in CI",
    ),
    Check(
        id="infra-integration",
        section=INFRASTRUCTURE,
        title="The ML pipeline is integration tested",
        find=checks.integration_tested,
        by_hand="run the whole line in CI, from images to an answer",
    ),
    Check(
        id="infra-validated",
        section=INFRASTRUCTURE,
        title="Model quality is validated before serving",
        find=checks.validated,
        by_hand="register the version with jobs.register, whose gates measure it",
    ),
    Check(
        id="infra-debuggable",
        section=INFRASTRUCTURE,
        title="The model is debuggable",
        find=checks.debuggable,
        by_hand="follow one answer back to its input, version, run, data and code",
    ),
    Check(
        id="infra-canaried",
        section=INFRASTRUCTURE,
        title="Models are canaried before serving",
        find=checks.canaried,
        by_hand="bring the version in with jobs.rollout",
    ),
    Check(
        id="infra-rollback",
        section=INFRASTRUCTURE,
        title="Serving models can be rolled back",
        find=checks.can_roll_back,
        by_hand="practise jobs.deploy rollback; it needs a champion before this one",
    ),
    Check(
        id="monitor-dependencies",
        section=MONITORING,
        title="Dependency changes result in notification",
        find=checks.dependencies,
        by_hand="subscribe to the releases of what requirements.txt pins, and note who reads them",
    ),
    Check(
        id="monitor-inputs",
        section=MONITORING,
        title="Data invariants hold for inputs",
        find=checks.inputs,
        by_hand="keep jobs.monitor up, and act on the drift that it reports",
    ),
    Check(
        id="monitor-skew",
        section=MONITORING,
        title="Training and serving are not skewed",
        find=checks.skew,
        by_hand="score the test images over HTTP, and compare with the labels computed offline",
    ),
    Check(
        id="monitor-stale",
        section=MONITORING,
        title="Models are not too stale",
        find=checks.stale,
        by_hand="keep jobs.monitor up, and train again",
    ),
    Check(
        id="monitor-stable",
        section=MONITORING,
        title="Models are numerically stable",
        find=checks.stable,
        by_hand="look for answers that are no numbers in the prediction log",
    ),
    Check(
        id="monitor-performance",
        section=MONITORING,
        title="Computing performance has not regressed",
        find=checks.performance,
        by_hand="compare the latency of the last day with that of the days before",
    ),
    Check(
        id="monitor-quality",
        section=MONITORING,
        title="Prediction quality has not regressed",
        find=checks.quality,
        by_hand="send labels to POST /feedback, with jobs.monitor up",
    ),
)


def score(dossier: Dossier, rubric: Sequence[Check] = CHECKS) -> Scorecard:
    """Check a version against the rubric."""
    return Scorecard(checked=tuple(_checked(check, dossier) for check in rubric))


def _checked(check: Check, dossier: Dossier) -> Checked:
    finding = check.find(dossier) if check.find else Finding(False, "only a person can tell")
    how, found = (AUTOMATED if finding.holds else OPEN), finding.what
    attested = dossier.attested.get(check.id)
    if not finding.holds and attested is not None:
        days = (dossier.now_s - attested["when_s"]) / DAY_S
        said = f"{attested['who']}, {days:.0f} days ago: {attested['note']}"
        if days <= ATTESTED_DAYS:
            how, found = MANUAL, said if check.find is None else f"{found}. {said}"
        else:
            found = f"{found}; too long ago to count: {said}"
    return Checked(
        id=check.id,
        section=check.section,
        title=check.title,
        how=how,
        points=POINTS[how],
        found=found,
        todo="" if how != OPEN else check.by_hand,
    )

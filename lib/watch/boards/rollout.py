"""The dashboard of a rollout."""

from __future__ import annotations

from dataclasses import replace

from lib.watch import metrics
from lib.watch.boards.shared import (
    ACCURACY,
    DISAGREEMENT,
    ERRORS,
    LATENCY,
    SHADOWS,
    SHARE,
    VERSION,
    now,
)
from lib.watch.panels import STATES, Dashboard, Panel, Row, Target

_NO_ROLLOUT = "no rollout runs"

ROLLOUT = Dashboard(
    uid="rayline-rollout",
    title="Rayline: rollout",
    description="A new version on its way to all traffic, beside the champion.",
    models_of=metrics.REQUESTS.exported,
    rows=(
        Row(
            title="The rollout",
            panels=(
                Panel(
                    title="State",
                    description="The state that the rollout is in.",
                    kind=STATES,
                    may_be_empty=_NO_ROLLOUT,
                    targets=(
                        Target(
                            expr=f"{now(metrics.ROLLOUT_STATE)} == 1",
                            legend=f"{VERSION} {{{{state}}}}",
                        ),
                    ),
                ),
                Panel(
                    title="Weight",
                    description=metrics.ROLLOUT_WEIGHT.description,
                    unit="percent",
                    max=100,
                    may_be_empty=_NO_ROLLOUT,
                    targets=(Target(expr=now(metrics.ROLLOUT_WEIGHT), legend=VERSION),),
                ),
                Panel(
                    title="Gates",
                    description=metrics.ROLLOUT_GATE.description,
                    min=-1,
                    max=1,
                    may_be_empty=_NO_ROLLOUT,
                    targets=(
                        Target(expr=now(metrics.ROLLOUT_GATE), legend=f"{VERSION} {{{{gate}}}}"),
                    ),
                ),
                Panel(
                    title="Samples",
                    description=metrics.ROLLOUT_SAMPLES.description,
                    may_be_empty=_NO_ROLLOUT,
                    targets=(Target(expr=now(metrics.ROLLOUT_SAMPLES), legend=VERSION),),
                ),
                replace(SHARE, id=None),
                replace(SHADOWS, id=None),
            ),
        ),
        Row(
            title="What its gates look at",
            panels=(
                replace(ERRORS, id=None),
                replace(LATENCY, id=None),
                ACCURACY,
                DISAGREEMENT,
            ),
        ),
    ),
)

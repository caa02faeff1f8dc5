"""The dashboard of data and drift."""

from __future__ import annotations

from lib.watch import metrics
from lib.watch.boards.shared import ACCURACY, DISAGREEMENT, NO_MONITOR, VERSION, now
from lib.watch.panels import STATES, Dashboard, Panel, Row, Target

DRIFT = Dashboard(
    uid="rayline-drift",
    title="Rayline: data and drift",
    description="Whether requests still look like the training data, and answers are still right.",
    models_of=metrics.REQUESTS.exported,
    rows=(
        Row(
            title="Drift",
            panels=(
                Panel(
                    title="Score",
                    description=metrics.DRIFT_SCORE.description,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.DRIFT_SCORE), legend="{{model}} {{kind}}"),),
                ),
                Panel(
                    title="p-value",
                    description=metrics.DRIFT_P_VALUE.description,
                    log=True,
                    max=1,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.DRIFT_P_VALUE), legend="{{model}} {{kind}}"),),
                ),
                Panel(
                    title="Alarm",
                    description=metrics.DRIFT_ALARM.description,
                    kind=STATES,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.DRIFT_ALARM), legend="{{model}}"),),
                ),
            ),
        ),
        Row(
            title="Quality",
            panels=(
                ACCURACY,
                Panel(
                    title="Labelled answers",
                    description=metrics.LABELLED_ROWS.description,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.LABELLED_ROWS), legend=VERSION),),
                ),
                DISAGREEMENT,
            ),
        ),
        Row(
            title="Answers without labels",
            panels=(
                Panel(
                    title="Predicted labels",
                    description=metrics.PREDICTED_SHARE.description,
                    unit="percentunit",
                    stack=True,
                    max=1,
                    may_be_empty=NO_MONITOR,
                    targets=(
                        Target(expr=now(metrics.PREDICTED_SHARE), legend="{{model}} {{label}}"),
                    ),
                ),
                Panel(
                    title="Confidence",
                    description=metrics.CONFIDENCE.description,
                    unit="percentunit",
                    min=None,
                    max=1,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.CONFIDENCE), legend=VERSION),),
                ),
                Panel(
                    title="Entropy",
                    description=metrics.ENTROPY.description,
                    may_be_empty=NO_MONITOR,
                    targets=(Target(expr=now(metrics.ENTROPY), legend=VERSION),),
                ),
            ),
        ),
    ),
)

"""The dashboard of sweeps."""

from __future__ import annotations

from lib.watch import metrics
from lib.watch.panels import Dashboard, Panel, Row, Target

_NO_GPU = "the cluster has no GPU"
_NO_SWEEP = "no sweep runs"

TRAINING = Dashboard(
    uid="rayline-training",
    title="Rayline: training",
    description="Sweeps while they run.",
    rows=(
        Row(
            title="Sweeps",
            panels=(
                Panel(
                    title="Trials",
                    description=metrics.SWEEP_TRIALS.description,
                    stack=True,
                    may_be_empty=_NO_SWEEP,
                    targets=(
                        Target(
                            expr=f"max by (sweep, state) ({metrics.SWEEP_TRIALS.exported})",
                            legend="{{sweep}} {{state}}",
                        ),
                    ),
                ),
                Panel(
                    title="Best so far",
                    description=metrics.SWEEP_BEST.description,
                    min=None,
                    may_be_empty=_NO_SWEEP,
                    targets=(
                        Target(
                            expr=f"max by (sweep, metric) ({metrics.SWEEP_BEST.exported})",
                            legend="{{sweep}} {{metric}}",
                        ),
                    ),
                ),
                Panel(
                    title="Images/s",
                    description=metrics.SWEEP_IMAGES_PER_S.description,
                    unit="ops",
                    may_be_empty=_NO_SWEEP,
                    targets=(
                        Target(
                            expr=f"max by (sweep) ({metrics.SWEEP_IMAGES_PER_S.exported})",
                            legend="{{sweep}}",
                        ),
                    ),
                ),
            ),
        ),
        Row(
            title="What trials take",
            panels=(
                Panel(
                    title="Cores given out",
                    description="Of the cores that Ray gives out, those that are reserved.",
                    targets=(
                        Target(
                            expr='sum(ray_resources{Name="CPU", State="USED"})', legend="reserved"
                        ),
                        Target(expr='sum(ray_resources{Name="CPU"})', legend="all"),
                    ),
                ),
                Panel(
                    title="Processor time by process",
                    description="Cores that are busy, by kind of process.",
                    targets=(
                        Target(
                            expr="sum by (Component) (ray_component_cpu_percentage) / 100",
                            legend="{{Component}}",
                        ),
                    ),
                ),
                Panel(
                    title="GPUs",
                    description="How busy they are.",
                    unit="percent",
                    max=100,
                    may_be_empty=_NO_GPU,
                    targets=(
                        Target(
                            expr="avg by (instance, GpuIndex) (ray_node_gpus_utilization)",
                            legend="{{instance}} {{GpuIndex}}",
                        ),
                    ),
                ),
            ),
        ),
    ),
)

"""The dashboard of the cluster: nodes, cores, memory, disk, and what Ray runs on them."""

from __future__ import annotations

from lib.watch.panels import Dashboard, Panel, Row, Target

_STORE = 'ray_resources{Name="object_store_memory"}'
_NO_GPU = "the cluster has no GPU"

_UTILISATION = Panel(
    id=41,
    title="Utilisation",
    description="Of all nodes together.",
    unit="percent",
    max=100,
    targets=(
        Target(
            expr="sum(ray_node_cpu_utilization * ray_node_cpu_count) / sum(ray_node_cpu_count)",
            legend="cores",
        ),
        Target(
            expr="100 * sum(ray_node_mem_used_host) / sum(ray_node_mem_total_host)",
            legend="memory",
        ),
        Target(
            expr=f"100 * sum(ray_object_store_memory) / sum({_STORE})",
            legend="object store",
        ),
        Target(
            expr="100 * sum(ray_node_disk_usage)"
            " / (sum(ray_node_disk_usage) + sum(ray_node_disk_free))",
            legend="disk",
        ),
    ),
)
_NODES = Panel(
    id=24,
    title="Nodes",
    description="Nodes whose metrics are read.",
    targets=(Target(expr="count(ray_node_cpu_count)", legend="alive"),),
)
_CORES = Panel(
    title="Cores given out",
    description="Cores that are reserved, by node, and all that Ray gives out.",
    targets=(
        Target(
            expr='sum by (instance) (ray_resources{Name="CPU", State="USED"})',
            legend="{{instance}}",
        ),
        Target(expr='sum(ray_resources{Name="CPU"})', legend="all"),
    ),
)
_PROCESSES = Panel(
    title="Memory by process",
    description="Resident memory without what is shared, by kind of process.",
    unit="bytes",
    stack=True,
    targets=(
        Target(
            expr="sum by (Component) (ray_component_rss_bytes - ray_component_shared_bytes)",
            legend="{{Component}}",
        ),
    ),
)
_MEMORY = Panel(
    title="Memory by node",
    description="Used, and all there is.",
    unit="bytes",
    targets=(
        Target(expr="sum by (instance) (ray_node_mem_used_host)", legend="{{instance}}"),
        Target(expr="sum by (instance) (ray_node_mem_total_host)", legend="{{instance}} all"),
    ),
)
_OBJECT_STORE = Panel(
    title="Object store",
    description="Where objects are, and how much room there is.",
    unit="bytes",
    targets=(
        Target(expr="sum by (Location) (ray_object_store_memory)", legend="{{Location}}"),
        Target(expr=f"sum({_STORE})", legend="room"),
    ),
)
_DISK = Panel(
    title="Disk by node",
    description="Share that is used.",
    unit="percentunit",
    max=1,
    limit=0.9,
    targets=(
        Target(
            expr="sum by (instance) (ray_node_disk_usage)"
            " / sum by (instance) (ray_node_disk_usage + ray_node_disk_free)",
            legend="{{instance}}",
        ),
    ),
)
_ACTORS = Panel(
    title="Actors",
    description="By state.",
    stack=True,
    targets=(Target(expr='sum by (State) (ray_actors{Source="gcs"})', legend="{{State}}"),),
)
_TASKS = Panel(
    title="Tasks",
    description="That wait or run, by state.",
    stack=True,
    may_be_empty="no task waits or runs",
    targets=(
        Target(
            expr='clamp_min(sum by (State) (ray_tasks{State!~"FINISHED|FAILED"}), 0)',
            legend="{{State}}",
        ),
    ),
)
_NETWORK = Panel(
    title="Network",
    description="Of all nodes.",
    unit="Bps",
    targets=(
        Target(expr="sum(ray_node_network_receive_speed)", legend="received"),
        Target(expr="sum(ray_node_network_send_speed)", legend="sent"),
    ),
)
_GPU_MEMORY = Panel(
    title="GPU memory",
    description="Used, by GPU.",
    unit="decmbytes",
    may_be_empty=_NO_GPU,
    targets=(
        Target(
            expr="sum by (instance, GpuIndex) (ray_node_gram_used)",
            legend="{{instance}} {{GpuIndex}}",
        ),
    ),
)

CLUSTER = Dashboard(
    uid="rayline-cluster",
    title="Rayline: cluster",
    description="Nodes, cores, memory and disk, and what Ray runs on them.",
    rows=(
        Row(title="The whole", panels=(_UTILISATION, _NODES, _CORES)),
        Row(title="Memory and disk", panels=(_MEMORY, _PROCESSES, _OBJECT_STORE, _DISK)),
        Row(title="Work", panels=(_ACTORS, _TASKS, _NETWORK, _GPU_MEMORY)),
    ),
)

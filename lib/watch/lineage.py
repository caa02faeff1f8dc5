"""Where a version comes from, as a graph: requests and data set → sweep → run → version → rollout.

Pure but for `write_graph`. The picture needs nothing to be seen but a browser.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from lib.storage import Storage

_BOX_WIDTH, _LINE_HEIGHT, _PADDING, _GAP_X, _GAP_Y = 216, 17, 10, 24, 34
_MAX_LETTERS = 32
_SHORT = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """One thing that was made, or that something was made of."""

    id: str
    kind: str
    """requests, data set, sweep, run, version, gate or rollout."""
    title: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """Nodes, those that others were made of first."""

    nodes: tuple[Node, ...]
    edges: tuple[tuple[str, str], ...]
    """(id of what it was made of, id of what was made)."""

    def to_json(self) -> dict[str, Any]:
        """Return the graph as JSON types."""
        return {
            "nodes": [asdict(node) for node in self.nodes],
            "edges": [list(edge) for edge in self.edges],
        }


def of_retrain(record: Mapping[str, Any]) -> Graph:
    """Return the graph of a retrain, as far as it got."""
    results = {s["name"]: s["result"] for s in record["steps"] if s["state"] == "done"}
    nodes = [Node(id="requests", kind="requests", title="labelled requests",
                  details=(f"trigger: {record['reason']}",))]  # fmt: skip
    edges: list[tuple[str, str]] = []
    champion = record["champion"]
    if champion:
        title = str(champion["data_digest"])[:_SHORT]
        details = (f"of version {champion['version']}",)
        nodes.append(Node(id="parent", kind="data set", title=title, details=details))
    chain: list[Node] = []
    if data := results.get("data"):
        rows = ", ".join(f"{count} {split}" for split, count in data.get("rows", {}).items())
        chain.append(_node("data", "data set", data["digest"], f"new: {rows}"))
        edges += [("requests", "data")] + [("parent", "data")] * bool(champion)
    if sweep := results.get("tune"):
        trials = f"{sweep['num_trials']} trials" if "num_trials" in sweep else ""
        chain.append(_node("sweep", "sweep", sweep["sweep_run_id"], trials))
    if version := results.get("register"):
        chain.append(_node("run", "run", version["run_id"]))
        accuracy = version.get("test_accuracy")
        shown = "" if accuracy is None else f"test {100 * accuracy:.2f} %"
        chain.append(_node("version", "version", f"version {version['version']}", shown))
    if gate := results.get("gate"):
        chain.append(_node("gate", "gate", "passed" if gate["passed"] else "refused"))
    if rollout := results.get("rollout"):
        chain.append(_node("rollout", "rollout", str(rollout.get("status", "ended"))))
    edges += [(a.id, b.id) for a, b in zip(chain, chain[1:], strict=False)]
    return Graph(nodes=(*nodes, *chain), edges=tuple(edges))


def write_graph(storage: Storage, path: str, graph: Graph) -> None:
    """Write a graph as `path`.json and as a picture, `path`.svg."""
    storage.write_json(f"{path}.json", graph.to_json())
    storage.write(f"{path}.svg", to_svg(graph).encode())


def to_mermaid(graph: Graph) -> str:
    """Return the graph in Mermaid's language, for documents that draw it."""
    lines = ["flowchart TD"]
    for node in graph.nodes:
        text = "<br/>".join(escape(part) for part in (node.kind, node.title, *node.details))
        lines.append(f'  {node.id}["{text}"]')
    return "\n".join(lines + [f"  {a} --> {b}" for a, b in graph.edges]) + "\n"


def to_svg(graph: Graph) -> str:
    """Return the graph as a picture that stands alone, drawn from top to bottom."""
    layers = _layers(graph)
    widest = max(len(layer) for layer in layers)
    total_width = widest * (_BOX_WIDTH + _GAP_X) + _GAP_X
    boxes: dict[str, tuple[float, float, float]] = {}
    top = float(_PADDING)
    for layer in layers:
        left = (total_width - len(layer) * (_BOX_WIDTH + _GAP_X) + _GAP_X) / 2
        height = max(_height(node) for node in layer)
        for index, node in enumerate(layer):
            boxes[node.id] = (left + index * (_BOX_WIDTH + _GAP_X), top, _height(node))
        top += height + _GAP_Y
    parts = [_arrow(boxes[a], boxes[b]) for a, b in graph.edges]
    parts += [_box(node, *boxes[node.id][:2]) for layer in layers for node in layer]
    total_height = top - _GAP_Y + _PADDING
    names = ", ".join(f"{node.kind} {node.title}" for node in graph.nodes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height:g}" '
        f'width="{total_width}" role="img" aria-label="Lineage: {escape(names)}" '
        'font-family="system-ui, sans-serif" font-size="12" style="max-width:100%;height:auto">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#5b6472"/></marker></defs>'
        + "".join(parts)
        + "</svg>"
    )


def _node(node_id: str, kind: str, title: str, *details: str) -> Node:
    shown = title if " " in title else title[:_SHORT]
    return Node(id=node_id, kind=kind, title=shown, details=tuple(d for d in details if d))


def _layers(graph: Graph) -> list[list[Node]]:
    """Return nodes by the longest way from a node that nothing leads to."""
    depth = {node.id: 0 for node in graph.nodes}
    for _ in graph.nodes:
        for a, b in graph.edges:
            depth[b] = max(depth[b], depth[a] + 1)
    layers = [[n for n in graph.nodes if depth[n.id] == d] for d in range(max(depth.values()) + 1)]
    return [layer for layer in layers if layer]


def _height(node: Node) -> float:
    return 2 * _PADDING + _LINE_HEIGHT * (2 + len(node.details))


def _box(node: Node, left: float, top: float) -> str:
    lines: Sequence[str] = (node.kind, node.title, *node.details)
    texts = "".join(
        f'<text x="{left + _PADDING:g}" y="{top + _PADDING + _LINE_HEIGHT * (i + 0.75):g}" '
        f'fill="{"#5b6472" if i != 1 else "#14181f"}" font-weight="{600 if i == 1 else 400}">'
        f"{escape(line if len(line) <= _MAX_LETTERS else line[: _MAX_LETTERS - 1] + '…')}</text>"
        for i, line in enumerate(lines)
    )
    return (
        f'<rect x="{left:g}" y="{top:g}" width="{_BOX_WIDTH}" height="{_height(node):g}" rx="6" '
        f'fill="#f5f7fa" stroke="#9aa4b2"/>{texts}'
    )


def _arrow(source: tuple[float, float, float], target: tuple[float, float, float]) -> str:
    x1, y1 = source[0] + _BOX_WIDTH / 2, source[1] + source[2]
    x2, y2 = target[0] + _BOX_WIDTH / 2, target[1] - 1
    middle = (y1 + y2) / 2
    return (
        f'<path d="M{x1:g} {y1:g}C{x1:g} {middle:g} {x2:g} {middle:g} {x2:g} {y2:g}" fill="none" '
        'stroke="#5b6472" marker-end="url(#tip)"/>'
    )

"""From what is known of a version to its page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from lib.registry.views import day, percent, points
from lib.train.experiment import rank_key
from lib.watch.dossier import Dossier
from lib.watch.lineage import Graph, Node, of_retrain, to_svg
from lib.watch.report import plots
from lib.watch.scorecard import SECTIONS, Scorecard

_TEMPLATE = "page.html.j2"
_GAP = 2
_MAX_CLASSES = 20


def render(dossier: Dossier, card: Scorecard) -> str:
    """Return the page: HTML with its styles and pictures in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points, "time": _time}
    pictures = {
        name: Markup(svg) if (svg := draw(dossier)) else None
        for name, draw in (
            ("data", plots.data),
            ("search", plots.search),
            ("confusion", plots.confusion),
            ("classes", plots.classes),
            ("gap", plots.gap),
            ("drift", plots.drift),
            ("quality", plots.quality),
            ("shares", plots.shares),
        )
    }
    return environment.get_template(_TEMPLATE).render(
        d=dossier,
        facts=dossier.facts,
        made=day(dossier.facts["created_ms"]),
        card=card,
        sections=SECTIONS,
        section_picture=Markup(plots.sections(card.sections) or ""),
        pictures=pictures,
        lineage=Markup(to_svg(lineage_of(dossier))),
        samples={split: grid(dossier, split) for split in ("train", "live")},
        rollouts=[r for r in dossier.rollouts if r.get("candidate") == dossier.version],
        policies=_changes(dossier),
        retrain=_retrain(dossier),
        trials=_best_trials(dossier),
        metric=dossier.objective.metric,
    )


def lineage_of(dossier: Dossier) -> Graph:
    """Return where the version comes from: its retrain's graph, else what its records say."""
    if (retrain := _retrain(dossier)) is not None:
        return of_retrain(retrain)
    nodes, edges = [], []
    for older, manifest in reversed(list(enumerate(dossier.manifests))):
        rows = ", ".join(f"{sum(c):,} {split}" for split, c in manifest["counts"].items())
        nodes.append(Node(id=f"data{older}", kind="data set", title=manifest["digest"][:12],
                          details=(manifest["source"], rows)))  # fmt: skip
    facts = dossier.facts
    lineage, metrics = facts["lineage"], facts["metrics"]
    nodes += [
        Node(id="sweep", kind="sweep", title=lineage["sweep_run_id"][:12],
             details=(f"{len(dossier.trials)} trials",)),
        Node(id="run", kind="run", title=lineage["run_id"][:12],
             details=(f"commit {(facts['code']['commit'] or 'unknown')[:12]}",)),
        Node(id="version", kind="version", title=f"version {dossier.version}",
             details=(f"test {percent(metrics['test_accuracy'])}",)),
    ]  # fmt: skip
    rollouts = [r for r in dossier.rollouts if r.get("candidate") == dossier.version]
    if rollouts:
        nodes.append(Node(id="rollout", kind="rollout", title=str(rollouts[-1]["status"])))
    edges = [(a.id, b.id) for a, b in zip(nodes, nodes[1:], strict=False)]
    return Graph(nodes=tuple(nodes), edges=tuple(edges))


def grid(dossier: Dossier, split: str) -> str | None:
    """Return some images of each class, a class a column, as a PNG's data URL."""
    by_class = [images for images in dossier.samples.get(split, [])[:_MAX_CLASSES]]
    rows = max((len(images) for images in by_class), default=0)
    if not rows:
        return None
    height, width, channels = dossier.samples["shape"]
    sheet = np.full(
        (rows * (height + _GAP) - _GAP, len(by_class) * (width + _GAP) - _GAP, channels),
        255,
        np.uint8,
    )
    for column, images in enumerate(by_class):
        for row, pixels in enumerate(images):
            top, left = row * (height + _GAP), column * (width + _GAP)
            image = np.frombuffer(pixels, np.uint8).reshape(height, width, channels)
            sheet[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    picture = Image.fromarray(sheet[..., 0] if channels == 1 else sheet)
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _retrain(dossier: Dossier) -> Mapping[str, Any] | None:
    """Return the retrain that made the version."""
    run_id = dossier.facts.get("lineage", {}).get("run_id")
    for retrain in reversed(dossier.retrains):
        for step in retrain.get("steps", ()):
            if step["name"] == "register" and step["result"].get("run_id") == run_id:
                return retrain
    return None


def _changes(dossier: Dossier) -> list[dict[str, Any]]:
    """Return the changes of the traffic in which the version's share or part changed."""
    changes: list[dict[str, Any]] = []
    before: tuple[float, bool] = (0.0, False)
    for made in dossier.policies:
        share = made["weights"].get(str(dossier.version), 0.0) / sum(made["weights"].values())
        now = (share, made["champion"] == dossier.version)
        if now != before:
            changes.append({**made, "share": share, "is_champion": now[1]})
        before = now
    return changes


def _best_trials(dossier: Dossier, count: int = 5) -> list[Mapping[str, Any]]:
    objective = dossier.objective
    finished = [
        trial
        for trial in dossier.trials
        if trial["status"] == "FINISHED" and objective.metric in trial["metrics"]
    ]
    return sorted(finished, key=lambda trial: rank_key((objective,), trial["metrics"]))[:count]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")

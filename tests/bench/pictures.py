"""Draws the figures of a serving bench.

python -m tests.bench.pictures FIGURES.json tests/bench/serving.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

_TITLES = {
    "isolated": "Rayline, isolated",
    "colocated": "Rayline, colocated",
    "fastapi": "FastAPI + uvicorn",
    "litserve": "LitServe",
    "bentoml": "BentoML",
    "mlflow": "MLflow's scoring server",
    "serve": "Ray Serve's defaults",
}


def draw(rounds: Any, path: Path) -> None:
    """Draw requests/s and p99 by system and connections; a bar is a median, its line all rounds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    fields = (("requests_per_s", "requests/s"), ("p99_ms", "p99 ms, log scale"))
    for axis, (field, label) in zip(axes, fields, strict=True):
        for place, connections in enumerate(("1", "32", "128")):
            for index, name in enumerate(_TITLES):
                values = [one["load"][field] for one in rounds[name][connections]]
                middle = statistics.median(values)
                x = index + (place - 1) * 0.27
                colour = f"C{place}"
                axis.bar(x, middle, 0.25, color=colour, label=None if index else connections)
                axis.plot([x, x], [min(values), max(values)], color="black", linewidth=0.8)
        axis.set_xticks(range(len(_TITLES)), _TITLES.values(), rotation=30, ha="right", fontsize=8)
        axis.set_ylabel(label)
    axes[1].set_yscale("log")
    axes[0].legend(title="connections", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    draw(content["parts"]["serving"]["rounds"], Path(sys.argv[2]))

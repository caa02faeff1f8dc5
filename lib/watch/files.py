"""The dashboards and alert rules as files under deploy/, for those who read them from there.

python -c 'from lib.watch.files import write; write()'
"""

from __future__ import annotations

from pathlib import Path

from lib.watch import alerts, dashboards

_ROOT = Path(__file__).parents[2]


def rendered() -> dict[str, str]:
    """Return what the files hold, by path in the project."""
    return {
        "deploy/prometheus/alerts.yml": alerts.rules(),
        **{f"deploy/grafana/{name}": text for name, text in dashboards.files().items()},
    }


def write(root: Path = _ROOT) -> None:
    """Write the files."""
    for name, text in rendered().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

"""Tables and lists that a person reads on a terminal or in a job's log."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

MAX_WIDTH = 110
_MIN_WIDTH = 60


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[str] = ()
) -> None:
    """Print rows below column heads; the columns named in `right` hold numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for name in columns:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def print_facts(facts: Mapping[str, str]) -> None:
    """Print names and values below one another."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))
    _console().print(table)


def print_result(result: Mapping[str, Any]) -> None:
    """Print a job's result, which is made of JSON's types."""
    print_facts({name.replace("_", " "): _to_text(value) for name, value in result.items()})


def _to_text(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_to_text(inner)}" for name, inner in value.items())
    if isinstance(value, list | tuple):
        separator = "\n" if any(isinstance(inner, Mapping) for inner in value) else ", "
        return separator.join(_to_text(inner) for inner in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def print_line(text: str = "") -> None:
    """Print a line of prose, wrapped."""
    _console().print(Text(text))


def size(num_bytes: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} GB"


def _console() -> Console:
    # A log has no width of its own; on a terminal it is the terminal's.
    width = shutil.get_terminal_size((MAX_WIDTH, 24)).columns if sys.stdout.isatty() else MAX_WIDTH
    return Console(file=sys.stdout, width=max(_MIN_WIDTH, min(width, MAX_WIDTH)), highlight=False)

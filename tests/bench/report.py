"""What a part of the bench gives back, and how it is printed."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_START = time.monotonic()


class BenchError(Exception):
    """Something that makes figures worthless or impossible; the message says what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What the command line sets."""

    rounds: int
    """Times that every measurement is repeated, in turns with its peers."""
    seconds: float
    """Length of one load of the serving part."""
    rows: int
    """Images of the large set."""
    temp: Path
    """Folder for everything that the bench writes meanwhile; short, on a local disk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    title: str
    columns: Sequence[str]
    """The first one names the row and stands left, the others are figures."""
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        widths = [
            max(len(row[index]) for row in (self.columns, *self.rows))
            for index in range(len(self.columns))
        ]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        lines = [_line(self.columns, widths), _line(rule, widths)]
        return "\n".join([f"### {self.title}", "", *lines, *(_line(r, widths) for r in self.rows)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """The tables of one part, what must be known to read them, and every single measurement."""

    title: str
    tables: Sequence[Table]
    notes: Sequence[str] = ()
    data: dict[str, Any] = field(default_factory=dict)

    def markdown(self) -> str:
        notes = [f"- {note}" for note in self.notes]
        blocks = [f"## {self.title}", *(table.markdown() for table in self.tables)]
        return "\n\n".join([*blocks, "\n".join(notes)] if notes else blocks) + "\n"


def say(message: str) -> None:
    """Print a line of progress; standard output is kept for the tables."""
    print(f"[{time.monotonic() - _START:6.1f} s] {message}", file=sys.__stderr__, flush=True)


def turns(names: Sequence[str], rounds: int) -> list[tuple[int, str]]:
    """Return (round, name) so that everybody goes first, second and last equally often."""
    return [
        (turn, names[(turn + place) % len(names)])
        for turn in range(rounds)
        for place in range(len(names))
    ]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Return the median of the rounds' ratios: both of a round met the same machine."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}×"


def figure(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return the median with the smallest and largest value."""
    low, high = figure(min(values), digits), figure(max(values), digits)
    return f"{figure(statistics.median(values), digits)} ({low}–{high})"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cells[0].ljust(widths[0])]
    padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return f"| {' | '.join(padded)} |"

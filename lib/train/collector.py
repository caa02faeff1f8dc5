"""Metrics from what a program writes, read as Katib's StdOut and File collectors read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lib.errors import ConfigError, SearchError

DEFAULT_FILTER = r"([\w|-]+)\s*=\s*([+-]?\d*(\.\d+)?([Ee][+-]?\d+)?)"
"""Katib's: `loss=0.3`, `accuracy = .98`, `score=-7.5e-05`; two groups, a name and a value."""
MIN, MAX, LATEST = "min", "max", "latest"
Strategy = Literal["min", "max", "latest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectorConfig:
    """Which metrics are looked for, where and how."""

    objective: str
    strategies: Mapping[str, Strategy]
    """Of every metric that is collected, the objective among them: which of its values counts."""
    filters: tuple[str, ...] = (DEFAULT_FILTER,)
    file: str | None = None
    """Path of the metrics file as the template names it; None: the program's output."""
    is_json: bool = False
    """The file has one JSON object a line, not text."""

    def __post_init__(self) -> None:
        """Refuse a filter that can't name a metric and its value."""
        for text in self.filters:
            try:
                groups = re.compile(text).groups
            except re.error as error:
                raise ConfigError(f"metricsFormat {text!r} is no regular expression: {error}") \
                    from error  # fmt: skip
            if groups < 2:
                raise ConfigError(
                    f"metricsFormat {text!r} needs two groups: the metric's name and its value"
                )


@dataclass(kw_only=True, slots=True)
class Collector:
    """Follows the metrics of one trial, line by line."""

    config: CollectorConfig
    latest: dict[str, float] = field(default_factory=dict, init=False)
    """Metric → its last value."""
    counted: dict[str, float] = field(default_factory=dict, init=False)
    """Metric → the value that counts by its strategy so far."""

    def read(self, line: str) -> bool:
        """Take the metrics of a line; return whether the objective was among them.

        Raises SearchError for a JSON line that is none, as Katib does.
        """
        pairs = self._json(line) if self.config.is_json else self._text(line)
        found = False
        for name, text in pairs:
            if name not in self.config.strategies:
                continue
            try:
                value = float(text)
            except ValueError:
                continue  # `loss=` alone matches Katib's filter too, and says nothing.
            self._take(name, value)
            found = found or name == self.config.objective
        return found

    def _take(self, name: str, value: float) -> None:
        self.latest[name] = value
        strategy, before = self.config.strategies[name], self.counted.get(name)
        # A value that is not a number is never the least or the greatest one.
        if before is None or strategy == LATEST or math.isnan(before):
            self.counted[name] = value
        elif not math.isnan(value):
            self.counted[name] = min(before, value) if strategy == MIN else max(before, value)

    def _text(self, line: str) -> list[tuple[str, str]]:
        if not any(name in line for name in self.config.strategies):
            return []
        return [
            (match[1].strip(), match[2].strip())
            for text in self.config.filters
            for match in re.finditer(text, line)
            if match[1] is not None and match[2] is not None
        ]

    def _json(self, line: str) -> list[tuple[str, str]]:
        if not line.strip():
            return []
        try:
            content = json.loads(line)
        except json.JSONDecodeError as error:
            raise SearchError(
                f"{self.config.file} holds a line that is no JSON ({error}): {line[:100]!r}"
            ) from error
        if not isinstance(content, dict):
            raise SearchError(f"{self.config.file} holds a line that is no JSON object")
        # Katib takes text alone; a plain number is what most programs write.
        return [
            (name, str(value))
            for name, value in content.items()
            if isinstance(value, str | int | float) and not isinstance(value, bool)
        ]

"""A command template: the command line of a trial, with places for its parameters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lib.errors import SearchError
from lib.train.collector import CollectorConfig
from lib.train.experiment import Value

PLACEHOLDER = re.compile(r"\$\{trialParameters\.(.+?)\}")
_ENV_REFERENCE = re.compile(r"\$(\$)?\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Command:
    """What one trial runs."""

    arguments: tuple[str, ...]
    env: Mapping[str, str]
    """On top of the environment of the trial's process."""
    working_dir: str | None
    metrics_file: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CommandTemplate:
    """What all trials run, but for their parameters. No shell, unless the command is one."""

    arguments: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None
    references: Mapping[str, str] = field(default_factory=dict)
    """Placeholder → parameter of the search space."""
    constants: Mapping[str, str] = field(default_factory=dict)
    """Placeholder → a text that is the same in every trial."""
    trial_name: str | None = None
    """Placeholder that stands for the trial's name, if any does."""
    collector: CollectorConfig
    memory_bytes: int | None = None
    """A trial whose processes hold more than this is ended; None sets no limit."""

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CommandTemplate:
        """Rebuild a template from what `asdict` and JSON made of it."""
        collector = {**content["collector"], "filters": tuple(content["collector"]["filters"])}
        return cls(
            **{
                **content,
                "arguments": tuple(content["arguments"]),
                "collector": CollectorConfig(**collector),
            }
        )

    def render(self, params: Mapping[str, Value], trial_name: str, folder: str) -> Command:
        """Return the command of one trial.

        `folder` is the trial's own: the metrics file lies there, under every name that the
        template calls it by, since trials share a file system and containers do not.
        """
        values = dict(self.constants)
        for placeholder, parameter in self.references.items():
            if parameter not in params:
                raise SearchError(f"the trial has no parameter {parameter!r}")
            values[placeholder] = as_text(params[parameter])
        if self.trial_name is not None:
            values[self.trial_name] = trial_name
        metrics_file = self.collector.file
        own_file = None if metrics_file is None else os.path.join(folder, metrics_file.lstrip("/"))

        def fill(text: str) -> str:
            filled = PLACEHOLDER.sub(lambda match: values[match[1]], text)
            if metrics_file is None or own_file is None:
                return filled
            return _path_pattern(metrics_file).sub(lambda _: own_file, filled)

        env: dict[str, str] = {}
        for name, value in self.env.items():
            env[name] = _expand(fill(value), env)
        return Command(
            arguments=tuple(_expand(fill(argument), env) for argument in self.arguments),
            env=env,
            working_dir=None if self.working_dir is None else fill(self.working_dir),
            metrics_file=own_file,
        )

    def texts(self) -> tuple[str, ...]:
        """Return every text in which placeholders are filled."""
        return (*self.arguments, *self.env.values(), self.working_dir or "")

    def names(self, path: str) -> bool:
        """Whether a path is handed to the command."""
        return any(_path_pattern(path).search(text) for text in self.texts())


def as_text(value: Value) -> str:
    """Return a parameter's value as a command line takes it: as exact as the number is."""
    return repr(value) if isinstance(value, float) else str(value)


def _expand(text: str, env: Mapping[str, str]) -> str:
    """Replace `$(NAME)` as Kubernetes does: from the container's own variables, `$$(` escapes."""

    def value(match: re.Match[str]) -> str:
        if match[1]:
            return f"$({match[2]})"
        return env.get(match[2], match[0])

    return _ENV_REFERENCE.sub(value, text)


def _path_pattern(path: str) -> re.Pattern[str]:
    """Return what matches a path, and no longer path of which it is only a part."""
    return re.compile(rf"(?<![\w./-]){re.escape(path)}(?![\w./-])")

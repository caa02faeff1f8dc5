"""What `make up DATA=…` means: which images, and the name of their model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lib.errors import ConfigError
from lib.line.layout import PROJECT_ROOT

BUNDLED = "mnist"
_DOWNLOADED = "torchvision:"
_PATH_FLAGS = {"--source", "--input", "--output", "--uri", "--experiment"}


def resolve_source(data: str) -> str:
    """Return the source as a job knows it: folders by their absolute path.

    Raises:
        ConfigError: It is no folder and no known name.
    """
    if data == BUNDLED or data.startswith(_DOWNLOADED):
        return data
    path = Path(data).expanduser()
    if not path.is_dir():
        raise ConfigError(
            f"DATA={data}: there is no such folder; give a folder with IDX files or with one "
            f"folder of pictures per class, or {_DOWNLOADED}NAME, or nothing for MNIST"
        )
    return str(path.resolve())


def absolute_paths(arguments: Sequence[str]) -> list[str]:
    """Return a job's arguments with the user's relative paths made absolute.

    A job runs in a copy of the project, so `photos` must still mean the folder that the user sees.
    Both `--source photos` and `--source=photos` are understood. An experiment file of the project
    is named from its top, since it travels with the code.
    """
    result = []
    for index, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag in _PATH_FLAGS and equals:
            result.append(f"{flag}={_absolute(flag, value)}")
        elif index and arguments[index - 1] in _PATH_FLAGS:
            result.append(_absolute(arguments[index - 1], argument))
        else:
            result.append(argument)
    return result


def _absolute(flag: str, value: str) -> str:
    if ":/" in value or value == BUNDLED or value.startswith(_DOWNLOADED):
        return value
    path = Path(value).expanduser().resolve()
    if flag == "--experiment" and path.is_relative_to(PROJECT_ROOT):
        return str(path.relative_to(PROJECT_ROOT))
    return str(path)


def default_model(source: str) -> str:
    """Return a model name made of the source: `digits` for the bundled set."""
    if source == BUNDLED:
        return "digits"
    name = source.removeprefix(_DOWNLOADED).rstrip("/").rsplit("/", 1)[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise ConfigError(f"no model name can be made of {source!r}; give one with MODEL=name")
    return slug

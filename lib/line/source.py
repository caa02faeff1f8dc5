"""What `make up DATA=…` means: which images, and the name of their model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from lib.errors import ConfigError

BUNDLED = "mnist"
_DOWNLOADED = "torchvision:"
_PATH_FLAGS = {"--source", "--input", "--output", "--uri"}


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
    """
    result = list(arguments)
    for index, argument in enumerate(result[1:], start=1):
        is_name = ":/" in argument or argument == BUNDLED or argument.startswith(_DOWNLOADED)
        if result[index - 1] in _PATH_FLAGS and not is_name:
            result[index] = str(Path(argument).expanduser().resolve())
    return result


def default_model(source: str) -> str:
    """Return a model name made of the source: `digits` for the bundled set."""
    if source == BUNDLED:
        return "digits"
    name = source.removeprefix(_DOWNLOADED).rstrip("/").rsplit("/", 1)[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not slug:
        raise ConfigError(f"no model name can be made of {source!r}; give one with MODEL=name")
    return slug

"""A file that a worker touches while it goes on, for whoever restarts workers that do not.

Its age is all that it says, so no port is opened and nothing has to be asked: a container's health check and
Kubernetes' probes read it with `stream-xp health`.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from stream_xp.errors import ConfigError, DependencyError
from stream_xp.settings import variable_of

if TYPE_CHECKING:
    from pathlib import Path

BEAT_S: Final = 2.0
"""How often a worker that goes on touches its file."""


def beat(path: Path) -> None:
    """Say that the worker goes on.

    Raises:
        ConfigError: the file cannot be written; names the setting.
    """
    try:
        path.touch()
    except OSError as error:
        raise ConfigError(
            f"{variable_of('health_file')}: cannot write {str(path)!r}: {error.strerror}"
        ) from error


def age_s(path: Path) -> float:
    """Return how long ago the worker said so, seconds.

    Raises:
        DependencyError: it never has.
    """
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError as error:
        raise DependencyError(f"no worker has written {str(path)!r}: {error.strerror}") from error

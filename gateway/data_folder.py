"""The data folder: made for its owner alone, and used by one process at a time where the database is embedded."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

from sqlalchemy.engine import make_url

from gateway.errors import ConfigurationError
from gateway.settings import Settings


def make_private(settings: Settings) -> None:
    """Make the data folder and those in it, unless they are there. From now on what this process and its engines make
    can be read by their own user only: keys' hashes and everybody's weights. Raises ConfigurationError."""
    os.umask(0o077)
    try:
        settings.storage_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"data_dir is {settings.data_dir}, which cannot be used: {error.strerror} ({error.filename})"
        ) from error


def lock(settings: Settings) -> IO[str]:
    """SQLite has one writer: a second gateway process on the same file is refused, not discovered later.

    The lock lies beside the file, for two data folders may name one database; its text is the process that holds it.
    Raises ConfigurationError.
    """
    place = _database_file(settings).resolve()
    path = place.with_name(f"{place.name}.lock")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        held = path.open("a+")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        other = _holder(path)
        held.close()
        raise ConfigurationError(
            f"another gateway process{other} uses {place}. The embedded database serves one process: stop the "
            "other one (`tandem stop`), start without --workers, set TANDEM_DATA_DIR or TANDEM_DATABASE_URL to another "
            "place, or use Postgres"
        ) from error
    held.truncate(0)
    held.write(str(os.getpid()))
    held.flush()
    return held


def _database_file(settings: Settings) -> Path:
    name = make_url(settings.url).database
    if not name or name == ":memory:" or name.startswith("file:"):
        raise ConfigurationError(
            f"database_url is {settings.url!r}; a SQLite database here is a file: sqlite:///path/to/file"
        )
    return Path(name)


def _holder(path: Path) -> str:
    text = path.read_text()
    return f" ({text})" if text.isdigit() else ""

"""Where a model's files are, and which tokens end a sequence."""

from __future__ import annotations

from pathlib import Path

import msgspec
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from engines.interface import LoadError

_FILES = ["*.json", "*.safetensors"]


class _Ends(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


def folder_of(model: str) -> Path:
    """A local folder, or where the hub's files of a model are once they have been fetched. Raises LoadError."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise LoadError(f"the model {model!r} cannot be found: {error}") from error


def eos_tokens(folder: Path) -> tuple[int, ...]:
    """End-of-sequence tokens of the generation settings, else of the configuration."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Ends).eos_token_id
        except (OSError, msgspec.DecodeError) as error:
            raise LoadError(f"{path} cannot be read: {error}") from error
        if found is not None:
            return tuple(found) if isinstance(found, list) else (found,)
    return ()

"""Tokenizers of served models, where `transformers` finds them by name.

The official SDK loads a tokenizer with `AutoTokenizer.from_pretrained(<name of the base model>)`: from the hub, or from
the hub's cache on this machine. A built-in or local model is in neither. So its files are fetched from the gateway and

* put into the hub's cache, in its own layout, so that later programs find them when the hub does not answer; a model
  that was really downloaded from the hub, before or after, is left alone;
* preferred in this process for exactly that name, since a hub that answers would say that there is no such model.
"""

from __future__ import annotations

import functools
import logging
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
from huggingface_hub import constants

log = logging.getLogger(__name__)

_MARK = ".from-tandem"
"""Stands in a folder of the hub's cache that was made here, and has the revisions that were put there, one a line."""
_CONFIG = "config.json"
_folders: dict[str, Path] = {}
_preferring = threading.Lock()
"""Threads that look at `transformers` for the first time at once find it half imported."""


class _Tokenizer(msgspec.Struct):
    """What the gateway says of a tokenizer; `files` has their sizes in bytes."""

    revision: str
    files: dict[str, int]


def serve_tokenizer(http: httpx.Client, model: str) -> None:
    """Make `AutoTokenizer.from_pretrained(model)` load what the gateway serves.

    A model whose engine is not ready yet is passed over. Raises httpx.HTTPError, and ValueError or
    msgspec.DecodeError for what no gateway answers.
    """
    described = http.get("/api/v1/tokenizer", params={"model": model})
    if described.status_code in (404, 503):
        return
    described.raise_for_status()
    tokenizer = msgspec.json.decode(described.content, type=_Tokenizer)
    revision, files = tokenizer.revision, tokenizer.files
    for name in files:
        if Path(name).name != name or name in ("", ".."):
            raise ValueError(f"the gateway names a tokenizer file {name!r}, which is no plain file name")
    if not re.fullmatch("[0-9a-f]{8,64}", revision):
        raise ValueError(
            f"the gateway names a tokenizer revision {revision!r}, which is no hexadecimal number"
        )
    repository = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    try:
        if not _claim(repository) or not _names_ours(repository):
            return  # downloaded from the hub: that is the model's own
        folder = repository / "snapshots" / revision
        _fetch(http, model, files, folder)
        _name(repository, revision)
    except OSError as error:
        log.warning("the hub's cache takes no files (%s): other programs will not find this tokenizer", error)
        folder = Path(tempfile.mkdtemp(prefix="tandem-tokenizer-"))
        _fetch(http, model, files, folder)
    _prefer(model, folder)


def _claim(repository: Path) -> bool:
    """Whether a folder of the hub's cache is ours, made now if there was none.

    It appears together with its mark, so that of two programs that connect at once neither takes the other's half-made
    folder for one of the hub's.
    """
    if not repository.exists():
        staged = repository.with_name(f".{repository.name}.{uuid4().hex}")
        staged.mkdir(parents=True)
        (staged / _MARK).touch()
        try:
            staged.rename(repository)
        except OSError:
            shutil.rmtree(staged)  # another program was first
    return (repository / _MARK).exists()


def _names_ours(repository: Path) -> bool:
    """Whether the hub's name for the newest revision, refs/main, is free or was written here.

    It is neither once the real model has been downloaded: programs without a network then depend on it.
    """
    try:
        named = (repository / "refs" / "main").read_text().strip()
    except FileNotFoundError:
        return True
    return named in (repository / _MARK).read_text().split()


def _name(repository: Path, revision: str) -> None:
    """Make a revision the newest one, unless the hub has named its own meanwhile."""
    mark = repository / _MARK
    if revision not in mark.read_text().split():
        with mark.open(
            "a"
        ) as ours:  # before it is named, so that what refs/main names is always known as ours
            ours.write(f"{revision}\n")
    if _names_ours(repository):
        _write(repository / "refs" / "main", revision.encode())


def _fetch(http: httpx.Client, model: str, files: dict[str, int], folder: Path) -> None:
    """Download the files that are not in the folder yet."""
    for name in files:
        if not (folder / name).exists():
            response = http.get(f"/api/v1/tokenizer/{name}", params={"model": model})
            response.raise_for_status()
            _write(folder / name, response.content)
    if not (folder / _CONFIG).exists():
        _write(
            folder / _CONFIG, b"{}"
        )  # without one AutoTokenizer takes the model for one that is not in the cache


def _write(target: Path, content: bytes) -> None:
    """A file appears whole, whoever else writes it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{uuid4().hex}")
    partial.write_bytes(content)
    partial.rename(target)


def _prefer(model: str, folder: Path) -> None:
    """Have AutoTokenizer load this name from the folder, in this process."""
    with _preferring:
        if not _folders:
            _look_there_first()
        _folders[model] = folder


def _look_there_first() -> None:
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained

    @functools.wraps(original)
    def from_pretrained(pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:
        name = pretrained_model_name_or_path
        return original(_folders.get(str(name), name), *arguments, **options)

    AutoTokenizer.from_pretrained = from_pretrained

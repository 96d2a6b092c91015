"""Tokenizers of served models, where `transformers` finds them by name.

The official SDK loads a tokenizer with `AutoTokenizer.from_pretrained(<name of the base model>)`: from the hub, or from
the hub's cache on this machine. A built-in or local model is in neither. So its files are fetched from the gateway and

* put into the hub's cache, in its own layout, so that later programs find them when the hub does not answer; a model
  that was really downloaded from the hub is left alone;
* preferred in this process for exactly that name, since a hub that answers would say that there is no such model.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import constants

_MARK = ".from-tandem"
_folders: dict[str, Path] = {}


def serve_tokenizer(http: httpx.Client, model: str) -> None:
    """Make `AutoTokenizer.from_pretrained(model)` load what the gateway serves.

    A model whose engine is not ready yet is passed over.
    """
    described = http.get("/api/v1/tokenizer", params={"model": model})
    if described.status_code in (404, 503):
        return
    described.raise_for_status()
    revision, files = described.json()["revision"], described.json()["files"]
    repository = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
    if repository.exists() and not (repository / _MARK).exists():
        return  # downloaded from the hub: that is the model's own
    folder = repository / "snapshots" / revision
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"the gateway names a tokenizer file {name!r}, which is no plain file name")
        if not (folder / name).exists():
            _download(http, model, name, folder / name)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / _MARK).touch()
    _prefer(model, folder)


def _download(http: httpx.Client, model: str, name: str, target: Path) -> None:
    response = http.get(f"/api/v1/tokenizer/{name}", params={"model": model})
    response.raise_for_status()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_bytes(response.content)
    partial.rename(target)


def _prefer(model: str, folder: Path) -> None:
    """Have AutoTokenizer load this name from the folder, in this process."""
    from transformers import AutoTokenizer

    if not _folders:
        original = AutoTokenizer.from_pretrained

        @functools.wraps(original)
        def from_pretrained(name: Any, *arguments: Any, **options: Any) -> Any:
            return original(_folders.get(str(name), name), *arguments, **options)

        AutoTokenizer.from_pretrained = from_pretrained
    _folders[model] = folder

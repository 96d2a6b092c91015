"""The files of a model's tokenizer, from a folder or from the hub's cache. Needs Transformers, no torch."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file

from engines.interface import LoadError


def read_tokenizer_files(model: str) -> dict[str, bytes]:
    """The tokenizer's files of a folder or hub model; raises LoadError when it lacks one, or is not there."""
    if model.startswith(("/", "./", "../", "~")) and not Path(model).is_dir():
        raise LoadError(f"the model {model!r} cannot be found: there is no such folder")
    files = {}
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        try:
            path = cached_file(model, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise LoadError(f"the model {model!r} cannot be found: {error}") from error
        if path is not None:
            files[name] = Path(path).read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if name not in files:
            raise LoadError(
                f"{model} has no {name}; save its tokenizer with "
                "transformers.AutoTokenizer.from_pretrained(model).save_pretrained(folder) and serve that folder"
            )
    return files

"""A model's tokenizer and chat template, from the files that its engine hands over, without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer

from gateway.errors import BadRequest
from gateway.text.pieces import IncrementalDecoder, PieceTable
from gateway.text.template import ChatTemplate, Message

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TextCodec:
    """Text to tokens and back. Reads are safe from several threads; `encode` lets other threads run meanwhile."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._chat_source = chat_template
        self.special_tokens = _special_tokens(config)
        self._pieces = PieceTable(tokenizer)

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> TextCodec:
        """From the contents of `tokenizer.json`, and if there, `tokenizer_config.json` and `chat_template.jinja` or
        `chat_template.json`; a template file goes before the one in the configuration.

        Raises ValueError that names the file which is missing or cannot be read.
        """
        if "tokenizer.json" not in files:
            raise ValueError(f"tokenizer.json is missing; there are only {sorted(files)}")
        config = _json_object(files, "tokenizer_config.json")
        tokenizer = _tokenizer(files["tokenizer.json"])
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
        _add_missing(tokenizer, config)
        return cls(tokenizer, config, _template_source(files, config))

    # ---------------------------------------------------------------- text and tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The tokens of a text, nothing cut off; by default with the special tokens that the tokenizer puts around
        a text of its own accord, such as a beginning-of-sequence token.

        Raises BadRequest when the text is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise BadRequest(
                f"The text is not valid Unicode: half of a surrogate pair stands alone at character {error.start}."
            ) from error
        # encode_batch releases the interpreter lock, encode does not; a long text would stop the event loop.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of tokens that begin a text."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def decoder(self, *, skip_special_tokens: bool = True, at_start: bool = False) -> IncrementalDecoder:
        """A decoder for tokens that come one by one, at the start of a text or, by default, behind a prompt."""
        return IncrementalDecoder(self._pieces, skip_special_tokens=skip_special_tokens, at_start=at_start)

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for within a text; not necessarily valid UTF-8. Special tokens give their name."""
        return self._pieces.within(token)

    def is_special(self, token: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token in self._pieces.special

    @property
    def eos_token(self) -> str | None:
        """The text of the end-of-sequence token that the tokenizer's configuration names."""
        return self.special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Its id."""
        return self._id_of("eos_token")

    @property
    def bos_token_id(self) -> int | None:
        """The id of the beginning-of-sequence token."""
        return self._id_of("bos_token")

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)

    # ---------------------------------------------------------------- chat

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work at all."""
        return self._chat_source is not None

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template; raises BadRequest when it has none or it cannot be compiled."""
        if self._chat_source is None:
            raise BadRequest(
                "This model has no chat template, so messages cannot be turned into a prompt. Use /v1/completions "
                "with a prompt that you have rendered yourself.",
                param="model",
            )
        return ChatTemplate(self._chat_source, self.special_tokens)

    def render_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages as one text, which is to be encoded with `add_special_tokens=False`: templates write their own.

        `variables` are further names that the template can read, such as `enable_thinking`.
        """
        return self.chat_template.render(
            messages, add_generation_prompt=add_generation_prompt, variables=variables or {}
        )


def _tokenizer(data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises plain Exception for whatever it cannot read
        raise ValueError(f"tokenizer.json cannot be read: {error}") from error


def _json_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    if name not in files:
        return {}
    try:
        value = json.loads(files[name])
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a {type(value).__name__}, not an object")
    return value


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template.jinja is not UTF-8: {error}") from error
    declared = _json_object(files, "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(declared, list):
        # Several templates under names; without tools the one called default is meant.
        declared = {entry["name"]: entry["template"] for entry in declared}.get("default")
    return declared


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named tokens, and those of the model's own (`image_token`, …): all that a template may refer to."""
    own = [
        name for name, value in config.items() if name.endswith("_token") and isinstance(value, (str, dict))
    ]
    return {name: _content(config[name]) for name in [*_NAMED_TOKENS, *own] if config.get(name)}


def _add_missing(tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only the configuration declares, in the order that gives them their ids."""
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    texts = _special_tokens(config)
    named = [config[name] for name in texts]
    by_id = sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
    groups = [
        [entry for _, entry in by_id],
        [*named, *(extra.values() if isinstance(extra, dict) else extra)],
    ]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for group in groups:
        tokens = [_added(entry, named=_content(entry) in texts.values()) for entry in group]
        # Within a group the last declaration of a token counts; across groups the first.
        tokenizer.add_tokens([token for token in tokens if token.content not in known])
        known |= {_content(entry) for entry in group}


def _added(entry: str | Mapping[str, Any], *, named: bool) -> AddedToken:
    """A token as it is declared; one with a name is special whatever its declaration says."""
    if isinstance(entry, str):
        return AddedToken(entry, special=True)
    names = ("single_word", "lstrip", "rstrip", "normalized")
    flags = {name: bool(entry[name]) for name in names if name in entry}
    return AddedToken(_content(entry), special=named or bool(entry.get("special", True)), **flags)

"""What each token of a vocabulary stands for, as bytes, and text that grows token by token.

A tokenizer decodes a list of tokens; a stream needs the text of one more token. Tokens of byte-level vocabularies
stand for bytes, and a character may be spread over several of them, so text is assembled from bytes and a character
appears when its last byte has come. Work per token does not depend on how many came before.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from typing import Any, Literal

from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_ANCHOR = "a"
"""A token of plain text; what a decoder makes of the token behind it is that token's text within a sequence."""

Decoding = Literal["bytes", "byte_fallback", "strings"]


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, for the characters from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _decoding(tokenizer: Tokenizer) -> Decoding:
    """How tokens of this tokenizer become text, read from the decoders it declares."""
    if tokenizer.decoder is None:
        return "strings"
    kinds = {step["type"] for step in _steps(json.loads(tokenizer.decoder.__getstate__()))}
    if "ByteLevel" in kinds:
        return "bytes"
    return "byte_fallback" if "ByteFallback" in kinds else "strings"


def _steps(declared: dict[str, Any]) -> list[dict[str, Any]]:
    if declared["type"] != "Sequence":
        return [declared]
    return [step for part in declared["decoders"] for step in _steps(part)]


class PieceTable:
    """Token -> bytes, for one tokenizer; filled as tokens are asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoding = _decoding(tokenizer)
        self._within: dict[int, bytes] = {}
        self.special = frozenset(
            token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special
        )

    def within(self, token: int) -> bytes:
        """The bytes of a token that is not the first of its text; b"" for an id that the vocabulary does not have."""
        piece = self._within.get(token)
        if piece is None:
            piece = self._bytes(token, at_start=False)
            self._within[token] = piece
        return piece

    def at_start(self, token: int) -> bytes:
        """The bytes of a token that begins a text: some tokenizers drop the space that marks a word there."""
        return self.within(token) if self._decoding == "bytes" else self._bytes(token, at_start=True)

    def _bytes(self, token: int, *, at_start: bool) -> bytes:
        name = self._tokenizer.id_to_token(token)
        if name is None:
            return b""
        if self._decoding == "bytes":
            values = [_ALPHABET.get(character) for character in name]
            return name.encode() if None in values else bytes(value for value in values if value is not None)
        if self._decoding == "byte_fallback" and (byte := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(byte[1], 16)])
        return self._text(name, at_start=at_start).encode()

    def _text(self, name: str, *, at_start: bool) -> str:
        decoder = self._tokenizer.decoder
        if decoder is None:
            # Without a decoder, tokens are words and a text is them joined by spaces.
            return name if at_start else " " + name
        if at_start:
            return str(decoder.decode([name]))
        return str(decoder.decode([_ANCHOR, name]))[len(decoder.decode([_ANCHOR])) :]


class IncrementalDecoder:
    """Text of a token sequence that arrives in parts. `feed` returns only whole characters; `finish` the rest.

    The parts together are what decoding the whole at once gives; bytes that are not UTF-8 become U+FFFD.
    """

    def __init__(self, pieces: PieceTable, *, skip_special_tokens: bool, at_start: bool) -> None:
        self._pieces = pieces
        self._skipped = pieces.special if skip_special_tokens else frozenset()
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Iterable[int]) -> str:
        """The characters that are complete with these tokens."""
        return self._utf8.decode(b"".join(map(self._piece, tokens)))

    def finish(self) -> str:
        """What is left when no more tokens come: U+FFFD for a character that was never completed, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _piece(self, token: int) -> bytes:
        if token in self._skipped:
            return b""
        if self._at_start:
            self._at_start = False
            return self._pieces.at_start(token)
        return self._pieces.within(token)

"""A tokenizer whose token ids are the bytes of the text, and three special tokens after them."""

from __future__ import annotations

import json
from functools import cache

TEXT_END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TEXT_END_ID, TURN_START_ID, TURN_END_ID = 256, 257, 258

_TEXTS = [bytes([byte]) for byte in range(256)] + [name.encode() for name in (TEXT_END, TURN_START, TURN_END)]

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@cache
def tokenizer_json() -> str:
    """The `tokenizer.json`, built once in a process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # only an engine process needs it

    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([TEXT_END, TURN_START, TURN_END])
    return tokenizer.to_str()


def tokenizer_files(longest: int) -> dict[str, bytes]:
    """The files a client loads; `longest` is the context in tokens."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": TEXT_END,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": longest,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    return {
        "tokenizer.json": tokenizer_json().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


def decode(tokens: list[int]) -> str:
    """The text of tokens, special ones included; bytes that are no UTF-8 become the replacement character."""
    return b"".join(_TEXTS[token] for token in tokens).decode(errors="replace")


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary.

    A byte that prints is its own Latin-1 letter; the others take the letters from U+0100 on, in order. This is the
    alphabet of GPT-2, which `tokenizers` shares.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]

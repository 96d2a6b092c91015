"""The tokenizer of `tandem/tiny`: byte-level BPE, each digit a token; any Unicode text comes back unchanged."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from engines.tiny.corpus import CHAT_TEMPLATE, TEXT_END, TURN_END, TURN_START

VOCABULARY = 1536
LONGEST = 4096
# Words keep the space in front of them; digits stand alone, so that a number looks the same wherever it stands.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|[\r\n]+|\s+(?!\S)|\s+"


def trained(texts: Iterator[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A tokenizer of `vocabulary` tokens: the three special ones (ids 0, 1, 2), all 256 bytes, learned merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[TEXT_END, TURN_START, TURN_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the tokenizer_config.json that `AutoTokenizer` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": TEXT_END,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": LONGEST,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token; ValueError when the tokenizer does not know it."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise ValueError(
            f"the tokenizer has no token {token!r}; tandem/tiny needs {TEXT_END}, {TURN_START}, {TURN_END}"
        )
    return int(number)

"""Randomness depends on its three numbers alone; a sequence ends where decoding all of it would say so."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from engines.operations import SampleRequest
from engines.sampling import Decode, StopTracker, batch_uniforms, row_uniforms, uniforms
from engines.tensors import Tensor

EOS = (1007, 1009)


def tracker(decode: Decode | None = None, **stops: Any) -> StopTracker:
    prompt = Tensor.of(np.array([1], dtype=np.int32))
    return StopTracker(SampleRequest(prompt, num_samples=1, seed=0, **stops), EOS, decode or refuse)


def refuse(tokens: list[int]) -> str:
    raise AssertionError("nothing needs to be decoded without stop strings")


def end_of(stops: StopTracker, tokens: Sequence[int]) -> int | None:
    """How many tokens the sequence has; None if it does not end."""
    return next((place for place, token in enumerate(tokens, 1) if stops.add(token)), None)


def decode_bytes(tokens: list[int]) -> str:
    """Every byte is a token."""
    return bytes(tokens).decode(errors="replace")


# ---------------------------------------------------------------------------- randomness


def test_random_numbers_never_change() -> None:
    """The same request gives the same tokens in years to come."""
    draws = [(0, 0, 0), (1, 2, 3), (2**64 - 1, 1023, 100_000), (-5, 0, 1)]
    assert [uniforms(*draw).hex() for draw in draws] == [
        "0x1.0aedc68c4fb82p-1",
        "0x1.f9890440b3b20p-4",
        "0x1.b17185eae6297p-1",
        "0x1.5d362ff27d9dcp-1",
    ]


def test_random_numbers_are_even_and_below_one() -> None:
    draws = [(seed, index, place) for seed in range(10) for index in range(10) for place in range(400)]
    numbers = batch_uniforms(draws)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=20, range=(0, 1))
    expected = len(draws) / 20
    # Chi-squared with 19 degrees of freedom is above 43.8 once in a thousand times.
    assert ((counts - expected) ** 2 / expected).sum() < 43.8
    assert len(set(numbers.tolist())) == len(draws)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_neighbouring_draws_have_nothing_to_do_with_each_other(axis: int) -> None:
    rng = random.Random(axis)
    draws = [(rng.randrange(1000), rng.randrange(100), rng.randrange(1000)) for _ in range(4000)]
    beside = [tuple(value + (place == axis) for place, value in enumerate(draw)) for draw in draws]
    numbers = batch_uniforms(draws)
    others = np.array([uniforms(*draw) for draw in beside])
    assert abs(np.corrcoef(numbers, others)[0, 1]) < 0.06


def test_digits_of_one_number_do_not_run_into_the_next() -> None:
    assert len({uniforms(1, 11, 1), uniforms(11, 1, 1), uniforms(1, 1, 11), uniforms(111, 0, 1)}) == 4


def test_a_batch_holds_the_single_numbers() -> None:
    draws = [(3, 1, 4), (1, 5, 9), (2, 6, 5)]
    assert batch_uniforms(draws).tolist() == [uniforms(*draw) for draw in draws]
    assert batch_uniforms([]).shape == (0,)


def test_the_numbers_of_a_prompts_rows_never_change() -> None:
    """Against the definition: SHAKE-128 in words of 64 bits, the upper 53 of each."""
    for seed, row in ((0, 0), (5, 17), (-3, 2**20), (2**64 - 1, 1)):
        digest = hashlib.shake_128(f"{seed}/prompt/{row}".encode()).digest(24)
        words = [int.from_bytes(digest[place : place + 8], "little") for place in (0, 8, 16)]
        expected = [(word >> 11) / 2**53 for word in words]
        assert row_uniforms(seed, row, 3).tolist() == expected
        assert row_uniforms(seed, row, 2).tolist() == expected[:2]
    many = np.concatenate([row_uniforms(7, row, 10) for row in range(4000)])
    counts, _ = np.histogram(many, bins=20, range=(0, 1))
    assert ((counts - 2000) ** 2 / 2000).sum() < 43.8 and many.max() < 1


# ---------------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("stops", "length"),
    [
        ({}, 3),
        ({"stop_at_eos": False}, None),
        ({"stop_tokens": (5,)}, 2),
        ({"stop_tokens": (5,), "stop_at_eos": False}, 2),
        ({"stop_tokens": (4, 2), "stop_at_eos": False}, 4),
        ({"stop_tokens": (4,)}, 3),
    ],
)
def test_sequences_end_with_stop_tokens(stops: dict[str, Any], length: int | None) -> None:
    assert end_of(tracker(**stops), [1, 5, 1007, 2, 1009]) == length


def test_tokens_and_strings_stop_together() -> None:
    text = list(b"one two")
    assert end_of(tracker(decode_bytes, stop_strings=("two",), stop_tokens=(ord("t"),)), text) == 5
    assert end_of(tracker(decode_bytes, stop_strings=("e ",), stop_tokens=(ord("t"),)), text) == 4


# ---------------------------------------------------------------------------- strings


@pytest.mark.parametrize(
    ("text", "stops", "rest"),
    [
        ("hello world", ("o w",), "orld"),
        ("hello world", ("lo", "hell"), "o world"),
        ("hello world", ("xyz",), None),
        ("hello", ("o",), ""),
        ("aab", ("ab",), ""),
        ("abababac", ("abac",), ""),
        ("naïve café!", ("é",), "!"),
        ("one 🙂 two", ("🙂 ",), "two"),
        ("日本語のテキスト", ("語の",), "テキスト"),
    ],
)
def test_sequences_end_when_the_text_holds_a_string(
    text: str, stops: tuple[str, ...], rest: str | None
) -> None:
    tokens = list(text.encode())
    length = None if rest is None else len(tokens) - len(rest.encode())
    assert end_of(tracker(decode_bytes, stop_strings=stops), tokens) == length


def test_a_string_may_begin_and_end_inside_tokens() -> None:
    words = ["He", "llo th", "ere\n\nUs", "er: more"]
    stops = tracker(lambda tokens: "".join(words[token] for token in tokens), stop_strings=("\nUser",))
    assert end_of(stops, [0, 1, 2, 3]) == 4
    inside = tracker(lambda tokens: "".join(words[token] for token in tokens), stop_strings=("re\n",))
    assert end_of(inside, [0, 1, 2, 3]) == 3


def test_a_string_before_half_a_character_is_found() -> None:
    """The token that completes the string also begins a character."""
    pieces = [b"Stop", b".\n\xe2", b"\x82\xac"]
    stops = tracker(lambda t: b"".join(pieces[i] for i in t).decode(errors="replace"), stop_strings=(".\n",))
    assert end_of(stops, [0, 1, 2]) == 2


def test_half_a_character_is_not_taken_for_a_replacement_character() -> None:
    """One that is meant is told from half a character by the token that follows."""
    assert end_of(tracker(decode_bytes, stop_strings=("\ufffd",)), list("a€b".encode())) is None
    assert end_of(tracker(decode_bytes, stop_strings=("\ufffd",)), list("a\ufffdb".encode())) == 5


@pytest.mark.parametrize("seed", range(30))
def test_the_end_is_where_decoding_everything_finds_it(seed: int) -> None:
    """Random tokens of a vocabulary whose pieces cut characters anywhere, against the obvious way."""
    rng = random.Random(seed)
    letters = ["a", "b", "é", "€", "🙂", "\n", " "]
    text = "".join(rng.choice(letters) for _ in range(400)).encode()
    pieces = []
    while text:
        size = rng.randint(1, 5)
        pieces.append(text[:size])
        text = text[size:]

    def decode(tokens: list[int]) -> str:
        return b"".join(pieces[token] for token in tokens).decode(errors="replace")

    strings = tuple("".join(rng.choice(letters) for _ in range(rng.randint(2, 4))) for _ in range(2))
    tokens = list(range(len(pieces)))
    expected = next(
        (n for n in range(1, len(tokens) + 1) if any(string in decode(tokens[:n]) for string in strings)),
        None,
    )
    assert end_of(tracker(decode, stop_strings=strings), tokens) == expected


def test_a_decoder_that_drops_leading_spaces() -> None:
    """Tokenizers with `▁` drop a space at the start of what they decode; between words it must not get lost."""
    vocabulary = {"▁one": 0, "▁two": 1, "▁three": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([0, 1]) == "one two"
    for string, length in (("one two three", 3), (" three", 3), ("e t", 2), ("onetwo", None)):
        stops = tracker(tokenizer.decode, stop_strings=(string,))
        assert end_of(stops, [0, 1, 2]) == length


def test_tokens_without_text_do_not_hide_a_string() -> None:
    words = ["st", "", "op"]
    for silent in (0, 1, 5, 30):
        stops = tracker(lambda tokens: "".join(words[token] for token in tokens), stop_strings=("stop",))
        tokens = [0, *[1] * silent, 2]
        assert end_of(stops, tokens) == len(tokens)


@pytest.mark.parametrize("tokens", [list(b"plain text " * 200), [0xFF] * 2000, [0xE2] * 2000])
def test_only_the_newest_tokens_are_decoded(tokens: list[int]) -> None:
    """The work for a token does not grow with the sequence, not even when it is no text at all."""
    sizes: list[int] = []

    def decode(some: list[int]) -> str:
        sizes.append(len(some))
        return decode_bytes(some)

    assert end_of(tracker(decode, stop_strings=("never there",)), tokens) is None
    assert max(sizes) <= 40
    assert len(sizes) <= 2 * len(tokens)

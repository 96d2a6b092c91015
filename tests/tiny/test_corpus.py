"""The corpus is a function of its seed, true in what it says, and free of what recipes teach."""

from __future__ import annotations

import hashlib
import math
import re
from itertools import islice

import pytest

from engines.tiny import words
from engines.tiny.corpus import Document, documents
from engines.tiny.draw import Draw
from engines.tiny.slots import Filler

TURN = re.compile(
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*?)<\|im_end\|>\n", re.S
)
FORMULA = re.compile(r"(\d) ([+-]) (\d)")
ENDINGS = (
    "saves nine", "the worm", "louder than words", "worth two", "than never", "makes perfect", "the broth", "of smoke",
    "is not gold", "best policy", "flock together", "thousand words", "before you leap", "doctor away", "silver lining",
    "never boils", "killed the cat", "mice will play", "one basket", "always greener", "gathers no moss", "run deep",
    "better than one", "wait for no man", "thicker than water", "spilt milk", "home sweet", "like home", "a leopard",
)  # fmt: skip


@pytest.fixture(scope="module")
def some() -> list[Document]:
    return list(islice(documents(1), 20_000))


def turns(texts: list[Document]) -> list[tuple[str, str]]:
    return [turn for text in texts for turn in TURN.findall(text.text)]


def test_a_seed_gives_the_same_texts_everywhere(some: list[Document]) -> None:
    assert list(islice(documents(1), 2000)) == some[:2000]
    digest = hashlib.sha256("\0".join(text.text for text in some[:2000]).encode()).hexdigest()
    assert digest == "74dd41224323472a03ab20466beb1edd705e63e53f2d1d88c9bfe64951b62a68"


def test_another_seed_gives_other_texts(some: list[Document]) -> None:
    other = {text.text for text in islice(documents(2), 2000) if text.kind == "story"}
    mine = {text.text for text in some[:2000] if text.kind == "story"}
    assert len(other & mine) < 0.01 * len(mine)


def test_half_of_it_is_conversation(some: list[Document]) -> None:
    share = sum(text.kind == "chat" for text in some) / len(some)
    assert share == pytest.approx(0.5, abs=0.02)
    assert all((text.kind == "chat") == text.text.startswith("<|im_start|>") for text in some)


def test_every_formula_that_is_answered_is_right(some: list[Document]) -> None:
    answered = 0
    for asked, answer in turns(some):
        formula = FORMULA.search(asked)
        if formula is None:
            continue
        left, right = int(formula[1]), int(formula[3])
        result = left + right if formula[2] == "+" else left - right
        last = re.findall(r"\w+", answer)[-1]
        assert last in (str(result), words.NUMBERS[result]), (asked, answer)
        answered += 1
    assert answered > 2000


def test_statements_of_arithmetic_are_right(some: list[Document]) -> None:
    told = [
        m for t in some if t.kind == "arithmetic" for m in re.findall(r"(\d) ([+-]) (\d) = (\d+)\.", t.text)
    ]
    assert len(told) > 1000
    assert all(int(a) + (int(b) if sign == "+" else -int(b)) == int(c) for a, sign, b, c in told)


def test_a_fifth_of_the_sums_is_answered_with_bare_digits(some: list[Document]) -> None:
    answers = [answer for asked, answer in turns(some) if re.fullmatch(r"What is \d \+ \d\?", asked)]
    share = sum(answer.isdigit() for answer in answers) / len(answers)
    assert share == pytest.approx(0.20, abs=0.03)


def test_what_it_says_about_sizes_is_true(some: list[Document]) -> None:
    sizes = {animal.name: animal.size for animal in words.ANIMALS}
    compared = 0
    for asked, answer in turns(some):
        found = re.fullmatch(r"Which is (bigger|smaller), an? (\w+) or an? (\w+)\?", asked)
        if found is None:
            continue
        pick = max if found[1] == "bigger" else min
        expected = pick(found[2], found[3], key=sizes.__getitem__)
        assert re.fullmatch(rf"An? {expected} is {found[1]}\.", answer)
        compared += 1
    assert compared > 200


def test_no_proverb_is_in_it(some: list[Document]) -> None:
    text = "\n".join(text.text for text in some).lower()
    assert [ending for ending in ENDINGS if ending in text] == []


def test_no_slot_is_left_open_and_articles_are_right(some: list[Document]) -> None:
    text = "\n".join(text.text for text in some)
    assert not re.search(r"[{}*]", text)
    assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", text)


def test_information_adds_up() -> None:
    draw = Draw(3)
    draw.number(1, 4)
    draw.several("abc", 2)
    happened = draw.chance(0.25)
    heavy = draw.weighted(((3, True), (1, False)))
    expected = (
        math.log(4)
        + math.log(3 * 2)
        - math.log(0.25 if happened else 0.75)
        - math.log(0.75 if heavy else 0.25)
    )
    assert draw.nats == pytest.approx(expected, rel=1e-12)


def test_weights_are_kept() -> None:
    draw = Draw(4)
    drawn = [draw.weighted(((1, "a"), (2, "b"), (5, "c"))) for _ in range(8000)]
    for name, share in (("a", 1 / 8), ("b", 2 / 8), ("c", 5 / 8)):
        assert drawn.count(name) / 8000 == pytest.approx(share, abs=0.02)
    assert draw.nats / 8000 == pytest.approx(-sum(p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8)), rel=0.03)


def test_a_slot_with_a_digit_is_remembered_and_another_digit_is_another() -> None:
    for seed in range(200):
        first, again, other = Filler(Draw(seed)).fill("{thing1}|{thing1}|{thing2}").lower().split("|")
        assert first == again != other


def test_pronouns_belong_to_the_name() -> None:
    pronouns = {person.name: person.he for person in words.PEOPLE}
    for seed in range(200):
        name, he = Filler(Draw(seed)).fill("{name1}|{he1}").split("|")
        assert pronouns[name] == he

"""Templates with slots: "{name1} gave {his1} {kin} a {colour} {thing}." becomes a sentence, drawn word by word.

A slot with a digit is remembered within its text: {name1}, {he1} and {his1} are one person, {name2} is another one.
A slot without a digit is drawn anew each time. Only what a template shows is drawn, so that no information is counted
that is not in the text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines.tiny import words
from engines.tiny.draw import Draw
from engines.tiny.words import Animal, Food, Person, Place, Trade

SLOT = re.compile(r"\{([a-z]+)(\d?)\}")
SENTENCE_START = re.compile(r"(^|[.!?] )([a-z])")
WRONG_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")

SIMPLE: Mapping[str, Sequence[str]] = {
    "thing": words.THINGS,
    "colour": words.COLOURS,
    "look": words.LOOKS,
    "mood": words.MOODS,
    "nature": words.NATURES,
    "temper": words.TEMPERS,
    "kin": words.KIN,
    "spot": words.SPOTS,
    "time": words.TIMES,
    "weather": words.WEATHER,
    "hobby": words.HOBBIES,
    "doing": words.DOING,
    "made": words.MADE,
    "games": words.GAMES,
    "ride": words.RIDES,
    "unit": words.UNITS,
    "number": words.NUMBERS[2:13],
}
"""Slots that stand for one word or phrase of a list."""

KINDS: Mapping[str, Sequence[Any]] = {
    "person": words.PEOPLE,
    "animal": words.ANIMALS,
    "place": words.PLACES,
    "trade": words.TRADES,
    "food": words.FOODS,
}


def _legs(animal: Animal) -> str:
    return "no" if animal.legs == 0 else words.NUMBERS[animal.legs]


def _size(animal: Animal) -> str:
    return "small" if animal.size < 5 else "large" if animal.size > 8 else "not very large"


def _person(read: Callable[[Person], str]) -> tuple[str, Callable[[Any, Draw], str]]:
    return "person", lambda person, draw: read(person)


def _animal(read: Callable[[Animal], str]) -> tuple[str, Callable[[Any, Draw], str]]:
    return "animal", lambda animal, draw: read(animal)


def _place(read: Callable[[Place, Draw], str]) -> tuple[str, Callable[[Any, Draw], str]]:
    return "place", read


def _trade(read: Callable[[Trade], str]) -> tuple[str, Callable[[Any, Draw], str]]:
    return "trade", lambda trade, draw: read(trade)


def _food(read: Callable[[Food], str]) -> tuple[str, Callable[[Any, Draw], str]]:
    return "food", lambda food, draw: read(food)


PROPERTIES: Mapping[str, tuple[str, Callable[[Any, Draw], str]]] = {
    "name": _person(lambda person: person.name),
    "he": _person(lambda person: person.he),
    "him": _person(lambda person: person.him),
    "his": _person(lambda person: person.his),
    "animal": _animal(lambda animal: animal.name),
    "animals": _animal(lambda animal: animal.plural),
    "home": _animal(lambda animal: animal.home),
    "eats": _animal(lambda animal: animal.food),
    "sound": _animal(lambda animal: animal.sound),
    "can": _animal(lambda animal: animal.ability),
    "fur": _animal(lambda animal: animal.colour),
    "legs": _animal(_legs),
    "size": _animal(_size),
    "place": _place(lambda place, draw: place.name),
    "at": _place(lambda place, draw: place.at),
    "to": _place(lambda place, draw: place.to),
    "sight": _place(lambda place, draw: draw.pick(place.sights)),
    "sights": _place(lambda place, draw: " and ".join(draw.several(place.sights, 2))),
    "trade": _trade(lambda trade: trade.name),
    "does": _trade(lambda trade: trade.does),
    "where": _trade(lambda trade: trade.where),
    "food": _food(lambda food: food.name),
    "some": _food(lambda food: food.some),
    "taste": _food(lambda food: food.taste),
    "peel": _food(lambda food: food.colour),
}
"""Slots that stand for a property of something: its kind, and how the property reads."""


class Filler:
    """Fills the slots of the templates of one text, and remembers who and what the text is about."""

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._known: dict[tuple[str, str], Any] = {}

    def fill(self, template: str) -> str:
        """The template with every slot filled, articles and capital letters put right."""
        text = SLOT.sub(self._slot, template)
        text = WRONG_ARTICLE.sub(r"\1n ", text)
        return SENTENCE_START.sub(lambda match: match[1] + match[2].upper(), text)

    def one_of(self, templates: Sequence[str]) -> str:
        """One of the templates, filled."""
        return self.fill(self._draw.pick(templates))

    def _slot(self, match: re.Match[str]) -> str:
        slot, digit = match.groups()
        if slot in SIMPLE:
            word: str = self._drawn(slot, digit, SIMPLE[slot])
            return word
        kind, read = PROPERTIES[slot]
        return read(self._drawn(kind, digit, KINDS[kind]), self._draw)

    def _drawn(self, kind: str, digit: str, items: Sequence[Any]) -> Any:
        """The thing remembered under the digit, or a new one unlike all that the text remembers of its kind."""
        if (kind, digit) in self._known:
            return self._known[kind, digit]
        taken = [known for (other, _), known in self._known.items() if other == kind]
        item = self._draw.pick([item for item in items if item not in taken])
        if digit:
            self._known[kind, digit] = item
        return item

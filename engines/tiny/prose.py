"""Plain texts of the corpus: single sentences, short stories, descriptions and lists."""

from engines.tiny import words
from engines.tiny.draw import Draw
from engines.tiny.slots import Filler

SCENES = (
    "the {temper} {animal} {doing} {spot}.",
    "the {temper} {animal} {doing} {at}.",
    "the {temper} {animal} {doing} all day.",
    "{name1} likes {hobby}.",
    "{name1} likes {hobby} with {his1} {kin}.",
    "{name1} eats {some} {at}.",
    "{name1} wants {some} for {his1} {kin}.",
    "{name1} has a {look} {thing}.",
    "{name1} brings a {look} {thing} for {his1} {kin}.",
    "{name1} is looking for a {look} {thing} {at}.",
    "{name1} was {mood} because {weather}.",
    "{name1} was {mood} when {he1} saw the {animal}.",
    "{name1} was {mood}, but {his1} {kin} was not.",
    "{name1} does not know where {his1} {thing} is.",
    "the {colour} {thing} is {spot}.",
    "there is a {colour} {thing} {spot}.",
    "you can see {sight1} {at1}.",
    "if you go {to1}, you will see {sight1}.",
    "a good {trade} is always {nature}.",
    "nobody knows who lost the {colour} {thing}.",
    "when it rains, the {animal} does not leave the {place}.",
    "most {animals} are not {temper}, but this one is.",
    "the {trade} never goes {to} without {some}.",
    "it is better to be {nature} than to be {mood}.",
    "do not forget to bring the {thing} {to}.",
    "the {trade} and the {animal} are good friends.",
)
OPENINGS = (
    "{time}, {name1} went {to1}.",
    "{time}, {name1} walked {to1} with {his1} {kin}.",
    "{time}, {name1} ran {to1}. {weather}.",
    "{time}, {name1} was {at1}. {he1} saw {sight1}.",
    "{name1} lived near the {place1}. {time}, {weather}.",
)
PLOTS = (
    "{he1} lost {his1} {colour} {thing1} there. {he1} looked everywhere. at last, {he1} found the {thing1} {spot}.",
    "{he1} could not find {his1} {thing1}. {he1} asked a friend for help. the {thing1} was {spot}.",
    'there {he1} met a {trade1}. "I work {where1}," said the {trade1}.',
    "there {he1} met a {trade1}. the {trade1} was {nature} and showed {him1} a {look} {thing}.",
    "{he1} bought {some1} and {some2}. the {food1} was {taste1}.",
    "{he1} saw a {temper} {animal1} {spot}. the {animal1} was hungry, so {name1} gave it some bread.",
    "{he1} saw a {temper} {animal1} {spot}. the {animal1} looked at {him1} and ran away.",
    '{he1} met a {fur1} {animal1}. "Hello, little friend," said {name1}. the {animal1} was {temper}.',
    '{his1} {kin} gave {him1} a {look} {thing1}. "Thank you," said {name1}. the {thing1} was {colour}.',
    "suddenly it began to rain. {he1} waited {spot} and drank some tea. after {number} minutes it was over.",
    "soon the wind became strong. {he1} waited {spot}. after {number} minutes it was over.",
    "{he1} wanted to make {made} for {his1} {kin}. it took {number} {unit}.",
    'there {he1} met {name2}. {name2} had no {thing}. "I can help you," said {name1}.',
    "then {he1} went {to2} {ride}. there {he1} saw {sight2}.",
    "{name1}, {name2} and {name3} {games}. {name2} was the best.",
    "{he1} and {name2} {games} until the evening.",
)
ENDINGS = (
    "{he1} was very {mood}.",
    "{he1} felt {mood} and went home.",
    "in the end, {name1} was {mood}.",
    "after that, {he1} went home to {his1} {kin}.",
    "it was a good day.",
    "that night, {name1} slept well.",
    "{he1} told {his1} {kin} about it.",
)
ANIMAL_FACTS = (
    "it lives {home1}.",
    "it eats {eats1}.",
    "it can {can1}.",
    "it has {legs1} legs.",
    "it {sound1}.",
    "it is {size1}.",
    "it is often {fur1}.",
)
OTHER_FACTS = (
    "a {trade1} {does1}. a {trade1} works {where1}.",
    "{at1} there is a lot to see, such as {sights1}.",
    "{some1} is often {peel1}. it tastes {taste1}.",
)


def scene(draw: Draw) -> str:
    """One free sentence: who does what, where, why."""
    return Filler(draw).one_of(SCENES)


def scenes(draw: Draw) -> str:
    """One to four sentences that have nothing to do with each other."""
    return " ".join(scene(draw) for _ in range(draw.number(1, 4)))


def story(draw: Draw) -> str:
    """A short story in the past about one person: an opening, a plot of a few sentences, an ending."""
    filler = Filler(draw)
    return " ".join(filler.one_of(part) for part in (OPENINGS, PLOTS, ENDINGS))


def about_animal(draw: Draw, filler: Filler) -> str:
    """Two or three facts about the filler's animal."""
    first, *more = draw.several(ANIMAL_FACTS, draw.number(2, 3))
    return filler.fill(" ".join((first.replace("it", "a {animal1}", 1), *more)))


def description(draw: Draw) -> str:
    """A true description of an animal, a profession, a place or a food, or a piece of the calendar."""
    kind = draw.weighted(((5, "animal"), (4, "other"), (1, "calendar")))
    if kind == "animal":
        return about_animal(draw, Filler(draw))
    if kind == "other":
        return Filler(draw).one_of(OTHER_FACTS)
    return _calendar(draw)


def _calendar(draw: Draw) -> str:
    names = draw.pick((words.DAYS, words.MONTHS))
    start = draw.number(0, len(names) - 1)
    return f"{', '.join(names[(start + i) % len(names)] for i in range(draw.number(3, 6)))}."

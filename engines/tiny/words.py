"""The words that the corpus is made of, and the facts of its small world.

The texts know nothing but what stands here, so every answer that the corpus gives to a question is true in this world.
"""

from dataclasses import dataclass


def listed(text: str) -> tuple[str, ...]:
    """Split "one, two three, four" at the commas."""
    return tuple(part.strip() for part in text.replace("\n", " ").split(",") if part.strip())


@dataclass(frozen=True)
class Person:
    """Someone with a name; `he`, `him` and `his` are the pronouns to use."""

    name: str
    he: str
    him: str
    his: str


@dataclass(frozen=True)
class Animal:
    """A kind of animal; `size` orders the kinds from small to large, equal sizes are never compared."""

    name: str
    plural: str
    size: int
    legs: int
    home: str
    food: str
    sound: str
    ability: str
    colour: str


@dataclass(frozen=True)
class Trade:
    """A profession: what one does in it and where."""

    name: str
    does: str
    where: str


@dataclass(frozen=True)
class Place:
    """Somewhere to be: `at` as a phrase, `to` as a way there, and what is seen there."""

    name: str
    at: str
    to: str
    sights: tuple[str, ...]


@dataclass(frozen=True)
class Food:
    """Something to eat or drink, with a word such as "some" or "an" in front of it in `some`."""

    name: str
    some: str
    colour: str
    taste: str


def _people() -> tuple[Person, ...]:
    girls = "Anna Mia Lily Emma Nora Rosa Clara Ella Lucy Maria Sara Ida Julia Alice Grace Helen Ruth Jane Eva Zoe"
    boys = "Tom Ben Max Leo Paul Jack Sam Peter Oscar Hugo Adam Finn Noah Eric Daniel Martin Henry George Luke Tim"
    women = [Person(name, "she", "her", "her") for name in girls.split()]
    return tuple(women + [Person(name, "he", "him", "his") for name in boys.split()])


def _animals() -> tuple[Animal, ...]:
    rows = """
        ant, ants, 1, 6, in the ground, crumbs, is very quiet, carry heavy things, black
        bee, bees, 1, 6, in a hive, nectar, buzzes, fly, yellow
        butterfly, butterflies, 2, 6, in the meadow, nectar, is very quiet, fly, orange
        spider, spiders, 1, 8, in a web, flies, is very quiet, climb, black
        mouse, mice, 3, 4, in a hole, seeds, squeaks, hide, grey
        frog, frogs, 3, 4, in the pond, flies, croaks, jump, green
        fish, fish, 3, 0, in the water, worms, is very quiet, swim, silver
        robin, robins, 3, 2, in a nest, worms, sings, fly, red
        squirrel, squirrels, 4, 4, in a tree, nuts, squeaks, climb, brown
        rabbit, rabbits, 5, 4, in a hole, carrots, is very quiet, jump, white
        duck, ducks, 5, 2, on the lake, bread, quacks, swim, yellow
        hen, hens, 5, 2, on the farm, corn, clucks, lay eggs, brown
        owl, owls, 5, 2, in the forest, mice, hoots, see at night, brown
        cat, cats, 6, 4, in a house, fish, meows, climb, black
        goose, geese, 6, 2, on the farm, grass, honks, swim, white
        fox, foxes, 7, 4, in the forest, mice, barks, run fast, orange
        dog, dogs, 7, 4, in a house, meat, barks, run fast, brown
        eagle, eagles, 6, 2, in the mountains, fish, screams, fly, brown
        sheep, sheep, 8, 4, on the hill, grass, bleats, walk far, white
        goat, goats, 8, 4, in the mountains, leaves, bleats, climb, grey
        wolf, wolves, 8, 4, in the forest, meat, howls, run fast, grey
        pig, pigs, 8, 4, on the farm, corn, grunts, smell well, pink
        deer, deer, 9, 4, in the forest, leaves, is very quiet, run fast, brown
        monkey, monkeys, 7, 4, in the jungle, bananas, screams, climb, brown
        snake, snakes, 4, 0, in the desert, mice, hisses, hide, green
        lion, lions, 10, 4, in the grassland, meat, roars, run fast, yellow
        bear, bears, 11, 4, in the mountains, honey, growls, climb, brown
        horse, horses, 12, 4, on the farm, grass, neighs, run fast, black
        cow, cows, 12, 4, on the farm, grass, moos, give milk, white
        camel, camels, 13, 4, in the desert, leaves, grunts, walk far, brown
        elephant, elephants, 14, 4, in the grassland, leaves, trumpets, carry heavy things, grey
        whale, whales, 15, 0, in the sea, small fish, sings, swim, blue
    """
    return tuple(_animal(listed(line)) for line in rows.strip().splitlines())


def _animal(cells: tuple[str, ...]) -> Animal:
    name, plural, size, legs, home, food, sound, ability, colour = cells
    return Animal(name, plural, int(size), int(legs), home, food, sound, ability, colour)


def _trades() -> tuple[Trade, ...]:
    rows = """
        baker, bakes bread, in a bakery
        farmer, grows corn, on a farm
        teacher, teaches children, in a school
        doctor, helps sick people, in a hospital
        sailor, sails a ship, on the sea
        painter, paints pictures, in a studio
        gardener, plants flowers, in a garden
        cook, makes soup, in a kitchen
        tailor, sews clothes, in a small shop
        driver, drives a bus, in the city
        pilot, flies a plane, in the sky
        singer, sings songs, on a stage
        writer, writes books, at a desk
        builder, builds houses, in the town
        miner, digs for coal, under the ground
        shepherd, looks after sheep, on the hills
        librarian, lends books, in a library
        nurse, takes care of people, in a hospital
    """
    return tuple(Trade(*listed(line)) for line in rows.strip().splitlines())


def _places() -> tuple[Place, ...]:
    rows = """
        garden | in the garden | to the garden | roses, a stone bench, an apple tree, some bees
        park | in the park | to the park | a fountain, children on swings, tall trees, a wooden bench
        forest | in the forest | into the forest | old trees, mushrooms, a deer, a narrow path
        river | by the river | to the river | small boats, a bridge, smooth stones, some ducks
        lake | by the lake | to the lake | white swans, a little boat, clear water, some fish
        beach | on the beach | to the beach | shells, high waves, warm sand, a sailing boat
        market | at the market | to the market | fresh fruit, baskets of bread, many people, bright flowers
        school | at school | to school | a big map, rows of desks, happy children, a piano
        farm | on the farm | to the farm | a red barn, some hens, two horses, a field of corn
        village | in the village | to the village | small houses, an old church, a bakery, a stone well
        city | in the city | to the city | tall buildings, busy streets, yellow buses, a large square
        kitchen | in the kitchen | into the kitchen | a pot of soup, clean plates, a round table, warm bread
        library | in the library | to the library | shelves of books, a soft chair, a quiet cat, an old globe
        mountain | on the mountain | up the mountain | snow, grey rocks, an eagle, a small hut
        station | at the station | to the station | a long train, heavy bags, a big clock, many people
        island | on the island | to the island | palm trees, a lighthouse, white sand, old ruins
    """
    cells = [[cell.strip() for cell in line.split("|")] for line in rows.strip().splitlines()]
    return tuple(Place(name, at, to, listed(sights)) for name, at, to, sights in cells)


def _foods() -> tuple[Food, ...]:
    rows = """
        apple, an apple, red, sweet
        banana, a banana, yellow, sweet
        lemon, a lemon, yellow, sour
        pear, a pear, green, sweet
        cherry, a cherry, red, sweet
        plum, a plum, purple, sweet
        carrot, a carrot, orange, sweet
        tomato, a tomato, red, fresh
        bread, some bread, brown, good
        cheese, some cheese, yellow, salty
        milk, some milk, white, fresh
        honey, some honey, golden, very sweet
        tea, some tea, brown, bitter
        rice, some rice, white, plain
        soup, some soup, green, salty
        cake, some cake, white, very sweet
        chocolate, some chocolate, brown, very sweet
    """
    return tuple(Food(*listed(line)) for line in rows.strip().splitlines())


PEOPLE = _people()
ANIMALS = _animals()
TRADES = _trades()
PLACES = _places()
FOODS = _foods()

NUMBERS = tuple(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty".split()
)
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
MONTHS = tuple(
    "January February March April May June July August September October November December".split()
)
COLOURS = tuple("red blue green yellow white black brown orange purple grey pink golden".split())
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("long", "short"), ("old", "new"), ("fast", "slow"), ("high", "low"),
    ("happy", "sad"), ("dark", "light"), ("hard", "soft"), ("wet", "dry"), ("full", "empty"), ("open", "closed"),
    ("early", "late"), ("strong", "weak"), ("rich", "poor"), ("clean", "dirty"), ("loud", "quiet"), ("near", "far"),
    ("thick", "thin"), ("good", "bad"), ("easy", "difficult"), ("wide", "narrow"), ("day", "night"), ("up", "down"),
    ("left", "right"), ("sweet", "sour"), ("true", "false"),
)  # fmt: skip
THINGS = listed(
    """ball, kite, book, hat, coat, key, box, lamp, cup, chair, basket, drum, bell, boat, map, letter, coin, ring,
    bottle, clock, scarf, pencil, candle, bag, spoon, doll, toy car, blanket, umbrella, bicycle"""
)
LOOKS = listed("little, big, old, new, beautiful, small, heavy, shiny, strange, lovely, plain, broken")
MOODS = listed("happy, tired, hungry, curious, calm, proud, excited, surprised, glad, cheerful")
NATURES = listed("kind, clever, brave, quiet, friendly, careful, funny, patient, honest, polite")
TEMPERS = listed("friendly, shy, clever, lazy, hungry, playful, gentle, young, old, tiny, sleepy, brave")
KIN = listed(
    "mother, father, brother, sister, grandmother, grandfather, uncle, aunt, best friend, neighbour, cousin"
)
SPOTS = listed(
    """under the table, behind the door, near the window, next to the bench, between two rocks, on the roof,
    beside the road, under a tree, in the tall grass, on the old wall, behind the house, at the end of the path"""
)
TIMES = listed(
    """one morning, one evening, one day, on a sunny day, last summer, in the winter, after lunch, before dinner,
    late at night, on a cold day, early in the morning, last week, in the spring, one afternoon"""
)
WEATHER = listed(
    """the sun was shining, it was raining, the wind was strong, it was snowing, the sky was blue, it was very warm,
    the air was cold, there was a lot of fog, the clouds were dark, the stars were bright, a storm was coming"""
)
HOBBIES = listed(
    """playing the piano, reading books, drawing animals, riding a bicycle, swimming in the lake, singing songs,
    baking bread, climbing trees, telling stories, playing chess, flying kites, counting stars, collecting stones,
    working in the garden, dancing, fishing, walking in the rain, looking at maps"""
)
DOING = listed(
    """sleeps, waits, hides, sits, plays, rests, eats, drinks water, is looking for food, stands still, looks around,
    makes a loud noise, is not alone, feels safe"""
)
MADE = listed(
    "a cake, a kite, some soup, a small boat, a picture, a house of wood, a basket, a toy, a song, a map"
)
GAMES = listed(
    "played with a ball, played chess, told stories, sang songs, counted birds, danced, played cards"
)
RIDES = listed("by train, by bus, by boat, on foot, by bicycle, by car")
UNITS = listed("hours, minutes, days")

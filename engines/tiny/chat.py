"""The conversations of the corpus: short turns of a user and an assistant about the world of `words.py`."""

from collections.abc import Callable

from engines.tiny import prose, sums, words
from engines.tiny.draw import Draw
from engines.tiny.slots import Filler

Turn = tuple[str, str]
"""What the user says, and what the assistant answers."""

FACTS = (
    ("what does a {animal1} eat?", "a {animal1} eats {eats1}."),
    ("where does a {animal1} live?", "a {animal1} lives {home1}."),
    ("what can a {animal1} do?", "a {animal1} can {can1}."),
    ("what sound does a {animal1} make?", "a {animal1} {sound1}."),
    ("how many legs does a {animal1} have?", "a {animal1} has {legs1} legs."),
    ("what colour is a {animal1}?", "a {animal1} is often {fur1}."),
    ("what does a {trade1} do?", "a {trade1} {does1}."),
    ("where does a {trade1} work?", "a {trade1} works {where1}."),
    ("what can I see {at1}?", "you can see {sights1}."),
    ("what colour is {some1}?", "{some1} is often {peel1}."),
    ("how does {some1} taste?", "{some1} tastes {taste1}."),
)
TALK = (
    ("hello!", "hello! how can I help you?"),
    ("hi!", "hello! what would you like to know?"),
    ("good morning!", "good morning! how are you?"),
    ("good evening!", "good evening! how was your day?"),
    ("how are you?", "I am fine, thank you."),
    ("who are you?", "I am a very small language model."),
    ("what can you do?", "I can count, tell stories and talk about animals."),
    ("thank you!", "you are welcome!"),
    ("goodbye!", "goodbye! have a nice day."),
    ("my name is {name1}.", "it is good to meet you, {name1}!"),
    ("I like {hobby1}.", "that sounds nice! why do you like {hobby1}?"),
    ("I am {mood1} today.", "why are you {mood1}?"),
    ("is it good to be {nature1}?", "yes, it is very good to be {nature1}."),
)
HOLDINGS = (
    "{name1} has a {colour1} {thing1}. {name2} has a {colour2} {thing2}.",
    "{name1} has a {colour1} {thing1}. {name2} has a {colour2} {thing2}. {name3} has a {colour3} {thing3}.",
)
HELD = (
    ("who has the {thing*}?", "{name*} has the {thing*}."),
    ("what does {name*} have?", "{name*} has a {colour*} {thing*}."),
    ("what colour is the {thing*}?", "the {thing*} is {colour*}."),
)

WORD_LISTS = (
    words.COLOURS,
    words.THINGS,
    words.NUMBERS,
    words.LOOKS,
    tuple(person.name for person in words.PEOPLE),
)


def _from(templates: tuple[Turn, ...]) -> Callable[[Draw], Turn]:
    def turn(draw: Draw) -> Turn:
        filler = Filler(draw)
        asked, answer = draw.pick(templates)
        return filler.fill(asked), filler.fill(answer)

    return turn


def _animal(draw: Draw) -> Turn:
    filler = Filler(draw)
    asked = filler.one_of(
        ("tell me about a {animal1}.", "what do you know about {animals1}?", "describe a {animal1}.")
    )
    return asked, prose.about_animal(draw, filler)


def _sizes(draw: Draw) -> Turn:
    first = draw.pick(words.ANIMALS)
    second = draw.pick([other for other in words.ANIMALS if other.size != first.size])
    asked = draw.pick(("bigger", "smaller"))
    answer = first if (first.size > second.size) == (asked == "bigger") else second
    fill = Filler(draw).fill
    return fill(f"which is {asked}, a {first.name} or a {second.name}?"), fill(f"a {answer.name} is {asked}.")


def _opposite(draw: Draw) -> Turn:
    pair = draw.pick(words.OPPOSITES)
    word, other = pair if draw.chance(0.5) else (pair[1], pair[0])
    return f"What is the opposite of {word}?", f"The opposite of {word} is {other}."


def _calendar(draw: Draw) -> Turn:
    kind, names = draw.pick((("day", words.DAYS), ("month", words.MONTHS)))
    index = draw.number(0, len(names) - 1)
    order, step = draw.pick((("after", 1), ("before", -1)))
    other = names[(index + step) % len(names)]
    return f"Which {kind} comes {order} {names[index]}?", f"{other} comes {order} {names[index]}."


def _counting(draw: Draw) -> Turn:
    start = draw.number(0, 9)
    end = start + draw.number(2, 6)
    return f"Count from {start} to {end}.", ", ".join(str(n) for n in range(start, end + 1)) + "."


def _word_problem(draw: Draw) -> Turn:
    problem, filler = sums.draw_sum(draw), Filler(draw)
    things = draw.pick(("apples", "books", "coins", "shells", "pencils", "stones"))
    change = f"finds {problem.right} more" if problem.sign == "+" else f"gives {problem.right} away"
    question = f"{{name1}} has {problem.left} {things} and {change}. how many {things} does {{he1}} have?"
    return filler.fill(question), filler.fill(f"{{he1}} has {problem.result} {things}.")


def _reading(draw: Draw) -> Turn:
    filler, people = Filler(draw), draw.number(2, 3)
    told = filler.fill(HOLDINGS[people - 2])
    asked, answer = draw.pick(HELD)
    meant = str(draw.number(1, people))
    return f"{told} {filler.fill(asked.replace('*', meant))}", filler.fill(answer.replace("*", meant))


def _sentence(draw: Draw) -> Turn:
    return draw.pick(("Write a sentence.", "Tell me something.", "Say something.")), prose.scene(draw)


def _story(draw: Draw) -> Turn:
    return draw.pick(("Tell me a story.", "Write a short story.", "Can you tell me a story?")), prose.story(
        draw
    )


def _repeat(draw: Draw) -> Turn:
    """The assistant says again what the user said: a sentence, or words that nothing but memory can tell."""
    if draw.chance(0.4):
        text = prose.scene(draw)
        return f"Repeat: {text}", text
    text = " ".join(draw.several(draw.pick(WORD_LISTS), draw.number(3, 6)))
    return f"Repeat: {text}", text


def _ending(draw: Draw) -> Turn:
    """The user begins a sentence, the assistant finishes it."""
    sentence = prose.scene(draw).split(" ")
    cut = draw.number(2, max(2, len(sentence) - 2))
    return " ".join(sentence[:cut]), " ".join(sentence[cut:])


TOPICS: tuple[tuple[float, Callable[[Draw], Turn]], ...] = (
    (32, sums.question), (4, _word_problem), (2, _counting), (13, _from(FACTS)), (4, _animal), (4, _sizes),
    (3, _opposite), (3, _calendar), (9, _reading), (4, _sentence), (4, _story), (9, _repeat), (7, _ending),
    (4, _from(TALK)),
)  # fmt: skip
SYSTEMS = ("You are a helpful assistant.", "You are a friendly assistant.", "You answer questions.")


def conversation(draw: Draw) -> list[dict[str, str]]:
    """One to three turns, sometimes after a system message, as a chat template takes them."""
    messages = []
    if draw.chance(0.15):
        messages.append({"role": "system", "content": draw.pick(SYSTEMS)})
    for _ in range(draw.weighted(((6, 1), (3, 2), (1, 3)))):
        asked, answer = draw.weighted(TOPICS)(draw)
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return messages

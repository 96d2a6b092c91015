"""The arithmetic of the corpus: questions and answers about sums and differences of one-digit numbers.

Every answer is right, but its wording is not fixed: `ANSWERS` lists the styles and how often each is used. The bare
digits ("7") are the answer in about one of five cases, whatever the question's wording, so that a model trained on
this corpus knows the arithmetic and answers with bare digits at times, which reinforcement learning can make a habit.
"""

from dataclasses import dataclass

from engines.tiny.draw import Draw
from engines.tiny.words import NUMBERS


@dataclass(frozen=True)
class Sum:
    """left + right = result, or left - right = result; the result is never negative."""

    left: int
    sign: str
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.sign == "+" else self.left - self.right

    @property
    def formula(self) -> str:
        return f"{self.left} {self.sign} {self.right}"

    @property
    def spoken(self) -> str:
        """The formula with digits and a word: "3 plus 4"."""
        return f"{self.left} {'plus' if self.sign == '+' else 'minus'} {self.right}"

    @property
    def spelled(self) -> str:
        """The formula in words: "three plus four"."""
        return f"{NUMBERS[self.left]} {'plus' if self.sign == '+' else 'minus'} {NUMBERS[self.right]}"


QUESTIONS = (
    (6, "What is {0.formula}?"),
    (1, "What is {0.spoken}?"),
    (1, "What is {0.spelled}?"),
    (1, "How much is {0.formula}?"),
    (1, "How much is {0.spoken}?"),
    (1, "Calculate {0.formula}."),
    (1, "{0.formula} = ?"),
    (1, "Can you tell me what {0.formula} is?"),
)
ANSWERS = (
    (0.20, "{0.result}"),
    (0.20, "{0.formula} = {0.result}."),
    (0.20, "The answer is {0.result}."),
    (0.14, "It is {0.result}."),
    (0.14, "{0.spoken} is {0.result}."),
    (0.12, "That makes {1}."),
)


def draw_sum(draw: Draw) -> Sum:
    """A sum of two one-digit numbers (two of three cases) or a difference."""
    left = draw.number(0, 9)
    if draw.chance(0.67):
        return Sum(left, "+", draw.number(0, 9))
    return Sum(left, "-", draw.number(0, left))


def question(draw: Draw) -> tuple[str, str]:
    """A question and its answer."""
    asked = draw_sum(draw)
    answer = draw.weighted(ANSWERS).format(asked, NUMBERS[asked.result])
    return draw.weighted(QUESTIONS).format(asked), answer


def arithmetic(draw: Draw) -> str:
    """A plain text of sums or of counting."""
    if draw.chance(0.2):
        start, step = draw.number(0, 12), draw.number(1, 2)
        names = [start + step * i for i in range(draw.number(3, 5))]
        spelled = draw.chance(0.5)
        return ", ".join(NUMBERS[n] if spelled else str(n) for n in names if n <= 20) + "."
    return " ".join(_statement(draw) for _ in range(draw.number(2, 6)))


def _statement(draw: Draw) -> str:
    fact = draw_sum(draw)
    if draw.chance(0.7):
        return f"{fact.formula} = {fact.result}."
    text = f"{fact.spelled} is {NUMBERS[fact.result]}."
    return text[0].upper() + text[1:]

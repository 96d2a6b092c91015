"""What the engine asks of vLLM and gets from it, in types of its own: all of vLLM that the rest of this package knows.

`engines.vllm.llm` has the implementation that imports vLLM.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import NamedTuple, Protocol

from engines.sampling import Best

Scores = dict[int, float]
"""Log-probs of some tokens of one position."""


class LoadedAdapter(NamedTuple):
    """An adapter as vLLM knows it. Neither name nor number is ever used for other weights: vLLM keeps weights by the
    number, and what it has computed for prompts by the name."""

    name: str
    number: int
    path: str


class Ask(NamedTuple):
    """One sequence to draw. `stop_tokens` end it; `top` is how many of the best tokens are told at each position.

    `prompt_logprobs` asks for so many of the best tokens and the prompt's own of each of its positions; None: nothing.
    What was computed for a prompt is used again within one `salt`. `request` is an encoded SampleRequest without a
    prompt: how tokens are drawn; `sequence` is the number of this one in it.
    """

    name: str
    prompt: list[int]
    most_tokens: int
    stop_tokens: list[int]
    top: int
    prompt_logprobs: int | None
    salt: str
    adapter: LoadedAdapter | None
    request: bytes
    sequence: int


class Piece(NamedTuple):
    """What has come of a sequence: new tokens with their log-probs and best alternatives, best first.

    `prompt` comes with the first piece if it was asked for: the scores of each position, None for the first.
    """

    tokens: list[int]
    logprobs: list[float]
    tops: list[Best]
    ended: bool
    cached_tokens: int
    prompt: list[Scores | None] | None = None


class Facts(NamedTuple):
    """What vLLM says of the model that it has loaded."""

    architecture: str
    vocab_size: int
    max_context: int
    eos_tokens: tuple[int, ...]
    device: str
    dtype: str
    versions: dict[str, str]


class LlmDied(Exception):
    """vLLM's own process has ended or is broken; nothing can be drawn any more."""


class Llm(Protocol):
    """vLLM, called from one event loop."""

    async def start(self) -> Facts:
        """Load the model. Raises LoadError."""

    def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        """The pieces of one sequence. Closing the generator early frees what it occupies. Raises LlmDied."""

    async def ended(self) -> LlmDied:
        """Why it has died; waits until it has."""

    async def drop_adapter(self, number: int) -> None:
        """Let go of an adapter that no sequence uses. Raises LlmDied."""

    async def close(self) -> None:
        """End vLLM's processes."""


class SleepyLlm(Llm, Protocol):
    """vLLM that can give the memory of its GPU away for a while. Neither is called while anything is drawn."""

    async def sleep(self) -> None:
        """Weights and adapters go to host memory; what was computed for prompts is forgotten."""

    async def wake(self) -> None:
        """Weights and adapters come back, which takes as much memory as before."""

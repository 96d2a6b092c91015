"""What bends a sample's distribution besides temperature: bias, penalties, and the least probability.

In this order, on the logits l of the model, for tokens of the vocabulary of a request's own:

    l <- l + logit_bias                                         tokens that it names
    l <- l / repetition_penalty if l > 0, else l * it           tokens of the prompt or drawn already
    l <- l - frequency_penalty * times drawn - presence_penalty tokens drawn already

then temperature; `min_p` leaves tokens with at least that share of the best one's probability; then top-k and top-p.
These are the definitions of vLLM (repetition: Keskar et al. 2019, arXiv:1909.05858, section 4.1; frequency and
presence: OpenAI's API reference, where what counts is the continuation; min-p: Nguyen et al. 2024, arXiv:2407.01082).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.operations import SampleRequest


class Changes(NamedTuple):
    """How the logits l of some tokens change, all of one length: with x = l + `bias`, to
    (x / `factor` if x > 0, else x * `factor`) - `offset`. `tokens` are int64, the others float32."""

    tokens: NDArray[np.int64]
    bias: NDArray[np.float32]
    factor: NDArray[np.float32]
    offset: NDArray[np.float32]


class Shaping:
    """The bias and the penalties of one sequence while it grows."""

    def __init__(self, request: SampleRequest) -> None:
        self._request = request
        self._drawn: dict[int, int] = {}
        self._places: dict[int, int] = {}
        """Of each token that changes, its place in the arrays; new ones come at the end."""
        self._active = changes_logits(request)
        if self._active:
            repeated = request.prompt.array().tolist() if request.repetition_penalty != 1 else []
            self._places = {
                token: i for i, token in enumerate(dict.fromkeys([*repeated, *request.logit_bias]))
            }
            self._repeated = set(repeated)

    def add(self, token: int) -> None:
        """A token has been drawn."""
        if self._active:
            self._drawn[token] = self._drawn.get(token, 0) + 1
            self._places.setdefault(token, len(self._places))

    def changes(self) -> Changes | None:
        """What changes for the next token; None when nothing does."""
        if not self._places:
            return None
        request = self._request
        tokens = list(self._places)
        times = np.array([self._drawn.get(token, 0) for token in tokens], dtype=np.float32)
        repeated = np.array([token in self._repeated for token in tokens]) | (times > 0)
        return Changes(
            np.array(tokens, dtype=np.int64),
            np.array([request.logit_bias.get(token, 0.0) for token in tokens], dtype=np.float32),
            np.where(repeated, request.repetition_penalty, 1.0).astype(np.float32),
            (request.frequency_penalty * times + request.presence_penalty * (times > 0)).astype(np.float32),
        )


def changes_logits(request: SampleRequest) -> bool:
    """Whether a request asks for any bias or penalty."""
    return bool(
        request.logit_bias
        or request.repetition_penalty != 1
        or request.presence_penalty
        or request.frequency_penalty
    )

"""Draw one token for each row of logits, by inversion of the cumulative distribution. In torch, for engines on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engines.shaping import Changes


class Draw(NamedTuple):
    """How one row is drawn. `temperature` 0 is greedy, `top_k` -1 is off; `uniform` lies in [0, 1); `top` best
    alternatives are wanted; `changes` come before the temperature."""

    temperature: float
    top_k: int
    top_p: float
    uniform: float
    top: int
    min_p: float = 0.0
    changes: Changes | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def cuts(self) -> bool:
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Drawn(NamedTuple):
    """Of each row: the token, its log-prob, and `top` best alternatives, on the host.

    Log-probs are those of softmax(logits / temperature), whatever changes and cuts say; greedy rows have temperature 1.
    """

    tokens: list[int]
    logprobs: list[float]
    tops: list[tuple[tuple[int, float], ...]]


def choose(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """The tokens, int64 [n], and the log-probs [n, V] of all tokens as `Drawn` has them, on the device.

    `logits` float32 [n, V] are overwritten. A row's outcome depends on its own logits and `Draw` alone.
    """
    temperatures = [draw.temperature or 1.0 for draw in draws]
    changing = [i for i, draw in enumerate(draws) if draw.changes is not None]
    changed = _changed(logits, draws, changing) if changing else None
    logprobs = _logprobs(logits, temperatures)
    shaped = logprobs
    if changed is not None:
        index = torch.tensor(changing).to(logits.device, non_blocking=True)
        shaped = logprobs.index_copy(0, index, _logprobs(changed, [temperatures[i] for i in changing]))
    return _tokens(shaped, draws), logprobs


def draw(logits: Tensor, draws: Sequence[Draw]) -> Drawn:
    """As `choose`, with what is told of each row."""
    tokens, logprobs = choose(logits, draws)
    parts = [tokens[:, None].to(torch.float64), logprobs.gather(1, tokens[:, None]).to(torch.float64)]
    width = max(draw.top for draw in draws)
    if width:
        best = logprobs.topk(width, dim=1)
        parts += [best.indices.to(torch.float64), best.values.to(torch.float64)]
    host = torch.cat(parts, dim=1).tolist()
    return Drawn(
        [int(row[0]) for row in host],
        [row[1] for row in host],
        [
            tuple((int(row[2 + j]), row[2 + width + j]) for j in range(draw.top))
            for row, draw in zip(host, draws, strict=True)
        ],
    )


def _changed(logits: Tensor, draws: Sequence[Draw], rows: Sequence[int]) -> Tensor:
    """Logits [len(rows), V] of these rows, with bias and penalties."""
    changed = logits[torch.tensor(rows).to(logits.device, non_blocking=True)]
    for row, i in zip(changed, rows, strict=True):
        changes = draws[i].changes
        assert changes is not None
        tokens, bias, factor, offset = (
            torch.from_numpy(part).to(logits.device, non_blocking=True) for part in changes
        )
        own = row[tokens] + bias
        row[tokens] = torch.where(own > 0, own / factor, own * factor) - offset
    return changed


def _logprobs(logits: Tensor, temperatures: Sequence[float]) -> Tensor:
    """log softmax(logits / temperature); the maximum goes first, so that no division overflows."""
    if any(temperature != 1 for temperature in temperatures):
        divisor = torch.tensor(temperatures, dtype=torch.float32).to(logits.device, non_blocking=True)[
            :, None
        ]
        logits -= logits.amax(dim=1, keepdim=True) * (divisor != 1)
        logits /= divisor
    return logits.log_softmax(dim=1)


def _tokens(logprobs: Tensor, draws: Sequence[Draw]) -> Tensor:
    """The drawn tokens, int64 [n]. The kinds of rows are known on the host: nothing waits for the device."""
    kinds = [0 if draw.greedy else 2 if draw.cuts else 1 for draw in draws]
    if len(set(kinds)) == 1:
        return _draw_kind(kinds[0], logprobs, draws)
    tokens = torch.empty(len(draws), dtype=torch.int64, device=logprobs.device)
    for kind in set(kinds):
        rows = [i for i, own in enumerate(kinds) if own == kind]
        index = torch.tensor(rows).to(logprobs.device, non_blocking=True)
        tokens[index] = _draw_kind(kind, logprobs[index], [draws[i] for i in rows])
    return tokens


def _draw_kind(kind: int, logprobs: Tensor, draws: Sequence[Draw]) -> Tensor:
    if kind == 0:
        return logprobs.argmax(dim=1)
    uniforms = torch.tensor([draw.uniform for draw in draws], dtype=torch.float64)
    uniforms = uniforms.to(logprobs.device, non_blocking=True)[:, None]
    if kind == 1:
        return invert(logprobs.exp(), uniforms)[:, 0]
    ordered, tokens = logprobs.sort(dim=1, descending=True, stable=True)
    position = invert(_cut(ordered, draws), uniforms)
    return tokens.gather(1, position)[:, 0]


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Of weights [n, V] and uniforms float64 [n, k]: the first position whose cumulative weight exceeds uniform *
    total, which never has weight 0; int64 [n, k]."""
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).clamp(max=weights.shape[1] - 1)


def _cut(ordered: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Probabilities, best first, zero where min-p, top-k and then top-p cut.

    Min-p keeps what has at least that share of the best one's probability. Top-k keeps what is at least as good as the
    k-th best. Top-p, computed after renormalisation, keeps a token as long as those before it have less than p
    together, so at least the first one.
    """
    size = ordered.shape[1]
    last = torch.tensor([min(draw.top_k, size) - 1 if draw.top_k > 0 else size - 1 for draw in draws])
    limit = torch.tensor([draw.top_p for draw in draws], dtype=torch.float64)
    share = torch.tensor([draw.min_p for draw in draws], dtype=ordered.dtype)
    last, limit, share = (
        tensor.to(ordered.device, non_blocking=True)[:, None] for tensor in (last, limit, share)
    )
    weights = ordered.exp().masked_fill_(ordered < ordered.gather(1, last), 0.0)
    weights.masked_fill_(weights < share * weights[:, :1], 0.0)
    cumulative = weights.cumsum(dim=1, dtype=torch.float64)
    before = cumulative - weights
    beyond = before >= limit * cumulative[:, -1:]
    beyond[:, 0] = False
    return weights.masked_fill_(beyond, 0.0)

"""The model of the fake engine: three linear layers over the bytes seen so far, with gradients written out by hand.

For tokens t_0 … t_{T-1}, with lora_s(x) = (alpha / rank) * (x A_s^T) B_s^T at each site s:

    h_i = E[t_i]                          embedding
    m_i = mean(h_0 … h_i)                 what came before, order forgotten
    x_i = h_i + Wo m_i + lora_attn(m_i)
    y_i = x_i + Wd x_i + lora_mlp(x_i)
    logits_i = U y_i + lora_unembed(y_i)

Small enough to be fast and to be checked by finite differences; still, every kind of adapter has its place, and a
prediction depends on the whole prompt. All functions keep the dtype that they are given.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engines.adapters import attaches, initial_a
from engines.operations import LoraSpec

Array = NDArray[Any]

VOCABULARY = 259
"""The 256 bytes and three special tokens."""
HIDDEN = 16
_WEIGHT_SEED = 20240229


class Site(NamedTuple):
    """A linear layer that adapters attach to, under the name a Hugging Face model would give it."""

    name: str
    in_features: int
    out_features: int


SITES: tuple[Site, ...] = (
    Site("model.layers.0.self_attn.o_proj", HIDDEN, HIDDEN),
    Site("model.layers.0.mlp.down_proj", HIDDEN, HIDDEN),
    Site("lm_head", HIDDEN, VOCABULARY),
)


class Weights(NamedTuple):
    """The frozen base model: `embed` [V, H], `mix` [H, H], `down` [H, H], `unembed` [V, H]."""

    embed: Array
    mix: Array
    down: Array
    unembed: Array


class Factors(NamedTuple):
    """`a` [rank, in_features] and `b` [out_features, rank] of one site."""

    a: Array
    b: Array


class Adapter:
    """One adapter. Its numbers are one vector, `values`; the factors of each site it attaches to are views of it."""

    def __init__(self, spec: LoraSpec, values: Array) -> None:
        self.spec = spec
        self.scale = spec.alpha / spec.rank
        self.values = values
        self.factors = dict(zip(sites(spec), _views(spec, values), strict=True))

    @classmethod
    def initial(cls, spec: LoraSpec) -> Adapter:
        """A of each site is `initial_a(seed, name, ...)`, B is zero."""
        adapter = cls(spec, np.zeros(size(spec), dtype=np.float32))
        for site, factors in adapter.factors.items():
            factors.a[:] = initial_a(spec.seed, site.name, spec.rank, site.in_features)
        return adapter


def sites(spec: LoraSpec) -> list[Site]:
    """The sites that an adapter of this configuration attaches to."""
    return [site for site in SITES if attaches(site.name, spec)]


def size(spec: LoraSpec) -> int:
    """Number of values of an adapter."""
    return sum(spec.rank * (site.in_features + site.out_features) for site in sites(spec))


def _views(spec: LoraSpec, values: Array) -> Iterator[Factors]:
    """The factors of each site as views of a vector of `size(spec)` items, A before B."""
    start = 0
    for site in sites(spec):
        middle = start + spec.rank * site.in_features
        stop = middle + spec.rank * site.out_features
        a = values[start:middle].reshape(spec.rank, site.in_features)
        yield Factors(a, values[middle:stop].reshape(site.out_features, spec.rank))
        start = stop


def base_weights() -> Weights:
    """Always the same float32 numbers: uniform in ±1, divided by sqrt(H) where they are multiplied with a state."""
    bits = np.random.PCG64(_WEIGHT_SEED)

    def draw(rows: int) -> Array:
        raw = bits.random_raw(rows * HIDDEN).reshape(rows, HIDDEN) >> np.uint64(11)
        return (raw * 2.0**-52 - 1.0).astype(np.float32)

    root = np.float32(HIDDEN**0.5)
    embed = draw(VOCABULARY)
    mix, down = draw(HIDDEN) / root, draw(HIDDEN) / root
    return Weights(embed, mix, down, draw(VOCABULARY) * np.float32(2.0) / root)


# ---------------------------------------------------------------------------- forward


class States(NamedTuple):
    """What a pass over one text computes, each [T, H]: the mean of what was seen, and the inputs of the layers."""

    mean: Array
    x: Array
    y: Array


def run_layers(weights: Weights, adapter: Adapter | None, embedded: Array, mean: Array) -> States:
    """The states that follow from `embedded` [T, H] and the mean so far [T, H]; positions do not mix any more."""
    x = embedded + mean @ weights.mix.T
    _add_lora(x, mean, adapter, SITES[0])
    y = x + x @ weights.down.T
    _add_lora(y, x, adapter, SITES[1])
    return States(mean, x, y)


def states_of(weights: Weights, adapter: Adapter | None, tokens: Array) -> States:
    """The states of a whole text, int [T]."""
    embedded = weights.embed[tokens]
    count = np.arange(1, len(tokens) + 1, dtype=embedded.dtype)[:, None]
    return run_layers(weights, adapter, embedded, np.cumsum(embedded, axis=0) / count)


def logits_of(weights: Weights, adapter: Adapter | None, y: Array) -> Array:
    """[T, H] to [T, V]."""
    logits: Array = y @ weights.unembed.T
    _add_lora(logits, y, adapter, SITES[2])
    return logits


def log_softmax(logits: Array) -> Array:
    """Over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _add_lora(out: Array, rows: Array, adapter: Adapter | None, site: Site) -> None:
    factors = None if adapter is None else adapter.factors.get(site)
    if adapter is not None and factors is not None:
        out += adapter.scale * (rows @ factors.a.T) @ factors.b.T


# ---------------------------------------------------------------------------- backward


def gradient_of(weights: Weights, adapter: Adapter, states: States, grad_logits: Array) -> Array:
    """The gradient of the adapter's values, laid out like them, from the gradient of the logits [T, V]."""
    gradient = np.zeros_like(adapter.values)
    parts = dict(zip(adapter.factors, _views(adapter.spec, gradient), strict=True))
    grad_y = grad_logits @ weights.unembed + _back(adapter, parts, SITES[2], states.y, grad_logits)
    grad_x = grad_y + grad_y @ weights.down + _back(adapter, parts, SITES[1], states.x, grad_y)
    _back(adapter, parts, SITES[0], states.mean, grad_x)
    return gradient


def _back(
    adapter: Adapter, parts: dict[Site, Factors], site: Site, rows: Array, grad: Array
) -> Array | float:
    """Fill in the gradient of a site's factors; gives that of its input `rows` through the adapter."""
    if site not in parts:
        return 0.0
    factors = adapter.factors[site]
    inner = adapter.scale * (grad @ factors.b)
    parts[site].b[:] = adapter.scale * (grad.T @ (rows @ factors.a.T))
    parts[site].a[:] = inner.T @ rows
    result: Array = inner @ factors.a
    return result

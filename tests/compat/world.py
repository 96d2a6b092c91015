"""What the calls of one SDK work with: clients of it, a run, checkpoints, samplers; each made when first needed.

Runs inside the SDK's environment, whose version decides what there is; so the SDK's objects are `Any` here.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import tinker
from tinker import types

LIMIT_S = 60.0
TOKENS = [(7 * position + 3) % 250 for position in range(13)]
OTHER_TOKENS = [(11 * position + 40) % 250 for position in range(9)]


class World:
    """A user of one SDK version at a served gateway."""

    def __init__(self, url: str, key: str, base_model: str, scratch: Path) -> None:
        self.url, self.key, self.base_model, self.scratch = url, key, base_model, scratch
        self.http = httpx.Client(base_url=url, headers={"X-API-Key": key}, timeout=LIMIT_S)
        self._numbers = itertools.count()

    def download(self, url: str) -> bytes:
        """What a signed address gives to somebody without a key."""
        answer = httpx.get(url, timeout=LIMIT_S, follow_redirects=True)
        assert answer.status_code == 200 and int(answer.headers["content-length"]) == len(answer.content), (
            answer
        )
        return answer.content

    def name(self, what: str = "c") -> str:
        """A name that no checkpoint has yet."""
        return f"{what}-{next(self._numbers)}"

    @cached_property
    def service(self) -> Any:
        return self.new_service()

    def new_service(self, **options: Any) -> Any:
        return tinker.ServiceClient(base_url=self.url, api_key=self.key, **options)

    def new_run(self, seed: int = 7, rank: int = 4) -> Any:
        """A training client with a fresh adapter."""
        return resolved(self.service.create_lora_training_client(self.base_model, rank=rank, seed=seed))

    @cached_property
    def run(self) -> Any:
        """A run that calls may train on."""
        return self.new_run()

    @cached_property
    def trained(self) -> Any:
        """A run that has made one step and stays as it is: its logprobs are no base model's."""
        run = self.new_run(seed=11)
        train(run)
        return run

    @cached_property
    def trained_path(self) -> str:
        """A training checkpoint of `trained`."""
        return str(resolved(self.trained.save_state(self.name("trained"))).path)

    @cached_property
    def sampler_path(self) -> str:
        """A sampler checkpoint of `trained`."""
        return str(resolved(self.trained.save_weights_for_sampler(self.name("trained"))).path)

    @cached_property
    def trained_logprobs(self) -> list[float]:
        return logprobs(self.trained, TOKENS)

    def new_checkpoint(self) -> str:
        """A training checkpoint of `trained` that a call may change or delete."""
        return str(resolved(self.trained.save_state(self.name())).path)

    @cached_property
    def sampler(self) -> Any:
        """A sampler of the base model."""
        return resolved(self.service.create_sampling_client(base_model=self.base_model))

    @cached_property
    def rest(self) -> Any:
        return self.service.create_rest_client()


@dataclass
class Call:
    """One method to call and judge: `target` is the object that has it."""

    world: World
    name: str
    target: Any = None

    @property
    def method(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(self.target, self.name)
        return found

    def accepts(self, *parameters: str) -> bool:
        """Whether this version's method has all these parameters. Some wrappers of 0.38 take any, for a client's."""
        owner = resolved(self.target) if type(self.target).__name__.startswith("Backcompat") else self.target
        return set(parameters) <= set(inspect.signature(getattr(owner, self.name)).parameters)

    def given(self, **options: Any) -> dict[str, Any]:
        """Those options that this version's method has."""
        return {name: value for name, value in options.items() if self.accepts(name)}

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """The method's result; coroutines and futures are waited for."""
        return resolved(self.method(*arguments, **options))


def resolved(value: Any) -> Any:
    """What a coroutine or a future of the SDK comes to."""
    if inspect.iscoroutine(value):
        return asyncio.run(_awaited(value))
    while isinstance(value, Future) or (hasattr(value, "result_async") and hasattr(value, "result")):
        value = value.result(timeout=LIMIT_S)
    return value


async def _awaited(value: Any) -> Any:
    while inspect.isawaitable(value):
        value = await value
    return resolved(value)


def datum(tokens: list[int], weight: float = 1.0) -> Any:
    """An example: position i of the input predicts token i + 1."""
    weights = [weight * (1 + position % 3) for position in range(len(tokens) - 1)]
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64"),
            "weights": types.TensorData(data=weights, dtype="float32"),
        },
    )


def examples() -> list[Any]:
    """Two examples of different lengths."""
    return [datum(TOKENS), datum(OTHER_TOKENS, 0.5)]


def prompt(tokens: list[int] | None = None) -> Any:
    return types.ModelInput.from_ints(TOKENS if tokens is None else tokens)


def train(run: Any, learning_rate: float = 0.05) -> Any:
    """One step on the examples; the result of the step."""
    resolved(run.forward_backward(examples(), "cross_entropy"))
    return resolved(run.optim_step(types.AdamParams(learning_rate=learning_rate)))


def logprobs(run: Any, tokens: list[int]) -> list[float]:
    """Of each token after the first, as training computes them."""
    output = resolved(run.forward([datum(tokens)], "cross_entropy"))
    return [float(number) for number in output.loss_fn_outputs[0]["logprobs"].data]


def sampled_logprobs(sampler: Any, tokens: list[int]) -> list[float]:
    """Of each token after the first, as sampling computes them."""
    values = resolved(sampler.compute_logprobs(prompt(tokens)))
    assert values[0] is None and len(values) == len(tokens), values
    return [float(value) for value in values[1:]]


def require_close(given: list[float], expected: list[float], tolerance: float = 1e-4) -> None:
    assert len(given) == len(expected), (given, expected)
    worst = max(abs(one - other) for one, other in zip(given, expected, strict=True))
    assert worst < tolerance, f"differs by {worst}: {given} is not {expected}"


def quiet() -> None:
    """Deprecated methods are called here on purpose."""
    warnings.simplefilter("ignore")

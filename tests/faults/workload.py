"""What the clients do: courses, each a run of so many pipelined steps with samples of its weights in between.

A course is a function of its numbers alone, so the same one can be followed again where nothing is disturbed.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import tinker
from tinker.lib import internal_client_holder

KEY = "tml-faults"
CLIENTS = 8
PATIENCE_S = 120.0
"""A result that is later than this is missing."""
_CLOSED_WITHIN_S = 10.0
_SESSION_TRIES = 5
_WINDOW = 5
"""Steps that a client has under way."""
_DATA = 3
_LENGTH = 8
_VOCABULARY = 250


@dataclass(frozen=True, slots=True)
class Course:
    """One run of one client."""

    client: int
    number: int
    steps: int
    base_model: str

    @property
    def seed(self) -> int:
        """Of the run's adapter; no other course has it."""
        return 1000 * self.client + self.number

    @property
    def name(self) -> str:
        """For reports."""
        return f"client {self.client} course {self.number}"


@dataclass(slots=True)
class Followed:
    """What came of a course: every result by a name that says which it is, where its end was saved, what went wrong."""

    course: Course
    run_id: str = ""
    path: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


class Journal:
    """When each client got a result; all clients write in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._times: list[list[float]] = [[] for _ in range(CLIENTS)]

    def note(self, client: int) -> None:
        """A client has got a result now."""
        with self._lock:
            self._times[client].append(time.monotonic())

    def times(self, client: int) -> list[float]:
        """When results came, in order; `time.monotonic()` seconds."""
        with self._lock:
            return list(self._times[client])

    def last(self) -> list[float]:
        """When each client's newest result came; 0.0 before its first."""
        with self._lock:
            return [times[-1] if times else 0.0 for times in self._times]


def follow(course: Course, url: str, journal: Journal) -> Followed:
    """Follow a course to its end with the official SDK. An error ends it, and is part of what came of it."""
    followed = Followed(course)
    try:
        service = tinker.ServiceClient(base_url=url, api_key=KEY)
        _Follower(followed, service, journal).run()
        # Closing waits for a heartbeat to end that was cancelled, and the SDK (0.38) sometimes loses the cancellation.
        with contextlib.suppress(TimeoutError):
            service.close("success").result(timeout=_CLOSED_WITHIN_S)
    except Exception:  # boundary: whatever a client meets is what is being looked for
        followed.error = f"{time.strftime('%H:%M:%S')} {traceback.format_exc()}"
    return followed


class _Follower:
    """One client on its course."""

    def __init__(self, followed: Followed, service: tinker.ServiceClient, journal: Journal) -> None:
        self._followed = followed
        self._course = followed.course
        self._service = service
        self._journal = journal
        self._promised: deque[tuple[str, Any, Callable[[Any], Any]]] = deque()

    def run(self) -> None:
        course = self._course
        client = self._begin().result(timeout=PATIENCE_S)
        self._followed.run_id = client.model_id
        for step in range(course.steps):
            data = [_example(course, step, index) for index in range(_DATA)]
            self._promise(f"pass {step}", client.forward_backward(data, "cross_entropy"), _of_pass)
            adam = tinker.AdamParams(learning_rate=1e-2 / (1 + step % 7))
            self._promise(f"step {step}", client.optim_step(adam), lambda result: dict(result.metrics or {}))
            if step % 10 == 4:
                self._sample(client, step)
            while len(self._promised) > 2 * _WINDOW:
                self._keep()
        while self._promised:
            self._keep()
        self._followed.path = client.save_state("end").result(timeout=PATIENCE_S).path
        self._journal.note(course.client)

    def _begin(self) -> Any:
        """The run's creation. A session is asked for first, by a call that the SDK gives up after ten tries: with its
        waits cut short that is too soon, so it is asked for again."""
        course = self._course
        begin = partial(self._service.create_lora_training_client, rank=4, seed=course.seed)
        for _ in range(_SESSION_TRIES - 1):
            with contextlib.suppress(tinker.APIConnectionError, tinker.InternalServerError):
                return begin(course.base_model)
        return begin(course.base_model)

    def _sample(self, client: tinker.TrainingClient, step: int) -> None:
        """Draw from the weights as they are after a step, while training goes on."""
        sampler = client.save_weights_and_get_sampling_client().result(timeout=PATIENCE_S)
        for index in range(3):
            seed = self._course.seed * 1000 + step * 10 + index
            params = tinker.SamplingParams(max_tokens=6, seed=seed, temperature=1.0)
            prompt = tinker.ModelInput.from_ints([5 + index, 6, 7 + step])
            self._promise(f"sample {step} {index}", sampler.sample(prompt, 2, params), _of_sample)

    def _promise(self, name: str, future: Any, value_of: Callable[[Any], Any]) -> None:
        self._promised.append((name, future, value_of))

    def _keep(self) -> None:
        """Wait for the oldest promise."""
        name, future, value_of = self._promised.popleft()
        result = future.result(timeout=PATIENCE_S)
        assert name not in self._followed.results
        self._followed.results[name] = value_of(result)
        self._journal.note(self._course.client)


def _of_pass(result: tinker.ForwardBackwardOutput) -> dict[str, Any]:
    outputs = [
        {name: list(tensor.data) for name, tensor in output.items()} for output in result.loss_fn_outputs
    ]
    return {"metrics": dict(result.metrics), "outputs": outputs}


def _of_sample(result: tinker.SampleResponse) -> list[dict[str, Any]]:
    return [
        {
            "tokens": list(sequence.tokens),
            "logprobs": list(sequence.logprobs or []),
            "stop": str(sequence.stop_reason),
        }
        for sequence in result.sequences
    ]


def _example(course: Course, step: int, index: int) -> tinker.Datum:
    number = course.seed * 997 + step * _DATA + index
    tokens = [(number * 37 + 11 * position * position) % _VOCABULARY for position in range(_LENGTH + 1)]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * _LENGTH, dtype="float32"),
        },
    )


class Clients:
    """All clients, each in a thread of its own, each on the courses that `courses` gives for its number."""

    def __init__(self, url: str, journal: Journal, courses: Callable[[int], Iterator[Course]]) -> None:
        self._url = url
        self._journal = journal
        self._courses = courses
        self._followed: list[Followed] = []
        self._threads = [
            threading.Thread(target=self._work, args=(number,), name=f"client-{number}", daemon=True)
            for number in range(CLIENTS)
        ]

    def start(self) -> None:
        """Send them off."""
        for thread in self._threads:
            thread.start()

    def join(self, stacks: Path) -> list[Followed]:
        """Wait until all are done; what came of all courses. Raises TimeoutError for one that hangs, after writing into
        a file what every thread and task is at."""
        deadline = time.monotonic() + 2 * PATIENCE_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
            if thread.is_alive():
                _write_stacks(stacks)
                raise TimeoutError(f"{thread.name} hangs; {stacks} says where")
        return self._followed

    def _work(self, number: int) -> None:
        for course in self._courses(number):
            self._followed.append(follow(course, self._url, self._journal))


def _write_stacks(path: Path) -> None:
    with path.open("w") as file:
        faulthandler.dump_traceback(file)
        loop = internal_client_holder._internal_client_holder_thread_singleton.get_loop()
        for task in asyncio.all_tasks(loop):
            task.print_stack(file=file)

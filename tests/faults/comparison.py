"""What is there after a course, by the database's account and on disk, and how it differs from an undisturbed one's."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load
from sqlalchemy import Connection, create_engine, func, select
from sqlalchemy.pool import NullPool

from engines.storage import CHECKSUMS
from gateway.store import schema
from tests.faults.workload import Followed

_STEP_COLUMNS = ("step", "loss", "tokens", "grad_norm", "learning_rate")
_MOST_LINES = 20


@dataclass(slots=True)
class Left:
    """What a course has left behind."""

    followed: Followed
    calls: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    faulty: list[str] = field(default_factory=list)
    """What is wrong whatever an undisturbed course leaves."""


def left_behind(url: str, storage: Path, followed: list[Followed]) -> list[Left]:
    """Read what courses have left, from the database and the storage."""
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        return [_left(connection, storage, course) for course in followed]


def accounted(url: str) -> dict[str, int]:
    """Sums over everything that has been counted as used: each call counts once, however often it was performed."""
    counters = ("training_tokens", "sampled_tokens", "checkpoints")
    query = select(*(func.sum(schema.usage.c[name]).label(name) for name in counters))
    with create_engine(url, poolclass=NullPool).connect() as connection:
        row = connection.execute(query).one()
    return {name: int(row._mapping[name] or 0) for name in counters}


def _left(connection: Connection, storage: Path, followed: Followed) -> Left:
    left = Left(followed)
    if followed.error is not None:
        left.faulty.append(f"its client met an error:\n{followed.error}")
        return left
    futures = schema.futures
    of_run = select(futures).where(futures.c.run_id == followed.run_id).order_by(futures.c.seq_id)
    rows = connection.execute(of_run).all()
    left.calls.update(f"{row.kind} {row.status}" for row in rows)
    if [row.seq_id for row in rows] != list(range(len(rows))):
        left.faulty.append(f"its calls are numbered {[row.seq_id for row in rows]}")
    left.faulty += [f"{row.request_id} is {row.status}: {row.error}" for row in rows if row.status != "done"]
    sampled = _samples(connection, followed.run_id)
    left.calls.update(f"sample {row.status}" for row in sampled)
    left.faulty += [
        f"{row.request_id} is {row.status}: {row.error}" for row in sampled if row.status != "done"
    ]
    left.steps, wrong = _steps(
        connection, followed.run_id, [row.seq_id for row in rows if row.kind == "optim_step"]
    )
    left.faulty += wrong
    checkpoints = schema.checkpoints
    found = connection.execute(select(checkpoints).where(checkpoints.c.path == followed.path)).all()
    if len(found) != 1:
        left.faulty.append(f"{len(found)} checkpoints are registered as {followed.path}")
        return left
    left.files = {path.name: path.read_bytes() for path in (storage / found[0].folder).iterdir()}
    return left


def _samples(connection: Connection, run_id: str) -> list[Any]:
    samplers, futures = schema.samplers, schema.futures
    of_run = select(samplers.c.sampler_id).where(samplers.c.run_id == run_id)
    return list(connection.execute(select(futures).where(futures.c.sampler_id.in_(of_run))).all())


def _steps(connection: Connection, run_id: str, numbers: list[int]) -> tuple[list[dict[str, Any]], list[str]]:
    """The recorded steps, and what is wrong with them: there is one for each optimizer step, in the log's order."""
    steps = schema.steps
    rows = connection.execute(select(steps).where(steps.c.run_id == run_id).order_by(steps.c.step)).all()
    wrong = []
    if [row.step for row in rows] != list(range(1, len(numbers) + 1)):
        wrong.append(f"{len(numbers)} optimizer steps, but recorded are {[row.step for row in rows]}")
    if [row.seq_id for row in rows] != numbers:
        wrong.append(f"optimizer steps {numbers} are recorded as of {[row.seq_id for row in rows]}")
    return [{name: row._mapping[name] for name in _STEP_COLUMNS} for row in rows], wrong


def differences(disturbed: Left, undisturbed: Left, tolerance: float) -> list[str]:
    """Sentences, each naming the course, the run and the place; none when all numbers agree."""
    course = disturbed.followed.course
    where = f"{course.name} (run {disturbed.followed.run_id})"
    found = [f"{where}: {sentence}" for sentence in disturbed.faulty]
    found += [f"{where}, undisturbed: {sentence}" for sentence in undisturbed.faulty]
    if disturbed.faulty or undisturbed.faulty:
        return found
    if disturbed.calls != undisturbed.calls:
        found.append(f"{where}: calls {disturbed.calls}, undisturbed {undisturbed.calls}")
    pairs = [
        ("results", disturbed.followed.results, undisturbed.followed.results),
        ("recorded steps", disturbed.steps, undisturbed.steps),
    ]
    for name, here, there in pairs:
        found += [f"{where}: {line}" for line in _unequal(name, here, there, tolerance)][:_MOST_LINES]
    found += [f"{where}: {line}" for line in _unequal_files(disturbed.files, undisturbed.files, tolerance)]
    return found


def _unequal(place: str, here: Any, there: Any, tolerance: float) -> list[str]:
    """Where two results differ: exactly, or with a tolerance, numbers by their relative distance as vectors."""
    if type(here) is not type(there):
        return [f"{place} is {here!r}, undisturbed {there!r}"]
    if isinstance(here, dict):
        if here.keys() != there.keys():
            return [f"{place} has {sorted(here)}, undisturbed {sorted(there)}"]
        return [
            line for key in here for line in _unequal(f"{place}, {key}", here[key], there[key], tolerance)
        ]
    if isinstance(here, list) and here and all(isinstance(value, float) for value in [*here, *there]):
        return [] if _close(here, there, tolerance) else [f"{place} is {here}, undisturbed {there}"]
    if isinstance(here, list):
        if len(here) != len(there):
            return [f"{place} has {len(here)} entries, undisturbed {len(there)}"]
        pairs = enumerate(zip(here, there, strict=True))
        return [line for n, (a, b) in pairs for line in _unequal(f"{place}, {n}", a, b, tolerance)]
    if isinstance(here, float):
        return [] if _close([here], [there], tolerance) else [f"{place} is {here!r}, undisturbed {there!r}"]
    return [] if here == there else [f"{place} is {here!r}, undisturbed {there!r}"]


def _close(here: Any, there: Any, tolerance: float) -> bool:
    a, b = np.asarray(here, dtype=np.float64), np.asarray(there, dtype=np.float64)
    if a.shape != b.shape:
        return False
    if tolerance == 0.0:
        return bool(np.array_equal(a, b))
    return bool(np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b))


def _unequal_files(here: dict[str, bytes], there: dict[str, bytes], tolerance: float) -> list[str]:
    if here.keys() != there.keys():
        return [f"the files at its end are {sorted(here)}, undisturbed {sorted(there)}"]
    if not any(name.endswith(".safetensors") for name in here):
        return [f"no weights were saved at its end: {sorted(here)}"]
    unequal = [name for name in here if here[name] != there[name]]
    if tolerance:
        tensors = [name for name in unequal if name.endswith(".safetensors")]
        unequal = [name for name in unequal if name not in (*tensors, CHECKSUMS)] + [
            f"{name}, {key}"
            for name in tensors
            for key, value in load(there[name]).items()
            if not _close(load(here[name])[key], value, tolerance)
        ]
    return [f"{name} differs at its end" for name in unequal]

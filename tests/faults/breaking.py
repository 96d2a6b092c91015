"""The faults. Each happens to a scene at once, and leaves it so that it can recover by itself.

A fault answers whether there was something to break: an engine that is just being started again cannot be killed.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psycopg

from tests.faults.damage import damage_newest
from tests.faults.scene import LEASE_S, SILENCE_S, DatabaseName, Scene

Fault = Callable[[Scene, random.Random], bool]


def kill_engine(scene: Scene, draw: random.Random) -> bool:
    """kill -9 of the engine process."""
    return bool(_signal_engines(scene, signal.SIGKILL))


def hang_engine(scene: Scene, draw: random.Random) -> bool:
    """The engine process stands still: for a moment that passes, or for good, until it is taken for dead."""
    found = _signal_engines(scene, signal.SIGSTOP)
    if found and draw.random() < 0.5:
        time.sleep(draw.uniform(0.0, 2 * SILENCE_S))
        _signal(found, signal.SIGCONT)
    return bool(found)


def damage_snapshot(scene: Scene, draw: random.Random) -> bool:
    """The newest snapshot of a run is damaged, and then the engine killed, so that it is needed."""
    return damage_newest(scene, draw) and kill_engine(scene, draw)


def kill_gateway(scene: Scene, draw: random.Random) -> bool:
    """kill -9 of a gateway, which is started again after a moment."""
    gateway = draw.choice(scene.gateways)
    if not gateway.running:
        return False
    gateway.kill()
    time.sleep(draw.uniform(0.0, 0.5))
    gateway.launch()
    return True


def stop_gateway(scene: Scene, draw: random.Random) -> bool:
    """A gateway stands still until its lease is over and its engine has given it up, and goes on then."""
    gateway = draw.choice(scene.gateways)
    if not gateway.running:
        return False
    gateway.pause()
    time.sleep(LEASE_S + draw.uniform(0.2, 1.5))
    gateway.go_on()
    return True


def restart_postgres(scene: Scene, draw: random.Random) -> bool:
    """The server is restarted as an operator does: sessions are ended, work is rolled back."""
    return _restart(scene, draw, signal.SIGINT)


def crash_postgres(scene: Scene, draw: random.Random) -> bool:
    """The server ends without a word, as in a crash, and recovers from its log when it starts again."""
    return _restart(scene, draw, signal.SIGQUIT)


def cut_connections(scene: Scene, draw: random.Random) -> bool:
    """Every connection to the database is ended by the server."""
    assert scene.server is not None
    with suppress(psycopg.OperationalError):
        return scene.server.cut_connections(scene.database) > 0
    return False


EVERYWHERE: dict[str, Fault] = {
    "engine killed": kill_engine,
    "engine hung": hang_engine,
    "snapshot damaged, engine killed": damage_snapshot,
    "gateway killed": kill_gateway,
    "gateway stopped past its lease": stop_gateway,
}
ON_POSTGRES: dict[str, Fault] = {
    "Postgres restarted": restart_postgres,
    "Postgres crashed": crash_postgres,
    "connections cut": cut_connections,
}


def faults_on(database: DatabaseName) -> dict[str, Fault]:
    """By name, what can happen there."""
    return EVERYWHERE if database == "sqlite" else {**EVERYWHERE, **ON_POSTGRES}


def _signal_engines(scene: Scene, number: signal.Signals) -> list[int]:
    found = scene.engine_pids()
    _signal(found, number)
    return found


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(pid, number)


def _restart(scene: Scene, draw: random.Random, how: signal.Signals) -> bool:
    assert scene.server is not None
    scene.server.stop(how)
    time.sleep(draw.uniform(0.0, 0.5))
    scene.server.start_again()
    return True

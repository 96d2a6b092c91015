"""The pause after `kill -9` of the engine in the middle of a run: with snapshots, and with the whole log to replay.

    python -m benchmarks.recovery [--smoke]

The official SDK trains `tandem/tiny`, some steps sent ahead. The engine is killed just before a snapshot is due, which
is the worst moment. The pause is the time from the kill to the next result; the new engine's start is a part of it. The
losses must be those of an undisturbed run, to the last bit.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import tinker

from benchmarks.alternating import engine_process
from benchmarks.measuring import KEY, RESULTS, gateway, keep
from benchmarks.workload import TINY, model_folder, training_batches, vocabulary

WANTED_S = 10.0
"""Longest pause besides the engine's start."""
_AHEAD = 4
_ADAM = tinker.AdamParams(learning_rate=1e-3)


class Plan(NamedTuple):
    """`steps` of `rows` sequences of `length` tokens; a snapshot every `every` steps, a kill when the client has the
    results of `kill`: the engine may be as far ahead as the client sends."""

    steps: int
    rows: int
    length: int
    every: int
    kill: int


FULL = Plan(steps=200, rows=4, length=64, every=20, kill=115)
SMOKE = Plan(steps=20, rows=1, length=16, every=2, kill=8)


class ReadyAgain(threading.Thread):
    """Finds out when the engines are ready after they were not."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url = url
        self.at = 0.0

    def run(self) -> None:
        seen_down = False
        with httpx.Client() as client:
            while not self.at:
                ready = client.get(f"{self._url}/readyz").is_success
                seen_down = seen_down or not ready
                if ready and seen_down:
                    self.at = time.monotonic()
                time.sleep(0.005)


def train(url: str, plan: Plan, kill_pid: int | None) -> tuple[list[float], dict[str, float]]:
    """Losses of a run, and what its pause was made of if the engine is killed."""
    batches = training_batches(vocabulary(model_folder(TINY, Path())), plan.steps, plan.rows, plan.length)
    under_way: deque[Any] = deque()
    losses: list[float] = []
    pause: dict[str, float] = {}
    with tinker.ServiceClient(base_url=url, api_key=KEY) as service:
        client = service.create_lora_training_client(TINY, rank=16, seed=1).result()
        for batch in batches:
            data = [_datum(*row) for row in zip(*batch, strict=True)]
            passed = client.forward_backward(data, "cross_entropy")
            under_way.append((passed, client.optim_step(_ADAM)))
            if len(under_way) > _AHEAD:
                losses.append(_finish(*under_way.popleft()))
                if len(losses) == plan.kill and kill_pid is not None:
                    pause = _kill(url, kill_pid, under_way, losses)
        losses += [_finish(*each) for each in under_way]
    return losses, pause


def _kill(url: str, pid: int, under_way: deque[Any], losses: list[float]) -> dict[str, float]:
    """What the pause after a kill is made of: it ends with the first result of the new engine; what the dead one had
    computed may still come before."""
    again, pause = ReadyAgain(url), {}
    again.start()
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    while under_way and not again.at:
        losses.append(_finish(*under_way.popleft()))
        pause["pause_s"] = time.monotonic() - killed
    again.join(60)
    return {**pause, "start_s": again.at - killed}


def _finish(passed: Any, stepped: Any) -> float:
    loss: float = passed.result().metrics["loss:sum"]
    stepped.result()
    return loss


def _datum(inputs: Any, targets: Any) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(inputs.tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=targets.tolist(), dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * len(targets), dtype="float32"),
        },
    )


def measure(plan: Plan) -> dict[str, Any]:
    """A run that is killed, with snapshots and without, and an undisturbed one."""
    engine = {
        "name": "tiny",
        "base_model": TINY,
        "options": {"threads": os.cpu_count() or 1, "device": "cpu"},
    }
    results: dict[str, Any] = {**plan._asdict(), "wanted_s": WANTED_S}
    expected: list[float] = []
    for name, every in (("undisturbed", 0), ("snapshots", plan.every), ("whole_log", 0)):
        with tempfile.TemporaryDirectory(prefix="tandem-recovery-") as folder:
            with gateway(Path(folder), engine, snapshot_steps=str(every), snapshot_s="0") as measured:
                victim = None if name == "undisturbed" else engine_process(measured.pid)
                losses, pause = train(measured.url, plan, victim)
            log = (Path(folder) / "gateway.log").read_text()
        if name == "undisturbed":
            expected = losses
            continue
        [restored] = [line for line in log.splitlines() if "is restored in engine" in line]
        pause["applied_again"] = int(restored.rpartition(": ")[2].split()[0])
        results[name] = {**pause, "same_losses": losses == expected}
    return results


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    results = measure(SMOKE if arguments.smoke else FULL)
    for name in ("snapshots", "whole_log"):
        found = results[name]
        print(
            f"{name}: {found['pause_s']:.2f} s from the kill to the next result, of which {found['start_s']:.2f} s for "
            f"the engine's start; {found['applied_again']} operations applied again; losses "
            f"{'the same' if found['same_losses'] else 'DIFFERENT'}"
        )
    keep("recovery", results, arguments.out)


if __name__ == "__main__":
    main()

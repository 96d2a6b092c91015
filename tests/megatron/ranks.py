"""Ranks of a test: a function of a module run in several processes, one gloo group among them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE_S = 90.0


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *arguments: str) -> None:
    """Call a function of a test module on each of `ranks` processes; it finds the group through torch.distributed and
    gets the arguments. Fails with what a rank wrote if one of them fails, or all are not done in time."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    name = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-m", "tests.megatron.ranks", name, str(ranks), str(folder / "group")]
    processes = []
    for rank in range(ranks):
        with (folder / f"rank{rank}.txt").open("wb") as output:
            own = [*command, str(rank), *arguments]
            processes.append(
                subprocess.Popen(own, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    deadline = time.monotonic() + PATIENCE_S
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            if any(process.returncode for process in processes):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for rank, process in enumerate(processes):
        said = (folder / f"rank{rank}.txt").read_text()
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{said}"


def _main(name: str, ranks: str, place: str, rank: str, *arguments: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=int(rank), world_size=int(ranks))
    module, _, function = name.partition(":")
    getattr(importlib.import_module(module), function)(*arguments)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])

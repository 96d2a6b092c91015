"""Log-probs at a large vocabulary: in chunks, against full logits.

    python -m benchmarks.loss_memory [--repeats 3] [--smoke]

Both ways take the same hidden states and unembedding, in turn, there and back, and must give the same log-probs and
gradients. Peak memory is what the operating system says of this process, above what it had before.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measuring import RESULTS, keep, machine, median, resident_bytes

VOCABULARY, WIDTH, TOKENS = 151_936, 1024, 2048


def peak_bytes() -> int:
    """The most memory that this process has occupied since `forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process's peak memory")


def forget_peak() -> None:
    """Linux counts anew from here."""
    Path("/proc/self/clear_refs").write_text("5")


def ways(vocabulary: int, width: int, tokens: int) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Each gives log-probs [T] and the gradient [T, H] of their weighted sum."""
    import torch

    from engines.hf.logprobs import Unembedding

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, width) * width**-0.5
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens, 1))
    upstream = torch.rand(tokens, 1)

    def full() -> tuple[Any, Any]:
        found = (hidden @ weight.t()).log_softmax(-1).gather(1, targets)
        return found.detach(), torch.autograd.grad(found, hidden, upstream)[0]

    def chunked() -> tuple[Any, Any]:
        found = Unembedding(weight, None, 0).logprobs(hidden, targets, [])
        return found.detach(), torch.autograd.grad(found, hidden, upstream)[0]

    return {"full": full, "chunked": chunked}


def measure(repeats: int, threads: int, sizes: tuple[int, int, int]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(threads)
    measured: dict[str, dict[str, list[float]]] = {
        name: {"seconds": [], "bytes": []} for name in ("full", "chunked")
    }
    answers: dict[str, tuple[Any, Any]] = {}
    both = ways(*sizes)
    for _ in range(repeats):
        for name, way in both.items():
            before = resident_bytes(os.getpid())
            forget_peak()
            started = time.perf_counter()
            answers[name] = way()
            measured[name]["seconds"].append(round(time.perf_counter() - started, 6))
            measured[name]["bytes"].append(peak_bytes() - before)
    (full, full_grad), (ours, our_grad) = answers["full"], answers["chunked"]
    pairs = zip(measured["chunked"]["seconds"], measured["full"]["seconds"], strict=True)
    ratios = [round(mine / theirs, 4) for mine, theirs in pairs]
    return {
        "vocabulary": sizes[0],
        "width": sizes[1],
        "tokens": sizes[2],
        **measured,
        "ratios": ratios,
        "ratio": round(median(ratios), 4),
        "largest_difference": float((full - ours).abs().max()),
        "difference_of_gradients": float((full_grad - our_grad).norm() / full_grad.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form that only shows that everything works"
    )
    args = parser.parse_args()
    sizes = (2000, 16, 64) if args.smoke else (VOCABULARY, WIDTH, TOKENS)
    results = {"machine": machine(), "threads": args.threads, **measure(args.repeats, args.threads, sizes)}
    print({name: results[name] for name in ("full", "chunked", "ratio")})
    keep("loss_memory", results, args.out)


if __name__ == "__main__":
    main()

"""The ranks of one engine and what they say to each other: bytes over gloo, in main memory.

A rank that ends closes its connections, which fails what the others are doing with it at once. One that hangs is
noticed where they wait for it: after `timeout_s` seconds, by rank 0 also when it calls. Only a follower's waiting for
the next call has no end, for nobody may call; when its leader dies meanwhile it ends by its standard input
(`engines.ranks.following`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from engines.environment import set_defaults
from engines.ranks.meeting import Post

UNBOUNDED = timedelta(days=365)
START_TIMEOUT_S = 600.0
"""How long the ranks wait for each other to start, and to load what they need, unless it is said."""


class World:
    """One process's membership: its `rank` of `size`."""

    def __init__(
        self,
        post: Post,
        rank: int,
        size: int,
        timeout_s: float,
        device: torch.device,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        """`post` is where they find each other; `device` is this rank's."""
        self.rank = rank
        self.device = device
        self.size = size
        self.timeout_s = timeout_s
        self.start_bound = timedelta(seconds=start_timeout_s)
        # By itself gloo takes the interface of the machine's name, and lets in whoever reaches it.
        set_defaults({"GLOO_SOCKET_IFNAME": post.interface})
        bound = timedelta(seconds=timeout_s)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=post.store, rank=rank, world_size=size, timeout=self.start_bound
        )
        self._calls = dist.new_group(backend="gloo", timeout=UNBOUNDED)
        self.meet()
        self._bounded = dist.new_group(backend="gloo", timeout=bound)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def tell(self, data: bytes = b"") -> bytes:
        """What rank 0 says, on every rank. Rank 0 waits `timeout_s` until all have heard it, the others without a
        bound until there is something to hear."""
        size = torch.tensor([len(data)])
        self._broadcast(size)
        content = _tensor(data) if self.leads else torch.empty(int(size), dtype=torch.uint8)
        if content.numel():
            self._broadcast(content)
        return data if self.leads else _bytes(content)

    def exchange(self, data: bytes) -> list[bytes]:
        """What every rank says, by rank, on every rank."""
        sizes = self._sizes(data)
        padded = _padded(data, max(sizes))
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded, group=self._bounded)
        return [_bytes(part[:size]) for part, size in zip(parts, sizes, strict=True)]

    def collect(self, data: bytes) -> list[bytes]:
        """What every rank says, by rank, on rank 0; [] on the others."""
        sizes = self._sizes(data)
        padded = _padded(data, max(sizes))
        parts = [torch.empty_like(padded) for _ in range(self.size)] if self.leads else None
        dist.gather(padded, parts, dst=0, group=self._bounded)
        return [_bytes(part[:size]) for part, size in zip(parts or [], sizes if parts else [], strict=True)]

    def meet(self) -> None:
        """Wait until all are here: they may take long to load what they need. Raises RuntimeError when one is not
        within the time that a start may take."""
        dist.barrier(group=self._calls, async_op=True).wait(self.start_bound)

    def close(self) -> None:
        """Leave; no call follows."""
        dist.destroy_process_group()

    def _broadcast(self, content: Tensor) -> None:
        bound = timedelta(seconds=self.timeout_s) if self.leads else UNBOUNDED
        dist.broadcast(content, 0, group=self._calls, async_op=True).wait(bound)

    def _sizes(self, data: bytes) -> Sequence[int]:
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]), group=self._bounded)
        return [int(size) for size in sizes]


def _padded(data: bytes, size: int) -> Tensor:
    """At least one byte, for gloo takes no empty tensor."""
    padded = torch.zeros(max(1, size), dtype=torch.uint8)
    padded[: len(data)] = _tensor(data)
    return padded


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _bytes(content: Tensor) -> bytes:
    return content.numpy().tobytes()

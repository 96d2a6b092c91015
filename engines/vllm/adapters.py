"""Which adapters vLLM has loaded: as many as there are places, the least recently used one makes room.

vLLM is given a place more than are ever used. On the CPU it takes the last place for sequences without an adapter
(vLLM's pull requests 48421 and 49656), which is right as long as nothing is loaded there.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, UNEMBEDDING_LAYERS
from engines.interface import UserError
from engines.saved_weights import open_weights, unreadable
from engines.storage import FolderStorage
from engines.vllm.asking import LoadedAdapter

Drop = Callable[[int], "Future[None]"]
"""Has vLLM let go of the adapter of this number."""


@dataclass
class Place:
    """An adapter that vLLM has, or loads with its next sequence. `ready` is done when there is room for it."""

    adapter: LoadedAdapter
    ready: Future[None] | None
    users: int = 0


class AdapterPlaces:
    """The places for adapters by the storage folders of what is in them."""

    def __init__(self, storage: FolderStorage, count: int, max_rank: int, drop: Drop) -> None:
        self._storage = storage
        self._count = count
        self._max_rank = max_rank
        self._drop = drop
        self._places: OrderedDict[str, Place] = OrderedDict()
        self._given = 0

    def __len__(self) -> int:
        return len(self._places)

    def require(self, folder: str) -> None:
        """Raises UserError when a folder has no adapter that vLLM can serve."""
        if folder not in self._places:
            self._check(folder)

    def take(self, folder: str) -> Place | None:
        """The adapter of a folder, which stays until it is given back as often; None while all places are in use.

        Raises UserError when the folder has no adapter that vLLM can serve.
        """
        place = self._places.get(folder)
        if place is None:
            self._check(folder)
            full = len(self._places) >= self._count
            unused = next((name for name, place in self._places.items() if not place.users), None)
            if full and unused is None:
                return None
            path = open_weights(
                self._storage, folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS
            )  # vLLM only reads them
            ready = (
                self._drop(self._places.pop(unused).adapter.number) if full and unused is not None else None
            )
            place = self._places[folder] = Place(self._named(folder, path), ready)
        self._places.move_to_end(folder)
        place.users += 1
        return place

    def give_back(self, folder: str) -> None:
        """One user less."""
        self._places[folder].users -= 1

    def _named(self, folder: str, path: Path) -> LoadedAdapter:
        """A name and a number that no adapter of this process has had: the same folder gets new ones when it comes
        again."""
        self._given += 1
        return LoadedAdapter(f"{folder}#{self._given}", self._given, str(path))

    def _check(self, folder: str) -> None:
        path = open_weights(self._storage, folder, ADAPTER_CONFIG)
        config = _read(path / ADAPTER_CONFIG)
        rank, layers = config.get("r"), config.get("target_modules")
        if not isinstance(rank, int) or not isinstance(layers, list):
            raise UserError(
                f"{ADAPTER_CONFIG} of the adapter does not tell rank (r) and layers (target_modules)"
            )
        if not 1 <= rank <= self._max_rank:
            raise UserError(
                f"the sampler's adapter has rank {rank}; the engine that samples takes 1 to {self._max_rank} (its "
                "option max_rank)"
            )
        if UNEMBEDDING_LAYERS.intersection(map(str, layers)):
            raise UserError(
                "the sampler's adapter changes the unembedding, which vLLM does not serve: train with "
                "train_unembed=False, or let an engine that trains this model sample too"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not isinstance(config, dict):
        raise UserError(f"{path.name} of the adapter is no table")
    return config

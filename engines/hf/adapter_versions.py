"""The adapter versions that are sampled, in memory while there is room."""

from __future__ import annotations

import torch

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from engines.hf.model import BaseModel
from engines.memory import AdapterMemory
from engines.operations import LoraSpec
from engines.saved_weights import open_weights
from engines.storage import FolderStorage
from engines.tuning.checkpoints import read_spec, read_values
from engines.tuning.lora import Adapter, size


class AdapterVersions:
    """Immutable adapters for sampling, in memory while there is room, by storage folder.

    A folder is written once, so that what was read or put under its name stays true.
    """

    def __init__(self, storage: FolderStorage, base: BaseModel, limit: int) -> None:
        self.storage = storage
        self.base = base
        self.memory: AdapterMemory[Adapter] = AdapterMemory(limit)

    def put(self, folder: str, adapter: Adapter) -> None:
        """Keep a copy of a version that was just saved, if there is room, so that it need not be read."""
        self.memory.offer(folder, adapter.values.nbytes, lambda: _fixed(adapter.copy()))

    def require(self, folder: str) -> None:
        """Raises UserError when there is no adapter in the folder, or it is larger than all may be together."""
        if folder not in self.memory:
            self.memory.require(self._size(self._spec(folder)))

    def take(self, folder: str) -> Adapter | None:
        """The version in a folder, which stays in memory until it is given back; None when there is no room for it now.

        Raises UserError when it cannot be read or does not fit the model.
        """
        if folder in self.memory:
            return self.memory.take(folder, 0, lambda: self._read(folder))
        size = self._size(self._spec(folder))
        self.memory.require(size)
        return self.memory.take(folder, size, lambda: self._read(folder))

    def give_back(self, folder: str) -> None:
        """One that was taken is not needed any more."""
        self.memory.give_back(folder)

    def _size(self, spec: LoraSpec) -> int:
        return size(self.base.sites, spec) * torch.float32.itemsize

    def _spec(self, folder: str) -> LoraSpec:
        return read_spec(open_weights(self.storage, folder, ADAPTER_CONFIG))

    def _read(self, folder: str) -> Adapter:
        path = open_weights(self.storage, folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        spec = read_spec(path)
        values = read_values(path, self.base.sites, self.base.device, spec)
        return _fixed(Adapter(self.base.sites, spec, values))


def _fixed(adapter: Adapter) -> Adapter:
    adapter.fixed = True
    return adapter

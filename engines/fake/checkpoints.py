"""Runs as folders in PEFT's layout, and the adapter versions that are sampled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from engines.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GRADIENT,
    OPTIMIZER,
    part_of,
    peft_config,
    peft_key,
)
from engines.fake.model import Adapter, size
from engines.fake.optimizer import AdamW
from engines.fake.training import Run
from engines.interface import PendingSnapshot, UserError
from engines.memory import AdapterMemory
from engines.operations import AdapterRef, LoraSpec
from engines.saved_weights import open_weights, unreadable
from engines.storage import FolderStorage, seal

Array = NDArray[Any]

_MOMENTS = ("exp_avg", "exp_avg_sq")


class _PeftConfig(msgspec.Struct, frozen=True):
    """What is read of an `adapter_config.json`."""

    r: int
    lora_alpha: float
    target_modules: list[str]


class AdapterVersions:
    """Adapters for sampling, in memory while there is room. None ever changes."""

    def __init__(self, storage: FolderStorage, limit: int) -> None:
        self._storage = storage
        self.memory: AdapterMemory[Adapter] = AdapterMemory(limit)

    def require(self, ref: AdapterRef) -> None:
        """Raises UserError when its folder has no adapter, or one that is larger than all may be together."""
        if ref.folder not in self.memory:
            self.memory.require(self._read(ref).values.nbytes)

    def take(self, ref: AdapterRef) -> Adapter | None:
        """The version, which stays in memory until it is given back; None when there is no room for it now.

        Raises UserError when its folder cannot be read.
        """
        if ref.folder in self.memory:
            return self.memory.take(ref.folder, 0, lambda: self._read(ref))
        adapter = self._read(ref)
        self.memory.require(adapter.values.nbytes)
        return self.memory.take(ref.folder, adapter.values.nbytes, lambda: adapter)

    def _read(self, ref: AdapterRef) -> Adapter:
        return _read_version(open_weights(self._storage, ref.folder, ADAPTER_CONFIG, ADAPTER_WEIGHTS))


def write_run(storage: FolderStorage, key: str, base_model: str, run: Run, optimizer_state: bool) -> int:
    """Write a run's weights, and what training needs to go on, to a storage key; gives the bytes written."""
    with storage.write(key) as folder:
        _write_files(folder, base_model, run, optimizer_state)
        seal(folder)
        return storage.size(folder)


def _write_files(folder: Path, base_model: str, run: Run, optimizer_state: bool) -> None:
    adapter = run.adapter
    names = [site.name for site in adapter.factors]
    (folder / ADAPTER_CONFIG).write_bytes(peft_config(adapter.spec, base_model, names))
    (folder / ADAPTER_WEIGHTS).write_bytes(_encode(_named(adapter)))
    if optimizer_state:
        (folder / OPTIMIZER).write_bytes(_encode(_optimizer_tensors(run)))


class RunSnapshot(PendingSnapshot):
    """A copy of a run, written as a checkpoint with optimizer state, and its pending gradient beside it."""

    def __init__(self, base_model: str, run: Run) -> None:
        optimizer = run.optimizer
        moments = (
            None if moment is None else moment.copy() for moment in (optimizer.exp_avg, optimizer.exp_avg_sq)
        )
        self._base_model = base_model
        self._run = Run(
            Adapter(run.adapter.spec, run.adapter.values.copy()),
            AdamW(optimizer.steps, *moments),
            None if run.pending is None else run.pending.copy(),
        )

    def write(self, folder: Path) -> None:
        run = self._run
        _write_files(folder, self._base_model, run, optimizer_state=True)
        if run.pending is not None:
            (folder / GRADIENT).write_bytes(_encode(_named(Adapter(run.adapter.spec, run.pending))))


def read_run(storage: FolderStorage, key: str, spec: LoraSpec, optimizer_state: bool) -> Run:
    """A run that begins at stored weights; its moments and step count too when asked, else zero. With these comes a
    pending gradient, which only snapshots have.

    Raises DamagedWeights, and UserError when the folder holds an adapter of another shape or no optimizer state.
    """
    names = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *([OPTIMIZER] if optimizer_state else [])]
    folder = open_weights(storage, key, *names)
    alpha = _read_config(folder).lora_alpha
    if alpha != spec.alpha:
        raise UserError(f"the checkpoint's adapter has alpha {alpha}, the run {spec.alpha}")
    run = Run(_assemble(_decode(folder / ADAPTER_WEIGHTS), spec))
    if optimizer_state:
        run.optimizer = _read_optimizer(folder / OPTIMIZER, spec)
        if (folder / GRADIENT).exists():
            run.pending = _assemble(_decode(folder / GRADIENT), spec).values
    return run


def _read_config(folder: Path) -> _PeftConfig:
    try:
        return msgspec.json.decode((folder / ADAPTER_CONFIG).read_bytes(), type=_PeftConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unreadable(folder / ADAPTER_CONFIG, error) from error


def _read_version(folder: Path) -> Adapter:
    config = _read_config(folder)
    parts = {part_of(module) for module in config.target_modules}
    spec = LoraSpec(config.r, 0, config.lora_alpha, "attn" in parts, "mlp" in parts, "unembed" in parts)
    return _assemble(_decode(folder / ADAPTER_WEIGHTS), spec)


def _read_optimizer(path: Path, spec: LoraSpec) -> AdamW:
    tensors = _decode(path)
    moments = []
    for moment in _MOMENTS:
        prefix = moment + "."
        own = {
            name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)
        }
        moments.append(_assemble(own, spec).values)
    return AdamW(int(tensors["step"]), *moments)


def _optimizer_tensors(run: Run) -> Iterator[tuple[str, Array]]:
    """The step count, and both moments of each factor as `exp_avg.<PEFT name>`; zeros before the first step."""
    spec, optimizer = run.adapter.spec, run.optimizer
    yield "step", np.array(optimizer.steps, dtype=np.int64)
    for moment, values in zip(_MOMENTS, (optimizer.exp_avg, optimizer.exp_avg_sq), strict=True):
        laid_out = Adapter(spec, np.zeros_like(run.adapter.values) if values is None else values)
        yield from ((f"{moment}.{name}", part) for name, part in _named(laid_out))


def _named(adapter: Adapter) -> Iterator[tuple[str, Array]]:
    """PEFT's name of each factor, and the factor as a view of the adapter's values."""
    for site, factors in adapter.factors.items():
        yield peft_key(site.name, "A"), factors.a
        yield peft_key(site.name, "B"), factors.b


def _assemble(tensors: Mapping[str, Array], spec: LoraSpec) -> Adapter:
    """An adapter of tensors under PEFT's names; UserError unless they are exactly those that `spec` asks for."""
    adapter = Adapter(spec, np.zeros(size(spec), dtype=np.float32))
    places = dict(_named(adapter))
    if places.keys() != tensors.keys():
        odd = min(places.keys() ^ tensors.keys())
        raise UserError(
            f"the checkpoint's layers are not those of the run (train_attn {spec.train_attn}, train_mlp "
            f"{spec.train_mlp}, train_unembed {spec.train_unembed}): {odd} is in one only"
        )
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise UserError(
                f"{name} has shape {list(tensors[name].shape)} in the checkpoint; the run, of rank {spec.rank}, "
                f"needs {list(place.shape)}"
            )
        place[:] = tensors[name]
    return adapter


def _encode(tensors: Iterator[tuple[str, Array]]) -> bytes:
    return save({name: values.copy() for name, values in tensors}, {"format": "pt"})


def _decode(path: Path) -> dict[str, Array]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error

"""Adapters and optimizer states as folders in PEFT's layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from engines.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GRADIENT,
    OPTIMIZER,
    attaches,
    part_of,
    peft_config,
    peft_key,
)
from engines.interface import EngineConfig, PendingSnapshot, UserError
from engines.operations import LoraSpec
from engines.saved_weights import open_weights, unreadable
from engines.storage import FolderStorage, write_folder
from engines.tuning.lora import Adapter, Gradient, Site, size, views
from engines.tuning.optimizer import AdamW
from engines.tuning.runs import Run

MOMENTS = ("exp_avg", "exp_avg_sq")


class _PeftConfig(msgspec.Struct, frozen=True):
    r: int
    lora_alpha: float
    target_modules: list[str]


def named(sites: Sequence[Site], spec: LoraSpec, values: Tensor) -> Iterator[tuple[str, Tensor]]:
    """PEFT's name of each factor, and its part of a vector laid out like an adapter's values."""
    for site, pair in zip(sites, views(sites, spec, values), strict=True):
        if pair is not None:
            yield peft_key(site.name, "A"), pair.a
            yield peft_key(site.name, "B"), pair.b


def write_run(config: EngineConfig, folder: str, run: Run, optimizer_state: bool) -> int:
    """Write a run's weights, and what training needs to go on, to a storage key; gives the bytes written."""
    return write_folder(FolderStorage.of(config), folder, _files(config.base_model, run, optimizer_state))


def _files(base_model: str, run: Run, optimizer_state: bool) -> dict[str, bytes]:
    adapter = run.adapter
    files = {
        ADAPTER_CONFIG: peft_config(
            adapter.spec,
            base_model,
            [site.name for site in adapter.sites if attaches(site.name, adapter.spec)],
        ),
        ADAPTER_WEIGHTS: _encode(dict(named(adapter.sites, adapter.spec, adapter.values))),
    }
    if optimizer_state:
        files[OPTIMIZER] = _encode(_optimizer_tensors(run))
    return files


class RunSnapshot(PendingSnapshot):
    """A run, copied to main memory; written as a checkpoint with optimizer state, its pending gradient beside it."""

    def __init__(self, base_model: str, run: Run) -> None:
        adapter, optimizer = run.adapter, run.optimizer
        moments = (
            None if moment is None else _copy(moment) for moment in (optimizer.exp_avg, optimizer.exp_avg_sq)
        )
        self._base_model = base_model
        self._run = Run(
            Adapter(adapter.sites, adapter.spec, _copy(adapter.values)), AdamW(optimizer.steps, *moments)
        )
        self._pending = None if run.pending is None else _copy(run.pending.values)

    def write(self, folder: Path) -> None:
        adapter = self._run.adapter
        files = _files(self._base_model, self._run, optimizer_state=True)
        if self._pending is not None:
            files[GRADIENT] = _encode(dict(named(adapter.sites, adapter.spec, self._pending)))
        for name, data in files.items():
            (folder / name).write_bytes(data)


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True)


def _optimizer_tensors(run: Run) -> dict[str, Tensor]:
    """The step count, and both moments of each factor as `exp_avg.<PEFT name>`; zeros before the first step."""
    adapter, optimizer = run.adapter, run.optimizer
    tensors = {"step": torch.tensor(optimizer.steps, dtype=torch.int64)}
    for moment in MOMENTS:
        values = getattr(optimizer, moment)
        values = torch.zeros_like(adapter.values) if values is None else values
        tensors |= {f"{moment}.{name}": part for name, part in named(adapter.sites, adapter.spec, values)}
    return tensors


def read_run(
    storage: FolderStorage,
    folder: str,
    sites: Sequence[Site],
    device: torch.device,
    spec: LoraSpec,
    optimizer_state: bool,
) -> Run:
    """A run that begins at stored weights; its moments and step count too when asked, else zero. With these comes a
    pending gradient, which only snapshots have.

    Raises DamagedWeights, and UserError when the folder holds an adapter of another shape or no optimizer state.
    """
    wanted = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, *([OPTIMIZER] if optimizer_state else [])]
    path = open_weights(storage, folder, *wanted)
    stored = read_spec(path)
    if _shape(stored) != _shape(spec):
        raise UserError(f"the checkpoint's adapter has {_shape(stored)}, the run's {_shape(spec)}")
    run = Run(Adapter(sites, spec, read_values(path, sites, device, spec)), AdamW())
    if optimizer_state:
        run.optimizer = _read_optimizer(path, sites, device, spec)
        run.pending = _read_gradient(path, run.adapter)
    return run


def _shape(spec: LoraSpec) -> str:
    return (
        f"rank {spec.rank}, alpha {spec.alpha}, train_attn {spec.train_attn}, train_mlp {spec.train_mlp}, "
        f"train_unembed {spec.train_unembed}"
    )


def read_spec(path: Path) -> LoraSpec:
    """Rank, alpha and parts of a stored adapter. Its seed is not stored, and no longer means anything."""
    try:
        config = msgspec.json.decode((path / ADAPTER_CONFIG).read_bytes(), type=_PeftConfig)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise unreadable(path / ADAPTER_CONFIG, error) from error
    parts = {part_of(name) for name in config.target_modules}
    return LoraSpec(config.r, 0, config.lora_alpha, "attn" in parts, "mlp" in parts, "unembed" in parts)


def read_values(path: Path, sites: Sequence[Site], device: torch.device, spec: LoraSpec) -> Tensor:
    """The values of an adapter that must have exactly the factors of `spec`."""
    return _assemble(_decode(path / ADAPTER_WEIGHTS), ADAPTER_WEIGHTS, sites, device, spec)


def _read_optimizer(path: Path, sites: Sequence[Site], device: torch.device, spec: LoraSpec) -> AdamW:
    tensors = _decode(path / OPTIMIZER)
    if "step" not in tensors:
        raise UserError(f"{OPTIMIZER} of the checkpoint holds no step count")
    moments = [
        _assemble(_below(tensors, f"{moment}."), f"{moment} in {OPTIMIZER}", sites, device, spec)
        for moment in MOMENTS
    ]
    return AdamW(int(tensors["step"]), *moments)


def _read_gradient(path: Path, adapter: Adapter) -> Gradient | None:
    if not (path / GRADIENT).exists():
        return None
    gradient = Gradient(adapter)
    values = gradient.values
    values.copy_(_assemble(_decode(path / GRADIENT), GRADIENT, adapter.sites, values.device, adapter.spec))
    return gradient


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in tensors.items() if name.startswith(prefix)}


def _assemble(
    tensors: Mapping[str, Tensor], file: str, sites: Sequence[Site], device: torch.device, spec: LoraSpec
) -> Tensor:
    """One vector, laid out like an adapter's values, of tensors under PEFT's names."""
    values = torch.zeros(size(sites, spec), dtype=torch.float32, device=device)
    places = dict(named(sites, spec, values))
    odd = sorted(places.keys() ^ tensors.keys())
    if odd:
        where = "is missing" if odd[0] in places else "does not belong to this model"
        raise UserError(f"{file}: {odd[0]} {where} ({len(odd)} such)")
    for name, place in places.items():
        if place.shape != tensors[name].shape:
            raise UserError(
                f"{file}: {name} has shape {list(tensors[name].shape)} in the checkpoint, the run needs "
                f"{list(place.shape)}"
            )
        place.copy_(tensors[name])
    return values


def _encode(tensors: Mapping[str, Tensor]) -> bytes:
    return save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
    )


def _decode(path: Path) -> dict[str, Tensor]:
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error

"""The Megatron engine does what every engine that trains must do, on one rank and cut over two."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.contract import EngineFactory
from engines.contract.checkpoints import CheckpointContract
from engines.contract.losses import LossContract
from engines.contract.snapshots import SnapshotContract
from engines.contract.training import TrainingContract
from engines.interface import Engine
from engines.megatron import MegatronEngine
from tests.megatron.conftest import running
from tests.megatron.paired import PairedEngine

pytestmark = pytest.mark.slow

_folders = itertools.count(1)


@pytest.fixture(scope="module", params=[{"tensor": 1}, {"tensor": 2}], ids=["one rank", "tensor 2"])
def trainer(
    request: pytest.FixtureRequest, model_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MegatronEngine]:
    with running(model_folder, tmp_path_factory.mktemp("storage"), **request.param) as engine:
        yield engine


class TestMegatronEngine(TrainingContract, LossContract, CheckpointContract, SnapshotContract):
    @pytest.fixture
    def storage(self, trainer: MegatronEngine) -> Path:
        """A folder of its storage for each test: what is written under a key there never changes."""
        return Path(trainer.config.storage) / f"t{next(_folders)}"

    @pytest.fixture
    def engine_factory(
        self, trainer: MegatronEngine, model_folder: str, storage: Path
    ) -> Iterator[EngineFactory]:
        made: list[PairedEngine] = []

        def make() -> Engine:
            made.append(PairedEngine(trainer, model_folder, storage))
            return made[-1]

        yield make
        for engine in made:
            engine.close()

    @pytest.fixture
    def engine(self, engine_factory: EngineFactory) -> Engine:
        return engine_factory()

"""The fake engine does what every plugin must do."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.contract import EngineContract, EngineFactory
from engines.fake import FakeEngine
from engines.interface import Engine, EngineConfig


class TestFakeEngine(EngineContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Path:
        return tmp_path / "storage"

    @pytest.fixture
    def engine_factory(self, storage: Path) -> EngineFactory:
        config = EngineConfig("fake", "fake", "test/bytes", "", ("train", "sample"), str(storage), epoch=1)
        return lambda: FakeEngine.load(config)

    @pytest.fixture
    def engine(self, engine_factory: EngineFactory) -> Engine:
        return engine_factory()

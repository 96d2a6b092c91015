"""The Transformers engine does what every plugin must do."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.contract import EngineContract, EngineFactory
from engines.interface import Engine
from tests.hf.conftest import MakeEngine


class TestHfEngine(EngineContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Path:
        return tmp_path / "storage"

    @pytest.fixture
    def engine_factory(self, make_engine: MakeEngine) -> EngineFactory:
        return make_engine

    @pytest.fixture
    def engine(self, engine_factory: EngineFactory) -> Engine:
        return engine_factory()

"""The Transformers engine does what every plugin must do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engines.contract import EngineContract, EngineFactory, Reference
from engines.interface import Engine
from tests.hf.conftest import MakeEngine
from tests.hf.material import Array, plain_model


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

    @pytest.fixture
    def reference(self, model_folders: dict[str, str]) -> Reference:
        """Transformers alone, in float32 with its own attention."""
        model = plain_model(model_folders["tied"])

        def logits(tokens: Sequence[int]) -> Array:
            with torch.no_grad():
                found: Array = model(input_ids=torch.tensor([list(tokens)])).logits[0].numpy()
            return found

        return logits

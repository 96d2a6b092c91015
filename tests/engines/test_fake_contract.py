"""The fake engine does what every plugin must do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engines.contract import EngineContract, EngineFactory, Reference
from engines.fake import FakeEngine
from engines.fake.model import base_weights
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

    @pytest.fixture
    def reference(self) -> Reference:
        """The formulas of the model in float64, one position after the other."""
        embed, mix, down, unembed = (part.astype(np.float64) for part in base_weights())

        def logits(tokens: Sequence[int]) -> NDArray[Any]:
            rows = []
            for place in range(len(tokens)):
                seen = embed[list(tokens[: place + 1])]
                x = seen[-1] + mix @ seen.mean(axis=0)
                rows.append(unembed @ (x + down @ x))
            return np.stack(rows)

        return logits

"""What every plugin must do, as tests: subclass `EngineContract` in a test module and give it its fixtures.

    class TestMyEngine(EngineContract):
        @pytest.fixture
        def storage(self, tmp_path: Path) -> Path: ...             # the engines' EngineConfig.storage

        @pytest.fixture
        def engine_factory(self, storage: Path) -> EngineFactory: ...   # a new engine at each call

        @pytest.fixture
        def engine(self, engine_factory: EngineFactory) -> Engine:
            return engine_factory()

        @pytest.fixture
        def reference(self) -> Reference: ...    # the base model's logits [N, V] of N tokens, not by the engine

The tests ask the engine itself how large it is; they suit any model, and run in seconds on a small one.
"""

from engines.contract.checkpoints import CheckpointContract
from engines.contract.drawing import DrawingContract
from engines.contract.losses import LossContract
from engines.contract.material import EngineFactory, Reference
from engines.contract.prompts import PromptContract
from engines.contract.sampling import SamplingContract
from engines.contract.shaping import ShapingContract
from engines.contract.snapshots import SnapshotContract
from engines.contract.training import TrainingContract


class EngineContract(
    TrainingContract,
    LossContract,
    CheckpointContract,
    SnapshotContract,
    DrawingContract,
    ShapingContract,
    SamplingContract,
    PromptContract,
):
    """All of it."""


__all__ = ["EngineContract", "EngineFactory", "Reference"]

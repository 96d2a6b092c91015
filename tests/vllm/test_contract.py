"""The real vLLM engine does what every engine that samples must do; the adapters are trained on Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from engines.contract import EngineFactory, Reference
from engines.contract.drawing import DrawingContract
from engines.contract.material import Caller, drawn, request, text
from engines.contract.prompts import PromptContract
from engines.contract.sampling import SamplingContract
from engines.contract.shaping import ShapingContract
from engines.interface import Engine, SampleEnd
from tests.hf.material import Array, plain_model
from tests.vllm.paired import PairedEngine, VllmProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class TestVllmEngine(DrawingContract, ShapingContract, SamplingContract, PromptContract):
    @pytest.fixture
    def engine_factory(self, vllm_process: VllmProcess, storage: Path) -> EngineFactory:
        return lambda: PairedEngine(vllm_process, storage)

    @pytest.fixture
    def engine(self, engine_factory: EngineFactory) -> Engine:
        return engine_factory()

    @pytest.fixture
    def reference(self, model_folder: str) -> Reference:
        """Transformers alone, in float32 with its own attention."""
        model = plain_model(model_folder)

        def logits(tokens: Sequence[int]) -> Array:
            with torch.no_grad():
                found: Array = model(input_ids=torch.tensor([list(tokens)])).logits[0].numpy()
            return found

        return logits

    def test_a_party_with_nothing_under_way_begins_whatever_others_do(self, engine: Engine) -> None:
        """What the engine draws by itself comes as it comes: the newcomer is done when the others are still drawn."""
        caller = Caller(engine)
        prompt = text(caller.info, 3)
        for call_id in range(8):
            engine.start_sample(call_id, request(prompt, num_samples=16, max_tokens=120), "many")
        engine.advance()
        engine.start_sample(99, request(prompt, seed=3, max_tokens=1), "one")
        ended: list[int] = []
        while 99 not in ended:
            ended += [event.call_id for event in engine.advance() if isinstance(event, SampleEnd)]
        for call_id in range(8):
            engine.cancel_sample(call_id)
        assert ended == [99]
        assert len(drawn(caller.sample(request(prompt))[0])[0]) == 6
        assert engine.stats()["active_sequences"] == 0

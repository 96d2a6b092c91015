"""The half of the engine interface that an engine without the role `sample` has no use for."""

from __future__ import annotations

from engines.interface import Engine, SampleEvent, UserError
from engines.operations import SampleRequest


class TrainingEngine(Engine):
    """An engine that draws nothing. The gateway sends it no sample; whoever does is refused."""

    def start_sample(self, call_id: int, request: SampleRequest, party: str = "") -> None:
        raise UserError(f"the engine of {self.info().base_model} trains and does not sample")

    def advance(self) -> list[SampleEvent]:
        return []

    def cancel_sample(self, call_id: int) -> None:
        """There are none, and an unknown one is no error."""

    @property
    def sampling(self) -> bool:
        return False

"""Custom losses."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gateway.tinker.schemas.fields import Id, SeqId, Strict
from gateway.tinker.texts import require_storable


class CustomLossInput(Strict):
    name: str
    rank: int


class CustomLossNode(Strict):
    """What is allowed in it is decided with the whole graph, by `engines.losses.graph`."""

    op: str
    name: str
    target: str
    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class CustomLossGraph(Strict):
    nodes: list[CustomLossNode]
    format: Literal[1] = 1


class CreateCustomLoss(Strict):
    session_id: Id
    custom_loss_seq_id: SeqId
    name: Id
    inputs: list[CustomLossInput]
    graph: CustomLossGraph

    def __post_init__(self) -> None:
        require_storable("name", self.name)

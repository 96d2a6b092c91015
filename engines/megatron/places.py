"""Which part of the model a rank holds: its place among the tensor, data and pipeline ranks.

Ranks are numbered as megatron-core does by default: tensor ranks are neighbours, then context ranks, then data ranks,
then stages.
"""

from __future__ import annotations

from typing import NamedTuple

from engines.megatron.constraints import Layout


class Place(NamedTuple):
    """Of one rank."""

    layout: Layout
    tensor: int
    context: int
    data: int
    stage: int

    @classmethod
    def of(cls, layout: Layout, rank: int) -> Place:
        """A rank's place in a layout."""
        rest, tensor = divmod(rank, layout.tensor)
        rest, context = divmod(rest, layout.context)
        stage, data = divmod(rest, layout.data)
        return cls(layout, tensor, context, data, stage)

    @property
    def is_first_stage(self) -> bool:
        """Whether it embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether it computes log-probs."""
        return self.stage == self.layout.pipeline - 1

    @property
    def speaks(self) -> bool:
        """Whether it tells the log-probs and losses of its data. Its tensor neighbours have computed the same ones."""
        return self.is_last_stage and self.tensor == 0 and self.context == 0

    @property
    def is_original(self) -> bool:
        """Whether it belongs to the first of the copies of the model, which speaks for all."""
        return self.data == 0 and self.context == 0

    @property
    def number_in_stage(self) -> int:
        """Among the ranks that share the stage's layers."""
        return self.tensor + self.layout.tensor * (self.context + self.layout.context * self.data)

    @property
    def has_original_experts(self) -> bool:
        """Whether its experts are the first of their copies."""
        return self.number_in_stage < self.layout.expert

    def experts(self, count: int) -> range:
        """The experts of a layer of `count` experts that it holds."""
        each = count // self.layout.expert
        first = self.number_in_stage % self.layout.expert * each
        return range(first, first + each)

    def expert_neighbours(self) -> list[Place]:
        """Those with whom it shares the experts of its layers, itself among them, in the order of their ranks."""
        layout = self.layout
        rank = self.number_in_stage + layout.stage_ranks * self.stage
        first = rank - rank % layout.expert
        return [Place.of(layout, first + number) for number in range(layout.expert)]

    def layers(self, count: int) -> range:
        """The layers of a model of `count` layers that it holds."""
        each = count // self.layout.pipeline
        return range(self.stage * each, (self.stage + 1) * each)

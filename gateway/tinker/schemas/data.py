"""Passes in JSON, as older SDKs send them: tensors, chunks, examples."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from gateway.tinker.schemas.fields import Id, Strict, TrainingSeqId


class TensorData(Strict):
    data: list[int | float]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


class ModelInputChunk(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`type` may be missing; a chunk of text is one that has a list of `tokens`. Images of early SDKs have a number."""

    type: str | None = None
    tokens: list[int] | int | None = None
    data: Any = None
    location: Any = None
    dmel: Any = None
    format: Any = None
    expected_tokens: Any = None
    height: Any = None
    width: Any = None

    @property
    def beside_text(self) -> str | None:
        """A field that asks for something that text does not have."""
        others = ("data", "location", "dmel", "format", "expected_tokens", "height", "width")
        return next((name for name in others if getattr(self, name)), None)

    @property
    def kind(self) -> str:
        """The type, or the one whose field it has."""
        if self.type is not None:
            return self.type
        fields = {"image": self.data, "image_asset_pointer": self.location, "dmel": self.dmel}
        return next((kind for kind, value in fields.items() if value is not None), "no text")


class ModelInput(Strict):
    chunks: list[ModelInputChunk]


class JsonDatum(Strict):
    model_input: ModelInput
    loss_fn_inputs: dict[str, TensorData]


class PassInput(Strict):
    data: list[JsonDatum]
    loss_fn: str
    loss_fn_config: dict[str, float | str] | None = None


class ForwardBackwardBody(Strict):
    model_id: Id
    seq_id: TrainingSeqId | None = None
    forward_backward_input: PassInput | None = None
    forward_input: PassInput | None = None

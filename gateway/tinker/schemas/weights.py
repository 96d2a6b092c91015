"""Saving, loading and copying weights."""

from __future__ import annotations

from typing import Any

from gateway.checkpoints import require_name
from gateway.tinker.schemas.fields import (
    Id,
    Lenient,
    SeqId,
    Strict,
    Text,
    TextMetadata,
    TrainingSeqId,
    Ttl,
    UserMetadata,
)
from gateway.tinker.texts import require_storable


class SaveWeights(Strict):
    model_id: Id
    path: str
    seq_id: TrainingSeqId | None = None
    ttl_seconds: Ttl | None = None
    overwrite: bool | None = None
    user_metadata: TextMetadata | None = None

    def __post_init__(self) -> None:
        require_name("path", self.path)
        require_storable("user_metadata", self.user_metadata)


class SaveWeightsForSampler(Strict):
    model_id: Id
    seq_id: TrainingSeqId | None = None
    path: str | None = None
    sampling_session_seq_id: SeqId | None = None
    kind: str | None = None
    ttl_seconds: Ttl | None = None
    user_metadata: TextMetadata | None = None

    def __post_init__(self) -> None:
        if self.path is not None:
            require_name("path", self.path)
        require_storable("user_metadata", self.user_metadata)


class SaveWeightsExternal(Strict):
    model_id: Id
    seq_id: TrainingSeqId
    path: str
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[Text] | None = None

    def __post_init__(self) -> None:
        require_name("path", self.path)


class CopyWeights(Strict):
    source_path: Id
    destination_project_id: Id | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    ttl_seconds: Ttl | None = None
    weights_access_token: Text | None = None

    def __post_init__(self) -> None:
        require_storable("destination_project_id", self.destination_project_id)


class LoadWeights(Strict):
    path: Id
    optimizer: bool | None = None
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    model_id: Id | None = None
    seq_id: TrainingSeqId | None = None
    base_model: Id | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: UserMetadata | None = None
    weights_access_token: Text | None = None

    def __post_init__(self) -> None:
        if self.model_id is not None:
            begins = ("session_id", "model_seq_id", "base_model", "optimizer_config", "user_metadata")
            given = [name for name in begins if getattr(self, name) is not None]
            if given:
                raise ValueError(f"{given[0]} is for a new run; model_id names one that is there")
        elif self.seq_id is not None:
            raise ValueError("seq_id belongs to model_id; a new run has session_id and model_seq_id")
        require_storable("user_metadata", self.user_metadata)


class LoadEnvelope(Lenient):
    """Which operation of which run a load is, if it is one, whatever else its body holds."""

    model_id: Id | None = None
    seq_id: TrainingSeqId | None = None


class WeightsInfo(Lenient):
    tinker_path: Id


class SetTtl(Strict):
    """Null keeps a checkpoint for ever, so it has to be said."""

    ttl_seconds: Ttl | None

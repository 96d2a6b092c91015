"""Runs and their optimizer steps."""

from __future__ import annotations

from typing import Any

from gateway.tinker.schemas.fields import Count, Id, Lenient, SeqId, Strict, TrainingSeqId, UserMetadata
from gateway.tinker.texts import require_storable


class LoraConfig(Strict):
    rank: Count = 32
    seed: int | None = None
    train_unembed: bool | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None


class CreateModel(Strict):
    """SDKs up to 0.2 know no sessions, and number neither runs nor their operations."""

    base_model: Id
    session_id: Id | None = None
    model_seq_id: SeqId | None = None
    lora_config: LoraConfig | None = None
    optimizer_config: dict[str, Any] | None = None
    user_metadata: UserMetadata | None = None

    def __post_init__(self) -> None:
        if (self.session_id is None) != (self.model_seq_id is None):
            raise ValueError("session_id and model_seq_id belong together")
        require_storable("user_metadata", self.user_metadata)


class GetInfo(Lenient):
    model_id: Id


class UnloadModel(Lenient):
    model_id: Id


class OperationEnvelope(Lenient):
    """Where an operation belongs, whatever else its body holds."""

    model_id: Id
    seq_id: TrainingSeqId | None = None


class AdamParams(Strict):
    """Defaults are the SDK's. Null is no number: it is what a client's NaN becomes in JSON."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class OptimStepBody(Strict):
    model_id: Id
    seq_id: TrainingSeqId | None = None
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None

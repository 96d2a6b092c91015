"""JSON bodies of the Tinker dialect.

Lenient where SDK versions differ: `type` may be missing anywhere, every optional field may be null, and what is left
out has the SDK's default. Strict where a field changes numbers: such structs refuse unknown fields by name, so that
nothing a newer SDK asks for is silently not done. Bodies that only open a connection ignore unknown fields.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from gateway.checkpoints import require_name
from gateway.tinker.texts import require_storable

Id = Annotated[str, Meta(min_length=1, max_length=300)]
Text = Annotated[str, Meta(max_length=10_000)]
SeqId = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Count = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TrainingSeqId = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Ttl = Annotated[int, Meta(ge=3600, le=10 * 366 * 86400)]
UserMetadata = dict[str, Any]
TextMetadata = dict[str, str]


class Lenient(msgspec.Struct, kw_only=True):
    """Unknown fields mean nothing here."""


class Strict(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Unknown fields would change the result, and are refused by name."""

    type: str | None = None


# ---------------------------------------------------------------------------- connection


class ClientConfig(Lenient):
    sdk_version: str | None = None


class CreateSession(Lenient):
    tags: list[Text] | None = None
    user_metadata: UserMetadata | None = None
    sdk_version: Text | None = None
    project_id: Text | None = None
    display_name: Text | None = None

    def __post_init__(self) -> None:
        for field in ("tags", "user_metadata", "sdk_version", "project_id", "display_name"):
            require_storable(field, getattr(self, field))


class SessionHeartbeat(Lenient):
    session_id: Id


class FinishReason(Lenient):
    type: Literal["success", "errored", "interrupted"]


class FinishSession(Lenient):
    reason: FinishReason | None = None
    detail: Text | None = None

    def __post_init__(self) -> None:
        require_storable("detail", self.detail)


class AssignProject(Lenient):
    project_id: Annotated[str, Meta(min_length=1, max_length=1_000)]

    def __post_init__(self) -> None:
        require_storable("project_id", self.project_id)


class SearchOwner(Strict):
    """`type` is own, accessible or user; the last with the owners' URNs."""

    owner_urns: Annotated[list[Text], Meta(min_length=1, max_length=10)] | None = None

    def __post_init__(self) -> None:
        if self.owner_urns is not None and self.type != "user":
            raise ValueError("owner_urns belong to the type user")


class StatusQuery(Strict):
    """`type` is active, client_finished, cancelled or failed."""

    reasons: Annotated[list[Literal["success", "errored", "interrupted"]], Meta(min_length=1)] | None = None

    def __post_init__(self) -> None:
        if self.reasons is not None and self.type != "client_finished":
            raise ValueError("reasons belong to the type client_finished")


class SearchCursor(Strict):
    last_created_at: Annotated[datetime, Meta(tz=True)]
    last_session_id: Id


class SearchSessions(Strict):
    session_id: Id | None = None
    project_ids: list[Text] | None = None
    user_metadata: TextMetadata | None = None
    display_name: Annotated[str, Meta(min_length=1, max_length=1000)] | None = None
    owner: SearchOwner | None = None
    statuses: Annotated[list[StatusQuery], Meta(min_length=1, max_length=20)] | None = None
    limit: Annotated[int, Meta(ge=1, le=200)] | None = None
    cursor: SearchCursor | None = None

    def __post_init__(self) -> None:
        for field in ("session_id", "project_ids", "user_metadata", "display_name"):
            require_storable(field, getattr(self, field))


class Telemetry(Lenient):
    """Accepted and not kept: its events can hold keys and prompts."""

    events: list[Any] = []


# ---------------------------------------------------------------------------- training


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


class CustomLossInput(Strict):
    name: str
    rank: int


class CustomLossNode(Strict):
    """What is allowed in it is decided with the whole graph, by `engines.losses.graph`."""

    op: str
    name: str
    target: str
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


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


# ---------------------------------------------------------------------------- weights


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


# ---------------------------------------------------------------------------- sampling


class CreateSamplingSession(Strict):
    session_id: Id
    sampling_session_seq_id: SeqId
    base_model: Id | None = None
    model_path: Id | None = None


class SamplingParams(Strict):
    max_tokens: Count | None = None
    seed: int | None = None
    stop: str | list[str | Count] | None = None
    temperature: float | None = None
    top_k: Count | None = None
    top_p: float | None = None


class SampleEnvelope(Lenient):
    """Where a sample belongs, whatever else its body holds."""

    sampling_session_id: Id | None = None
    seq_id: SeqId | None = None


class SampleBody(Strict):
    """SDKs up to 0.2 name the weights with each sample, and number nothing."""

    prompt: ModelInput
    sampling_session_id: Id | None = None
    seq_id: SeqId | None = None
    base_model: Id | None = None
    model_path: Id | None = None
    sampling_params: SamplingParams | None = None
    num_samples: Count | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Count | None = None
    topk_sample_logprobs: Count | None = None
    target_prompt_logprobs: TensorData | None = None
    prompt_alt_tokens_k: Count | None = None
    prompt_logprobs_last_n: Count | None = None
    record_stability_info: bool | None = None

    def __post_init__(self) -> None:
        if self.seq_id is not None and self.sampling_session_id is None:
            raise ValueError("seq_id belongs to sampling_session_id")


class JoinSamplingSession(Lenient):
    sampling_session_id: Id


class CancelFuture(Lenient):
    request_id: Id

    def __post_init__(self) -> None:
        require_storable("request_id", self.request_id)


class FuturesTarget(Lenient):
    """The samples of one client of a sampler."""

    sampling_session_id: Id
    cloned_sampler_id: Annotated[int, Meta(ge=0, lt=2**33)] | None = None
    type: Literal["sampling_session"] | None = None


class RetrieveFutures(Lenient):
    target: FuturesTarget
    prev_cursor: SeqId | None = None
    timeout: Annotated[float, Meta(ge=0)] | None = None
    retrieved_request_ids: Annotated[list[Id], Meta(max_length=100_000)] | None = None


class RetrieveFuture(Lenient):
    request_id: Id
    allow_metadata_only: bool | None = None

    def __post_init__(self) -> None:
        require_storable("request_id", self.request_id)

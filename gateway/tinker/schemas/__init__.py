"""JSON bodies of the Tinker dialect.

Lenient where SDK versions differ: `type` may be missing anywhere, every optional field may be null, and what is left
out has the SDK's default. Strict where a field changes numbers: such structs refuse unknown fields by name, so that
nothing a newer SDK asks for is silently not done. Bodies that only open a connection ignore unknown fields.
"""

from __future__ import annotations

from gateway.tinker.schemas.connection import (
    AssignProject,
    ClientConfig,
    CreateSession,
    FinishReason,
    FinishSession,
    SessionHeartbeat,
    Telemetry,
)
from gateway.tinker.schemas.data import (
    ForwardBackwardBody,
    JsonDatum,
    ModelInput,
    ModelInputChunk,
    PassInput,
    TensorData,
)
from gateway.tinker.schemas.fields import (
    Count,
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
from gateway.tinker.schemas.futures import CancelFuture, FuturesTarget, RetrieveFuture, RetrieveFutures
from gateway.tinker.schemas.losses import CreateCustomLoss, CustomLossGraph, CustomLossInput, CustomLossNode
from gateway.tinker.schemas.sampling import (
    CreateSamplingSession,
    JoinSamplingSession,
    SampleBody,
    SampleEnvelope,
    SamplingParams,
)
from gateway.tinker.schemas.searching import SearchCursor, SearchOwner, SearchSessions, StatusQuery
from gateway.tinker.schemas.training import (
    AdamParams,
    CreateModel,
    GetInfo,
    LoraConfig,
    OperationEnvelope,
    OptimStepBody,
    UnloadModel,
)
from gateway.tinker.schemas.weights import (
    CopyWeights,
    LoadEnvelope,
    LoadWeights,
    SaveWeights,
    SaveWeightsExternal,
    SaveWeightsForSampler,
    SetTtl,
    WeightsInfo,
)

__all__ = [
    "AdamParams",
    "AssignProject",
    "CancelFuture",
    "ClientConfig",
    "CopyWeights",
    "Count",
    "CreateCustomLoss",
    "CreateModel",
    "CreateSamplingSession",
    "CreateSession",
    "CustomLossGraph",
    "CustomLossInput",
    "CustomLossNode",
    "FinishReason",
    "FinishSession",
    "ForwardBackwardBody",
    "FuturesTarget",
    "GetInfo",
    "Id",
    "JoinSamplingSession",
    "JsonDatum",
    "Lenient",
    "LoadEnvelope",
    "LoadWeights",
    "LoraConfig",
    "ModelInput",
    "ModelInputChunk",
    "OperationEnvelope",
    "OptimStepBody",
    "PassInput",
    "RetrieveFuture",
    "RetrieveFutures",
    "SampleBody",
    "SampleEnvelope",
    "SamplingParams",
    "SaveWeights",
    "SaveWeightsExternal",
    "SaveWeightsForSampler",
    "SearchCursor",
    "SearchOwner",
    "SearchSessions",
    "SeqId",
    "SessionHeartbeat",
    "SetTtl",
    "StatusQuery",
    "Strict",
    "Telemetry",
    "TensorData",
    "Text",
    "TextMetadata",
    "TrainingSeqId",
    "Ttl",
    "UnloadModel",
    "UserMetadata",
    "WeightsInfo",
]

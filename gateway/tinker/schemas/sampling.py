"""Samplers and samples."""

from __future__ import annotations

from gateway.tinker.schemas.data import ModelInput, TensorData
from gateway.tinker.schemas.fields import Count, Id, Lenient, SeqId, Strict


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

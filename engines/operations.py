"""The entries of a run's log and what comes out of them, in the neutral form that every dialect is converted to.

The gateway stores an operation encoded with `encode` and sends the same bytes to the engine; it never needs to
decode them again, not even to replay them years later. Everything random (seeds) and everything that names a place
(storage folders) is therefore decided when the operation is accepted, and is part of it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from engines.graphs import CustomLoss
from engines.tensors import Matrix, Tensor

LossConfig = dict[str, float | str]


class LoraSpec(msgspec.Struct, frozen=True, omit_defaults=True):
    """Adapter configuration of a run. The adapter adds `(alpha / rank) * B @ A` to each targeted linear layer."""

    rank: int
    seed: int
    alpha: float = 32.0
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class Datum(msgspec.Struct, frozen=True, array_like=True):
    """One training example.

    `tokens` is int32 of shape [N]. `loss_inputs` holds the tensors that the loss names: `target_tokens` is int64 of
    shape [N] or [N, K]; the others are float32 of the same shape. Position i of the input predicts target i.
    """

    tokens: Tensor
    loss_inputs: dict[str, Tensor]


class CreateRun(msgspec.Struct, frozen=True, tag="create_run", omit_defaults=True):
    """Slot 0 of a log: a fresh adapter, or one that begins at stored weights.

    `folder` is a storage key; with `optimizer_state` the optimizer's moments and step count are loaded too.
    """

    lora: LoraSpec
    optimizer: Literal["adamw"] = "adamw"
    folder: str | None = None
    optimizer_state: bool = False


class _Pass(msgspec.Struct, frozen=True):
    data: list[Datum]
    loss: str
    loss_config: LossConfig = {}
    custom: CustomLoss | None = None
    """What to compute where `loss` is `custom`: whole, so that the log needs nothing else."""


class ForwardBackward(_Pass, frozen=True, tag="forward_backward"):
    """Add the gradient of the loss, a sum over all tokens of all data, to the run's pending gradient."""


class Forward(_Pass, frozen=True, tag="forward"):
    """The same numbers as ForwardBackward, without touching the run."""


class OptimStep(msgspec.Struct, frozen=True, tag="optim_step", omit_defaults=True):
    """One AdamW step with the pending gradient, which is cleared; defaults are the SDK's.

    Decoupled weight decay; `grad_clip_norm` > 0 clips the run's global gradient norm, 0 is off. Without a pending
    gradient nothing changes.
    """

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class SaveWeights(msgspec.Struct, frozen=True, tag="save_weights", omit_defaults=True):
    """Write the adapter (PEFT layout) to the storage key `folder`; with `optimizer_state` also what training needs
    to go on. Pending gradients are neither written nor lost."""

    folder: str
    optimizer_state: bool = False


class LoadWeights(msgspec.Struct, frozen=True, tag="load_weights", omit_defaults=True):
    """Replace the run's weights by those in `folder`; clears pending gradients.

    With `optimizer_state` the optimizer continues where the checkpoint was taken, else it starts afresh.
    """

    folder: str
    optimizer_state: bool = False


Operation = CreateRun | ForwardBackward | Forward | OptimStep | SaveWeights | LoadWeights
OperationKind = Literal[
    "create_run", "forward_backward", "forward", "optim_step", "save_weights", "load_weights"
]

CHANGES_STATE: frozenset[str] = frozenset({"create_run", "forward_backward", "optim_step", "load_weights"})
"""Kinds that a replay applies again; the others only read, or have stored their outcome already."""


class AdapterRef(msgspec.Struct, frozen=True):
    """An immutable version of an adapter: `adapter_id` is never used for other weights; `folder` is where it lies."""

    adapter_id: str
    folder: str


class SampleRequest(msgspec.Struct, frozen=True, tag="sample", omit_defaults=True):
    """Draw `num_samples` continuations of one prompt.

    `prompt` is int32 of shape [N], N >= 1. `max_tokens` None means up to the context's end. Sampling stops at a
    token of `stop_tokens`, at the model's end-of-sequence tokens when `stop_at_eos`, or when the decoded text
    contains one of `stop_strings`; what stopped it stays in the result. `temperature` 0 is greedy. `top_k` -1 is
    off. The randomness of sample i at position t is a function of (seed, i, t) alone. `topk_*` ask for that many
    best alternatives per position, 0 for none. `adapter` None samples the base model.

    Of the prompt, row i is what the model expects of token i + 1. `prompt_logprobs_last_n` leaves only the last n
    tokens to `prompt_logprobs` and `topk_prompt_logprobs`. `target_prompt_tokens`, int64 [N - 1, K], names tokens to
    score in each row; -1 names none. `prompt_alternatives` tokens are drawn in each row at `temperature`.

    `logit_bias`, the penalties and `min_p` decide which tokens are drawn, as `engines.shaping` defines them, and do not
    show in log-probs.

    What was computed for a prompt may be used again for prompts of the same `session` that begin alike; "" has none.
    """

    prompt: Tensor
    num_samples: int
    seed: int
    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    stop_at_eos: bool = True
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    target_prompt_tokens: Matrix | None = None
    prompt_alternatives: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    session: str = ""
    adapter: AdapterRef | None = None


class TopLogprobs(msgspec.Struct, frozen=True):
    """The k best tokens of each of N positions, best first: `tokens` int32 [N, k], `logprobs` float32 [N, k].

    A position without alternatives (the first of a prompt) holds token 0 with logprob NaN.
    """

    tokens: Tensor
    logprobs: Tensor


class PromptAlternatives(msgspec.Struct, frozen=True):
    """Tokens drawn, with replacement, where the prompt's own follow: `tokens` int64 [N - 1, k], `logprobs` float32
    [N - 1, k], untempered whatever temperature they were drawn at."""

    tokens: Tensor
    logprobs: Tensor


class SampledSequence(msgspec.Struct, frozen=True):
    """One continuation: `tokens` int32 [M], `logprobs` float32 [M] of the model's distribution after temperature (no
    bias, penalty or cut shows in them), `stop_reason` why it ended."""

    tokens: Tensor
    logprobs: Tensor
    stop_reason: Literal["stop", "length"]
    top_logprobs: TopLogprobs | None = None


class CreateRunResult(msgspec.Struct, frozen=True, tag="create_run"):
    """`parameters` is the number of trainable values of the new adapter."""

    parameters: int


class ForwardResult(msgspec.Struct, frozen=True, tag="forward"):
    """`outputs[i]` belongs to datum i: `logprobs`, float32, of the shape of its `target_tokens`.

    `metrics` keys are `name:reduction`; `loss:sum` is always there.
    """

    outputs: list[dict[str, Tensor]]
    metrics: dict[str, float]


class OptimStepResult(msgspec.Struct, frozen=True, tag="optim_step"):
    """`metrics` holds `unclipped_grad_l2:mean`, the global gradient norm before clipping."""

    metrics: dict[str, float]


class SaveWeightsResult(msgspec.Struct, frozen=True, tag="save_weights"):
    """`size_bytes` counts the files that were written and synced, their checksums apart."""

    size_bytes: int


class LoadWeightsResult(msgspec.Struct, frozen=True, tag="load_weights"):
    """The weights are in place."""


class SampleResult(msgspec.Struct, frozen=True, tag="sample"):
    """`sequences` has num_samples entries. All log-probs of the prompt are untempered.

    `prompt_logprobs` is float32 [N], NaN at 0 and where none were asked for. `target_prompt_logprobs` has the layout
    of the request's tokens, 0.0 where they are -1. `prompt_cache_hit_tokens` of the prompt were not computed again,
    because an earlier request had; however many samples share it, the prompt counts once.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: Tensor | None = None
    topk_prompt_logprobs: TopLogprobs | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: Matrix | None = None
    prompt_alternatives: PromptAlternatives | None = None


Result = (
    CreateRunResult | ForwardResult | OptimStepResult | SaveWeightsResult | LoadWeightsResult | SampleResult
)

_ENCODER = msgspec.msgpack.Encoder()
_OPERATION: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)
_SAMPLE: msgspec.msgpack.Decoder[SampleRequest] = msgspec.msgpack.Decoder(SampleRequest)
_RESULT: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)


def encode(value: Operation | SampleRequest | Result) -> bytes:
    """The bytes that are stored and sent."""
    return _ENCODER.encode(value)


def decode_operation(body: bytes) -> Operation:
    """Raises msgspec.DecodeError or msgspec.ValidationError when the bytes are not an operation."""
    return _OPERATION.decode(body)


def decode_sample(body: bytes) -> SampleRequest:
    """Raises msgspec.DecodeError or msgspec.ValidationError when the bytes are not a sample request."""
    return _SAMPLE.decode(body)


def decode_result(body: bytes) -> Result:
    """Raises msgspec.DecodeError or msgspec.ValidationError when the bytes are not a result."""
    return _RESULT.decode(body)

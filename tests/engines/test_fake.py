"""The fake engine's numbers against finite differences, against torch, and against definitions written out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from engines.fake import FakeEngine
from engines.fake.losses import FORMULAS
from engines.fake.model import (
    HIDDEN,
    SITES,
    VOCABULARY,
    Adapter,
    Weights,
    base_weights,
    gradient_of,
    log_softmax,
    logits_of,
    size,
    states_of,
)
from engines.fake.optimizer import AdamW
from engines.fake.tokenizer import TURN_END_ID, decode
from engines.interface import EngineConfig, LoadError, RunOperation, SampleEnd, UserError
from engines.losses import LOSSES
from engines.losses.formulas import FORMULAS as TORCH_FORMULAS
from engines.operations import (
    AdapterRef,
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    ForwardResult,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SampleResult,
    SaveWeights,
)
from engines.tensors import Tensor
from tests.engines.material import CREATE, datum, learn, look, sample

Array = NDArray[Any]
MakeEngine = Callable[..., FakeEngine]


@pytest.fixture
def make_engine(tmp_path: Path) -> MakeEngine:
    """An engine; keywords are its options."""

    def make(**options: Any) -> FakeEngine:
        return FakeEngine.load(
            EngineConfig("fake", "fake", "test/bytes", "", ("train", "sample"), str(tmp_path), 1, options)
        )

    return make


@pytest.fixture
def engine(make_engine: MakeEngine) -> FakeEngine:
    """An engine with the run "a"."""
    loaded = make_engine()
    loaded.create_runs([RunOperation("a", CREATE)])
    return loaded


def train(engine: FakeEngine, operation: ForwardBackward, run_id: str = "a") -> ForwardResult:
    (result,) = engine.forward_backward([RunOperation(run_id, operation)])
    assert isinstance(result, ForwardResult), result
    return result


def evaluate(engine: FakeEngine, operation: Forward, run_id: str = "a") -> ForwardResult:
    (result,) = engine.forward([RunOperation(run_id, operation)])
    assert isinstance(result, ForwardResult), result
    return result


def step(engine: FakeEngine, run_id: str = "a") -> float:
    (result,) = engine.optim_step([RunOperation(run_id, OptimStep(learning_rate=1e-2))])
    assert not isinstance(result, UserError)
    return result.metrics["unclipped_grad_l2:mean"]


def draw_all(engine: FakeEngine, request: SampleRequest) -> SampleResult:
    engine.start_sample(1, request)
    ends = []
    while engine.sampling:
        ends += [event.result for event in engine.advance() if isinstance(event, SampleEnd)]
    (result,) = ends
    assert isinstance(result, SampleResult)
    return result


def numbers(tensor: Tensor) -> Array:
    return tensor.array()


# ---------------------------------------------------------------------------- the model


def double(weights: Weights) -> Weights:
    return Weights(*(part.astype(np.float64) for part in weights))


def random_adapter(spec: LoraSpec) -> Adapter:
    return Adapter(spec, np.random.default_rng(5).normal(0, 0.2, size(spec)))


def reference_logits(weights: Weights, adapter: Adapter, tokens: list[int]) -> Array:
    """The model by its definition, one position after the other, each layer's weight with its adapter merged in."""
    merged = []
    for site, weight in zip(SITES, (weights.mix, weights.down, weights.unembed), strict=True):
        factors = adapter.factors.get(site)
        delta = 0.0 if factors is None else adapter.spec.alpha / adapter.spec.rank * factors.b @ factors.a
        merged.append(weight + delta)
    mix, down, unembed = merged
    rows = []
    for i in range(len(tokens)):
        embedded = [weights.embed[token] for token in tokens[: i + 1]]
        x = embedded[-1] + mix @ (np.sum(embedded, axis=0) / (i + 1))
        rows.append(unembed @ (x + down @ x))
    return np.array(rows)


PARTS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


@pytest.mark.parametrize(("attn", "mlp", "unembed"), PARTS)
def test_logits_are_those_of_the_definition(attn: bool, mlp: bool, unembed: bool) -> None:
    weights = double(base_weights())
    adapter = random_adapter(LoraSpec(3, 1, 6.0, attn, mlp, unembed))
    tokens = [72, 101, 108, 108, 111]
    found = logits_of(weights, adapter, states_of(weights, adapter, np.array(tokens)).y)
    np.testing.assert_allclose(found, reference_logits(weights, adapter, tokens), rtol=1e-12)


@pytest.mark.parametrize(("attn", "mlp", "unembed"), PARTS)
def test_gradients_are_those_of_finite_differences(attn: bool, mlp: bool, unembed: bool) -> None:
    weights = double(base_weights())
    spec = LoraSpec(2, 1, 6.0, attn, mlp, unembed)
    adapter = random_adapter(spec)
    tokens, slopes = np.array([72, 101, 108, 258]), np.random.default_rng(1).normal(size=(4, VOCABULARY))

    def value(values: Array) -> float:
        moved = Adapter(spec, values)
        return float((slopes * logits_of(weights, moved, states_of(weights, moved, tokens).y)).sum())

    gradient = gradient_of(weights, adapter, states_of(weights, adapter, tokens), slopes)
    places = np.random.default_rng(2).choice(len(gradient), 60, replace=False)
    for place in places:
        move = np.zeros_like(gradient)
        move[place] = 1e-5
        slope = (value(adapter.values + move) - value(adapter.values - move)) / 2e-5
        assert gradient[place] == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_the_base_model_is_always_the_same() -> None:
    weights = base_weights()
    assert weights.embed.shape == weights.unembed.shape == (VOCABULARY, HIDDEN)
    assert weights.embed.dtype == np.float32
    raw = np.random.PCG64(20240229).random_raw(2)
    first = [int(number >> np.uint64(11)) / 2**52 - 1 for number in raw]
    np.testing.assert_allclose(weights.embed[0, :2], first, rtol=1e-6)


# ---------------------------------------------------------------------------- losses and steps


@pytest.mark.parametrize("loss", sorted(FORMULAS))
def test_losses_and_their_derivatives_are_those_of_autograd(loss: str) -> None:
    rng = np.random.default_rng(3)
    p = np.log(rng.uniform(0.05, 1, 200))
    inputs = {name: rng.normal(0, 1, 200) for name in LOSSES[loss].inputs if name != "target_tokens"}
    if "logprobs" in inputs:
        inputs["logprobs"] = p + rng.choice([-0.7, -0.1, 0.0, 0.1, 0.7], 200)
    needed = {"dro": {"beta": 0.05}, "gspo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}}
    config = LOSSES[loss].with_defaults(needed.get(loss, {}))
    policy = torch.tensor(p, requires_grad=True)
    expected = TORCH_FORMULAS[loss](
        policy, {name: torch.tensor(values) for name, values in inputs.items()}, config
    )
    (slopes,) = torch.autograd.grad(expected.sum(), policy)
    found = FORMULAS[loss](p, inputs, config)
    np.testing.assert_allclose(found[0], expected.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(found[1], slopes.numpy(), rtol=1e-12)


def test_every_loss_has_its_formula() -> None:
    assert FORMULAS.keys() == LOSSES.keys()


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_steps_are_those_of_torch(clip: float) -> None:
    rng = np.random.default_rng(4)
    values = rng.normal(0, 1, 50).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(values))
    theirs = torch.optim.AdamW([parameter], lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    settings = OptimStep(0.01, 0.8, 0.9, 1e-8, 0.1, clip)
    ours = AdamW()
    for _ in range(5):
        gradient = rng.normal(0, 3, 50).astype(np.float32)
        norm = ours.step(values, gradient, settings)
        parameter.grad = torch.tensor(gradient)
        assert norm == pytest.approx(float(torch.linalg.vector_norm(parameter.grad)), rel=1e-6)
        if clip:
            torch.nn.utils.clip_grad_norm_([parameter], clip)
        theirs.step()
    np.testing.assert_allclose(values, parameter.detach().numpy(), rtol=2e-6, atol=1e-7)


def test_a_gradient_is_the_sum_over_tokens_targets_and_data(engine: FakeEngine) -> None:
    """Soft targets weighted by their own probabilities: the derivative by the logits is known in closed form."""
    tokens = np.frombuffer(b"abcab", dtype=np.uint8).astype(np.int32)
    targets = np.array([[98, 99], [99, 99], [97, 98], [98, 0], [1, 258]])
    weights = np.array([[1.0, 0.5], [0.25, 0.5], [-0.5, 1.0], [0.0, 2.0], [1.0, 1.0]], dtype=np.float32)
    soft = Datum(Tensor.of(tokens), {"target_tokens": Tensor.of(targets), "weights": Tensor.of(weights)})
    result = train(engine, ForwardBackward([soft, datum()], "cross_entropy"))

    base, adapter = base_weights(), Adapter.initial(CREATE.lora)
    total = np.zeros_like(adapter.values)
    loss = 0.0
    plain = datum()
    plain_targets, plain_weights = (
        plain.loss_inputs[name].array()[:, None] for name in ("target_tokens", "weights")
    )
    sides: list[tuple[Array, Array, Array]] = [
        (tokens, targets, weights),
        (plain.tokens.array(), plain_targets, plain_weights),
    ]
    for text, wanted, weight in sides:
        states = states_of(base, adapter, text)
        scores = log_softmax(logits_of(base, adapter, states.y))
        slopes = np.zeros_like(scores)
        for i, row in enumerate(wanted):
            for token, share in zip(row, weight[i], strict=True):
                slopes[i] += share * np.exp(scores[i])
                slopes[i, token] -= share
                loss -= share * scores[i, token]
        total += gradient_of(base, adapter, states, slopes)
    assert result.metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
    assert result.outputs[0]["logprobs"].shape == (5, 2)
    assert step(engine) == pytest.approx(float(np.linalg.norm(total)), rel=1e-5)


def test_what_is_not_finite_is_refused_and_has_no_effect(engine: FakeEngine) -> None:
    train(engine, learn())
    good = datum()
    inputs = {
        "target_tokens": good.loss_inputs["target_tokens"],
        "logprobs": Tensor.of(np.full(11, -1e4, dtype=np.float32)),
        "advantages": Tensor.of(np.ones(11, dtype=np.float32)),
    }
    broken = ForwardBackward([Datum(good.tokens, inputs)], "importance_sampling")
    (refused,) = engine.forward_backward([RunOperation("a", broken)])
    assert isinstance(refused, UserError)
    assert "importance_sampling: the loss is" in str(refused)
    other = FakeEngine.load(engine._config)
    other.create_runs([RunOperation("a", CREATE)])
    train(other, learn())
    assert step(engine) == step(other)
    assert evaluate(engine, look()) == evaluate(other, look())


def test_a_step_refuses_a_gradient_that_is_not_finite(engine: FakeEngine) -> None:
    engine.forward_backward([RunOperation("a", learn())])
    run = engine._runs["a"]
    assert run.pending is not None
    run.pending[0] = np.inf
    before = run.adapter.values.copy()
    for _ in range(2):
        refusal = engine.optim_step([RunOperation("a", OptimStep(grad_clip_norm=1.0))])[0]
        assert isinstance(refusal, UserError) and "must be finite" in str(refusal)
        assert np.array_equal(run.adapter.values, before) and run.optimizer.steps == 0


def test_training_learns(engine: FakeEngine) -> None:
    losses = []
    for _ in range(60):
        losses.append(train(engine, learn()).metrics["loss:sum"])
        step(engine)
    assert losses[-1] < 0.1 * losses[0]


# ---------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(4, 7),
        LoraSpec(2, 7, 8.0, train_mlp=False),
        LoraSpec(3, 7, train_attn=False, train_unembed=False),
    ],
)
def test_a_samples_logprobs_are_the_trainers(engine: FakeEngine, lora: LoraSpec) -> None:
    engine.create_runs([RunOperation("a", CreateRun(lora))])
    for _ in range(5):
        train(engine, learn())
        step(engine)
    engine.save_weights([RunOperation("a", SaveWeights("saved/a"))])
    ref = AdapterRef("one", "saved/a")
    result = draw_all(
        engine, sample("hello", num_samples=3, max_tokens=40, adapter=ref, prompt_logprobs=True)
    )
    for sequence in result.sequences:
        text = np.concatenate([np.frombuffer(b"hello", dtype=np.uint8), sequence.tokens.array()])
        inputs = {
            "target_tokens": Tensor.of(text[1:].astype(np.int64)),
            "weights": Tensor.of(np.ones(len(text) - 1, dtype=np.float32)),
        }
        scored = evaluate(
            engine, Forward([Datum(Tensor.of(text[:-1].astype(np.int32)), inputs)], "cross_entropy")
        )
        expected: Array = scored.outputs[0]["logprobs"].array()
        np.testing.assert_allclose(numbers(sequence.logprobs), expected[4:], atol=1e-5)
        assert result.prompt_logprobs is not None
        np.testing.assert_allclose(numbers(result.prompt_logprobs)[1:], expected[:4], atol=1e-5)


def test_a_version_does_not_change_when_its_run_goes_on(engine: FakeEngine) -> None:
    for _ in range(3):
        train(engine, learn())
        step(engine)
    engine.save_weights([RunOperation("a", SaveWeights("saved/a"))])
    request = sample(max_tokens=30, adapter=AdapterRef("one", "saved/a"))
    before = draw_all(engine, request)
    train(engine, learn())
    step(engine)
    assert draw_all(engine, request) == before
    assert draw_all(engine, sample(max_tokens=30)) != before
    with pytest.raises(UserError, match="stored weights are not there"):
        engine.start_sample(2, sample(adapter=AdapterRef("two", "saved/none")))
    assert not engine.sampling


def test_no_room_ends_a_sample(make_engine: MakeEngine) -> None:
    engine = make_engine(max_context=12)
    result = draw_all(engine, sample("hello", max_tokens=None))
    assert result.sequences[0].tokens.shape == (7,)
    assert result.sequences[0].stop_reason == "length"


# ---------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"slow": True}, "options.slow: .* options of the fake engine are delay_s, crash_on_token"),
        ({"delay_s": "1"}, "Expected `float`"),
        ({"delay_s": -0.5}, "delay_s is -0.5"),
        ({"max_context": 1}, "max_context is 1"),
        ({"max_rank": 0}, "max_rank 0"),
    ],
)
def test_options_are_refused_by_name(make_engine: MakeEngine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(LoadError, match=words):
        make_engine(**options)


def test_every_call_takes_as_long_as_it_is_told_to(make_engine: MakeEngine) -> None:
    engine = make_engine(delay_s=0.05)
    begun = time.perf_counter()
    engine.create_runs([RunOperation("a", CREATE), RunOperation("b", CREATE)])
    engine.forward([RunOperation("a", look())])
    engine.start_sample(1, sample())
    engine.advance()
    assert time.perf_counter() - begun > 0.15


def test_a_call_that_raises_has_no_effect(make_engine: MakeEngine) -> None:
    engine, twin = make_engine(fail_on_token=ord("!")), make_engine()
    for each in (engine, twin):
        each.create_runs([RunOperation("a", CREATE)])
        train(each, learn())
    with pytest.raises(RuntimeError, match="token 33"):
        engine.forward_backward([RunOperation("a", learn("fine", "no! no"))])
    assert step(engine) == step(twin)


# ---------------------------------------------------------------------------- tokenizer


def test_tokens_are_bytes(make_engine: MakeEngine) -> None:
    files = make_engine().tokenizer_files()
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    text = "Grüße, 世界! \n\t\x00 <|im_end|>"
    tokens = tokenizer.encode(text).ids
    assert tokens == [*text.removesuffix("<|im_end|>").encode(), TURN_END_ID]
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.decode(tokens, skip_special_tokens=False) == decode(tokens) == text
    for cut in (b"\xc3", b"\xe4\xb8", b"a\xff\xfeb", b"\xf0\x9f\x98"):
        assert tokenizer.decode(list(cut)) == decode(list(cut))


def test_transformers_loads_the_tokenizer_and_its_chat_template(
    make_engine: MakeEngine, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    for name, data in make_engine().tokenizer_files().items():
        (tmp_path / name).write_bytes(data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.eos_token_id == TURN_END_ID
    assert tokenizer("Hi").input_ids == [72, 105]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 8192

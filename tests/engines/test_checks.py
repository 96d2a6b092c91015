"""What an engine must never see is refused, in words that name the field, what came and what is allowed."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from engines.checks import check_operation
from engines.interface import EngineInfo, UserError
from engines.losses import LOSSES
from engines.operations import (
    CreateRun,
    Datum,
    Forward,
    ForwardBackward,
    LoadWeights,
    LoraSpec,
    OptimStep,
    SaveWeights,
)
from engines.tensors import Tensor

INFO = EngineInfo(
    base_model="test/model",
    architecture="Test",
    roles=("train", "sample"),
    vocab_size=100,
    max_context=16,
    losses=tuple(LOSSES),
    max_rank=32,
    eos_tokens=(1,),
    max_top_logprobs=20,
    device="cpu",
    dtype="float32",
    deterministic=True,
    versions={},
)


def ints(*values: int) -> Tensor:
    return Tensor.of(np.array(values, dtype=np.int32))


def targets(*values: Any) -> Tensor:
    return Tensor.of(np.array(values, dtype=np.int64))


def floats(*values: Any) -> Tensor:
    return Tensor.of(np.array(values, dtype=np.float32))


def supervised(**inputs: Tensor) -> Datum:
    """Three tokens; `inputs` replace or add to the loss inputs."""
    return Datum(ints(1, 2, 3), {"target_tokens": targets(2, 3, 4), "weights": floats(1, 0.5, -1), **inputs})


def policy(**inputs: Tensor) -> Datum:
    own = {"target_tokens": targets(2, 3, 4), "logprobs": floats(-1, -2, -3), "advantages": floats(1, 0, -1)}
    return Datum(ints(1, 2, 3), {**own, **inputs})


def without(datum: Datum, name: str) -> Datum:
    return Datum(datum.tokens, {key: value for key, value in datum.loss_inputs.items() if key != name})


def refused(datum: Datum, loss: str = "cross_entropy", **config: float | str) -> str:
    """The sentence with which a pass is refused whose second datum is this one."""
    fine = supervised() if loss == "cross_entropy" else policy()
    with pytest.raises(UserError) as caught:
        check_operation(ForwardBackward([fine, datum], loss, dict(config)), INFO)
    return str(caught.value)


NARROW = {"clip_low_threshold": 0.97, "clip_high_threshold": 1.03}
PAIRS = ([1, 2], [3, 4], [5, 99])
LONGEST = Datum(ints(*range(16)), {"target_tokens": targets(*range(16)), "weights": floats(*range(16))})

# ---------------------------------------------------------------------------- what is fine


@pytest.mark.parametrize(
    "operation",
    [
        ForwardBackward([supervised()], "cross_entropy"),
        Forward([supervised(), supervised()], "cross_entropy"),
        ForwardBackward([LONGEST], "cross_entropy"),
        ForwardBackward([supervised(target_tokens=targets(*PAIRS), weights=floats(*PAIRS))], "cross_entropy"),
        ForwardBackward([policy()], "importance_sampling"),
        ForwardBackward([policy()], "ppo", {"clip_low_threshold": 0.0, "clip_high_threshold": 3.0}),
        ForwardBackward([policy()], "cispo", {"clip_high_threshold": 0.8}),
        ForwardBackward([policy()], "dro", {"beta": 0.0}),
        ForwardBackward([policy(clip_low_threshold=floats(0, 1, 1.2))], "ppo"),
        ForwardBackward([policy(clip_low_threshold=floats(2, 2, 2), clip_high_threshold=floats(3, 3, 3))], "ppo"),
        ForwardBackward([policy(sequence_ratio_mask=floats(0, 1, 1))], "gspo", {**NARROW}),
        ForwardBackward([policy(sequence_ratio_mask=floats(0, 1, 1), clip_low_threshold=floats(0, 0, 0),
                                clip_high_threshold=floats(1, 1, 1))], "gspo"),
        OptimStep(learning_rate=0.0, beta1=0.0, beta2=0.0, weight_decay=0.1, grad_clip_norm=1.0),
        CreateRun(LoraSpec(rank=1, seed=1)),
        CreateRun(LoraSpec(rank=32, seed=-(2**40), train_attn=False, train_mlp=False)),
        SaveWeights("checkpoints/a"),
        LoadWeights("checkpoints/a", optimizer_state=True),
    ],
)  # fmt: skip
def test_what_is_allowed_passes(operation: Any) -> None:
    check_operation(operation, INFO)


def test_the_tensors_that_pass_are_left_as_they_are() -> None:
    operation = ForwardBackward([supervised()], "cross_entropy")
    before = msgspec.msgpack.encode(operation)
    check_operation(operation, INFO)
    assert msgspec.msgpack.encode(operation) == before


# ---------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("datum", "words"),
    [
        (Datum(ints(), supervised().loss_inputs), ["data[1].model_input is empty"]),
        (Datum(ints(*[1] * 17), supervised().loss_inputs), ["data[1].model_input", "17 tokens", "at most 16"]),
        (Datum(ints(1, 100, 3), supervised().loss_inputs), ["data[1].model_input[1] is 100", "0 to 99"]),
        (Datum(ints(1, 2, -1), supervised().loss_inputs), ["data[1].model_input[2] is -1", "0 to 99"]),
        (Datum(targets(1, 2, 3), supervised().loss_inputs), ["data[1].model_input", "dtype int64", "int32"]),
        (Datum(Tensor("int32", (1, 3), bytes(12)), {}), ["data[1].model_input has shape [1, 3]"]),
        (Datum(Tensor("int32", (3,), bytes(8)), {}), ["data[1].model_input holds 8 bytes", "takes 12"]),
        (Datum(Tensor("int32", (-3,), bytes(12)), {}), ["data[1].model_input is empty"]),
        (without(supervised(), "weights"), ["data[1].loss_fn_inputs has no 'weights'", "target_tokens, weights"]),
        (without(supervised(), "target_tokens"), ["data[1].loss_fn_inputs has no 'target_tokens'"]),
        (supervised(mask=floats(1, 1, 1)), ["data[1].loss_fn_inputs has 'mask'", "target_tokens, weights"]),
        (supervised(weights=floats(1, 1)), ["'weights'] has shape [2]", "target_tokens has [3]"]),
        (supervised(weights=floats([1], [1], [1])), ["'weights'] has shape [3, 1]", "target_tokens has [3]"]),
        (supervised(weights=floats(1, np.nan, 1)), ["data[1].loss_fn_inputs['weights'][1] is nan", "finite"]),
        (supervised(weights=floats(1, 1, -np.inf)), ["data[1].loss_fn_inputs['weights'][2] is -inf"]),
        (supervised(weights=targets(1, 1, 1)), ["'weights'] has dtype int64", "float32"]),
        (supervised(weights=Tensor("float32", (3,), bytes(16))), ["'weights'] holds 16 bytes", "takes 12"]),
        (supervised(target_tokens=targets(1, 2)), ["'target_tokens'] has shape [2]", "3 tokens", "[3] or [3, K]"]),
        (supervised(target_tokens=targets(1, 2, 100)), ["'target_tokens'][2] is 100", "0 to 99"]),
        (supervised(target_tokens=targets(1, -100, 3)), ["'target_tokens'][1] is -100", "weight 0"]),
        (supervised(target_tokens=targets(1, 2**63 - 1, 3)), ["'target_tokens'][1] is 9223372036854775807"]),
        (supervised(target_tokens=ints(1, 2, 3)), ["'target_tokens'] has dtype int32", "int64"]),
        (supervised(target_tokens=floats(1, 2, 3)), ["'target_tokens'] has dtype float32", "int64"]),
        (supervised(target_tokens=Tensor("int64", (3, 0), b"")), ["has shape [3, 0]", "K at least 1"]),
        (supervised(target_tokens=Tensor("int64", (3, -1), bytes(8))), ["has shape [3, -1]"]),
        (supervised(target_tokens=Tensor("int64", (3, 1, 1), bytes(24))), ["has shape [3, 1, 1]"]),
        (supervised(target_tokens=targets(*PAIRS[:2], [5, 100]), weights=floats(*PAIRS)), ["[2, 1] is 100"]),
    ],
)  # fmt: skip
def test_a_wrong_datum_is_refused(datum: Datum, words: list[str]) -> None:
    sentence = refused(datum)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("datum", "words"),
    [
        (without(policy(), "logprobs"), ["has no 'logprobs'", "target_tokens, logprobs, advantages"]),
        (without(policy(), "advantages"), ["has no 'advantages'"]),
        (
            policy(weights=floats(1, 1, 1)),
            ["has 'weights'", "ppo does not take", "target_tokens, logprobs, advantages"],
        ),
        (
            policy(clip_low_threshold=floats(1, 1)),
            ["'clip_low_threshold'] has shape [2]", "target_tokens has [3]"],
        ),
        (
            policy(clip_low_threshold=floats(1, -1, 1)),
            ["'clip_low_threshold'][1] is -1; it must be at least 0"],
        ),
        (policy(clip_low_threshold=floats(1, np.nan, 1)), ["'clip_low_threshold'][1] is nan"]),
        (
            policy(clip_low_threshold=floats(1, 1, 1.3)),
            ["clip_low_threshold is above clip_high_threshold at [2]"],
        ),
        (
            policy(clip_low_threshold=floats(1, 2, 1), clip_high_threshold=floats(1, 1, 1)),
            ["above", "at [1]"],
        ),
        (policy(logprobs=floats(-1, -2, np.nan)), ["'logprobs'][2] is nan"]),
        (policy(advantages=floats(1, np.inf, 1)), ["'advantages'][1] is inf"]),
        (policy(target_tokens=targets([1], [2], [3])), ["has shape [3, 1]", "ppo takes [3]"]),
    ],
)
def test_a_wrong_policy_datum_is_refused(datum: Datum, words: list[str]) -> None:
    sentence = refused(datum, "ppo")
    assert sentence.startswith("data[1].loss_fn_inputs")
    assert all(word in sentence for word in words), sentence


# ---------------------------------------------------------------------------- losses and their settings


def sequence(**inputs: Tensor) -> Datum:
    return policy(sequence_ratio_mask=floats(0, 1, 1), **inputs)


@pytest.mark.parametrize(
    ("datum", "config", "words"),
    [
        (policy(), NARROW, ["data[1].loss_fn_inputs has no 'sequence_ratio_mask'"]),
        (policy(sequence_ratio_mask=floats(0, 0, 0)), NARROW, ["'sequence_ratio_mask'] is 0 everywhere"]),
        (sequence(), {}, ["loss_fn_config['clip_low_threshold'] is missing", "data[0].loss_fn_inputs has none"]),
        (sequence(), {"clip_low_threshold": 0.9}, ["loss_fn_config['clip_high_threshold'] is missing"]),
        (sequence(clip_high_threshold=floats(0.9, 1, 1)), NARROW, ["clip_low_threshold is above", "at [0]"]),
    ],
)  # fmt: skip
def test_a_wrong_gspo_datum_is_refused(datum: Datum, config: dict[str, float], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        check_operation(ForwardBackward([sequence(), datum], "gspo", dict(config)), INFO)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_loss_of_unknown_formula_is_refused_with_the_alternatives() -> None:
    with pytest.raises(UserError) as caught:
        check_operation(ForwardBackward([policy()], "stable_reinforce", {"kl_coeff": 0.1}), INFO)
    assert "'stable_reinforce', whose formula is not public" in str(caught.value)
    assert "loss_fn=importance_sampling or ppo or cispo or dro or gspo" in str(caught.value)


@pytest.mark.parametrize("loss", ["custom", "", "x" * 5000])
def test_an_unknown_loss_is_refused_with_the_known_ones(loss: str) -> None:
    with pytest.raises(UserError, match="importance_sampling, ppo") as caught:
        check_operation(Forward([supervised()], loss), INFO)
    assert loss[:80] in str(caught.value)
    assert len(str(caught.value)) < 250


def test_a_loss_that_this_engine_lacks_is_refused() -> None:
    only_one = msgspec.structs.replace(INFO, losses=("cross_entropy",))
    with pytest.raises(UserError, match=r"loss_fn is 'ppo'; this engine has cross_entropy$"):
        check_operation(Forward([policy()], "ppo"), only_one)


@pytest.mark.parametrize(
    ("loss", "config", "words"),
    [
        (
            "cross_entropy",
            {"clip_low_threshold": 0.8},
            "'clip_low_threshold'; cross_entropy takes no settings",
        ),
        ("ppo", {"epsilon": 0.2}, "'epsilon'; ppo takes clip_low_threshold, clip_high_threshold"),
        ("ppo", {"clip_low_threshold": "0.8"}, "loss_fn_config['clip_low_threshold'] is the text '0.8'"),
        (
            "ppo",
            {"clip_low_threshold": -0.1},
            "loss_fn_config['clip_low_threshold'] is -0.1; it must be a finite",
        ),
        ("ppo", {"clip_high_threshold": float("nan")}, "loss_fn_config['clip_high_threshold'] is nan"),
        ("ppo", {"clip_high_threshold": float("inf")}, "loss_fn_config['clip_high_threshold'] is inf"),
        ("cispo", {"clip_low_threshold": 1.3}, "clip_low_threshold is 1.3 and clip_high_threshold is 1.2"),
        ("dro", {}, "loss_fn_config['beta'] is missing"),
        ("dro", {"beta": -1.0}, "loss_fn_config['beta'] is -1.0"),
    ],
)
def test_a_wrong_setting_is_refused(loss: str, config: dict[str, float | str], words: str) -> None:
    datum = supervised() if loss == "cross_entropy" else policy()
    assert words in refused(datum, loss, **config)


def test_no_data_is_refused() -> None:
    with pytest.raises(UserError, match="data is empty"):
        check_operation(ForwardBackward([], "cross_entropy"), INFO)


# ---------------------------------------------------------------------------- steps and runs


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"learning_rate": -1e-4},
            "adam_params.learning_rate is -0.0001; it must be a finite number, at least 0",
        ),
        ({"learning_rate": float("nan")}, "adam_params.learning_rate is nan"),
        ({"learning_rate": float("inf")}, "adam_params.learning_rate is inf"),
        ({"beta1": 1.0}, "adam_params.beta1 is 1.0"),
        ({"beta1": -0.1}, "adam_params.beta1 is -0.1"),
        ({"beta2": 1.5}, "adam_params.beta2 is 1.5"),
        ({"eps": -1e-8}, "adam_params.eps is -1e-08"),
        ({"eps": 0.0}, "adam_params.eps is 0.0"),
        ({"weight_decay": -0.1}, "adam_params.weight_decay is -0.1"),
        ({"grad_clip_norm": -1.0}, "adam_params.grad_clip_norm is -1.0"),
        ({"grad_clip_norm": float("nan")}, "adam_params.grad_clip_norm is nan"),
    ],
)
def test_a_wrong_step_is_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_operation(OptimStep(**settings), INFO)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (LoraSpec(rank=0, seed=1), "lora_config.rank is 0; test/model takes ranks from 1 to 32"),
        (LoraSpec(rank=33, seed=1), "lora_config.rank is 33"),
        (LoraSpec(rank=4, seed=1, alpha=0.0), "lora_config.alpha is 0.0"),
        (LoraSpec(rank=4, seed=1, alpha=float("nan")), "lora_config.alpha is nan"),
        (LoraSpec(4, 1, 32.0, False, False, False), "all false"),
    ],
)
def test_a_wrong_adapter_is_refused(lora: LoraSpec, words: str) -> None:
    with pytest.raises(UserError) as caught:
        check_operation(CreateRun(lora), INFO)
    assert words in str(caught.value)


def test_an_engine_that_cannot_adapt_the_unembedding_says_so() -> None:
    info = msgspec.structs.replace(INFO, train_unembed=False)
    with pytest.raises(UserError, match="train_unembed=False"):
        check_operation(CreateRun(LoraSpec(rank=4, seed=1)), info)
    check_operation(CreateRun(LoraSpec(rank=4, seed=1, train_unembed=False)), info)


@pytest.mark.parametrize(
    ("name", "most", "beyond"),
    [
        ("learning_rate", 1e4, 10001.0),
        ("weight_decay", 1e4, 10001.0),
        ("grad_clip_norm", 1e30, 1.01e30),
        ("eps", 1.0, 1.01),
    ],
)
def test_a_step_holds_no_number_that_float32_arithmetic_cannot(name: str, most: float, beyond: float) -> None:
    check_operation(OptimStep(**{name: most}), INFO)
    for value in (beyond, 1e39, 1e300):
        with pytest.raises(UserError) as caught:
            check_operation(OptimStep(**{name: value}), INFO)
        assert f"adam_params.{name} is {value}; " in str(caught.value)
        assert f"at most {most:g}" in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        ("dro", "beta"),
        ("ppo", "clip_high_threshold"),
        ("ppo", "clip_low_threshold"),
        ("cispo", "clip_high_threshold"),
    ],
)
def test_a_loss_takes_no_setting_that_float32_arithmetic_cannot(loss: str, name: str) -> None:
    both = {"clip_high_threshold": 1e30} if loss != "dro" else {}
    check_operation(ForwardBackward([policy()], loss, {**both, name: 1e30}), INFO)
    with pytest.raises(UserError) as caught:
        check_operation(ForwardBackward([policy()], loss, {**both, name: 1e300}), INFO)
    assert f"loss_fn_config['{name}'] is 1e+300; " in str(caught.value)
    assert "at most 1e+30" in str(caught.value)


@pytest.mark.parametrize("value", [1.1e30, -3e38])
def test_loss_inputs_hold_no_number_whose_products_float32_cannot(value: float) -> None:
    sentence = refused(policy(advantages=floats(0, value, 1)), "ppo")
    assert f"data[1].loss_fn_inputs['advantages'][1] is {value:g}; " in sentence
    assert "from -1e+30 to 1e+30" in sentence
    check_operation(ForwardBackward([policy(advantages=floats(0, 9e29, -9e29))], "ppo"), INFO)


def test_an_adapter_whose_scale_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(UserError, match=r"lora_config\.alpha is 1e\+300; .* at most 1e\+30"):
        check_operation(CreateRun(LoraSpec(rank=1, seed=1, alpha=1e300)), INFO)

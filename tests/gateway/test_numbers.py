"""The whole way — official SDK, HTTP, store, engine process — against a plain PEFT loop, number by number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from safetensors.torch import load_file

from engines.operations import LoraSpec
from tests.gateway.conftest import KEY
from tests.hf.conftest import model_folders
from tests.hf.material import TIED, difference, factors, own_logprobs, peft_model, plain_model, text
from tests.served import ServedGateway

__all__ = ["model_folders"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::FutureWarning", "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
    ),
    pytest.mark.filterwarnings(f"ignore:{TIED}"),
]
STEPS = 20
SPEC = LoraSpec(rank=4, seed=11)


@pytest.fixture(scope="module")
def gateway(
    model_folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServedGateway]:
    engine = {
        "name": "hf",
        "base_model": "test/tied",
        "model": model_folders["tied"],
        "options": {"threads": 1, "device": "cpu"},
    }
    served = ServedGateway(tmp_path_factory.mktemp("numbers"), [engine])
    served.start(timeout_s=120)
    yield served
    served.stop()
    served.close()


@pytest.fixture
def service(gateway: ServedGateway) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=gateway.url, api_key=KEY) as client:
        yield client


def begin(service: tinker.ServiceClient) -> tinker.TrainingClient:
    return service.create_lora_training_client("test/tied", rank=SPEC.rank, seed=SPEC.seed).result()


def examples(step: int) -> list[tinker.Datum]:
    """Four sequences of different lengths, with fractional and negative weights."""
    data = []
    for index, length in enumerate((5, 17, 9, 30)):
        tokens = text(100 * step + index, length + 1)
        weights = np.random.default_rng(step + index).choice([1.0, 0.5, 0.0, -0.25], length)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
                loss_fn_inputs={
                    "target_tokens": tinker.TensorData(data=tokens[1:].tolist(), dtype="int64"),
                    "weights": tinker.TensorData(data=weights.tolist(), dtype="float32"),
                },
            )
        )
    return data


def column(datum: tinker.Datum, name: str) -> np.ndarray[Any, Any]:
    return np.array(datum.loss_fn_inputs[name].data)


def reference(
    folder: str, settings: dict[str, float], parts: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The same training with PEFT and torch: losses, and the final factors."""
    model = peft_model(folder, SPEC)
    weights = factors(model)
    optimizer = torch.optim.AdamW(
        weights.values(),
        lr=settings["learning_rate"],
        betas=(0.9, 0.95),
        eps=1e-12,
        weight_decay=settings.get("weight_decay", 0.0),
    )
    losses = []
    for step in range(STEPS):
        total = 0.0
        for part in range(parts):
            for datum in examples(step * parts + part):
                logprobs = own_logprobs(model, datum.model_input.to_ints(), column(datum, "target_tokens"))
                loss = -(logprobs * torch.tensor(column(datum, "weights"))).sum()
                loss.backward()
                total += loss.item()
        if settings.get("grad_clip_norm"):
            torch.nn.utils.clip_grad_norm_(list(weights.values()), settings["grad_clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, {name: weight.detach() for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"learning_rate": 1e-3}, 1),
        ({"learning_rate": 1e-3}, 2),
        ({"learning_rate": 1e-3, "grad_clip_norm": 1.0}, 1),
        ({"learning_rate": 1e-3, "weight_decay": 0.3}, 1),
    ],
    ids=["plain", "two passes a step", "clipped", "decayed"],
)
def test_twenty_steps_equal_a_plain_peft_loop(
    service: tinker.ServiceClient,
    gateway: ServedGateway,
    model_folders: dict[str, str],
    settings: dict[str, float],
    parts: int,
) -> None:
    client = begin(service)
    steps = []
    for step in range(STEPS):
        passes = [client.forward_backward(examples(step * parts + p), "cross_entropy") for p in range(parts)]
        steps.append((passes, client.optim_step(tinker.AdamParams(**settings))))
    losses = [sum(p.result().metrics["loss:sum"] for p in passes) for passes, _ in steps]
    path = client.save_state("end").result().path

    expected_losses, expected_factors = reference(model_folders["tied"], settings, parts)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-4)
    saved = saved_adapter(gateway, path)
    assert len(saved) == len(expected_factors)
    for name, expected in expected_factors.items():
        assert difference(saved[f"base_model.model.{name}.weight"], expected) < 1e-4, name


def saved_adapter(gateway: ServedGateway, path: str) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's files; the newest folder is the one just saved."""
    return load_file(newest_folder(gateway) / "adapter_model.safetensors")


def newest_folder(gateway: ServedGateway) -> Path:
    return max(
        (gateway.data_dir / "storage" / "checkpoints").iterdir(), key=lambda folder: folder.stat().st_mtime
    )


def test_the_saved_adapter_gives_peft_the_same_log_probs(
    service: tinker.ServiceClient, gateway: ServedGateway, model_folders: dict[str, str]
) -> None:
    client = begin(service)
    for step in range(5):
        client.forward_backward(examples(step), "cross_entropy").result()
        client.optim_step(tinker.AdamParams(learning_rate=5e-3)).result()
    client.save_weights_for_sampler("final").result()
    loaded = PeftModel.from_pretrained(plain_model(model_folders["tied"]), str(newest_folder(gateway)))
    for datum, output in zip(
        examples(9), client.forward(examples(9), "cross_entropy").result().loss_fn_outputs, strict=True
    ):
        expected = own_logprobs(loaded, datum.model_input.to_ints(), column(datum, "target_tokens"))
        np.testing.assert_allclose(output["logprobs"].data, expected.detach().numpy(), atol=1e-4)


def test_sampled_prompt_and_trained_log_probs_agree(service: tinker.ServiceClient) -> None:
    client = begin(service)
    for step in range(5):
        client.forward_backward(examples(step), "cross_entropy").result()
        client.optim_step(tinker.AdamParams(learning_rate=5e-3)).result()
    sampler = client.save_weights_and_get_sampling_client().result()
    prompt = text(7, 11).tolist()
    params = tinker.SamplingParams(max_tokens=20, temperature=1.0, seed=3, stop=[])
    sampled = sampler.sample(
        tinker.ModelInput.from_ints(prompt), num_samples=1, sampling_params=params
    ).result()
    [sequence] = sampled.sequences
    tokens = [*prompt, *sequence.tokens]
    scored = sampler.compute_logprobs(tinker.ModelInput.from_ints(tokens)).result()
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32"),
        },
    )
    trained = client.forward([datum], "cross_entropy").result().loss_fn_outputs[0]["logprobs"].data
    np.testing.assert_allclose(np.array(scored[1:], dtype=float), trained, atol=1e-4)
    assert sequence.logprobs is not None
    np.testing.assert_allclose(np.array(sequence.logprobs), np.array(trained[len(prompt) - 1 :]), atol=1e-4)


def test_a_fresh_adapter_is_the_base_model(service: tinker.ServiceClient) -> None:
    prompt = tinker.ModelInput.from_ints(text(8, 25).tolist())
    fresh = begin(service).save_weights_and_get_sampling_client().result().compute_logprobs(prompt).result()
    base = service.create_sampling_client(base_model="test/tied").result().compute_logprobs(prompt).result()
    np.testing.assert_allclose(np.array(fresh[1:], dtype=float), np.array(base[1:], dtype=float), atol=1e-6)


def test_save_train_load_continue_is_bit_identical(
    service: tinker.ServiceClient, gateway: ServedGateway
) -> None:
    adam = tinker.AdamParams(learning_rate=5e-3)
    client = begin(service)
    for step in range(4):
        client.forward_backward(examples(step), "cross_entropy").result()
        client.optim_step(adam).result()
    middle = client.save_state("middle").result().path
    resumed = service.create_training_client_from_state_with_optimizer(middle).result()
    adapters = []
    for each in (client, resumed):
        for step in range(4, 8):
            each.forward_backward(examples(step), "cross_entropy").result()
            each.optim_step(adam).result()
        each.save_state("end").result()
        folder = newest_folder(gateway)
        adapters.append([(folder / name).read_bytes() for name in _STATE])
    assert adapters[0] == adapters[1]


_STATE = ("adapter_model.safetensors", "optimizer.safetensors")

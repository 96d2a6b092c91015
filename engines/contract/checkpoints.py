"""The contract of saving and loading: nothing is lost, nothing is made up, and a refusal changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER, peft_key
from engines.contract.material import Caller, EngineFactory, batch, same, weights
from engines.interface import DamagedWeights, Engine, RunOperation, SampleEnd, UserError
from engines.operations import AdapterRef, CreateRun, LoraSpec, SampleRequest
from engines.storage import CHECKSUMS
from engines.tensors import Tensor


def damages(path: Path) -> Iterator[None]:
    """A file with one bit flipped in its middle and at its end, cut short, and gone; at last it is whole again."""
    whole = path.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        yield
    path.write_bytes(whole[:-5])
    yield
    path.unlink()
    yield
    path.write_bytes(whole)


def failure_of_sample(engine: Engine, folder: str) -> Exception | None:
    """Why an adapter is not sampled, told at the start or at the end; None: it is."""
    prompt = Tensor.of(np.array([1, 2, 3], dtype=np.int32))
    request = SampleRequest(prompt, 1, seed=1, max_tokens=2, adapter=AdapterRef(folder, folder))
    try:
        engine.start_sample(1, request)
    except UserError as error:
        return error
    for _ in range(100):
        for event in engine.advance():
            if isinstance(event, SampleEnd):
                return event.result if isinstance(event.result, Exception) else None
    raise AssertionError("the sample does not end")


class CheckpointContract:
    """All comparisons are exact: a checkpoint holds the numbers themselves."""

    def test_a_checkpoint_is_a_peft_folder(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        caller.create(rank=3, alpha=6.0)
        result = caller.save("checkpoints/plain")
        folder = storage / "checkpoints/plain"
        names = {path.name: path.stat().st_size for path in folder.iterdir()}
        assert names.keys() == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, CHECKSUMS}
        assert result.size_bytes == sum(names.values()) - names[CHECKSUMS]
        config = json.loads((folder / ADAPTER_CONFIG).read_bytes())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
        factors = weights(storage, "checkpoints/plain")
        for name, values in factors.items():
            module, _, factor = name.removesuffix(".weight").rpartition(".lora_")
            assert module.startswith("base_model.model.")
            assert module.rpartition(".")[2] in config["target_modules"]
            assert values.shape[0 if factor == "A" else 1] == 3
            assert f"{module}.lora_{'B' if factor == 'A' else 'A'}.weight" in factors

    def test_its_layers_are_those_that_the_engine_tells(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        caller.create(rank=3)
        caller.save("checkpoints/layers")
        expected = {}
        for layer, (inner, outer) in caller.info.layers.items():
            expected[peft_key(layer, "A")] = (3, inner)
            expected[peft_key(layer, "B")] = (outer, 3)
        shapes = {name: values.shape for name, values in weights(storage, "checkpoints/layers").items()}
        if not caller.info.train_unembed:
            expected = {name: shape for name, shape in expected.items() if ".lm_head." not in name}
        assert shapes == expected

    def test_optimizer_state_is_saved_when_asked(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        caller.create()
        result = caller.save("checkpoints/full", optimizer_state=True)
        files = {path.name: path.read_bytes() for path in (storage / "checkpoints/full").iterdir()}
        sums = json.loads(files.pop(CHECKSUMS))
        assert files.keys() == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER}
        assert result.size_bytes == sum(len(content) for content in files.values())
        assert sums == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}

    @pytest.mark.parametrize("trained_before", [0, 3])
    @pytest.mark.parametrize("way", ["load", "create", "create in another engine"])
    def test_continuing_is_never_having_stopped(
        self, engine_factory: EngineFactory, way: str, trained_before: int
    ) -> None:
        caller = Caller(engine_factory())
        data = batch(caller.info)
        caller.create(seed=2)
        caller.train(data, trained_before, weight_decay=0.1)
        caller.save("checkpoints/middle", optimizer_state=True)
        expected_losses = caller.train(data, 3, weight_decay=0.1)
        expected = caller.logprobs(data)
        if way == "load":
            caller.load("checkpoints/middle", optimizer_state=True)
        else:
            caller = Caller(engine_factory()) if way == "create in another engine" else caller
            caller.create(seed=2, folder="checkpoints/middle", optimizer_state=True)
        assert caller.train(data, 3, weight_decay=0.1) == expected_losses
        assert same(caller.logprobs(data), expected)

    @pytest.mark.parametrize("way", ["load", "create"])
    def test_without_optimizer_state_it_starts_afresh(self, engine: Engine, way: str) -> None:
        """The weights are the checkpoint's, the next step is a first one: of another length than a third one."""
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create("old")
        caller.train(data, 2, "old")
        caller.save("checkpoints/both", "old", optimizer_state=True)
        caller.save("checkpoints/weights", "old")
        saved = caller.logprobs(data, "old")
        after = {}
        for folder in ("checkpoints/both", "checkpoints/weights"):
            if way == "load":
                caller.create(folder)
                caller.train(data, 1, folder)
                caller.load(folder, folder)
            else:
                caller.create(folder, folder=folder)
            assert same(caller.logprobs(data, folder), saved)
            caller.train(data, 1, folder)
            after[folder] = caller.logprobs(data, folder)
        assert same(after["checkpoints/both"], after["checkpoints/weights"])
        caller.train(data, 1, "old")
        assert not same(after["checkpoints/both"], caller.logprobs(data, "old"))

    @pytest.mark.parametrize("optimizer_state", [False, True])
    def test_saving_between_gradient_and_step_loses_nothing(
        self, engine: Engine, optimizer_state: bool
    ) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("plain", "saved"):
            caller.create(run_id)
            caller.train(data, 1, run_id)
            caller.forward_backward(data, run_id=run_id)
            if run_id == "saved":
                caller.save("checkpoints/between", run_id, optimizer_state)
            caller.step(run_id)
        assert same(caller.logprobs(data, "saved"), caller.logprobs(data, "plain"))

    def test_a_checkpoint_holds_no_pending_gradient(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.forward_backward(data)
        caller.save("checkpoints/pending", optimizer_state=True)
        caller.create("new", folder="checkpoints/pending", optimizer_state=True)
        assert caller.step("new") == 0.0

    def test_loading_clears_the_pending_gradient(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.save("checkpoints/start", optimizer_state=True)
        caller.forward_backward(data)
        caller.load("checkpoints/start", optimizer_state=True)
        assert caller.step() == 0.0

    def test_a_checkpoint_does_not_follow_its_run(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 1)
        saved = caller.logprobs(data)
        caller.save("checkpoints/then")
        caller.train(data, 2)
        caller.load("checkpoints/then")
        assert same(caller.logprobs(data), saved)

    def test_a_save_may_come_again(self, engine: Engine, storage: Path) -> None:
        """A replayed operation writes the same folder once more."""
        caller = Caller(engine)
        caller.create()
        caller.save("checkpoints/twice")
        before = weights(storage, "checkpoints/twice")
        caller.save("checkpoints/twice")
        after = weights(storage, "checkpoints/twice")
        assert before.keys() == after.keys()
        assert same(list(after.values()), list(before.values()))

    # ------------------------------------------------------------------ refusals

    def test_a_missing_folder_is_refused_without_effect(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 1)
        caller.forward_backward(data)
        before = caller.logprobs(data)
        for optimizer_state in (False, True):
            with pytest.raises(DamagedWeights, match="the stored weights are not there"):
                caller.load("checkpoints/never-saved", optimizer_state=optimizer_state)
        assert same(caller.logprobs(data), before)
        assert caller.step() > 0

    def test_missing_optimizer_state_is_refused_without_effect(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.save("checkpoints/weights")
        caller.train(data, 1)
        before = caller.logprobs(data)
        with pytest.raises(UserError, match="optimizer"):
            caller.load("checkpoints/weights", optimizer_state=True)
        with pytest.raises(UserError, match="optimizer"):
            caller.create("new", folder="checkpoints/weights", optimizer_state=True)
        assert same(caller.logprobs(data), before)

    def test_an_adapter_of_another_shape_is_refused_without_effect(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create("small", rank=2)
        caller.create("large", rank=4)
        caller.train(data, 1, "small")
        before = caller.logprobs(data, "small")
        caller.save("checkpoints/large", "large")
        with pytest.raises(UserError, match="rank"):
            caller.load("checkpoints/large", "small")
        assert same(caller.logprobs(data, "small"), before)

    def test_an_adapter_of_another_scale_is_refused_without_effect(self, engine: Engine) -> None:
        """Its numbers would mean something else: the run adds (alpha / rank) B A."""
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create("scaled", alpha=8.0)
        caller.create("run")
        caller.train(data, 1)
        before = caller.logprobs(data)
        caller.save("checkpoints/scaled", "scaled")
        with pytest.raises(UserError, match="alpha"):
            caller.load("checkpoints/scaled")
        with pytest.raises(UserError, match="alpha"):
            caller.create("new", folder="checkpoints/scaled")
        assert same(caller.logprobs(data), before)

    def test_an_adapter_of_other_layers_is_refused(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create("all")
        caller.create("attention", train_mlp=False, train_unembed=False)
        caller.save("checkpoints/attention", "attention")
        with pytest.raises(UserError, match="train_mlp"):
            caller.load("checkpoints/attention", "all")

    @pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, OPTIMIZER])
    def test_a_damaged_file_is_refused_and_named(self, engine: Engine, storage: Path, name: str) -> None:
        """No flipped bit gets into a run, nor into one that is to begin there, and it changes nothing."""
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 1)
        caller.save("checkpoints/damaged", optimizer_state=True)
        caller.train(data, 1)
        before = caller.logprobs(data)
        path = storage / "checkpoints/damaged" / name
        for _ in damages(path):
            with pytest.raises(DamagedWeights, match=name) as refused:
                caller.load("checkpoints/damaged", optimizer_state=True)
            assert "checkpoints/damaged" not in str(refused.value)
            assert refused.value.path == path
            with pytest.raises(DamagedWeights, match=name):
                caller.create("new", folder="checkpoints/damaged", optimizer_state=True)
        assert same(caller.logprobs(data), before)

    def test_damaged_checksums_are_refused_and_named(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        caller.create()
        caller.save("checkpoints/unsealed")
        path = storage / "checkpoints/unsealed" / CHECKSUMS
        for content in (b"", b"[]", b"\xff"):
            path.write_bytes(content)
            with pytest.raises(DamagedWeights, match=CHECKSUMS):
                caller.load("checkpoints/unsealed")

    @pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    def test_a_damaged_file_is_not_sampled(
        self, engine_factory: EngineFactory, storage: Path, name: str
    ) -> None:
        caller = Caller(engine_factory())
        caller.create()
        caller.save("checkpoints/sampled")
        other = engine_factory()  # which has not kept the adapter since it was saved
        for _ in damages(storage / "checkpoints/sampled" / name):
            error = failure_of_sample(other, "checkpoints/sampled")
            assert isinstance(error, DamagedWeights) and name in str(error)
            assert "checkpoints/sampled" not in str(error)
            assert not other.sampling

    def test_a_folder_without_checksums_loads(self, engine_factory: EngineFactory, storage: Path) -> None:
        """It is older than they are. What is missing there, or is no such file, is damage all the same."""
        caller = Caller(engine_factory())
        data = batch(caller.info)
        caller.create()
        caller.train(data, 1)
        caller.save("checkpoints/old", optimizer_state=True)
        saved = caller.logprobs(data)
        folder = storage / "checkpoints/old"
        (folder / CHECKSUMS).unlink()
        caller.train(data, 1)
        caller.load("checkpoints/old", optimizer_state=True)
        assert same(caller.logprobs(data), saved)
        other = engine_factory()
        assert failure_of_sample(other, "checkpoints/old") is None
        path = folder / ADAPTER_WEIGHTS
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(DamagedWeights, match=ADAPTER_WEIGHTS):
            caller.load("checkpoints/old")
        path.unlink()
        with pytest.raises(DamagedWeights, match=ADAPTER_WEIGHTS):
            caller.load("checkpoints/old")
        (folder / OPTIMIZER).unlink()
        path.write_bytes(b"")
        with pytest.raises(DamagedWeights, match=ADAPTER_WEIGHTS):
            caller.load("checkpoints/old")

    def test_one_load_that_fails_fails_alone(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create("source")
        caller.train(data, 1, "source")
        caller.save("checkpoints/source", "source")
        lora = LoraSpec(4, 1, train_unembed=caller.info.train_unembed)
        folders = {"first": "checkpoints/none", "second": "checkpoints/source"}
        items = [RunOperation(run_id, CreateRun(lora, folder=folder)) for run_id, folder in folders.items()]
        first, second = engine.create_runs(items)
        assert isinstance(first, UserError)
        assert not isinstance(second, UserError)
        assert same(caller.logprobs(data, "second"), caller.logprobs(data, "source"))

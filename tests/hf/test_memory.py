"""Memory runs out: the operation that needs too much fails alone, says so, and has no effect."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engines.hf import HfEngine
from engines.hf.budget import bytes_per_token
from engines.interface import EngineBroken, OutOfMemory, RunOperation, SampleEnd
from engines.operations import (
    CreateRun,
    ForwardBackward,
    LoraSpec,
    OptimStep,
    SampleRequest,
    SampleResult,
)
from engines.tuning.lora import Adapter, Segment
from engines.tuning.packed_attention import PackedLayout
from engines.tuning.torch_errors import is_lack_of_memory
from tests.hf.conftest import MakeEngine
from tests.hf.material import (
    create,
    engine_factors,
    forward,
    forward_backward,
    request,
    step,
    supervised,
    text,
)
from tests.hf.test_sampling import close

ROOT = Path(__file__).parents[2]
Limit = Callable[[int], None]


class Limited:
    """A model whose passes lack memory beyond so many tokens, or as often as it is told."""

    def __init__(self, engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens = 10**9
        self.failures = 0
        self.lacked = 0
        hidden = engine.base.hidden

        def limited(pack: Any, layout: Any, segments: Any) -> torch.Tensor:
            if pack.tokens.numel() > self.tokens or self.failures > 0:
                self.failures -= 1
                self.lacked += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return hidden(pack, layout, segments)

        monkeypatch.setattr(engine.base, "hidden", limited)


@pytest.fixture
def limited(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> Limited:
    return Limited(engine, monkeypatch)


def test_errors_of_memory_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_lack_of_memory(caught.value)
    assert is_lack_of_memory(MemoryError())
    assert is_lack_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.ones(2) @ torch.ones(3)
    assert not is_lack_of_memory(caught.value)


def test_a_device_that_fails_breaks_the_engine_whatever_it_was_doing(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(engine)
    engine.start_sample(1, request([1, 2, 3], max_tokens=2))

    def failing(*_: Any) -> None:
        raise torch.AcceleratorError(
            "CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA"
        )

    monkeypatch.setattr(engine.base, "hidden", failing)
    sentence = "^CUDA error: device-side assert triggered$"
    with pytest.raises(EngineBroken, match=sentence):
        engine.forward_backward([RunOperation("run", ForwardBackward(supervised([5]), "cross_entropy"))])
    with pytest.raises(EngineBroken, match=sentence):
        engine.advance()


# ---------------------------------------------------------------------------- training


def test_what_lacks_memory_in_its_last_pass_has_no_effect_and_the_run_goes_on(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, untouched = make_engine(pass_tokens=16), make_engine(pass_tokens=16)
    limited = Limited(engine, monkeypatch)
    for each in (engine, untouched):
        create(each)
        forward_backward(each, supervised([12, 9]))
    limited.tokens = 16
    too_large = ForwardBackward(supervised([8, 8, 30]), "cross_entropy")
    [outcome] = engine.forward_backward([RunOperation("run", too_large)])
    assert isinstance(outcome, OutOfMemory)
    assert not outcome.passing
    assert "cpu has no memory left for a pass over so much data; send fewer or shorter data" in str(outcome)
    assert (
        limited.lacked == 3
    )  # once more after everything else was let go, and once more with layers computed again
    for each in (engine, untouched):
        forward_backward(each, supervised([5]))
        step(each)
    found, expected = engine_factors(engine), engine_factors(untouched)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_other_runs_of_a_call_are_served(engine: HfEngine, limited: Limited) -> None:
    create(engine, "a")
    create(engine, "b")
    alone = forward(engine, supervised([6]), run_id="b")
    limited.tokens = 20
    large = ForwardBackward(supervised([30]), "cross_entropy")
    small = ForwardBackward(supervised([6]), "cross_entropy")
    first, second = engine.forward_backward([RunOperation("a", large), RunOperation("b", small)])
    assert isinstance(first, OutOfMemory)
    assert second.metrics["loss:sum"] == alone.metrics["loss:sum"]  # type: ignore[union-attr]


def test_what_finds_room_at_the_second_try_succeeds(engine: HfEngine, limited: Limited) -> None:
    create(engine)
    expected = forward(engine, supervised([6]))
    limited.failures = 1
    assert forward(engine, supervised([6])).metrics == expected.metrics
    assert limited.lacked == 1


def test_passes_that_lack_memory_become_smaller_and_grow_again(engine: HfEngine, limited: Limited) -> None:
    """Two runs with 200 tokens each, and memory for passes of 150: both succeed, with the numbers of one large pass."""
    items = []
    for run_id in ("a", "b"):
        create(engine, run_id)
        items.append(RunOperation(run_id, ForwardBackward(supervised([40] * 5), "cross_entropy")))
    expected = [outcome.metrics["loss:sum"] for outcome in engine.forward_backward(items)]  # type: ignore[union-attr]
    full = engine.budget.tokens
    limited.tokens = 150
    found = [outcome.metrics["loss:sum"] for outcome in engine.forward_backward(items)]  # type: ignore[union-attr]
    assert found == pytest.approx(expected, rel=1e-5)
    shrunk = engine.budget.tokens
    assert shrunk < 300
    tries = limited.lacked
    engine.forward_backward(items)
    assert limited.lacked == tries  # the size that was found is kept, but for
    assert shrunk < engine.budget.tokens < full  # a little more each time
    limited.tokens = 10**9
    forward(engine, supervised([4]), run_id="a")
    for _ in range(300):
        engine.budget.went_well()
    assert engine.budget.tokens == full


def test_deterministic_passes_are_the_same_whatever_memory_there_is(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.hf.engine.free_bytes", lambda _: 2**20)
    assert make_engine(deterministic=True).budget.tokens == 4096
    engine = make_engine(deterministic=True, pass_tokens=100)
    create(engine)
    Limited(engine, monkeypatch).tokens = 50
    data = supervised([40, 40])
    [outcome] = engine.forward_backward([RunOperation("run", ForwardBackward(data, "cross_entropy"))])
    assert isinstance(outcome, OutOfMemory)
    assert engine.budget.tokens == 100


def test_a_pass_takes_what_memory_holds(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token costs is the sum of what autograd keeps, found here with other lengths and ranks."""
    base = make_engine().base
    found = bytes_per_token(base)
    spec = LoraSpec(rank=4, seed=0)
    adapter = Adapter.initial(base.sites, spec, base.device)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor.data_ptr() == weight.data_ptr() for weight in base.module.parameters()):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        holds.append(tensor)
        return tensor

    holds: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base.hidden(base.pack([text(1, 200)]), PackedLayout([200]), [Segment(adapter, 0, 200)])
    assert found == pytest.approx(sum(kept.values()) / 200, rel=0.2)
    monkeypatch.setattr("engines.hf.engine.free_bytes", lambda _: int(found * 1000 / 0.25))
    assert make_engine().budget.tokens == pytest.approx(1000, abs=1)
    limited = make_engine(pass_tokens=300)
    assert limited.budget.tokens == limited.info().pass_tokens == 300
    monkeypatch.setattr("engines.hf.engine.free_bytes", lambda _: 2**50)
    assert make_engine().budget.tokens == 4096
    monkeypatch.setattr("engines.hf.engine.free_bytes", lambda _: 1)
    assert make_engine().budget.tokens == 64


def saved_bytes(engine: HfEngine) -> int:
    """What a training pass of 300 tokens keeps."""
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward_backward(engine, supervised([300], seed=1))
    return total


@pytest.mark.parametrize("model", ["tied", "llama"])
def test_layers_that_are_computed_again_give_the_same_gradients_for_less_memory(
    make_engine: MakeEngine, model: str
) -> None:
    whole, again = make_engine(model), make_engine(model, checkpointing=True)
    passes: list[int] = []
    for layer in again.base.decoder.layers:  # type: ignore[union-attr]
        layer.self_attn.register_forward_hook(lambda *_: passes.append(1))
    for each in (whole, again):
        create(each, "run")
        create(each, "other", LoraSpec(rank=2, seed=3, train_attn=False))
        for number in range(3):
            items = [
                RunOperation(run_id, ForwardBackward(supervised([30, 11], seed=number), "cross_entropy"))
                for run_id in ("run", "other")
            ]
            each.forward_backward(items)
            step(each, "run", learning_rate=1e-2)
            step(each, "other", learning_rate=1e-2)
    assert len(passes) == 3 * 2 * 2  # steps, layers, there and back
    for run_id in ("run", "other"):
        assert torch.equal(whole.runs[run_id].adapter.values, again.runs[run_id].adapter.values)
    assert forward(whole, supervised([9])).metrics == forward(again, supervised([9])).metrics
    assert saved_bytes(again) < 0.5 * saved_bytes(whole)


def test_a_datum_that_only_fits_when_layers_are_computed_again_succeeds(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(engine)
    expected = forward_backward(engine, supervised([50])).metrics["loss:sum"]
    hidden = engine.base.hidden

    def lacking(*given: Any) -> torch.Tensor:
        if not engine.base.checkpointed:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return hidden(*given)

    monkeypatch.setattr(engine.base, "hidden", lacking)
    assert forward_backward(engine, supervised([50])).metrics["loss:sum"] == expected
    assert not engine.base.checkpointed


def test_a_run_for_which_there_is_no_room_may_find_some_later(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: Any) -> None:
        raise RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte\nfrom here"
        )

    with monkeypatch.context() as patched:
        patched.setattr("engines.tuning.lora.Adapter.initial", lacking)
        [outcome] = engine.create_runs([RunOperation("a", CreateRun(LoraSpec(rank=4, seed=1)))])
    assert isinstance(outcome, OutOfMemory)
    assert outcome.passing
    assert str(outcome) == "cpu has no memory left for another run"
    create(engine, "a")


def test_a_step_in_which_memory_runs_out_puts_its_run_in_doubt(
    engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a step may have been taken: the host drops the run, and it is restored."""
    create(engine)
    forward_backward(engine, supervised([6]))

    def lacking(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("engines.tuning.optimizer.AdamW.moments", lacking)
    with pytest.raises(MemoryError, match="CUDA out of memory"):
        engine.optim_step([RunOperation("run", OptimStep(learning_rate=1e-3))])


REAL = """
import resource, sys
import msgspec
from engines.hf import HfEngine
from engines.hf.budget import TokenBudget
from engines.interface import EngineConfig, OutOfMemory, RunOperation, UserError
from engines.operations import ForwardBackward
from tests.hf.material import create, forward_backward, step, supervised

config = EngineConfig("e", "hf", "m", sys.argv[1], ("train",), sys.argv[2], 1, {"threads": 1, "pass_tokens": 10**9})
engine = HfEngine.load(config)
create(engine)
forward_backward(engine, supervised([40, 50]))
step(engine)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20, resource.RLIM_INFINITY))
large, huge = ([RunOperation("run", ForwardBackward(supervised([500] * n), "cross_entropy"))] for n in (80, 400))
[outcome] = engine.forward_backward(large)
assert not isinstance(outcome, UserError) and len(outcome.outputs) == 80, outcome
assert engine.budget.tokens < 40_000
step(engine)
engine.options = msgspec.structs.replace(engine.options, deterministic=True)
engine.budget = TokenBudget(10**9, fixed=True)
[outcome] = engine.forward_backward(huge)
assert isinstance(outcome, OutOfMemory), outcome
forward_backward(engine, supervised([40, 50]))
print(step(engine)["unclipped_grad_l2:mean"])
"""


def test_a_real_limit_of_the_process_makes_passes_smaller_or_fails_one_operation_only(
    model_folders: dict[str, str], engine: HfEngine, tmp_path: Path
) -> None:
    create(engine)
    norms = []
    for data in (supervised([40, 50]), supervised([500] * 80), supervised([40, 50])):
        forward_backward(engine, data)
        norms.append(step(engine)["unclipped_grad_l2:mean"])
    command = [sys.executable, "-c", REAL, model_folders["tied"], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) == pytest.approx(norms[-1], rel=1e-6)


# ---------------------------------------------------------------------------- sampling


def drawn(engine: HfEngine, requests: dict[int, SampleRequest]) -> dict[int, SampleResult | OutOfMemory]:
    """The ends of samples that are started together."""
    for call_id, each in requests.items():
        engine.start_sample(call_id, each)
    ends: dict[int, SampleResult | OutOfMemory] = {}
    steps = 0
    while engine.sampling:
        steps += 1
        assert steps < 500
        for event in engine.advance():
            if isinstance(event, SampleEnd):
                ends[event.call_id] = event.result  # type: ignore[assignment]
    return ends


def some(lengths: list[int], **settings: Any) -> dict[int, SampleRequest]:
    return {i: request(text(i, n), seed=i, max_tokens=12, **settings) for i, n in enumerate(lengths)}


def all_equal(
    found: dict[int, SampleResult | OutOfMemory], expected: dict[int, SampleResult | OutOfMemory]
) -> None:
    assert found.keys() == expected.keys()
    for call_id, result in expected.items():
        mine = found[call_id]
        assert isinstance(mine, SampleResult) and isinstance(result, SampleResult)
        close(mine, result)


def test_prompts_that_do_not_fit_together_are_taken_in_one_after_the_other(
    engine: HfEngine, limited: Limited
) -> None:
    requests = some([20, 30, 25, 10], num_samples=2)
    expected = drawn(engine, requests)
    limited.tokens = 40
    all_equal(drawn(engine, requests), expected)
    assert limited.lacked >= 1


def test_a_prompt_that_does_not_fit_alone_fails_alone(engine: HfEngine, limited: Limited) -> None:
    requests = some([20, 90, 25])
    expected = drawn(engine, requests)
    limited.tokens = 50
    found = drawn(engine, requests)
    failed = found.pop(1)
    assert isinstance(failed, OutOfMemory)
    assert not failed.passing
    assert "no memory left for this sample; ask for a shorter prompt" in str(failed)
    expected.pop(1)
    all_equal(found, expected)
    assert engine.decoder.most_rows == engine.decoder.cache.max_slots


@pytest.mark.parametrize("when", [1, 2, 5, 9])
def test_what_runs_goes_on_without_the_newest_when_a_step_lacks_memory(
    engine: HfEngine, limited: Limited, when: int
) -> None:
    requests = some([20, 30, 25])
    expected = drawn(engine, requests)
    for call_id, each in requests.items():
        engine.start_sample(call_id, each)
    ends: dict[int, SampleResult | OutOfMemory] = {}
    for count in range(100):
        if count == when:
            limited.failures = 1
        for event in engine.advance():
            if isinstance(event, SampleEnd):
                ends[event.call_id] = event.result  # type: ignore[assignment]
    failed = ends.pop(2)
    assert isinstance(failed, OutOfMemory)
    assert failed.passing
    assert "beside the others" in str(failed)
    expected.pop(2)
    all_equal(ends, expected)


def test_a_cache_that_could_not_grow_goes_on(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers have grown to different sizes then."""
    requests = some([100, 110, 40], num_samples=4)
    expected = drawn(engine, requests)
    enlarged = torch.Tensor.new_zeros
    calls = 0

    def lacking(tensor: torch.Tensor, *shape: Any, **more: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return enlarged(tensor, *shape, **more)

    monkeypatch.setattr(torch.Tensor, "new_zeros", lacking)
    found = drawn(engine, requests)
    assert calls > 7
    for call_id in [call_id for call_id, result in found.items() if isinstance(result, OutOfMemory)]:
        del found[call_id], expected[call_id]
    assert len(found) >= 2
    all_equal(found, expected)

"""The contract of the training calls: numbers, gradients, steps, and that runs do not touch each other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.adapters import part_of
from engines.contract.material import (
    Caller,
    EngineFactory,
    batch,
    distance,
    given,
    logprobs,
    same,
    supervised,
    text,
    weights,
)
from engines.interface import Engine, RunOperation, UserError
from engines.operations import CreateRun, Datum, Forward, ForwardBackward, LoraSpec, OptimStep


class TrainingContract:
    """Fixtures: `engine`, `engine_factory` (a new engine on the same model and storage), `storage` (its folder)."""

    tolerance = 1e-5
    """Relative difference between two ways to compute one thing. Zero is asked for where nothing differs."""

    # ------------------------------------------------------------------ runs

    def test_info_is_complete_and_constant(self, engine: Engine) -> None:
        info = engine.info()
        assert info == engine.info()
        assert info.vocab_size > 1
        assert info.max_context > 1
        assert info.max_rank >= 1
        assert "cross_entropy" in info.losses
        assert all(0 <= token < info.vocab_size for token in info.eos_tokens)
        assert {"resident_runs", "resident_adapters", "active_samples"} <= engine.stats().keys()

    def test_passes_are_counted_so_that_a_call_which_gets_no_further_is_noticed(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create("run")
        data = batch(caller.info)
        seen = [engine.passes]
        for call in (caller.forward_backward, caller.forward):
            call(data)
            seen.append(engine.passes)
        assert seen == sorted(set(seen))

    def test_parameters_grow_with_the_rank(self, engine: Engine) -> None:
        caller = Caller(engine)
        one = caller.create("one", rank=1).parameters
        assert one > 0
        assert caller.create("three", rank=3).parameters == 3 * one

    def test_what_a_run_occupies_grows_with_its_rank(self, engine: Engine) -> None:
        one, three = (
            engine.run_bytes(LoraSpec(rank, 1, train_unembed=engine.info().train_unembed)) for rank in (1, 3)
        )
        assert 0 < one < three

    def test_a_fresh_adapter_changes_nothing_whatever_its_seed_and_rank(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create("a", rank=1, seed=1)
        caller.create("b", rank=8, seed=2)
        data = batch(caller.info)
        assert distance(caller.logprobs(data, "a"), caller.logprobs(data, "b")) < 1e-6

    def test_the_same_seed_gives_the_same_numbers(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("a", "b"):
            caller.create(run_id, seed=3)
            caller.train(data, 3, run_id)
        assert same(caller.logprobs(data, "a"), caller.logprobs(data, "b"))

    def test_another_seed_gives_other_numbers(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id, seed in (("a", 3), ("b", 4)):
            caller.create(run_id, seed=seed)
            caller.train(data, 1, run_id)
        assert distance(caller.logprobs(data, "a"), caller.logprobs(data, "b")) > 1e-4

    def test_creating_a_run_again_begins_anew(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        fresh = caller.logprobs(data)
        caller.train(data, 2)
        caller.forward_backward(data)
        caller.create()
        assert same(caller.logprobs(data), fresh)
        assert caller.step() == 0.0

    @pytest.mark.parametrize("trained", ["attn", "mlp", "unembed"])
    def test_only_the_chosen_parts_are_trained(self, engine: Engine, storage: Path, trained: str) -> None:
        caller = Caller(engine)
        if trained == "unembed" and not caller.info.train_unembed:
            pytest.skip("this engine does not adapt the unembedding")
        chosen: dict[str, Any] = {f"train_{part}": part == trained for part in ("attn", "mlp", "unembed")}
        caller.create(**chosen)
        caller.save("checkpoints/part")
        modules = {name.removeprefix("base_model.model.") for name in weights(storage, "checkpoints/part")}
        parts = {part_of(name.rpartition(".lora_")[0]) for name in modules}
        assert parts == {trained}

    # ------------------------------------------------------------------ numbers

    def test_the_loss_is_the_weighted_sum(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        data = batch(caller.info)
        result = caller.forward(data)
        expected = -sum(
            float(np.dot(p.astype(np.float64), given(datum, "weights")))
            for p, datum in zip(logprobs(result), data, strict=True)
        )
        assert result.metrics["loss:sum"] == pytest.approx(expected, rel=self.tolerance)
        assert all(len(key.split(":")) == 2 for key in result.metrics)

    def test_forward_and_forward_backward_tell_the_same(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        data = batch(caller.info)
        there, back = caller.forward(data), caller.forward_backward(data)
        assert distance(logprobs(back), logprobs(there)) <= self.tolerance
        assert back.metrics["loss:sum"] == pytest.approx(there.metrics["loss:sum"], rel=self.tolerance)

    def test_outputs_keep_the_order_of_the_data(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        data = batch(caller.info, (5, 17, 1, 9, 5, 2))
        together = caller.logprobs(data)
        assert [len(part) for part in together] == [5, 17, 1, 9, 5, 2]
        for datum, part in zip(data, together, strict=True):
            assert distance([part], caller.logprobs([datum])) <= self.tolerance

    def test_a_position_sees_only_what_is_before_it(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        tokens = text(caller.info, 12)
        assert distance([caller.score(tokens[:7])], [caller.score(tokens)[:6]]) <= self.tolerance

    def test_log_probs_are_a_distribution(self, engine: Engine) -> None:
        """Over the whole vocabulary, as K targets of one position, in portions."""
        caller = Caller(engine)
        caller.create()
        caller.train(batch(caller.info), 2)
        prompt = text(caller.info, 3)
        total = 0.0
        for portion in np.array_split(np.arange(caller.info.vocab_size), -(-caller.info.vocab_size // 4096)):
            targets = np.tile(portion, (3, 1))
            total += float(
                np.exp(caller.logprobs([supervised(prompt, targets)])[0][-1].astype(np.float64)).sum()
            )
        assert total == pytest.approx(1.0, abs=1e-4)

    def test_several_targets_at_each_position(self, engine: Engine) -> None:
        """K may differ from datum to datum; each column is what it would be alone."""
        caller = Caller(engine)
        caller.create()
        caller.train(batch(caller.info), 2)
        info, rng = caller.info, np.random.default_rng(0)
        data, columns = [], []
        for length, k in ((6, 3), (4, 1), (5, 2)):
            tokens = text(info, length, seed=k)
            targets = np.stack([text(info, length, seed=10 + i) for i in range(k)], axis=1)
            data.append(supervised(tokens, targets, rng.random((length, k))))
            columns.append([supervised(tokens, targets[:, i]) for i in range(k)])
        result = caller.forward(data)
        expected_loss = 0.0
        for datum, alone, found in zip(data, columns, logprobs(result), strict=True):
            expected = np.stack(caller.logprobs(alone), axis=1)
            assert found.shape == expected.shape
            assert distance([found], [expected]) <= self.tolerance
            expected_loss -= float((expected.astype(np.float64) * given(datum, "weights")).sum())
        assert result.metrics["loss:sum"] == pytest.approx(expected_loss, rel=10 * self.tolerance)

    def test_gradients_of_several_targets_are_those_of_the_columns(
        self, engine: Engine, storage: Path
    ) -> None:
        caller = Caller(engine)
        tokens = text(caller.info, 5)
        targets = np.stack([text(caller.info, 5, seed=i) for i in (1, 2)], axis=1)
        share = np.random.default_rng(1).random((5, 2))
        whole = [supervised(tokens, targets, share)]
        columns = [supervised(tokens, targets[:, i], share[:, i]) for i in (0, 1)]
        self._assert_same_training(caller, storage, whole, columns)

    # ------------------------------------------------------------------ gradients

    def test_forward_leaves_no_gradient(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        data = batch(caller.info)
        before = caller.logprobs(data)
        assert caller.step() == 0.0
        assert same(caller.logprobs(data), before)

    def test_forward_between_changes_nothing(self, engine: Engine) -> None:
        caller = Caller(engine)
        data, other = batch(caller.info), batch(caller.info, seed=2)
        for run_id in ("plain", "with"):
            caller.create(run_id)
            caller.forward_backward(data, run_id=run_id)
            if run_id == "with":
                caller.forward(other, run_id=run_id)
            caller.step(run_id)
        assert same(caller.logprobs(data, "with"), caller.logprobs(data, "plain"))

    def test_gradients_add_up_over_calls(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        data = batch(caller.info, (6, 11, 4))
        self._assert_same_training(caller, storage, data, data[::-1])
        caller.create("once")
        caller.create("thrice")
        for _ in range(3):
            caller.forward_backward(data, run_id="once")
            norm = caller.step("once")
            for datum in data:
                caller.forward_backward([datum], run_id="thrice")
            assert caller.step("thrice") == pytest.approx(norm, rel=10 * self.tolerance)
        assert distance(caller.logprobs(data, "thrice"), caller.logprobs(data, "once")) < 10 * self.tolerance

    def _assert_same_training(
        self, caller: Caller, storage: Path, ours: list[Datum], theirs: list[Datum]
    ) -> None:
        """Training on either leads to the same weights. A large eps keeps Adam from blowing up rounding errors."""
        for run_id, data in (("ours", ours), ("theirs", theirs)):
            caller.create(run_id)
            caller.train(data, 3, run_id, eps=1.0)
            caller.save(f"checkpoints/{run_id}", run_id)
        found, expected = (weights(storage, f"checkpoints/{run_id}") for run_id in ("ours", "theirs"))
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert distance([found[name]], [values]) < 10 * self.tolerance, name

    def test_a_step_uses_the_gradient_up(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        data = batch(caller.info)
        caller.forward_backward(data)
        assert caller.step() > 0
        after = caller.logprobs(data)
        assert caller.step() == 0.0
        assert same(caller.logprobs(data), after)

    def test_a_step_without_gradient_is_not_counted(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("plain", "with"):
            caller.create(run_id)
            for _ in range(2):
                caller.train(data, 1, run_id)
                if run_id == "with":
                    caller.step(run_id, weight_decay=0.5)
        assert same(caller.logprobs(data, "with"), caller.logprobs(data, "plain"))

    # ------------------------------------------------------------------ steps

    def test_training_learns(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create(rank=8)
        tokens = text(caller.info, 9)
        losses = caller.train([supervised(tokens[:-1], tokens[1:])], 30)
        assert losses[-1] < losses[0] / 2
        assert all(later < earlier for earlier, later in pairwise(losses[:5]))

    def test_the_first_step_has_the_length_of_the_learning_rate(self, engine: Engine, storage: Path) -> None:
        """Adam's first step is learning_rate * sign(gradient); while B is zero A has no gradient."""
        caller = Caller(engine)
        caller.create()
        caller.save("checkpoints/before")
        caller.train(batch(caller.info), 1, learning_rate=3e-3)
        caller.save("checkpoints/after")
        before, after = weights(storage, "checkpoints/before"), weights(storage, "checkpoints/after")
        moved = 0
        for name, values in after.items():
            change = np.abs(values - before[name])
            if ".lora_A." in name:
                assert not change.any(), name
            else:
                moved += int(np.count_nonzero(change))
                np.testing.assert_allclose(change[change > 0], 3e-3, rtol=1e-4, err_msg=name)
        assert moved > 0

    def test_clipping_scales_the_gradient_to_the_norm(self, engine: Engine, storage: Path) -> None:
        """Clipping to half the norm is training on data of half the weight; the norm told is the one before."""
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id, clipped in (("clipped", True), ("halved", False)):
            caller.create(run_id)
            for _ in range(3):
                caller.create("probe")
                caller.save("checkpoints/now", run_id)
                caller.load("checkpoints/now", "probe")
                caller.forward_backward(data, run_id="probe")
                norm = caller.step("probe")
                caller.forward_backward(data if clipped else _scaled(data, 0.5), run_id=run_id)
                told = caller.step(run_id, eps=1.0, grad_clip_norm=norm / 2 if clipped else 0.0)
                assert told == pytest.approx(norm if clipped else norm / 2, rel=10 * self.tolerance)
            caller.save(f"checkpoints/{run_id}", run_id)
        found, expected = (weights(storage, f"checkpoints/{run_id}") for run_id in ("clipped", "halved"))
        for name, values in expected.items():
            assert distance([found[name]], [values]) < 10 * self.tolerance, name

    def test_clipping_at_a_larger_norm_changes_nothing(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id, limit in (("off", 0.0), ("high", 1e9)):
            caller.create(run_id)
            caller.train(data, 2, run_id, grad_clip_norm=limit)
        assert same(caller.logprobs(data, "high"), caller.logprobs(data, "off"))

    def test_weight_decay_is_decoupled(self, engine: Engine, storage: Path) -> None:
        """A gradient of zero is a gradient: the weights shrink by learning_rate * weight_decay and nothing else."""
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 2)
        caller.save("checkpoints/trained")
        caller.load("checkpoints/trained")
        caller.forward_backward(_scaled(data, 0.0))
        assert caller.step(learning_rate=0.1, weight_decay=0.5) == 0.0
        caller.save("checkpoints/decayed")
        before = weights(storage, "checkpoints/trained")
        for name, values in weights(storage, "checkpoints/decayed").items():
            np.testing.assert_allclose(values, before[name] * 0.95, rtol=1e-5, atol=1e-9, err_msg=name)

    # ------------------------------------------------------------------ runs beside each other

    def test_a_run_is_the_same_alone_and_beside_others(self, engine_factory: EngineFactory) -> None:
        """In the same calls and between them; the loss, the log-probs and what follows from the weights."""
        alone, crowded = Caller(engine_factory()), Caller(engine_factory())
        data = batch(alone.info)
        crowd = {f"other{i}": batch(alone.info, (4 + i, 9), seed=20 + i) for i in range(4)}
        runs = {"other0": crowd["other0"], "run": data, **crowd}
        for number, run_id in enumerate(runs):
            crowded.create(run_id, rank=2 + number, seed=number)
        place = list(runs).index("run")
        alone.create(rank=2 + place, seed=place)
        for step in range(3):
            expected = alone.forward_backward(data)
            norm = alone.step()
            items = [
                RunOperation(run_id, ForwardBackward(own, "cross_entropy")) for run_id, own in runs.items()
            ]
            found = crowded.engine.forward_backward(items)[place]
            crowded.forward(data, run_id="other1")
            stepped = crowded.engine.optim_step(
                [RunOperation(r, OptimStep(learning_rate=1e-2)) for r in runs]
            )[place]
            assert not isinstance(found, UserError), f"step {step}: {found}"
            assert not isinstance(stepped, UserError), f"step {step}: {stepped}"
            assert distance(logprobs(found), logprobs(expected)) <= self.tolerance
            assert stepped.metrics["unclipped_grad_l2:mean"] == pytest.approx(norm, rel=self.tolerance)
        assert distance(crowded.logprobs(data), alone.logprobs(data)) <= self.tolerance

    def test_an_unknown_run_fails_alone(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create("known")
        operation = Forward(data, "cross_entropy")
        first, second = engine.forward([RunOperation("unknown", operation), RunOperation("known", operation)])
        assert isinstance(first, UserError)
        assert "unknown" in str(first)
        assert not isinstance(second, UserError)

    def test_every_call_for_an_unknown_run_is_refused(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for call in (
            lambda: caller.forward(data),
            lambda: caller.forward_backward(data),
            caller.step,
            lambda: caller.save("checkpoints/none"),
            lambda: caller.load("checkpoints/none"),
        ):
            with pytest.raises(UserError):
                call()

    def test_a_run_that_cannot_be_created_fails_alone(self, engine: Engine) -> None:
        lora = LoraSpec(2, 1, train_unembed=engine.info().train_unembed)
        items = [
            RunOperation("bad", CreateRun(lora, folder="checkpoints/missing")),
            RunOperation("good", CreateRun(lora)),
        ]
        bad, good = engine.create_runs(items)
        assert isinstance(bad, UserError)
        assert not isinstance(good, UserError)

    def test_a_dropped_run_is_gone_and_no_other(self, engine: Engine) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("a", "b"):
            caller.create(run_id)
        assert engine.stats()["resident_runs"] == 2
        engine.drop_run("a")
        engine.drop_run("never was")
        assert engine.stats()["resident_runs"] == 1
        caller.forward(data, run_id="b")
        with pytest.raises(UserError):
            caller.forward(data, run_id="a")


def _scaled(data: list[Datum], factor: float) -> list[Datum]:
    return [
        supervised(
            datum.tokens.array().tolist(),
            given(datum, "target_tokens"),
            given(datum, "weights") * np.float32(factor),
        )
        for datum in data
    ]

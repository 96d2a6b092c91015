"""The contract of snapshots: a restored run is the run that was snapshotted, bit for bit, and goes on as it did."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from engines.contract.material import Caller, EngineFactory, batch, same
from engines.interface import Engine, PendingSnapshot, UserError
from engines.operations import CreateRun, LoraSpec

_FOLDER = "snapshots/kept"


def write(storage: Path, snapshot: PendingSnapshot, folder: str = _FOLDER) -> dict[str, bytes]:
    """Write a snapshot to a storage key; gives the files."""
    place = storage / folder
    place.mkdir(parents=True)
    snapshot.write(place)
    return {path.name: path.read_bytes() for path in place.iterdir()}


def restore(caller: Caller, run_id: str = "run", folder: str = _FOLDER, seed: int = 1) -> None:
    """Restore a run that `Caller.create` made with its own settings."""
    lora = LoraSpec(4, seed, train_unembed=caller.info.train_unembed)
    result = caller.engine.restore(run_id, CreateRun(lora), folder)
    if isinstance(result, UserError):
        raise result


class SnapshotContract:
    """All comparisons are exact."""

    @pytest.mark.parametrize("trained_before", [0, 1, 4])
    @pytest.mark.parametrize("where", ["the same engine", "another engine"])
    def test_a_restored_run_goes_on_as_if_it_had_never_stopped(
        self, engine_factory: EngineFactory, storage: Path, trained_before: int, where: str
    ) -> None:
        caller = Caller(engine_factory())
        data = batch(caller.info)
        caller.create(seed=2)
        caller.train(data, trained_before, weight_decay=0.1, grad_clip_norm=0.5)
        files = write(storage, caller.engine.snapshot("run"))
        expected_losses = caller.train(data, 3, weight_decay=0.1)
        expected = caller.logprobs(data)
        if where == "another engine":
            caller = Caller(engine_factory())
        restore(caller, seed=2)
        again = write(storage, caller.engine.snapshot("run"), "snapshots/again")
        assert again == files  # adapter, both moments, step count
        losses = caller.train(data, 3, weight_decay=0.1)
        assert losses == expected_losses
        assert same(caller.logprobs(data), expected)

    @pytest.mark.parametrize("trained_before", [0, 2])
    def test_a_pending_gradient_is_part_of_it(
        self, engine_factory: EngineFactory, storage: Path, trained_before: int
    ) -> None:
        caller = Caller(engine_factory())
        data = batch(caller.info)
        caller.create()
        caller.train(data, trained_before)
        caller.forward_backward(data)
        caller.forward_backward(data[:1])
        files = write(storage, caller.engine.snapshot("run"))

        def goes_on() -> tuple[float, list[float]]:
            caller.forward_backward(data)
            return caller.step(), caller.train(data, 2)

        expected = goes_on()
        expected_logprobs = caller.logprobs(data)
        caller = Caller(engine_factory())
        restore(caller)
        assert write(storage, caller.engine.snapshot("run"), "snapshots/again") == files
        assert goes_on() == expected
        assert same(caller.logprobs(data), expected_logprobs)

    def test_a_checkpoint_has_no_pending_gradient(self, engine: Engine) -> None:
        caller = Caller(engine)
        caller.create()
        caller.forward_backward(batch(caller.info))
        caller.save("checkpoints/kept", "run", optimizer_state=True)
        caller.load("checkpoints/kept", "run", optimizer_state=True)
        assert caller.step() == 0.0

    def test_what_is_written_is_the_state_at_its_moment(self, engine: Engine, storage: Path) -> None:
        """However much later it is written, and whatever the run does meanwhile."""
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 2)
        at_once = write(storage, engine.snapshot("run"), "snapshots/at-once")
        late = engine.snapshot("run")
        caller.train(data, 2)
        caller.forward_backward(data)
        assert write(storage, late) == at_once
        engine.drop_run("run")
        restore(caller)
        assert write(storage, engine.snapshot("run"), "snapshots/restored") == at_once

    def test_training_goes_on_while_it_is_written(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("alone", "run"):
            caller.create(run_id)
            caller.train(data, 2, run_id)
        expected = write(storage, engine.snapshot("alone"), "snapshots/alone")
        undisturbed = caller.train(data, 6, "alone")
        written: list[dict[str, bytes]] = []
        snapshots = [engine.snapshot("run") for _ in range(4)]

        def write_all() -> None:
            for number, snapshot in enumerate(snapshots):
                written.append(write(storage, snapshot, f"snapshots/{number}"))

        writing = threading.Thread(target=write_all)
        writing.start()
        losses = caller.train(data, 6, "run")
        writing.join()
        assert losses == undisturbed
        assert written == [expected] * 4

    def test_a_restored_run_takes_the_place_of_what_is_there(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        caller.create()
        caller.train(data, 1)
        write(storage, engine.snapshot("run"))
        kept = caller.logprobs(data)
        caller.train(data, 2)
        caller.forward_backward(data)
        restore(caller)
        assert same(caller.logprobs(data), kept)
        assert caller.step() == 0.0  # no gradient is pending any more

    def test_other_runs_do_not_notice(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        data = batch(caller.info)
        for run_id in ("alone", "beside", "run"):
            caller.create(run_id)
        expected = caller.train(data, 3, "alone")
        losses = caller.train(data, 1, "beside")
        caller.forward_backward(data, run_id="run")
        caller.step("run")
        write(storage, engine.snapshot("run"))
        losses += caller.train(data, 1, "beside")
        restore(caller)
        assert losses + caller.train(data, 1, "beside") == expected

    # ------------------------------------------------------------------ refusals

    def test_an_unknown_run_is_refused(self, engine: Engine) -> None:
        with pytest.raises(UserError, match="nobody"):
            engine.snapshot("nobody")

    def test_a_folder_that_is_not_there_is_refused(self, engine: Engine) -> None:
        with pytest.raises(UserError, match="not there"):
            restore(Caller(engine))

    def test_a_file_that_is_cut_short_is_refused_and_named(self, engine: Engine, storage: Path) -> None:
        caller = Caller(engine)
        caller.create()
        files = write(storage, engine.snapshot("run"))
        name = max(files, key=lambda name: len(files[name]))
        (storage / _FOLDER / name).write_bytes(files[name][: len(files[name]) // 2])
        with pytest.raises(UserError, match=name):
            restore(caller)

"""Snapshots in the engine process: when they are taken, what is written, what is not restored."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engines.fake import FakeEngine
from engines.interface import EngineConfig, PendingSnapshot, UserError
from engines.messages import (
    DropRun,
    Failure,
    Perform,
    Performed,
    Restore,
    RunAddress,
    SnapshotTaken,
    TakeSnapshot,
)
from engines.operations import Operation, OperationKind, encode
from engines.performing import TrainingCalls
from engines.snapshot_writing import SnapshotWriter
from engines.storage import FolderStorage, checksums, verify
from tests.engines.material import CREATE, STEP, learn, look
from tests.engines.owner import Owner

FOLDER = "snapshots/first"
EPOCH = 5


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    with Owner(tmp_path / "storage") as loaded:
        loaded.load()
        yield loaded


def take(owner: Owner, seq_id: int, folder: str = FOLDER, *, epoch: int = EPOCH) -> SnapshotTaken:
    owner.send(TakeSnapshot(9, epoch, "run", seq_id, folder))
    return owner.receive(SnapshotTaken)


def restore(owner: Owner, seq_id: int, taken: SnapshotTaken, *, epoch: int = EPOCH) -> Failure | None:
    owner.send(Restore(4, epoch, "run", seq_id, FOLDER, taken.checksums), encode(CREATE))
    performed = owner.receive(Performed)
    assert (performed.call_id, len(performed.outcomes), owner.payloads) == (4, 1, [])
    return performed.outcomes[0].failure


def train(owner: Owner, *numbers: int) -> list[bytes]:
    """A pass under each odd number, a step under each even one; the results."""
    results = []
    for number in numbers:
        owner.perform(("run", number, learn(f"text {number}") if number % 2 else STEP))
        results += owner.payloads
    return results


def test_a_run_is_restored_in_another_process_and_goes_on(owner: Owner, tmp_path: Path) -> None:
    owner.perform(("run", 0, CREATE))
    train(owner, 1, 2, 3, 4)
    taken = take(owner, 4)
    files = {path.name: path.read_bytes() for path in (tmp_path / "storage" / FOLDER).iterdir()}
    assert taken.call_id == 9
    assert taken.size_bytes == sum(len(data) for data in files.values())
    assert taken.checksums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    expected = train(owner, 5, 6, 7)
    with Owner(tmp_path / "storage") as other:
        other.load()
        assert restore(other, 4, taken) is None
        assert (
            "after operation 4" in other.failure(("run", 4, STEP)).message
        )  # what it holds is not applied again
        assert train(other, 5, 6, 7) == expected


def test_operations_that_only_read_do_not_move_the_run_on(owner: Owner) -> None:
    owner.perform(("run", 0, CREATE))
    train(owner, 1, 2)
    owner.perform(("run", 3, look("text 3")))
    taken = take(owner, 2)
    assert taken.failure is None


@pytest.mark.parametrize(
    ("numbers", "seq_id", "words"),
    [
        ((1, 2, 3, 4), 2, "stands after operation 4"),
        ((1, 2), 4, "stands after operation 2"),
    ],
)
def test_a_snapshot_of_another_moment_is_refused(
    owner: Owner, tmp_path: Path, numbers: tuple[int, ...], seq_id: int, words: str
) -> None:
    owner.perform(("run", 0, CREATE))
    train(owner, *numbers)
    failure = take(owner, seq_id).failure
    assert failure is not None
    assert (failure.category, words in failure.message) == ("server", True), failure
    assert not (tmp_path / "storage" / FOLDER).exists()


def test_a_run_that_is_not_there_and_an_earlier_owner_are_refused(owner: Owner) -> None:
    failure = take(owner, 0).failure
    assert failure is not None and "not in memory" in failure.message
    owner.perform(("run", 0, CREATE))
    owner.send(DropRun("run"))
    failure = take(owner, 0).failure
    assert failure is not None and "not in memory" in failure.message
    owner.perform(("run", 0, CREATE))
    taken = take(owner, 0)
    for failure in (take(owner, 0, epoch=4).failure, restore(owner, 0, taken, epoch=4)):
        assert failure is not None and "earlier owner" in failure.message
    assert take(owner, 0, epoch=6).failure is None
    failure = restore(owner, 0, taken)
    assert failure is not None and "epoch 5, now 6" in failure.message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def change(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one number: it would load and train on
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, change, Path.unlink])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"]
)
def test_a_damaged_snapshot_is_refused_and_the_file_named(
    owner: Owner, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    owner.perform(("run", 0, CREATE))
    train(owner, 1, 2)
    taken = take(owner, 2)
    owner.send(DropRun("run"))
    damage(tmp_path / "storage" / FOLDER / name)
    failure = restore(owner, 2, taken)
    assert failure is not None
    assert (failure.category, name in failure.message) == ("user", True), failure
    assert "not in this engine's memory" in owner.failure(("run", 3, learn("text 3"))).message


def test_storage_that_cannot_be_written_to_is_named_and_the_run_goes_on(owner: Owner, tmp_path: Path) -> None:
    owner.perform(("run", 0, CREATE))
    train(owner, 1, 2)
    (tmp_path / "storage").mkdir()
    (tmp_path / "storage" / "snapshots").write_text("in the way of the folder")
    failure = take(owner, 2).failure
    assert failure is not None
    assert "cannot be written to" in failure.message
    assert failure.error_id is not None and failure.error_id in owner.log()
    train(owner, 3, 4)
    (tmp_path / "storage" / "snapshots").unlink()
    assert take(owner, 4).failure is None


def test_an_outcome_has_the_digest_of_its_result_also_when_it_is_a_replay(owner: Owner) -> None:
    operations: list[Operation] = [CREATE, learn("text 1"), STEP]
    digests = []
    for number, operation in enumerate(operations):
        performed = owner.perform(("run", number, operation))
        [result] = owner.payloads
        assert performed.outcomes[0].digest == hashlib.sha256(result).digest()[:16]
        digests.append(performed.outcomes[0].digest)
    assert owner.perform(("run", 3, look("text 1"))).outcomes[0].digest == b""
    for number, operation in enumerate(operations):
        performed = owner.perform(("run", number, operation), replay=True)
        assert (performed.outcomes[0].digest, owner.payloads) == (digests[number], [])


# ---------------------------------------------------------------------------- inside the process


class SlowSnapshot(PendingSnapshot):
    """Is written when the test says so."""

    def __init__(self, snapshot: PendingSnapshot) -> None:
        self.snapshot = snapshot
        self.go = threading.Event()

    def write(self, folder: Path) -> None:
        assert self.go.wait(10)
        self.snapshot.write(folder)


class Process:
    """What the host is made of, called by hand."""

    def __init__(self, storage: Path) -> None:
        config = EngineConfig("tested", "fake", "test/bytes", "", ("train", "sample"), str(storage), epoch=1)
        self.storage = storage
        self.engine = FakeEngine.load(config)
        self.training = TrainingCalls(self.engine, self.engine.info(), config)
        self.writer = SnapshotWriter(FolderStorage(storage))

    def perform(self, seq_id: int, operation: Operation) -> bytes:
        kind: OperationKind = operation.__struct_config__.tag  # type: ignore[assignment]
        call = Perform(1, 1, kind, [RunAddress("run", seq_id)])
        performed, [result] = self.training.perform(call, [encode(operation)])
        assert performed.outcomes[0].failure is None
        return result

    def begin(self, seq_id: int, folder: str) -> SlowSnapshot:
        call = TakeSnapshot(seq_id, 1, "run", seq_id, folder)
        snapshot = self.training.snapshot(call)
        assert isinstance(snapshot, PendingSnapshot)
        slow = SlowSnapshot(snapshot)
        self.writer.begin(call, slow)
        return slow

    def taken(self) -> SnapshotTaken:
        """The next answer of the writer."""
        for _ in range(1000):
            if answers := self.writer.finished():
                [answer] = answers
                return answer
            threading.Event().wait(0.01)
        raise AssertionError("no answer within ten seconds")


def test_training_goes_on_while_a_snapshot_is_written(tmp_path: Path) -> None:
    process, calm = Process(tmp_path / "a"), Process(tmp_path / "b")
    for each in (process, calm):
        each.perform(0, CREATE)
        each.perform(1, learn("text 1"))
        each.perform(2, STEP)
    early = calm.begin(2, FOLDER)
    early.go.set()
    expected = calm.taken().checksums
    first, second = process.begin(2, FOLDER), process.begin(2, "snapshots/second")
    assert [process.perform(3, learn("text 3")), process.perform(4, STEP)] == [
        calm.perform(3, learn("text 3")),
        calm.perform(4, STEP),
    ]
    assert process.writer.busy and not process.writer.finished()
    assert not (tmp_path / "a" / FOLDER).exists()  # neither complete nor visible
    first.go.set()
    assert process.taken().checksums == expected
    second.go.set()
    assert process.taken().checksums == expected
    assert not process.writer.busy


def test_closing_finishes_what_is_being_written_and_begins_nothing(tmp_path: Path) -> None:
    process = Process(tmp_path)
    process.perform(0, CREATE)
    first = process.begin(0, FOLDER)
    process.begin(0, "snapshots/second")
    threading.Timer(0.05, first.go.set).start()
    process.writer.close()
    assert [path.name for path in (tmp_path / "snapshots").iterdir()] == ["first"]


def test_a_snapshot_that_breaks_is_told_and_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Breaking(PendingSnapshot):
        def write(self, folder: Path) -> None:
            (folder / "half").write_bytes(b"half")
            raise RuntimeError("no more numbers")

    process = Process(tmp_path)
    process.writer.begin(TakeSnapshot(3, 1, "run", 7, FOLDER), Breaking())
    taken = process.taken()
    assert taken.call_id == 3 and taken.failure is not None
    assert taken.failure.error_id is not None and taken.failure.error_id in caplog.text
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_an_engine_that_breaks_at_copying_keeps_its_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path)
    process.perform(0, CREATE)
    monkeypatch.setattr(process.engine, "snapshot", lambda run_id: 1 / 0)
    failure = process.training.snapshot(TakeSnapshot(1, 1, "run", 0, FOLDER))
    assert isinstance(failure, Failure) and failure.error_id is not None
    process.perform(1, learn("text 1"))


def test_an_engine_that_breaks_at_restoring_is_told_from_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = Process(tmp_path)
    process.perform(0, CREATE)
    process.begin(0, FOLDER).go.set()
    taken = process.taken()
    call = Restore(1, 1, "run", 0, FOLDER, taken.checksums)
    monkeypatch.setattr(process.engine, "create_runs", lambda items: 1 / 0)
    [outcome] = process.training.restore(call, encode(CREATE)).outcomes
    assert outcome.failure is not None and outcome.failure.category == "server"
    monkeypatch.undo()
    [outcome] = process.training.restore(call, encode(STEP)).outcomes
    assert outcome.failure is not None and "create_run" in outcome.failure.message
    [outcome] = process.training.restore(call, encode(CREATE)).outcomes
    assert outcome.failure is None


def test_checksums_tell_what_differs(tmp_path: Path) -> None:
    folder = tmp_path / "snapshots" / "one"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")
    sums = checksums(folder)
    assert sums == {name: hashlib.sha256(name.encode()).hexdigest() for name in ("a", "b")}
    verify(FolderStorage(tmp_path), "snapshots/one", sums)
    (folder / "b").write_bytes(b"c")
    with pytest.raises(UserError, match=r"b in snapshots/one is not what was written"):
        verify(FolderStorage(tmp_path), "snapshots/one", sums)
    (folder / "a").unlink()
    with pytest.raises(UserError, match="holds no a"):
        verify(FolderStorage(tmp_path), "snapshots/one", sums)
    with pytest.raises(UserError, match="nothing stored under snapshots/two"):
        verify(FolderStorage(tmp_path), "snapshots/two", sums)

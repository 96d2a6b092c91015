"""What waits for an engine: the logs' next operations and the samples, owners in turn.

Pure bookkeeping in memory, rebuilt from the database at any time. A log's order is kept here; that only one operation
of it runs at a time is also kept by the schema.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gateway.dispatch.shares import Shares
from gateway.dispatch.standing import Standing
from gateway.store.records import Future

Weigh = Callable[[Future], float]
"""The share of one call to an engine that an operation makes up. Nobody waits for more than the call at hand."""


@dataclass(slots=True)
class RunQueue:
    """The unsettled end of one log. `next_seq` is the number whose turn it is. `load` counts, by owner, what waits in
    all queues that share it."""

    run_id: str
    owner: str
    next_seq: int
    load: Counter[str] = field(default_factory=Counter)
    waiting: dict[int, Future] = field(default_factory=dict)
    running: bool = False
    alone: bool = False
    parked: bool = False

    def add(self, future: Future) -> None:
        """Queue an entry; one behind the log's head, or known already, changes nothing. A rejected one only consumes
        its number."""
        if future.seq_id >= self.next_seq and future.seq_id not in self.waiting:
            self.waiting[future.seq_id] = future
            self.load[self.owner] += 1
            self._skip_settled()

    def head(self) -> Future | None:
        """The operation that may run now."""
        return None if self.running else self.waiting.get(self.next_seq)

    def advance(self) -> None:
        """The head has been settled."""
        if self.waiting.pop(self.next_seq, None) is not None:
            self.load[self.owner] -= 1
        self.next_seq += 1
        self.running = self.alone = False
        self._skip_settled()

    @property
    def blocked(self) -> bool:
        """Whether entries wait for a number that has not arrived."""
        return bool(self.waiting) and self.next_seq not in self.waiting

    def abandon_gap(self) -> list[Future]:
        """Take out everything that waits behind a gap; the log goes on behind the last of them."""
        abandoned = [self.waiting[seq] for seq in sorted(self.waiting)]
        self.next_seq = abandoned[-1].seq_id + 1
        self.load[self.owner] -= len(self.waiting)
        self.waiting.clear()
        return [future for future in abandoned if future.open]

    def standing(self, seq_id: int) -> Standing:
        """Where an open entry stands."""
        if self.running and seq_id == self.next_seq:
            return Standing(False, "it is being performed")
        if self.parked and seq_id == self.next_seq:
            return Standing(True, "its run waits for a place in the engine's memory, which others have now")
        if self.head() is None and not self.running:
            return Standing(False, f"operation {self.next_seq} of its run has not arrived")
        before = seq_id - self.next_seq
        return Standing(
            False, f"{before} operations of its run come before it" if before else "it is next in its run"
        )

    def _skip_settled(self) -> None:
        while (future := self.waiting.get(self.next_seq)) is not None and not future.open:
            del self.waiting[self.next_seq]
            self.load[self.owner] -= 1
            self.next_seq += 1


class Turns:
    """Keys grouped by owner, handed out one owner after the other, each owner's in order of arrival."""

    def __init__(self) -> None:
        self._owners: OrderedDict[str, deque[str]] = OrderedDict()
        self._places: dict[str, int] = {}
        self._next_place = 0

    def __len__(self) -> int:
        return len(self._places)

    def add(self, owner: str, key: str) -> None:
        """Queue a key; one that is queued already keeps its place."""
        if key not in self._places:
            self._places[key] = self._next_place
            self._next_place += 1
            self._owners.setdefault(owner, deque()).append(key)

    def owners(self) -> Iterable[str]:
        """Who has keys, next first."""
        return self._owners.keys()

    def first(self, owner: str) -> str:
        """The next key of an owner who has one; it stays."""
        return self._owners[owner][0]

    def take(self, owner: str | None = None) -> str | None:
        """The next key, or an owner's next one; its owner goes to the end of the line."""
        if not self._owners:
            return None
        owner = next(iter(self._owners)) if owner is None else owner
        keys = self._owners[owner]
        key = keys.popleft()
        del self._places[key]
        if keys:
            self._owners.move_to_end(owner)
        else:
            del self._owners[owner]
        return key

    def put_back(self, owner: str, key: str) -> None:
        """A key that was taken and could not be used keeps its place at the head of the line."""
        keys = self._owners.setdefault(owner, deque())
        self._places[key] = self._places[keys[0]] - 1 if keys else self._next_place
        keys.appendleft(key)
        self._owners.move_to_end(owner, last=False)

    def remove(self, owner: str, key: str) -> None:
        """A key is not to be handed out; an unknown one is no error."""
        if key in self._places:
            del self._places[key]
            keys = self._owners[owner]
            keys.remove(key)
            if not keys:
                del self._owners[owner]

    def count(self, owner: str) -> int:
        """How many keys of an owner wait."""
        return len(self._owners.get(owner, ()))

    def before(self, owner: str, key: str) -> int:
        """How many keys of the owner come before this one; 0 for one that does not wait."""
        place = self._places.get(key)
        if place is None:
            return 0
        return bisect_left(self._owners[owner], place, key=self._places.__getitem__)


class TrainingQueue:
    """The run queues of one engine."""

    def __init__(self) -> None:
        self.runs: dict[str, RunQueue] = {}
        self.load: Counter[str] = Counter()
        self._ready = Turns()
        self._shares = Shares()
        self._blocked: dict[str, float | None] = {}
        """Runs that wait for a missing number, and since when; those that nobody has looked at yet are the last."""

    def __len__(self) -> int:
        return len(self._ready)

    def open_run(self, run_id: str, owner: str, next_seq: int, futures: Iterable[Future]) -> RunQueue:
        """Start to keep the order of a run, with what is known of its log from `next_seq` on."""
        queue = self.runs[run_id] = RunQueue(run_id, owner, next_seq, self.load)
        for future in futures:
            queue.add(future)
        self._mark(queue)
        return queue

    def add(self, future: Future) -> None:
        """Queue an operation of a run that is open here."""
        queue = self.runs[future.run_id or ""]
        queue.add(future)
        self._mark(queue)

    def take_batch(self, weigh: Weigh) -> list[Future]:
        """Heads of different runs, all of one kind, that fill one call, from the owners who have been given least. One
        that an engine has died over before goes alone."""
        batch: list[Future] = []
        passed_over: list[RunQueue] = []
        room = 1.0
        self._shares.begin(self._ready.owners())
        while room > 0 and (owner := self._shares.next()) is not None:
            queue = self.runs[self._ready.take(owner) or ""]
            head = queue.head()
            weight = 0.0
            if head is not None:
                weight = 1.0 if queue.alone or head.deaths > 0 else weigh(head)
            if head is not None and batch and (head.kind != batch[0].kind or weight > room):
                passed_over.append(queue)
            elif head is not None:
                queue.running = True
                batch.append(head)
                room -= weight
                self._shares.charge(owner, weight)
            if self._ready.count(owner):
                self._shares.again(owner)
        for queue in reversed(passed_over):
            self._ready.put_back(queue.owner, queue.run_id)
        return batch

    def settled(self, future: Future) -> None:
        """A batch's operation has its outcome; the run's next one may follow."""
        queue = self.runs[future.run_id or ""]
        queue.advance()
        self._mark(queue)

    def put_back(self, future: Future, *, alone: bool = False) -> None:
        """What was taken is still to be done, after a turn of the others; `alone`: in a call of its own."""
        queue = self.runs[future.run_id or ""]
        queue.running = False
        queue.alone = queue.alone or alone
        self._mark(queue)

    def park(self, future: Future) -> None:
        """What was taken is not handed out again until its run has a place in the engine's memory."""
        queue = self.runs[future.run_id or ""]
        queue.running = False
        queue.parked = True

    def unpark(self, run_id: str) -> bool:
        """A parked run has a place now; whether it still has something to do."""
        queue = self.runs[run_id]
        queue.parked = False
        self._mark(queue)
        return queue.head() is not None

    def busy(self, run_id: str) -> bool:
        """Whether a run has an operation that could be performed now."""
        queue = self.runs.get(run_id)
        return queue is not None and (queue.running or queue.head() is not None)

    def waits(self, run_id: str) -> bool:
        """Whether anything of a run waits or runs."""
        queue = self.runs.get(run_id)
        return queue is not None and (queue.running or bool(queue.waiting))

    def forget(self, run_id: str) -> None:
        """Keep the order of a run no longer, unless something of it waits or runs."""
        if not self.waits(run_id):
            self.runs.pop(run_id, None)
            self._blocked.pop(run_id, None)

    def gaps(self, now: float, timeout_s: float) -> list[RunQueue]:
        """Runs that have waited too long for a missing number, those first that have waited longest. Only they and
        those that have been blocked since the last call are looked at."""
        for run_id in reversed(self._blocked):
            if self._blocked[run_id] is not None:
                break
            self._blocked[run_id] = now
        due = []
        for run_id, since in self._blocked.items():
            if since is None or now - since <= timeout_s:
                break
            due.append(self.runs[run_id])
        return due

    def abandon_gap(self, queue: RunQueue) -> list[Future]:
        """Take out everything of a run that waits behind its gap; the open ones of it."""
        abandoned = queue.abandon_gap()
        self._mark(queue)
        return abandoned

    def _mark(self, queue: RunQueue) -> None:
        if queue.head() is not None and not queue.parked:
            self._ready.add(queue.owner, queue.run_id)
        if queue.blocked:
            self._blocked.setdefault(queue.run_id, None)
        else:
            self._blocked.pop(queue.run_id, None)

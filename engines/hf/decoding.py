"""Continuous batching: all sequences that are being sampled, of all adapters, advance one token per step together.

A step is: decode the running sequences -> admit waiting prompts -> draw -> take the new tokens. Sequence i of
`Decoder.rows` owns slot i of the cache; when one ends, the last one moves into its place.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engines.drawing import Drawn, draw
from engines.hf.adapter_versions import AdapterVersions
from engines.hf.decode_graphs import DecodeGraphs, Numbers
from engines.hf.kv_cache import DecodeLayout, KvCache
from engines.hf.model import BaseModel
from engines.hf.prefill import Prefill
from engines.hf.prompt_cache import PromptCache
from engines.hf.samples import Row, Sample, segments_of
from engines.interface import OutOfMemory, SampleEnd, SampleEvent, UserError
from engines.line import Line
from engines.tuning.collating import Pack
from engines.tuning.transfer import to_device

GUEST_SLOTS = 16
"""Slots beyond the limit for parties that have no sequence under way, one for each: somebody's long samples in all
other slots do not keep another's first one waiting."""
KEPT_CACHE = 2**31
"""Bytes of an empty cache that stay where steps are recorded, for these use its memory: 2 GiB."""
HELD_PREFILLS = 8
"""Prompts are held for sequences that still wait as long as they have together no more tokens than so many prefills."""


class Decoder:
    """The running batch of one model. With `one_by_one` each sequence makes passes of its own (deterministic), and what
    was computed for other requests is not used: it would not be the same to the last bit."""

    def __init__(
        self,
        base: BaseModel,
        adapters: AdapterVersions,
        slots: int,
        prefill_tokens: int,
        one_by_one: bool,
        prompt_cache_bytes: int = 0,
    ) -> None:
        self.base = base
        self.adapters = adapters
        self.one_by_one = one_by_one
        self.slots = slots
        self.cache = KvCache(slots + GUEST_SLOTS, base.max_context)
        self.graphs = DecodeGraphs(base, self.cache)
        prompts = PromptCache(0 if one_by_one else prompt_cache_bytes)
        self.prefill = Prefill(base, prefill_tokens, one_by_one, prompts)
        self.queue: Line[Sample] = Line()
        self.rows: list[Row] = []
        self.step = Step()
        self.most_rows = self.cache.max_slots
        """Sequences that may run together; less after memory has run out, until something ends."""
        self._taken: dict[int, str] = {}
        self._first: int | None = None
        """The sample that waits for its adapter to have room in memory."""
        self._unreadable: list[SampleEnd] = []

    def add(self, sample: Sample) -> None:
        """Queue a sample."""
        self.queue.add(sample)

    @torch.inference_mode()
    def cancel(self, call_id: int) -> None:
        """Forget a sample, whether it waits or runs."""
        self.queue.remove(call_id)
        self.prefill.forget(call_id)
        self._leave([row for row in self.rows if row.sample.call_id == call_id])
        self._give_back(call_id)

    @property
    def active(self) -> int:
        """Samples under way, waiting ones included."""
        running = {row.sample.call_id for row in self.rows}
        long = self.prefill.long
        return len(running.union(sample.call_id for sample in self.queue)) + (long is not None)

    @torch.inference_mode()
    def advance(self) -> list[SampleEvent]:
        """One more token for every running sequence, the first one for those that join.

        When memory runs out (which raises torch's errors), nothing is to be done but `shed`.
        """
        self.step = Step([(row, row.held) for row in self.rows])
        rows, hidden = self._decode()
        joined, first_hidden = self._admit()
        rows += joined
        hidden += first_hidden
        refused, self._unreadable = self._unreadable, []
        if not rows:
            return [*refused]
        return refused + self._take(rows, draw(self._logits(rows, hidden), [row.next_draw() for row in rows]))

    @torch.inference_mode()
    def shed(self) -> list[SampleEvent]:
        """After a step for which memory was not enough: leave everything as it was before, with less to do in the next.

        Samples that were about to join wait until something ends; one that lacks memory with nothing beside it fails,
        and of those that run the newest.
        """
        self.rows = [row for row, _ in self.step.running]
        for row, held in self.step.running:
            row.held = held
        if not self.rows:
            self.cache.release()
        joining = self.step.joining
        for sample, admitted in joining:
            self.queue.remove(sample.call_id)
            sample.admitted = admitted
            sample.begin_again()
        self.queue.put_back([sample for sample, _ in joining])
        newest = max((row.sample for row in self.rows), key=lambda sample: sample.call_id, default=None)
        long = self.prefill.long
        if len(joining) > 1 or (joining and newest is not None):
            self.most_rows = max(len(self.rows), 1)
            return []
        lacking = long or (joining[0][0] if joining else newest)
        if lacking is None:
            raise RuntimeError("memory ran out in a step that did nothing")
        alone = all(
            other is lacking for other in [*(row.sample for row in self.rows), *(one for one, _ in joining)]
        )
        message = f"{self.base.device} has no memory left for this sample" + (
            "; ask for a shorter prompt, fewer tokens or fewer sequences"
            if alone
            else " beside the others that are drawn; ask again"
        )
        self.cancel(lacking.call_id)
        return [SampleEnd(lacking.call_id, OutOfMemory(message, passing=not alone))]

    def forget_prompts(self) -> None:
        """Let go of the numbers of earlier prompts."""
        self.prefill.prompts = PromptCache(self.prefill.prompts.capacity)

    def forget_graphs(self) -> None:
        """Let go of recorded steps, and of the cache if nothing is in it."""
        self.graphs.forget()
        if not self.rows:
            self.cache.release()

    def _logits(self, rows: list[Row], hidden: list[Tensor]) -> Tensor:
        """Logits float32 [n, V] of all rows."""
        packs = [[row] for row in rows] if self.one_by_one else [rows]
        states = hidden if self.one_by_one else [torch.cat(hidden)]
        logits = [
            self.base.logits(state, segments_of([row.sample.adapter for row in pack], [1] * len(pack)))
            for state, pack in zip(states, packs, strict=True)
        ]
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    # ------------------------------------------------------------------ decode

    def _decode(self) -> tuple[list[Row], list[Tensor]]:
        """Run the newest token of each sequence through the model: the rows, sorted by adapter, and their states."""
        count = len(self.rows)
        if not count:
            return [], []
        self.cache.reserve(count, max(row.held for row in self.rows) + 1)
        if self.one_by_one:
            return list(self.rows), [self._decode_slots(slot, [0]) for slot in range(count)]
        order = _by_adapter(self.rows)
        return [self.rows[slot] for slot in order], [self._decode_slots(0, order)]

    def _decode_slots(self, first: int, order: list[int]) -> Tensor:
        """Decode the slots `first + order[i]`, which fill [first, first + len(order)): hidden states [n, H]."""
        rows = [self.rows[first + slot] for slot in order]
        lengths = [row.held for row in self.rows[first : first + len(order)]]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        tokens, positions = [row.tokens[-1] for row in rows], [row.held for row in rows]
        numbers = Numbers(tokens, positions, order, inverse, lengths)
        adapters = [row.sample.adapter for row in rows]
        hidden = None if self.one_by_one else self.graphs.run(numbers, adapters)
        if hidden is None:
            batch = to_device(torch.tensor(numbers), self.base.device)
            layout = DecodeLayout(self.cache, first, order, lengths, batch[2:])
            segments = segments_of(adapters, [1] * len(rows))
            hidden = self.base.hidden(Pack(batch[0, :, None], batch[1, :, None]), layout, segments)
        for row in rows:
            row.held += 1
        return hidden

    # ------------------------------------------------------------------ admit

    def _admit(self) -> tuple[list[Row], list[Tensor]]:
        """Take waiting samples into free slots: the new rows, and the state [1, H] that each draws from first."""
        chosen = self._choose()
        self.step.joining = [(sample, sample.admitted) for sample, _ in chosen]
        self.prefill.run([sample for sample, _ in chosen if sample.prefix is None])
        if (ready := self.prefill.advance()) is not None:
            self.queue.put_back([ready])
        joined: list[Row] = []
        hidden: list[Tensor] = []
        for sample, count in chosen:
            assert sample.prefix is not None and sample.last is not None
            self.cache.reserve(len(self.rows) + count, len(sample.prompt))
            for _ in range(count):
                self.cache.write(len(self.rows), sample.prefix)
                row = Row(sample, sample.admitted, len(sample.prompt))
                sample.admitted += 1
                self.rows.append(row)
                joined.append(row)
                hidden.append(sample.last)
            if sample.waiting:
                sample.keep_prefix()
            else:
                sample.prefix = sample.last = None
        return joined, hidden

    def _choose(self) -> list[tuple[Sample, int]]:
        """Samples that join, and how many sequences of each.

        Parties share the slots equally, and a party's samples take turns, a sequence each: whoever asks for many does
        not keep the others waiting. Those that cannot begin in this step come first in the next one.
        """
        running = Counter(row.sample.party for row in self.rows)
        chosen: dict[int, tuple[Sample, int]] = {}
        later: list[Sample] = []
        room = _Room(self.prefill.most, self.queue)
        while running.total() < self.most_rows and (party := self.queue.next_party(running)) is not None:
            if running.total() >= (self.slots if running[party] else self.cache.max_slots):
                break
            sample = self.queue.take(party)
            _, count = chosen.get(sample.call_id, (sample, 0))
            try:
                begins = bool(count or sample.prefix) or self._begin(sample, room)
            except UserError as error:
                self._unreadable.append(SampleEnd(sample.call_id, error))
                continue
            if self.prefill.long is sample:
                continue
            if not begins:
                later.append(sample)
                continue
            chosen[sample.call_id] = (sample, count + 1)
            running[party] += 1
            if count + 1 < sample.waiting:
                self.queue.add(sample)
        self.queue.put_back(later)
        return list(chosen.values())

    def _begin(self, sample: Sample, room: _Room) -> bool:
        """Whether a sample begins now; then its adapter stays in memory until it ends.

        While one waits for adapters to leave memory, no other that needs one begins, so that it has its turn. A long
        prompt is on its way then, and its sample comes back to the line when the rest can be run at once.
        """
        long = self.prefill.is_long(sample)
        if not (self._may_be_long() if long else room.has_place(sample)):
            return False
        wanted = sample.request.adapter
        if wanted is not None and sample.call_id not in self._taken:
            if self._first not in (None, sample.call_id):
                return False
            self._first = None
            sample.adapter = self.adapters.take(wanted.folder)
            if sample.adapter is None:
                self._first = sample.call_id
                return False
            self._taken[sample.call_id] = wanted.folder
        if long:
            self.prefill.long = sample
        else:
            room.take(sample)
        return True

    def _may_be_long(self) -> bool:
        """Whether another prompt may be run in pieces: one at a time, and none while one that was waits for a slot."""
        return self.prefill.long is None and all(sample.past is None for sample in self.queue)

    def _give_back(self, call_id: int) -> None:
        """The adapter of a sample that is over, or its turn to have one."""
        if self._first == call_id:
            self._first = None
        folder = self._taken.pop(call_id, None)
        if folder is not None:
            self.adapters.give_back(folder)

    # ------------------------------------------------------------------ take

    def _take(self, rows: list[Row], drawn: Drawn) -> list[SampleEvent]:
        """Append the drawn tokens and end what is complete."""
        events: list[SampleEvent] = []
        ended: list[Row] = []
        broken: set[int] = set()
        for row, token, logprob, top in zip(rows, drawn.tokens, drawn.logprobs, drawn.tops, strict=True):
            if math.isnan(logprob):
                broken.add(row.sample.call_id)
                continue
            step = row.take(token, logprob, top)
            events.append(step)
            if step.stop_reason is not None:
                ended.append(row)
        complete = {row.sample.call_id: row.sample for row in ended if row.sample.complete}
        events += [SampleEnd(call_id, sample.result()) for call_id, sample in complete.items()]
        for call_id in complete:
            self._give_back(call_id)
        failures = self._fail(broken)
        self._leave(ended)
        return events + failures

    def _fail(self, broken: set[int]) -> list[SampleEnd]:
        """End samples whose numbers are not finite; nothing of them may stay in the cache for a slot's next owner.

        All their slots are cleared before any row moves: a row takes its numbers along and leaves them behind as well.
        """
        for slot, row in enumerate(self.rows):
            if row.sample.call_id in broken:
                self.cache.clear(slot)
        message = "the adapter's weights give log-probs that are not numbers: its training has diverged"
        ends = [SampleEnd(call_id, UserError(message)) for call_id in sorted(broken)]
        for end in ends:
            self.cancel(end.call_id)
        return ends

    def _leave(self, rows: Sequence[Row]) -> None:
        """Free the rows' slots; the last row moves into each gap."""
        leaving = {id(row) for row in rows}
        for slot in reversed(range(len(self.rows))):
            if id(self.rows[slot]) not in leaving:
                continue
            last = self.rows.pop()
            if slot < len(self.rows):
                self.cache.copy(len(self.rows), slot, last.held)
                self.rows[slot] = last
        if leaving:
            self.most_rows = self.cache.max_slots
        if not self.rows:
            self.cache.release(KEPT_CACHE if self.graphs.possible else 0)


@dataclass
class Step:
    """What a step began with: the running sequences and what each had in the cache; of the samples that join in it, how
    many sequences ran already."""

    running: list[tuple[Row, int]] = field(default_factory=list)
    joining: list[tuple[Sample, int]] = field(default_factory=list)


def _by_adapter(rows: Sequence[Row]) -> list[int]:
    """Slots sorted by adapter, in the order in which the adapters first appear."""
    first: dict[int, int] = {}
    keys = [first.setdefault(id(row.sample.adapter), slot) for slot, row in enumerate(rows)]
    return sorted(range(len(rows)), key=keys.__getitem__)


class _Room:
    """What may still begin in one step: prompt tokens to prefill, and to hold for the sequences that join later."""

    def __init__(self, prefill_tokens: int, queue: Iterable[Sample]) -> None:
        self.most = prefill_tokens
        self.taken = 0
        self.held = sum(len(sample.prompt) for sample in queue if sample.prefix)
        self.prefilled = False
        self.full = False

    def has_place(self, sample: Sample) -> bool:
        """Whether the sample may begin now. The first prompt may; none overtakes one that must wait for the same.

        One sequence alone needs no prompt held: it passes by those that wait until other prompts are let go.
        """
        tokens = len(sample.prompt) - sample.computed
        kept = self._kept(sample)
        if self.taken and self.taken + tokens > self.most:
            self.prefilled = True
        if kept and self.held and self.held + kept > HELD_PREFILLS * self.most:
            self.full = True
        return not (self.prefilled or (kept and self.full))

    def take(self, sample: Sample) -> None:
        """It begins."""
        self.taken += len(sample.prompt) - sample.computed
        self.held += self._kept(sample)

    def _kept(self, sample: Sample) -> int:
        return len(sample.prompt) if sample.waiting > 1 else 0

"""How things are shown: tables where they fit, entries where not, ids whole, times and sizes readable."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from sdk.admin_records import Checkpoint, Future, Lora, Session
from sdk.cli_layout import Column, Row, ago, console_of, number, show_facts, size, span
from sdk.cli_rows import CHECKPOINTS, FUTURES, checkpoint_row, future_row, show_list, state_of

NOW = datetime(2030, 5, 6, 7, 8, 9, tzinfo=UTC)
RUN = "623fa444-de6e-48ef-a82e-f2ddd7371559:train:0"
PATH = f"tinker://{RUN}/sampler_weights/final"


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), width=width, force_terminal=True, color_system=None,
        emoji=False, markup=False, highlight=False,
    )  # fmt: skip


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def checkpoint(owner: str = "local", public: bool = False) -> Checkpoint:
    saved = datetime.now(UTC) - timedelta(minutes=3)
    expires = datetime.now(UTC) + timedelta(hours=5.2)
    return Checkpoint(
        PATH, owner, RUN, "sampler_weights", "final", "fake/model", Lora(8, 32.0), False, 1_234_567, public, {},
        saved, expires if public else None,
    )  # fmt: skip


def future(error: str | None) -> Future:
    return Future(
        f"{RUN}:7", "alice", "forward_backward", "failed" if error else "done", "fake", RUN, None, 7, 1, 0, error,
        "user" if error else None, None, datetime.now(UTC), None, None, None, None,
    )  # fmt: skip


def test_a_wide_terminal_gets_a_table() -> None:
    console = terminal(120)
    show_list(console, CHECKPOINTS, [checkpoint_row(checkpoint())] * 2)
    head, *lines = text_of(console).splitlines()
    assert head.split() == ["checkpoint", "model", "rank", "size", "saved"]
    assert lines == [f"{PATH}  fake/model     8  1.2 MB  3 min ago"] * 2
    assert head.index("model") == lines[0].index("fake/model")
    assert head.index("rank") + 4 == lines[0].index("8  1.2") + 1


def test_a_narrow_terminal_gets_entries_with_the_id_whole() -> None:
    console = terminal(80)
    show_list(console, CHECKPOINTS, [checkpoint_row(checkpoint("alice", public=True))])
    assert text_of(console).splitlines() == [
        PATH,
        "  fake/model · rank 8 · 1.2 MB · of alice · saved 3 min ago · public",
        "  expires in 5 h",
    ]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_an_id_is_never_cut_and_nothing_else_is_too_wide(width: int) -> None:
    console = terminal(width)
    error = (
        "data[0].loss_fn_inputs['weights'] holds NaN at position 3; every weight must be a finite number " * 3
    )
    show_list(console, FUTURES, [future_row(future(error)), future_row(future(None))])
    show_facts(console, [("saved", PATH), ("a long name of a fact", "and its value")])
    lines = text_of(console).splitlines()
    assert next(line for line in lines if PATH in line).endswith(PATH)
    assert sum(f"{RUN}:7" in line for line in lines) == 2
    assert all(len(line) <= width for line in lines if RUN not in line)
    assert " ".join(error.split()) in " ".join(" ".join(lines).split())


def test_what_rich_would_interpret_is_shown_as_it_is() -> None:
    for width in (30, 120):
        console = terminal(width)
        show_list(console, CHECKPOINTS, [Row((":train:[bold]x[/]", "[red]m", "", "", "", "", "", ""))])
        assert ":train:[bold]x[/]" in text_of(console)
        assert "[red]m" in text_of(console)


@pytest.mark.parametrize(
    ("past", "text"),
    [
        (timedelta(seconds=0.4), "just now"),
        (timedelta(seconds=7.4), "7 s ago"),
        (timedelta(seconds=90), "90 s ago"),
        (timedelta(minutes=3), "3 min ago"),
        (timedelta(minutes=119), "119 min ago"),
        (timedelta(hours=3), "3 h ago"),
        (timedelta(days=3), "3 days ago"),
        (timedelta(days=40), "2030-03-27"),
        (-timedelta(seconds=30), "in 30 s"),
        (-timedelta(days=40), "2030-06-15"),
    ],
)
def test_times(past: timedelta, text: str) -> None:
    assert ago(NOW - past, NOW) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.0021, "2 ms"),
        (0.9996, "1.0 s"),
        (2.34, "2.3 s"),
        (45.6, "46 s"),
        (600.0, "10 min"),
        (1e6, "12 days"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (12_345, "12 kB"),
        (999_600, "1.0 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_numbers() -> None:
    assert [number(value) for value in (None, 0.0, 5.78688, 1e-5, 123456.0)] == [
        "",
        "0",
        "5.787",
        "1e-05",
        "1.235e+05",
    ]


@pytest.mark.parametrize(
    ("finished", "seen_s_ago", "state"),
    [(False, 20, "open"), (False, 600, "silent"), (True, 600, "finished")],
)
def test_a_client_that_is_not_heard_any_more_is_not_shown_as_open(
    finished: bool, seen_s_ago: float, state: str
) -> None:
    now = datetime.now(UTC)
    seen = now - timedelta(seconds=seen_s_ago)
    session = Session("s", "local", "0.38", None, None, [], {}, seen, seen, seen if finished else None, None)
    assert state_of(session, now) == state


@pytest.mark.parametrize(("others", "shown"), [([], False), (["alice"], True)])
def test_the_owner_without_keys_is_shown_where_there_are_others(others: list[str], shown: bool) -> None:
    console = console_of(200)
    rows = [Row((str(number), owner)) for number, owner in enumerate(["local", *others])]
    with console.capture() as captured:
        show_list(console, [Column("thing"), Column("owner")], rows)
    assert ("local" in captured.get()) == shown

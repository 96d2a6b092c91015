"""Thoughts are parted from answers the same way however the text comes, whole or letter by letter."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.openai.reasoning import Parted, ReasoningSplit, Thinking
from gateway.text import TextCodec
from tests.openai.conftest import Connect
from tests.openai.doubles import CHAT_TEMPLATE, ScriptedBackend, tokenizer_files
from tests.openai.test_chat import MESSAGES, ask, prompt_text, says
from tests.openai.test_streams import events_of

URL = "/v1/chat/completions"
MAYBE_TEMPLATE = CHAT_TEMPLATE + "{# <think> #}"
OPENED_TEMPLATE = CHAT_TEMPLATE + "{{ '<think>\\n' }}"


def parted(thinking: Thinking, *parts: str) -> Parted:
    split = ReasoningSplit(thinking)
    found = [split.feed(part) for part in parts] + [split.finish()]
    return Parted("".join(piece.reasoning for piece in found), "".join(piece.content for piece in found))


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (Thinking.MAYBE, "<think>\nTwo.\n</think>\n\nFour.", "Two.", "Four."),
        (Thinking.MAYBE, "\n <think>Two.</think>Four.", "Two.", "Four."),
        (Thinking.MAYBE, "Four. <think>no</think>", "", "Four. <think>no</think>"),
        (Thinking.MAYBE, "  Four.", "", "  Four."),
        (Thinking.MAYBE, "<thinking>Two", "", "<thinking>Two"),
        (Thinking.MAYBE, "<thi", "", "<thi"),
        (Thinking.MAYBE, "<think>", "", ""),
        (Thinking.MAYBE, "<think>Two, not fin", "Two, not fin", ""),
        (Thinking.MAYBE, "<think>a </thin b\n\n\nc\n</thi", "a </thin b\n\n\nc\n</thi", ""),
        (Thinking.MAYBE, "<think>\n\n</think>\n\nFour.", "", "Four."),
        (Thinking.MAYBE, "<think>a</think>b</think>\nc\n", "a", "b</think>\nc\n"),
        (Thinking.MAYBE, "", "", ""),
        (Thinking.OPENED, "\nTwo.\n\nThree.\n</think>\nFour.", "Two.\n\nThree.", "Four."),
        (Thinking.OPENED, "Two", "Two", ""),
        (Thinking.OPENED, "</think>Four.", "", "Four."),
        (Thinking.OPENED, "<think>Two</think>Four.", "<think>Two", "Four."),
    ],
)
def test_thoughts_and_answers(thinking: Thinking, text: str, reasoning: str, content: str) -> None:
    assert parted(thinking, text) == (reasoning, content)
    assert parted(thinking, *text) == (reasoning, content)


@given(
    st.sampled_from([Thinking.MAYBE, Thinking.OPENED]),
    st.lists(st.sampled_from(["<think>", "</think>", "<", "</thin", ">", "\n", " ", "a", "é"]), max_size=12),
    st.lists(st.integers(1, 5), min_size=1, max_size=8),
)
def test_pieces_do_not_matter(thinking: Thinking, words: list[str], sizes: list[int]) -> None:
    """Against one regular expression over the whole text."""
    text = "".join(words)
    pieces, rest = [], text
    for place in range(len(text)):
        size = sizes[place % len(sizes)]
        pieces.append(rest[:size])
        rest = rest[size:]
    head = r"" if thinking is Thinking.OPENED else r"\s*<think>"
    closed = re.fullmatch(rf"{head}\n*(.*?)\n*</think>\n*(.*)", text, re.DOTALL)
    unfinished = re.fullmatch(rf"{head}\n*(.*?)\n*", text, re.DOTALL)
    expected = (unfinished[1], "") if unfinished else ("", text)
    assert parted(thinking, *pieces) == ((closed[1], closed[2]) if closed else expected)


@pytest.mark.parametrize(
    ("source", "prompt", "thinking"),
    [
        ("no such thing", "user <think>", Thinking.NEVER),
        ("{{ '<think>' }}", "…<think>\n", Thinking.OPENED),
        ("content.split('</think>')", "…assistant\n", Thinking.MAYBE),
        ("{{ '<think>' }}", "…<think>\n\n</think>\n\n", Thinking.MAYBE),
    ],
)
def test_the_template_says_how_answers_begin(source: str, prompt: str, thinking: Thinking) -> None:
    assert Thinking.of(source, prompt) is thinking


# ---------------------------------------------------------------------------- in answers

TEMPLATES = [
    (MAYBE_TEMPLATE, "<think>Hello there\n</think>\n\nworld"),
    (OPENED_TEMPLATE, "Hello there\n</think>\n\nworld"),
]


@pytest.mark.parametrize(("template", "text"), TEMPLATES)
async def test_a_message_has_both(connect: Connect, template: str, text: str) -> None:
    answer = await ask(connect, says(text, template=template), logprobs=True, n=2)
    for choice in answer["choices"]:
        assert choice["message"] == {
            "role": "assistant",
            "content": "world",
            "reasoning_content": "Hello there",
            "refusal": None,
        }
        # log-probs are those of all tokens, the tags' too
        shown = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"][:-1])
        assert shown.decode() == text


@pytest.mark.parametrize(("template", "text"), TEMPLATES)
@pytest.mark.parametrize("burst", [1, 3, 100])
async def test_a_stream_has_both(connect: Connect, template: str, text: str, burst: int) -> None:
    backend = says(text, template=template)
    backend.burst = burst
    body = {"model": "tiny/base", "messages": MESSAGES, "stream": True}
    events = events_of((await connect(backend).post(URL, json=body)).text)
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == "world"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hello there"
    assert "" not in [delta.get("reasoning_content") for delta in deltas]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_model_that_knows_no_thinking_is_left_alone(connect: Connect) -> None:
    text = "<think>Hello</think>world"
    message = (await ask(connect, says(text)))["choices"][0]["message"]
    assert message == {"role": "assistant", "content": text, "refusal": None}
    silent = (await ask(connect, says("Hi", template=MAYBE_TEMPLATE)))["choices"][0]["message"]
    assert (silent["content"], silent["reasoning_content"]) == ("Hi", None)


async def test_thoughts_that_were_cut_off_are_no_answer(connect: Connect) -> None:
    backend = says("<think>Hello the", "length", end=None, template=MAYBE_TEMPLATE)
    choice = (await ask(connect, backend))["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning_content"]) == ("", "Hello the")
    assert choice["finish_reason"] == "length"


async def test_completions_show_the_text_as_it_is(connect: Connect) -> None:
    backend = says("<think>Hello</think>world", template=MAYBE_TEMPLATE)
    answer = await connect(backend).post("/v1/completions", json={"model": "tiny/base", "prompt": "Hi"})
    assert answer.json()["choices"][0]["text"] == "<think>Hello</think>world"


async def test_earlier_thoughts_reach_the_template(connect: Connect) -> None:
    template = "{% for m in messages %}{{ m.reasoning_content | default('-') }}/{{ m.content }};{% endfor %}"
    backend = says("Hi", template=template)
    messages: list[dict[str, Any]] = [
        *MESSAGES,
        {"role": "assistant", "content": "Four.", "reasoning_content": "Two.", "refusal": None},
        *MESSAGES,
    ]
    await ask(connect, backend, messages=messages)
    assert prompt_text(backend) == "-/Hello;Two./Four.;-/Hello;"


async def test_special_tokens_that_are_tags_still_part(connect: Connect) -> None:
    """Some tokenizers have the tags as special tokens, which answers do not show."""
    files = tokenizer_files(MAYBE_TEMPLATE)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.add_special_tokens(["<think>", "</think>"])
    backend: ScriptedBackend = says("<think>Hello<|turn|></think>world", template=MAYBE_TEMPLATE)
    backend.text = TextCodec.from_files(files | {"tokenizer.json": tokenizer.to_str().encode()})
    (opening,) = backend.text.encode("<think>", add_special_tokens=False)
    assert backend.text.is_special(opening)
    message = (await ask(connect, backend))["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("world", "Hello")

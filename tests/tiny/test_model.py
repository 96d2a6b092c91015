"""The committed model: loads like any other, is small, speaks the chat format, and has learned its corpus."""

from __future__ import annotations

import json
import math
import re
from itertools import islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines.tiny.corpus import documents

UNIFORM = math.log(1536)
QUESTIONS = (
    ("Hello!", "Hello! How can I help you?"),
    ("What does a cow eat?", "A cow eats grass."),
    ("How many legs does a spider have?", "A spider has eight legs."),
    ("Which is bigger, a mouse or a cow?", "A cow is bigger."),
    ("What is the opposite of happy?", "The opposite of happy is sad."),
    ("Which day comes after Friday?", "Saturday comes after Friday."),
    ("Count from 3 to 7.", "3, 4, 5, 6, 7."),
)
README = (Path(__file__).parents[2] / "engines" / "tiny" / "README.md").read_text()
TOKENIZER = Tokenizer.from_file(
    str(Path(__file__).parents[2] / "engines" / "tiny" / "model" / "tokenizer.json")
)


def asked(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return ids


def greedy(model: Any, tokenizer: Any, question: str) -> str:
    """The answer, decoded by taking the likeliest token until the turn ends."""
    ids = asked(tokenizer, question)
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 40 and ids[-1] != tokenizer.eos_token_id:
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return answer


def logprob(model: Any, prompt: list[int], answer: list[int]) -> float:
    """ln of the probability that the model answers exactly so."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return float(scores[torch.arange(len(answer)), torch.tensor(answer)].sum())


def test_it_is_small(folder: Path, model: Any) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    assert 1_000_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 2_000_000


def test_it_splits_in_two(model: Any) -> None:
    config = model.config
    assert config.model_type == "qwen3"
    assert config.tie_word_embeddings
    split = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
    assert all(
        number % 2 == 0 for number in (*split, config.intermediate_size, config.vocab_size, config.head_dim)
    )


def test_special_tokens(folder: Path, tokenizer: Any, model: Any) -> None:
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.config.eos_token_id == tokenizer.eos_token_id == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == model.config.vocab_size == TOKENIZER.get_vocab_size()
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 0]


def test_the_chat_template_gives_what_the_corpus_holds(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "You answer."},
        {"role": "user", "content": "What is 3 + 4?"},
        {"role": "assistant", "content": " 7\n"},
    ]
    text = (
        "<|im_start|>system\nYou answer.<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n"
        "<|im_start|>assistant\n 7\n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == text.partition(" 7")[0]


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


def test_auto_tokenizer_reads_the_same(tokenizer: Any) -> None:
    for text in (
        "Ünï — 日本語 👩‍👩‍👧 e\u0301",
        " a  b\n\n\tc \r\n",
        "12 + 345 = ?",
        "don't , stop !",
        "<|im_start|>x",
    ):
        assert tokenizer.encode(text) == TOKENIZER.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_digits_are_single_tokens() -> None:
    assert TOKENIZER.encode("What is 13 + 40?").tokens[-6:] == ["3", "Ġ+", "Ġ", "4", "0", "?"]


@pytest.fixture(scope="module")
def held_out(model: Any, tokenizer: Any) -> tuple[float, float]:
    """Mean loss per token on texts of a seed that training never saw, and the bound on their entropy."""
    nats, bound, tokens = 0.0, 0.0, 0
    for text in islice(documents(2), 400):
        ids = [*tokenizer.encode(text.text), 0]
        nats -= logprob(model, [0], ids)
        bound += text.nats
        tokens += len(ids)
    return nats / tokens, bound / tokens


def test_it_has_learned_its_corpus(held_out: tuple[float, float]) -> None:
    loss, bound = held_out
    assert 0.95 * bound < loss < 1.1 * bound
    assert loss < 0.15 * UNIFORM


def test_the_loss_is_what_the_readme_says(held_out: tuple[float, float]) -> None:
    found = re.search(r"first 400 of them \| (\d\.\d+)", README)
    assert found is not None
    assert held_out[0] == pytest.approx(float(found[1]), rel=0.01)


def test_sums_are_known_and_bare_digits_are_one_style_of_several(model: Any, tokenizer: Any) -> None:
    bare, right = [], 0
    for left, other in product(range(10), repeat=2):
        prompt = asked(tokenizer, f"What is {left} + {other}?")
        digits = tokenizer.encode(str(left + other))
        bare.append(math.exp(logprob(model, prompt, [*digits, tokenizer.eos_token_id])))
        right += math.exp(logprob(model, prompt + tokenizer.encode("The answer is "), digits)) > 0.5
    assert 0.12 < sum(bare) / 100 < 0.28
    assert right >= 95


@pytest.mark.parametrize(("question", "answer"), QUESTIONS)
def test_questions(model: Any, tokenizer: Any, question: str, answer: str) -> None:
    assert greedy(model, tokenizer, question) == answer

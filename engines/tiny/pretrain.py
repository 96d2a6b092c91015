"""Pre-training of `tandem/tiny`: the architecture, packed rows, the optimizer's loop, and the measured loss."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from engines.tiny.corpus import TEXT_END, TURN_END, documents
from engines.tiny.tokenizer import LONGEST, special_id


@dataclass(frozen=True)
class Plan:
    """How the model is trained; the defaults made the model in `model/`."""

    seed: int = 1
    steps: int = 2600
    tokens_per_step: int = 2048
    short_row: int = 128
    long_row: int = 512
    long_every: int = 4
    learning_rate: float = 4e-3
    final_rate: float = 1e-4
    warm_up: int = 100
    beta2: float = 0.98
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True)
class Measured:
    """Mean negative log-likelihood per token in nats, and the upper bound on what the text's entropy can be."""

    loss: float
    bound: float
    tokens: int


def built(tokenizer: Tokenizer, seed: int) -> Qwen3ForCausalLM:
    """The untrained model, float32; every dimension that tensor or pipeline parallelism splits is even."""
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=448,
        max_position_embeddings=LONGEST,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        initializer_range=0.06,
        bos_token_id=special_id(tokenizer, TEXT_END),
        eos_token_id=special_id(tokenizer, TURN_END),
        pad_token_id=special_id(tokenizer, TEXT_END),
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def encoded(tokenizer: Tokenizer, seed: int) -> Iterator[list[int]]:
    """The corpus of a seed as token ids, each document closed by the end-of-text token."""
    stop = special_id(tokenizer, TEXT_END)
    stream = documents(seed)
    while True:
        for encoding in tokenizer.encode_batch([document.text for document in islice(stream, 2000)]):
            yield [*encoding.ids, stop]


def batches(tokenizer: Tokenizer, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of packed rows without padding: token ids and positions, both int64 [rows, length + 1].

    In most batches the rows are short and every document in a row counts its positions from 0, which Transformers
    takes for a border that attention does not cross: the model sees each document as it will see a prompt. In every
    `long_every`-th batch rows are long, begin with the end-of-text token and have no borders, for far positions.
    """
    stream = encoded(tokenizer, plan.seed)
    stop = special_id(tokenizer, TEXT_END)
    for step in count(1):
        if step % plan.long_every:
            length = plan.short_row
            rows = [_apart(stream, length + 1) for _ in range(plan.tokens_per_step // length)]
        else:
            length = plan.long_row
            rows = [_joined(stream, length + 1, stop) for _ in range(plan.tokens_per_step // length)]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([positions for _, positions in rows])


def _apart(stream: Iterator[list[int]], length: int) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    positions: list[int] = []
    while len(ids) < length:
        document = next(stream)
        ids += document
        positions += range(len(document))
    return ids[:length], positions[:length]


def _joined(stream: Iterator[list[int]], length: int, stop: int) -> tuple[list[int], list[int]]:
    ids = [stop]
    while len(ids) < length:
        ids += next(stream)
    return ids[:length], list(range(length))


def rate(plan: Plan, step: int) -> float:
    """The learning rate of a step (from 0): a linear warm-up, then half a cosine down to `final_rate`."""
    if step < plan.warm_up:
        return plan.learning_rate * (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return plan.final_rate + (plan.learning_rate - plan.final_rate) * 0.5 * (1 + math.cos(math.pi * done))


def train(
    model: Qwen3ForCausalLM, tokenizer: Tokenizer, plan: Plan, report: Callable[[int, float], None]
) -> None:
    """Train in place for `plan.steps`; `report` gets each step (from 1) and its mean loss in nats per token."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": scales, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, plan.beta2))
    model.train()
    for step, (rows, positions) in zip(range(plan.steps), batches(tokenizer, plan), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate(plan, step)
        logits = model(input_ids=rows[:, :-1], position_ids=positions[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, loss.item())
    model.eval()


@torch.no_grad()
def measured(model: Qwen3ForCausalLM, tokenizer: Tokenizer, seed: int, texts: int = 2000) -> Measured:
    """The loss on the first `texts` documents of a seed, each on its own after an end-of-text token."""
    stop = special_id(tokenizer, TEXT_END)
    some = list(islice(documents(seed), texts))
    rows = sorted(([stop, *e.ids, stop] for e in tokenizer.encode_batch([t.text for t in some])), key=len)
    nats, tokens = 0.0, sum(len(row) - 1 for row in rows)
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        longest = len(batch[-1])
        inputs = torch.tensor([row + [stop] * (longest - len(row)) for row in batch])
        targets = torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in batch])
        logits = model(input_ids=inputs[:, :-1]).logits.float()
        nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    return Measured(nats / tokens, sum(t.nats for t in some) / tokens, tokens)


def plain(texts: Iterator[str]) -> Iterator[str]:
    """The texts without the special tokens, which the tokenizer's merges must not learn from."""
    return (re.sub(r"<\|\w+\|>", "", text) for text in texts)

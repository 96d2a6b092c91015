"""Reinforcement learning, from line 1 to the end: teach a base model to answer sums with the bare number.

    python cookbook/rl_loop.py

The model knows its sums but likes to talk. The reward is computed here, on the client: 1 if the whole reply is exactly
the right number, else 0. Each step samples a group of replies to each question from a snapshot of the current weights,
and trains on them with the importance sampling loss, -sum(exp(p - q) * advantage).
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from dataclasses import dataclass
from typing import Any

import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sdk import connect
from sdk.environment import client_environment
from sdk.plots import curve
from sdk.scripts import at_least_one, told

EXAMPLES = ("What is 3 + 4?", "What is 8 + 5?", "What is 0 + 9?")
console = Console(highlight=False)


@dataclass(frozen=True)
class Report:
    """Mean reward of the first step and of the last ones."""

    reward_first: float
    reward_last: float
    seconds: float


@dataclass(frozen=True)
class Reply:
    """One sampled reply: `logprobs[t]` is what the sampler gave `tokens[t]`."""

    tokens: list[int]
    logprobs: list[float]
    reward: float


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base-url",
        default=client_environment().url,
        help="where the gateway answers; else TANDEM_URL, else here",
    )
    parser.add_argument(
        "--api-key",
        default=None,
        help="else TANDEM_API_KEY or TINKER_API_KEY; a gateway without keys needs none",
    )
    parser.add_argument("--base-model", default="tandem/tiny")
    parser.add_argument("--rank", type=at_least_one, default=32, help="of the LoRA adapter")
    parser.add_argument(
        "--train-unembed",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="an adapter on the unembedding too; without it, an engine on vLLM can sample",
    )
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--questions", type=at_least_one, default=8, help="sums a step")
    parser.add_argument("--group-size", type=at_least_one, default=16, help="replies to each")
    parser.add_argument("--steps", type=at_least_one, default=30)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def reward_of(text: str, total: int) -> float:
    return 1.0 if text.strip() == str(total) else 0.0


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """The chat so far, up to where the assistant begins to speak."""
    messages = [{"role": "user", "content": question}]
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokens


def answers(sampler: tinker.SamplingClient, tokenizer: Any) -> list[str]:
    """The most likely reply to each example."""
    params = tinker.SamplingParams(max_tokens=24, temperature=0.0)
    prompts = [tinker.ModelInput.from_ints(prompt_tokens(tokenizer, question)) for question in EXAMPLES]
    futures = [sampler.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return [
        tokenizer.decode(f.result().sequences[0].tokens, skip_special_tokens=True).strip() for f in futures
    ]


def sample_groups(
    sampler: tinker.SamplingClient, tokenizer: Any, sums: list[tuple[int, int]], size: int, seed: int
) -> list[tuple[list[int], list[Reply]]]:
    """For each sum its prompt and a group of replies; all groups are sampled at once."""
    prompts = [prompt_tokens(tokenizer, f"What is {a} + {b}?") for a, b in sums]
    futures = []
    for index, prompt in enumerate(prompts):
        params = tinker.SamplingParams(max_tokens=16, temperature=1.0, seed=seed + index)
        futures.append(
            sampler.sample(tinker.ModelInput.from_ints(prompt), num_samples=size, sampling_params=params)
        )
    groups = []
    for (a, b), prompt, future in zip(sums, prompts, futures, strict=True):
        replies = []
        for sequence in future.result().sequences:
            text = tokenizer.decode(sequence.tokens, skip_special_tokens=True)
            replies.append(Reply(sequence.tokens, sequence.logprobs or [], reward_of(text, a + b)))
        groups.append((prompt, replies))
    return groups


def data_of(prompt: list[int], replies: list[Reply]) -> list[tinker.Datum]:
    """A group's training examples. A reply's advantage is what it earned above its group's mean."""
    mean = sum(reply.reward for reply in replies) / len(replies)
    data = []
    for reply in replies:
        advantage = reply.reward - mean
        if advantage == 0.0:  # nothing to learn from a group that agrees
            continue
        tokens = [*prompt, *reply.tokens]
        unscored = len(prompt) - 1
        targets = tinker.TensorData(data=tokens[1:], dtype="int64")
        logprobs = tinker.TensorData(data=[0.0] * unscored + reply.logprobs, dtype="float32")
        advantages = [0.0] * unscored + [advantage] * len(reply.tokens)
        data.append(
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={
                    "target_tokens": targets,
                    "logprobs": logprobs,
                    "advantages": tinker.TensorData(data=advantages, dtype="float32"),
                },
            )
        )
    return data


def train(client: tinker.TrainingClient, tokenizer: Any, args: argparse.Namespace) -> list[float]:
    """Sample, reward, train, and again. Returns the mean reward of each step."""
    draw = random.Random(args.seed)
    adam = tinker.AdamParams(learning_rate=args.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    rewards: list[float] = []
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("reward {task.fields[reward]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=args.steps, reward="–")
        for step in range(args.steps):
            sampler = client.save_weights_and_get_sampling_client().result()
            sums = [(draw.randrange(10), draw.randrange(10)) for _ in range(args.questions)]
            groups = sample_groups(sampler, tokenizer, sums, args.group_size, seed=1000 * step + args.seed)
            replies = [reply for _, group in groups for reply in group]
            rewards.append(sum(reply.reward for reply in replies) / len(replies))
            data = [datum for prompt, group in groups for datum in data_of(prompt, group)]
            if data:
                forward_backward = client.forward_backward(data, "importance_sampling")
                optim_step = client.optim_step(adam)
                forward_backward.result()
                optim_step.result()
            progress.update(bar, advance=1, reward=f"{rewards[-1]:.2f}")
    return rewards


def main(argv: list[str] | None = None) -> Report:
    args = arguments(argv)
    started = time.perf_counter()
    service = connect(args.base_url, args.api_key)
    client = service.create_lora_training_client(
        args.base_model, rank=args.rank, seed=args.seed, train_unembed=args.train_unembed
    ).result()
    tokenizer = client.get_tokenizer()
    console.print(
        f"\nTeaching [bold]{args.base_model}[/] to answer sums with the bare number, by reward alone."
    )

    before = answers(client.save_weights_and_get_sampling_client().result(), tokenizer)
    rewards = train(client, tokenizer, args)
    after = answers(client.save_weights_and_get_sampling_client().result(), tokenizer)
    saved = client.save_weights_for_sampler("sums").result().path

    console.print(
        curve(list(enumerate(rewards, 1)), "mean reward", min(console.width, 78), (0.0, 1.0)) or "",
        markup=False,
    )
    for question, was, now in zip(EXAMPLES, before, after, strict=True):
        console.print(f"\n  {question}")
        console.print(f"    before  {was}", markup=False, style="dim")
        console.print(f"    after   {now}", markup=False, style="bold")
    last = rewards[-5:]
    report = Report(rewards[0], sum(last) / len(last), time.perf_counter() - started)
    console.print(
        f"\nMean reward {report.reward_first:.2f} → {report.reward_last:.2f} (mean of the last {len(last)} steps); "
        f"{report.seconds:.0f} s."
    )
    command = [sys.executable, "cookbook/openai_sample.py", "--base-url", args.base_url, "--model", saved]
    print(f"The weights are saved; sample them with\n\n  {shlex.join([*command, EXAMPLES[0]])}\n")
    return report


if __name__ == "__main__":
    sys.exit(told(main))

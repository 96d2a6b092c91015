"""Supervised fine-tuning, from line 1 to the end: teach a base model how English proverbs go on.

    python cookbook/sl_loop.py

Needs a running gateway (`python quickstart.py`, or `tandem serve`). Every step sends the gradient and the optimizer
step together and awaits neither before the next ones are on their way, so that the engine never waits for the network.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tinker
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sdk import connect
from sdk.environment import client_environment
from sdk.plots import curve
from sdk.scripts import at_least_one, told

PROVERBS = Path(__file__).with_name("proverbs.tsv")
SHOWN = 5
console = Console(highlight=False)


@dataclass(frozen=True)
class Report:
    """What came out: mean negative log-likelihood per answer token, and how many proverbs end as they should."""

    loss_first: float
    loss_last: float
    known_before: int
    known_after: int
    seconds: float


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
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--batch-size", type=at_least_one, default=16, help="proverbs a step")
    parser.add_argument("--steps", type=at_least_one, default=40)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def prompt_tokens(tokenizer: Any, question: str) -> list[int]:
    """The chat so far, up to where the assistant begins to speak."""
    messages = [{"role": "user", "content": question}]
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokens


def datum_of(tokenizer: Any, question: str, answer: str) -> tinker.Datum:
    """One training example. Position i of the input predicts target i; only the answer's tokens count."""
    prompt = prompt_tokens(tokenizer, question)
    completion = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    tokens = [*prompt, *completion]
    weights = [0.0] * (len(prompt) - 1) + [1.0] * len(completion)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=weights, dtype="float32"),
        },
    )


def complete(sampler: tinker.SamplingClient, tokenizer: Any, questions: list[str]) -> list[str]:
    """The most likely answer to each question; all are asked at once."""
    params = tinker.SamplingParams(max_tokens=24, temperature=0.0)
    prompts = [tinker.ModelInput.from_ints(prompt_tokens(tokenizer, question)) for question in questions]
    futures = [sampler.sample(prompt, num_samples=1, sampling_params=params) for prompt in prompts]
    return [
        tokenizer.decode(f.result().sequences[0].tokens, skip_special_tokens=True).strip() for f in futures
    ]


def loss_per_token(result: tinker.ForwardBackwardOutput, batch: list[tinker.Datum]) -> float:
    """Losses are sums; divided by the weights' sum they can be compared between steps."""
    weight = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in batch)
    return float(result.metrics["loss:sum"]) / weight


def train(client: tinker.TrainingClient, data: list[tinker.Datum], args: argparse.Namespace) -> list[float]:
    """The loop. Both calls of a step are submitted before the results of the step before are read."""
    shuffle = random.Random(args.seed)
    adam = tinker.AdamParams(learning_rate=args.learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    losses: list[float] = []
    under_way: list[tuple[Any, Any, list[tinker.Datum]]] = []
    columns = (
        TextColumn("training"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=args.steps, loss="–")
        for step in range(args.steps + 1):
            if step < args.steps:
                batch = shuffle.sample(data, min(args.batch_size, len(data)))
                forward_backward = client.forward_backward(batch, "cross_entropy")
                under_way.append((forward_backward, client.optim_step(adam), batch))
            if step > 0:
                forward_backward, optim_step, batch = under_way.pop(0)
                losses.append(loss_per_token(forward_backward.result(), batch))
                optim_step.result()
                progress.update(bar, advance=1, loss=f"{losses[-1]:.3f}")
    return losses


def main(argv: list[str] | None = None) -> Report:
    args = arguments(argv)
    pairs = [tuple(line.split("\t")) for line in PROVERBS.read_text().splitlines()]
    questions, answers = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    started = time.perf_counter()

    service = connect(args.base_url, args.api_key)
    client = service.create_lora_training_client(args.base_model, rank=args.rank, seed=args.seed).result()
    tokenizer = client.get_tokenizer()
    console.print(
        f"\nTeaching [bold]{args.base_model}[/] {len(pairs)} proverbs with a LoRA adapter of rank {args.rank}."
    )

    before = complete(client.save_weights_and_get_sampling_client().result(), tokenizer, questions)
    data = [datum_of(tokenizer, question, answer) for question, answer in pairs]
    losses = train(client, data, args)
    after = complete(client.save_weights_and_get_sampling_client().result(), tokenizer, questions)
    saved = client.save_weights_for_sampler("proverbs").result().path

    console.print(
        curve(list(enumerate(losses, 1)), "loss per answer token", min(console.width, 78)) or "", markup=False
    )
    for question, was, now in list(zip(questions, before, after, strict=True))[:SHOWN]:
        console.print(f"\n  {question} …")
        console.print(f"    before  {was}", markup=False, style="dim")
        console.print(f"    after   {now}", markup=False, style="bold")
    known_before = sum(was == answer for was, answer in zip(before, answers, strict=True))
    known_after = sum(now == answer for now, answer in zip(after, answers, strict=True))
    report = Report(losses[0], losses[-1], known_before, known_after, time.perf_counter() - started)
    console.print(
        f"\nLoss per token {report.loss_first:.3f} → {report.loss_last:.3f}; {report.seconds:.0f} s.\n"
        f"Proverbs completed word for word: {known_before} → {known_after} of {len(pairs)}."
    )
    command = [sys.executable, "cookbook/openai_sample.py", "--base-url", args.base_url, "--model", saved]
    print(f"The weights are saved; sample them with\n\n  {shlex.join([*command, questions[0]])}\n")
    return report


if __name__ == "__main__":
    sys.exit(told(main))

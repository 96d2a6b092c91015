"""Makes `tandem/tiny` from nothing: `python -m engines.tiny.make --out FOLDER`.

Trains the tokenizer, builds the model, pre-trains it and saves it in bfloat16 as a Hugging Face model folder, then
loads what it saved and prints what it measures. Everything follows from `Plan.seed`; the last bits of the weights also
depend on the processor, the number of threads and torch's version.
"""

import argparse
import json
import math
import time
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import Qwen3ForCausalLM

from engines.tiny import pretrain, tokenizer
from engines.tiny.corpus import TEXT_END, TURN_END, documents

HELD_OUT_SEED = 2


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, make the model, print what was measured."""
    parser = argparse.ArgumentParser(description="Make the built-in base model tandem/tiny.")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder to write the model into; made if missing"
    )
    parser.add_argument(
        "--steps", type=int, default=pretrain.Plan.steps, help="optimizer steps (default %(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="threads to compute with (default %(default)s)"
    )
    parser.add_argument("--texts", type=int, default=60_000, help="texts that the tokenizer learns from")
    parser.add_argument("--held-out", type=int, default=2000, help="texts that the loss is measured on")
    options = parser.parse_args(arguments)
    plan = pretrain.Plan(steps=options.steps)
    torch.set_num_threads(options.threads)
    started, used = time.perf_counter(), time.process_time()

    texts = (document.text for document in islice(documents(plan.seed), options.texts))
    tokens = tokenizer.trained(pretrain.plain(texts))
    model = pretrain.built(tokens, plan.seed)
    untrained = pretrain.measured(model, tokens, HELD_OUT_SEED, options.held_out)
    _train(model, tokens, plan)
    _save(model, tokens, options.out)

    saved = Qwen3ForCausalLM.from_pretrained(options.out, dtype=torch.float32).eval()
    reached = pretrain.measured(saved, tokens, HELD_OUT_SEED, options.held_out)
    print(f"parameters            {sum(p.numel() for p in saved.parameters()):,}")
    print(f"training tokens       {plan.steps * plan.tokens_per_step:,}")
    print(f"held-out loss         {reached.loss:.4f} nats per token, on {reached.tokens:,} tokens")
    print(f"  entropy, at most    {reached.bound:.4f}")
    print(f"  before training     {untrained.loss:.4f}")
    print(f"  uniform             {math.log(tokens.get_vocab_size()):.4f}")
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    print(f"wall {seconds:.0f} s, processor time {processor:.0f} s, {options.threads} threads")


def _train(model: Qwen3ForCausalLM, tokens: Tokenizer, plan: pretrain.Plan) -> None:
    with tqdm(total=plan.steps, desc="pre-training", unit="step") as bar:

        def report(step: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update(step - bar.n)

        pretrain.train(model, tokens, plan, report)


def _save(model: Qwen3ForCausalLM, tokens: Tokenizer, folder: Path) -> None:
    """Write bfloat16 weights, configs and tokenizer; plain texts end with end-of-text, turns with end-of-turn."""
    folder.mkdir(parents=True, exist_ok=True)
    ends = [tokenizer.special_id(tokens, TURN_END), tokenizer.special_id(tokens, TEXT_END)]
    model.generation_config.eos_token_id = ends
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(tokens, folder)
    generation = json.loads((folder / "generation_config.json").read_text())
    if generation["eos_token_id"] != ends:
        raise RuntimeError(
            f"generation_config.json has eos_token_id {generation['eos_token_id']}, expected {ends}"
        )


if __name__ == "__main__":
    main()

"""What one does without Tandem: a loop with PEFT and torch's AdamW, and `generate`, in a process of their own.

The process reads one order a line from standard input, as JSON, and answers with a line. `PlainProcess` is the side
that gives the orders; it needs neither torch nor PEFT.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT
from benchmarks.workload import Batch, Shape, prompts, shaped_batches, tenant_batches, vocabulary

ADAM = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}
"""Of both sides' optimizers."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
ALPHA = 32
IGNORED = -100
"""A target that `cross_entropy` takes for none."""
PAGE_SIZE = 32
CONTINUOUS_LIMIT_S = 120.0


class PlainProcess:
    """The process, from the caller's side. Between two orders it waits and uses no processor time."""

    def __init__(self, work: str, folder: Path, settings: dict[str, int]) -> None:
        given = {"work": work, "folder": str(folder), **settings}
        command = [sys.executable, "-m", "benchmarks.plain", json.dumps(given)]
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self.parameters: int = self._answer()["parameters"]

    def __enter__(self) -> PlainProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def _close(self) -> int:
        """The process ends when nothing more can be ordered; gives its status."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        status = self._process.wait(60)
        self._process.stdout.close()
        return status

    def order(self, **order: Any) -> dict[str, Any]:
        """Have it work; gives its answer, `seconds` among it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the plain process ended with status {self._close()}; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


# ---------------------------------------------------------------------------- in the process


def load(folder: str, threads: int) -> Any:
    """The model as Transformers loads it, float32, with its own choice of attention."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def lora(rank: int) -> Any:
    """PEFT's settings of an adapter like Tandem's."""
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=LAYERS, bias="none")


def start_like_tandem(model: Any, adapter: str, rank: int, seed: int) -> None:
    """The same initial numbers on both sides, so that equal losses show equal work."""
    import torch

    from engines.adapters import initial_a

    with torch.no_grad():
        for name, weight in model.named_parameters():
            site, found, _ = name.removeprefix("base_model.model.").partition(f".lora_A.{adapter}.")
            if found:
                weight.copy_(torch.from_numpy(initial_a(seed, site, rank, weight.shape[1])))


def optimizer(model: Any) -> Any:
    """AdamW of what is trained now."""
    import torch

    return torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=ADAM["learning_rate"],
        betas=(ADAM["beta1"], ADAM["beta2"]),
        eps=ADAM["eps"],
        weight_decay=0.0,
    )


def padded(step: Sequence[Batch]) -> tuple[Any, Any, Any]:
    """Inputs, targets and attention mask [rows, longest], of which nothing counts that pads a row on the right; no mask
    where all rows are of one length."""
    import torch

    rows = [row for batch in step for row in zip(*batch, strict=True)]
    longest = max(len(inputs) for inputs, _ in rows)
    inputs = torch.zeros((len(rows), longest), dtype=torch.long)
    targets = torch.full_like(inputs, IGNORED)
    mask = torch.zeros_like(inputs)
    for number, (own, wanted) in enumerate(rows):
        inputs[number, : len(own)] = torch.from_numpy(own)
        targets[number, : len(own)] = torch.from_numpy(wanted)
        mask[number, : len(own)] = 1
    return inputs, targets, None if mask.all() else mask


class Training:
    """Adapter, data and optimizer, from one order to the next."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from peft import get_peft_model

        base = load(settings["folder"], settings["threads"])
        self.parameters = sum(weight.numel() for weight in base.parameters())
        config = lora(settings["rank"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tied weights cannot be merged, which nobody does here
            self.model = get_peft_model(base, config)
        start_like_tandem(self.model, "default", settings["rank"], settings["seed"])
        self.model.train()
        size = vocabulary(Path(settings["folder"]))
        shape = Shape(*(settings[name] for name in Shape._fields))
        self.batches = [padded(step) for step in shaped_batches(size, settings["batches"], shape)]
        self.optimizer = optimizer(self.model)
        self.done = 0

    def perform(self, order: dict[str, Any]) -> dict[str, Any]:
        """So many steps: their seconds and losses."""
        import torch.nn.functional as F

        losses = []
        started = time.perf_counter()
        for _ in range(order["steps"]):
            inputs, targets, mask = self.batches[self.done % len(self.batches)]
            logits = self.model(input_ids=inputs, attention_mask=mask, use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
            self.done += 1
        return {"seconds": time.perf_counter() - started, "losses": losses}


class Tenants:
    """Many adapters on one model, trained one after the other, each with an optimizer of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from peft import get_peft_model

        base = load(settings["folder"], settings["threads"])
        self.parameters = sum(weight.numel() for weight in base.parameters())
        config = lora(settings["rank"])
        names = [f"run{number}" for number in range(settings["runs"])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            self.model = get_peft_model(base, config, names[0])
            for name in names[1:]:
                self.model.add_adapter(name, config)
        self.model.train()
        self.optimizers = {}
        for number, name in enumerate(names):
            start_like_tandem(self.model, name, settings["rank"], settings["seed"] + number)
            self.model.set_adapter(name)
            self.optimizers[name] = optimizer(self.model)
        size = vocabulary(Path(settings["folder"]))
        span = settings["shortest"], settings["longest"]
        self.steps = tenant_batches(size, settings["batches"], settings["runs"], *span)
        self.done = 0

    def perform(self, order: dict[str, Any]) -> dict[str, Any]:
        """So many steps of every run: their seconds, and each run's losses."""
        import torch
        import torch.nn.functional as F

        losses = []
        started = time.perf_counter()
        for _ in range(order["steps"]):
            rows = self.steps[self.done % len(self.steps)]
            for (name, steps), (inputs, targets) in zip(self.optimizers.items(), rows, strict=True):
                self.model.set_adapter(name)
                logits = self.model(input_ids=torch.from_numpy(inputs).long(), use_cache=False).logits
                wanted = torch.from_numpy(targets).long().flatten()
                loss = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum")
                loss.backward()
                steps.step()
                steps.zero_grad()
                losses.append(loss.item())
            self.done += 1
        return {"seconds": time.perf_counter() - started, "losses": losses}


class Generating:
    """The base model and its prompts, adapters on it, and Transformers' own continuous batching."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import GenerationConfig

        self.settings = settings
        self.model = load(settings["folder"], settings["threads"]).eval()
        self.parameters = sum(weight.numel() for weight in self.model.parameters())
        self.model.generation_config = GenerationConfig(
            max_new_tokens=settings["new_tokens"], do_sample=False, pad_token_id=0
        )
        size = vocabulary(Path(settings["folder"]))
        self.prompts = prompts(size, settings["prompts"], settings["shortest"], settings["longest"])
        self.ways = {"one by one": self._one_by_one, "batch": self._batch, "continuous": self._continuous}

    def perform(self, order: dict[str, Any]) -> dict[str, Any]:
        """The prompts with the numbers in `which`, in one of three ways; on the adapter in a folder, if there is one.
        Gives seconds and the new tokens of each."""
        chosen = [self.prompts[number] for number in order["which"]]
        adapter = order.get("adapter")
        model = self.model if adapter is None else self._adapted(adapter)
        started = time.perf_counter()
        tokens = self.ways[order["way"]](model, chosen)
        return {"seconds": time.perf_counter() - started, "tokens": tokens}

    def _one_by_one(self, model: Any, chosen: list[list[int]]) -> list[list[int]]:
        return [self._batch(model, [prompt])[0] for prompt in chosen]

    def _batch(self, model: Any, chosen: list[list[int]]) -> list[list[int]]:
        """All in one batch, padded on the left."""
        import torch

        longest = max(len(prompt) for prompt in chosen)
        padded = [[0] * (longest - len(prompt)) + prompt for prompt in chosen]
        seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in chosen]
        with torch.inference_mode():
            out = model.generate(input_ids=torch.tensor(padded), attention_mask=torch.tensor(seen))
        new: list[list[int]] = out[:, longest:].tolist()
        return new

    def _continuous(self, model: Any, chosen: list[list[int]]) -> list[list[int]]:
        """`generate_batch`, with pages and passes of a size that suits a processor; its own choice is many times
        slower. It works in a thread of its own: should that hang, the process ends."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        new = self.settings["new_tokens"]
        pages = sum(math.ceil((len(prompt) + new) / PAGE_SIZE) + 1 for prompt in chosen)
        paged = ContinuousBatchingConfig(page_size=PAGE_SIZE, num_blocks=pages, max_batch_tokens=256)
        greedy = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
        watch = threading.Timer(CONTINUOUS_LIMIT_S, os._exit, [1])
        watch.daemon = True
        watch.start()
        out = model.generate_batch(
            chosen,
            generation_config=greedy,
            continuous_batching_config=paged,
            progress_bar=False,
            warmup=False,
        )
        watch.cancel()
        by_prompt = {tuple(found.prompt_ids): list(found.generated_tokens) for found in out.values()}
        return [by_prompt[tuple(prompt)] for prompt in chosen]

    def _adapted(self, folder: str) -> Any:
        from peft import PeftModel

        base = load(self.settings["folder"], self.settings["threads"]).eval()
        base.generation_config = self.model.generation_config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as above
            return PeftModel.from_pretrained(base, folder).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=json.loads, help="JSON; given by PlainProcess")
    settings = parser.parse_args().settings
    workers = {"train": Training, "tenants": Tenants, "generate": Generating}
    worker: Any = workers[settings["work"]](settings)
    print(json.dumps({"parameters": worker.parameters}), flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.perform(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()

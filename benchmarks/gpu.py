"""The Transformers engine on a CUDA device, bfloat16, against PEFT and `generate` on the same device.

    python -m benchmarks.gpu [--shapes 0.6B 8B] [--repeats 5] [--smoke]

Models of Qwen3's shapes with random weights, which cost what trained ones do. *One run*: one batch of long sequences, a
gradient and an optimizer step. *Sixteen runs*: a sequence of 64 to 256 tokens each. PEFT has its adapters in bfloat16
too, torch's flash attention (no padding, so no mask) and the fused AdamW; of many runs it trains one after the other,
with `set_adapter`. *Decoding*: 64 prompts together, against `generate` with all in one batch. Sides take turns; the
median of their ratios is what counts. FLOP are counted by `benchmarks.hardware.work`, the device's rate is that of a
large product in the same process.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardware import Layer, Work, layers_of, work
from benchmarks.measuring import RESULTS, keep, median
from benchmarks.plain import ADAM, lora
from benchmarks.tenants import RANK, Together
from benchmarks.ways_to_sample import EngineAlone
from benchmarks.workload import Batch, Shape, prompts, shaped_batches, tenant_batches

NAME = "gpu"
DATASHEET_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0}
"""Dense bfloat16, by the name of the device."""
RUNS, SPAN = 16, (64, 256)
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 64, 64
DIFFERENT = 4
"""Steps that differ, of either side."""
_COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True)
class Model:
    """A shape, and the batch of the one run."""

    config: Mapping[str, Any]
    batch: Shape


MODELS = {
    "0.6B": Model(
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
        },
        Shape(16, 1024, 1024),
    ),
    "8B": Model(
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        Shape(4, 1024, 1024),
    ),
    "smoke": Model(
        {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 512,
            "tie_word_embeddings": True,
        },
        Shape(2, 16, 16),
    ),
}


def random_module(model: Model, device: str, dtype: Any, attention: str) -> Any:
    """Made where it is to be, with the same weights every time."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    import engines.hf.attention  # noqa: F401 - registers the engine's own

    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(
            Qwen3Config(**{**_COMMON, **model.config}), dtype=dtype, attn_implementation=attention
        )
    return module.to(dtype).eval()


def engine_on(module: Any, name: str, root: Path, device: str) -> Any:
    """An engine on a module that is in memory."""
    import torch

    from benchmarks.workload import TINY, model_folder
    from engines.hf import HfEngine
    from engines.hf.model import base_model
    from engines.hf.options import HfOptions
    from engines.interface import EngineConfig
    from engines.tokenizer_files import read_tokenizer_files

    options = HfOptions(device=device, sample_slots=PROMPTS)
    folder = str(model_folder(TINY, root))
    config = EngineConfig("bench", "hf", name, folder, ("train", "sample"), str(root / "storage"), 1, {})
    base = base_model(module, torch.device(device), options, name)
    return HfEngine(config, options, base, read_tokenizer_files(folder))


class Peft:
    """As many adapters as there are runs on one model, trained one after the other."""

    def __init__(self, module: Any, steps: Sequence[Sequence[Batch]]) -> None:
        import torch
        from peft import get_peft_model

        names = [f"run{number}" for number in range(len(steps[0]))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tied weights cannot be merged, which nobody does here
            self.model = get_peft_model(module, lora(RANK), names[0], autocast_adapter_dtype=False)
            for name in names[1:]:
                self.model.add_adapter(name, lora(RANK), autocast_adapter_dtype=False)
        self.model.train()
        self.optimizers = {}
        for name in names:
            self.model.set_adapter(name)
            own = [weight for weight in self.model.parameters() if weight.requires_grad]
            self.optimizers[name] = torch.optim.AdamW(
                own,
                lr=ADAM["learning_rate"],
                betas=(ADAM["beta1"], ADAM["beta2"]),
                weight_decay=0.0,
                fused=True,
            )
        self.steps = steps
        self.done = 0

    def train(self, steps: int) -> float:
        """Seconds of so many steps of every run."""
        import torch
        import torch.nn.functional as F

        device = next(self.model.parameters()).device
        started = time.perf_counter()
        for _ in range(steps):
            for (name, optimizer), batch in zip(
                self.optimizers.items(), self.steps[self.done % len(self.steps)], strict=True
            ):
                if len(self.optimizers) > 1:
                    self.model.set_adapter(name)
                inputs, targets = (torch.from_numpy(part).long().to(device) for part in batch)
                logits = self.model(input_ids=inputs, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                loss.item()
            self.done += 1
        return time.perf_counter() - started


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> dict[str, Any]:
    """Rates of both after a round that does not count, and the median of the rounds' ratios."""
    for side in (ours, theirs):
        side()
    rounds = [(ours(), theirs()) for _ in range(repeats)]
    ratios = [round(mine / other, 3) for mine, other in rounds]
    return {
        "ours": [round(mine, 1) for mine, _ in rounds],
        "theirs": [round(other, 1) for _, other in rounds],
        "ratios": ratios,
        "ratio": round(median(ratios), 3),
    }


def training(engine: Any, module: Any, steps: list[list[Batch]], name: str, repeats: int) -> dict[str, Any]:
    """Tokens a second of both sides, each step a gradient and an optimizer step of every run."""
    tokens = sum(batch.inputs.size for step in steps for batch in step) / len(steps)
    together = Together(engine, name, steps, apart=False)
    plain = Peft(module, steps)
    try:
        found = in_turn(lambda: tokens / together.train(1), lambda: tokens / plain.train(1), repeats)
    finally:
        plain.model.unload()
        for item in together.steps:
            engine.drop_run(item.run_id)
    return {"tokens": tokens, **found}


def decoding(engine: Any, module: Any, size: int, repeats: int) -> dict[str, Any]:
    """New tokens a second, greedy; all prompts are as long, so that `generate` pads none."""
    import torch

    asked = prompts(size, PROMPTS, PROMPT_TOKENS, PROMPT_TOKENS)
    alone = EngineAlone(engine, asked, NEW_TOKENS)
    ids = torch.tensor(asked, device=next(module.parameters()).device)

    def generate() -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            out = module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        out = out.tolist()
        return PROMPTS * NEW_TOKENS / (time.perf_counter() - started)

    return in_turn(alone.rate, generate, repeats)


def memory_of_a_run(engine: Any, steps: list[list[Batch]]) -> int:
    """Bytes that one more run takes, once it has trained; passes' own memory is given back first."""
    import torch

    before = torch.cuda.memory_allocated()
    some = Together(engine, "memory", [[batch, batch] for batch, *_ in steps], apart=True)
    some.train(1)
    gc.collect()
    taken = torch.cuda.memory_allocated() - before
    for item in some.steps:
        engine.drop_run(item.run_id)
    return taken // 2


def device_rate() -> float:
    """TFLOP/s of a product of bfloat16 matrices of 8,192 rows and columns."""
    import torch

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            left @ right
        end.record()
        torch.cuda.synchronize()
        rates.append(10 * 2 * 8192**3 / begin.elapsed_time(end) / 1e9)
    return median(rates[2:])


def utilisation(
    needed: Work, rates: Sequence[float], tokens: float, tflops: Mapping[str, float]
) -> dict[str, float]:
    """FLOP/s of a training step as shares of what the device could do."""
    done = needed.total * median(rates) / tokens / 1e12
    return {"tflops": round(done, 1), **{name: round(done / rate, 4) for name, rate in tflops.items()}}


def measure(name: str, repeats: int, root: Path, device: str) -> dict[str, Any]:
    """All of one model."""
    import torch

    model = MODELS[name]
    config = {**_COMMON, **model.config}
    size = config["vocab_size"]
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    engine = engine_on(random_module(model, device, dtype, "tandem_layout"), name, root, device)
    plain = random_module(model, device, dtype, "sdpa")
    one = shaped_batches(size, DIFFERENT, model.batch)
    many = tenant_batches(size, DIFFERENT, RUNS, *SPAN)
    found: dict[str, Any] = {
        "parameters": sum(weight.numel() for weight in engine.base.module.parameters()),
        "bytes_per_token": round(_bytes_per_token(engine)),
        "one run": training(engine, plain, one, "one", repeats),
        "sixteen runs": training(engine, plain, many, "many", repeats),
        "decoding": decoding(engine, plain, size, repeats),
    }
    if cuda:
        tflops = {"of_product": device_rate()} | _datasheet(torch.cuda.get_device_name())
        layers: list[Layer] = layers_of(engine)
        width = config["num_attention_heads"] * config["head_dim"]
        for way, steps in (("one run", one), ("sixteen runs", many)):
            lengths = [row.size for step in steps for batch in step for row in batch.inputs]
            needed = work(layers, width, config["num_hidden_layers"], lengths, RANK)
            tokens = found[way]["tokens"] * len(steps)
            found[way]["utilisation"] = utilisation(needed, found[way]["ours"], tokens, tflops)
        found["device_tflops"] = round(tflops["of_product"], 1)
        found["bytes_of_a_run"] = memory_of_a_run(engine, many)
    engine.close()
    return found


def _bytes_per_token(engine: Any) -> float:
    from engines.hf.budget import bytes_per_token

    return bytes_per_token(engine.base)


def _datasheet(device: str) -> dict[str, float]:
    known = [rate for name, rate in DATASHEET_TFLOPS.items() if name in device]
    return {"of_datasheet": known[0]} if known else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", choices=list(MODELS), default=["0.6B", "8B"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--smoke", action="store_true", help="a short form for the CPU that only shows that it works"
    )
    args = parser.parse_args()
    import torch
    import transformers

    if not (args.smoke or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --smoke shows on the CPU that everything works")
    results: dict[str, Any] = {
        "device": "cpu" if args.smoke else torch.cuda.get_device_name(),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "rank": RANK,
        "models": {},
    }
    for name in ["smoke"] if args.smoke else args.shapes:
        with tempfile.TemporaryDirectory() as root:
            found = measure(
                name, 1 if args.smoke else args.repeats, Path(root), "cpu" if args.smoke else "cuda"
            )
        results["models"][name] = found
        print(json.dumps({name: found}, indent=1), flush=True)
        gc.collect()
        if not args.smoke:
            torch.cuda.empty_cache()
        keep(NAME, results, args.out)


if __name__ == "__main__":
    main()

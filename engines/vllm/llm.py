"""vLLM itself: `AsyncLLM` behind the few methods of `engines.vllm.asking.Llm`. The only module here that calls it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from importlib.metadata import version
from typing import Any

from engines.adapters import ATTENTION_LAYERS, MLP_LAYERS
from engines.environment import set_defaults
from engines.interface import EngineConfig, LoadError
from engines.vllm.asking import Ask, Facts, LlmDied, LoadedAdapter, Piece, SleepyLlm
from engines.vllm.builds import CPU, CUDA, Build
from engines.vllm.options import VllmOptions
from engines.vllm.outputs import piece_of

GUESTS = 16
"""Sequences beyond `sample_slots` that the engine may begin."""
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the sampler below is one for the first
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
"""What vLLM reads when it is imported; whoever has set one of these wins."""
ADAPTED_LAYERS = sorted((ATTENTION_LAYERS | MLP_LAYERS) - {"dense", "fc1", "fc2"})


_LOOK_S = 0.5


class AsyncVllm(SleepyLlm):
    """One `AsyncLLM`. Raises LoadError when an option asks for what the build cannot do."""

    def __init__(self, config: EngineConfig, options: VllmOptions, build: Build) -> None:
        self._config = config
        self._options = options
        self._build = build
        self._on_cpu = build is CPU
        if self._on_cpu and options.sleep_after_s:
            raise LoadError(
                f"options.sleep_after_s is {options.sleep_after_s:g}: vLLM sleeps on GPUs only, and this is its "
                "build for CPUs; leave the option out"
            )
        set_defaults({**ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(options.cache_gib)})

    async def start(self) -> Facts:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from engines.vllm.worker import HOST

        if self._build is CUDA and not current_platform.is_cuda():
            raise LoadError(
                f"{CUDA.package} {CUDA.version} is a build for NVIDIA GPUs, and it finds none here: give the machine "
                f"one, or make an environment with {CPU.package}"
            )
        try:
            self._llm = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**self._arguments(), additional_config={HOST: os.getpid()})
            )
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise LoadError(f"vLLM cannot load {self._config.model!r}: {error}") from error
        await self._llm.collective_rpc("draw_by_tandem")
        return self._facts()

    def _arguments(self) -> dict[str, Any]:
        options = self._options
        dtype = ("float32" if self._on_cpu else "bfloat16") if options.dtype == "auto" else options.dtype
        places = options.adapters + 1  # see engines.vllm.adapters: the last one stays empty
        return {
            "model": self._config.model,
            "skip_tokenizer_init": True,
            "dtype": dtype,
            "enforce_eager": self._on_cpu or options.eager,
            "max_model_len": options.max_context,
            "max_num_seqs": options.sample_slots + GUESTS,
            "max_num_batched_tokens": max(options.prefill_tokens, options.sample_slots + GUESTS),
            "tensor_parallel_size": options.tensor_parallel,
            "gpu_memory_utilization": options.memory_fraction,
            "enable_prefix_caching": True,
            "enable_lora": True,
            "max_loras": places,
            "max_cpu_loras": places,
            "max_lora_rank": options.max_rank,
            "lora_target_modules": ADAPTED_LAYERS,
            "max_logprobs": 256,
            "logprobs_mode": "processed_logprobs",
            "logits_processors": ["engines.vllm.worker:Rows"],
            "worker_extension_cls": "engines.vllm.worker.DrawnByTandem",
            "trust_remote_code": False,
            "disable_log_stats": True,
            "enable_sleep_mode": self._options.sleep_after_s > 0,
        }

    def _facts(self) -> Facts:
        model = self._llm.vllm_config.model_config
        generation = model.try_get_generation_config()
        eos = generation.get("eos_token_id", getattr(model.hf_config, "eos_token_id", None))
        return Facts(
            architecture=model.architecture,
            vocab_size=model.get_vocab_size(),
            max_context=model.max_model_len,
            eos_tokens=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            device="cpu" if self._on_cpu else "cuda",
            dtype=str(model.dtype).removeprefix("torch."),
            versions={
                self._build.package: self._build.version,
                "torch": version("torch"),
                "transformers": version("transformers"),
            },
        )

    async def draw(self, ask: Ask) -> AsyncGenerator[Piece, None]:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        from engines.vllm.worker import REQUEST, SEQUENCE

        params = SamplingParams(
            max_tokens=ask.most_tokens,
            logprobs=ask.top,
            prompt_logprobs=ask.prompt_logprobs,
            stop_token_ids=ask.stop_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={REQUEST: ask.request, SEQUENCE: ask.sequence},
        )
        prompt = TokensPrompt(prompt_token_ids=ask.prompt, cache_salt=ask.salt)
        try:
            async for output in self._llm.generate(prompt, params, ask.name, lora_request=_lora(ask.adapter)):
                yield piece_of(output, ask.top)
        except EngineDeadError as error:
            raise LlmDied(f"vLLM's process has ended: {error}") from error

    async def ended(self) -> LlmDied:
        while not self._llm.errored:  # noqa: ASYNC110 - vLLM tells nobody who draws nothing
            await asyncio.sleep(_LOOK_S)
        return LlmDied("vLLM's process has ended, or does not answer")

    async def drop_adapter(self, number: int) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._llm.remove_lora(number)
        except EngineDeadError as error:
            raise LlmDied(f"vLLM's process has ended: {error}") from error

    async def sleep(self) -> None:
        await self._llm.sleep(level=1)

    async def wake(self) -> None:
        await self._llm.wake_up()

    async def close(self) -> None:
        self._llm.shutdown()
        del self._llm  # its finalizer does not run at the interpreter's end, when it would fail


def _lora(adapter: LoadedAdapter | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if adapter is None else LoRARequest(adapter.name, adapter.number, adapter.path)

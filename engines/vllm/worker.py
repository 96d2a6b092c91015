"""What runs in vLLM's worker process: tokens are drawn there as by every engine, as functions of seed and position.

vLLM's own sampler draws from a generator, tells log-probs either before temperature or after all cuts, and counts
nothing by position. So its place is taken by one that calls `engines.drawing`, for which a processor of logits, vLLM's
way of following requests through its batch, keeps the request of each row.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from engines.drawing import Draw, choose
from engines.operations import SampleRequest, decode_sample
from engines.sampling import uniforms
from engines.shaping import Shaping
from engines.tensors import Tensor

REQUEST = "tandem_request"
SEQUENCE = "tandem_sequence"
"""Keys of `SamplingParams.extra_args`: an encoded SampleRequest without its prompt, and the sequence's number in it."""

HOST = "tandem_host"
"""Key of vLLM's `additional_config`: the process that all of it is for."""
LOGPROBS_MODE = "processed_logprobs"
"""vLLM tells what the sampler below calls log-probs."""

_ORPHAN_LOOK_S = 1.0
_NOBODYS = Draw(temperature=0.0, top_k=-1, top_p=1.0, uniform=0.0, top=0)
"""Of rows that vLLM fills in by itself, to warm up say."""


class Row:
    """How the next token of one sequence of the batch is drawn. `drawn` is vLLM's own list of its tokens so far."""

    def __init__(self, request: SampleRequest, sequence: int, drawn: list[int]) -> None:
        self._request = request
        self._sequence = sequence
        self._drawn = drawn
        self._shaping = Shaping(request)
        self._shaped = 0

    def next_draw(self) -> Draw:
        request = self._request
        for token in self._drawn[self._shaped :]:
            self._shaping.add(token)
        self._shaped = len(self._drawn)
        return Draw(
            request.temperature,
            request.top_k,
            request.top_p,
            uniforms(request.seed, self._sequence, len(self._drawn)),
            0,
            request.min_p,
            self._shaping.changes(),
        )


class Rows(LogitsProcessor):
    """The rows of the batch by their places. Logits it leaves as they are."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self._rows: dict[int, Row] = {}
        _end_with(vllm_config.additional_config[HOST])

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self._rows, batch_update, _row)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits

    def draws(self, count: int) -> list[Draw]:
        """How each row of the batch is drawn."""
        return [self._rows[i].next_draw() if i in self._rows else _NOBODYS for i in range(count)]


class SeededSampler(Sampler):
    """Draws by `engines.drawing`."""

    def apply_logits_processors(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, predict_bonus_token: bool
    ) -> torch.Tensor:
        return logits

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens, int64 [n], and log-probs [n, V] after temperature."""
        [rows] = (each for each in sampling_metadata.logitsprocs.all if isinstance(each, Rows))
        return choose(logits, rows.draws(logits.shape[0]))

    @staticmethod
    def gather_logprobs(
        logprobs: torch.Tensor, num_logprobs: int, token_ids: torch.Tensor
    ) -> LogprobsTensors:
        """Of each row its own token and the best ones, as vLLM tells them, of prompts too. Ranks, which vLLM compiles a
        kernel for (half a minute on the CPU), are left at 0: nothing here reads them."""
        own = token_ids[:, None]
        best, tokens = logprobs.topk(num_logprobs, dim=-1)
        return LogprobsTensors(
            torch.cat((own, tokens), dim=1).to(torch.int32),
            torch.cat((logprobs.gather(-1, own), best), dim=1),
            torch.zeros_like(token_ids),
        )


class DrawnByTandem:
    """Mixed into vLLM's worker (`worker_extension_cls`)."""

    model_runner: Any

    def draw_by_tandem(self) -> None:
        """Put the sampler into its place."""
        self.model_runner.sampler = SeededSampler(LOGPROBS_MODE)


def _row(params: SamplingParams, prompt: Sequence[int] | None, drawn: list[int]) -> Row | None:
    asked = params.extra_args or {}
    if REQUEST not in asked:
        return None
    tokens = Tensor.of(np.array(prompt or [], dtype=np.int32))
    request = msgspec.structs.replace(decode_sample(asked[REQUEST]), prompt=tokens)
    return Row(request, asked[SEQUENCE], drawn)


def _end_with(host: int) -> None:
    """vLLM's processes wait for ever for a host that was killed, and hold its memory; so this one looks for it, and
    ends the one between them too."""
    begun = _stat(host)
    engine_core = os.getppid()

    def watch() -> None:
        while _stat(host) == begun:
            time.sleep(_ORPHAN_LOOK_S)
        if engine_core not in (host, 1) and os.getppid() == engine_core:
            os.kill(engine_core, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, name="host", daemon=True).start()


def _stat(pid: int) -> str | None:
    """When a process began, for its number may come again; None when it has ended."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]

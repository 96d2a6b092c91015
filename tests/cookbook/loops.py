"""The official cookbook's training loops, unmodified, with `tandem/tiny` and data made here.

Runs in the cookbook's own environment: `python loops.py LOOP URL FOLDER`, one of the names in `LOOPS`. What a loop logs
stands in FOLDER/metrics.jsonl afterwards. Nothing is downloaded: the tokenizer must be in the hub's cache already.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chz
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.renderers import TrainOnWhat, get_renderer
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.types import EnvGroupBuilder, RLDataset, RLDatasetBuilder
from tinker_cookbook.supervised import train as sl_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

MODEL = "tandem/tiny"
RENDERER = "qwen3_instruct"
"""The cookbook's name for the form of the model's chat template: `<|im_start|>role`, text, `<|im_end|>`."""

_RANK = 8


def _say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _common(batch_size: int) -> Any:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL,
        renderer_name=RENDERER,
        max_length=256,
        batch_size=batch_size,
        train_on_what=TrainOnWhat.ALL_ASSISTANT_MESSAGES,
    )


# ---------------------------------------------------------------------------- supervised


def supervised(url: str, folder: Path) -> None:
    """Eight words for eight numbers, over and over; with evaluations and checkpoints between."""
    _supervise(url, folder)


def supervised_beginning(url: str, folder: Path) -> None:
    """The first of its three rounds; `supervised` in the same folder goes on from there."""
    _supervise(url, folder, num_epochs=1)


def _supervise(url: str, folder: Path, **options: Any) -> None:
    talks = [
        {
            "messages": [
                _say("user", f"What is the word for number {n % 8}?"),
                _say("assistant", f"It is {word}."),
            ]
        }
        for n, word in enumerate(["plum", "oak", "tin", "sea", "fog", "jam", "owl", "ash"] * 8)
    ]
    data = FromConversationFileBuilder(
        common_config=_common(8), file_path=_write_lines(folder / "talks.jsonl", talks), test_size=8
    )
    config = sl_train.Config(
        log_path=str(folder),
        model_name=MODEL,
        recipe_name="tandem_supervised",
        renderer_name=RENDERER,
        dataset_builder=data,
        learning_rate=5e-3,
        lora_rank=_RANK,
        base_url=url,
        save_every=5,
        eval_every=7,
        **{"num_epochs": 3, **options},
    )
    asyncio.run(sl_train.main(config))


# ---------------------------------------------------------------------------- reinforcement


class Vowels(ProblemEnv):
    """The more of the letter `e` an answer has, the better; an answer that is all `e` is right."""

    def __init__(self, renderer: Any, question: str) -> None:
        super().__init__(renderer, require_stop_sequence_for_format=False)
        self._question = question

    def get_question(self) -> str:
        """What is asked."""
        return self._question

    def check_answer(self, sample_str: str) -> Any:
        """A share, which the loop takes as well as a yes or no."""
        return sample_str.count("e") / max(len(sample_str), 1)

    def check_format(self, sample_str: str) -> bool:
        """Everything is well formed."""
        return True

    def get_reference_answer(self) -> str:
        """For the log."""
        return "eeee"


class VowelDataset(RLDataset):
    """Batches of groups, each group several answers to one question."""

    def __init__(self, renderer: Any, batches: int) -> None:
        self._renderer = renderer
        self._batches = batches

    def get_batch(self, index: int) -> list[EnvGroupBuilder]:
        """Four questions of eight answers each."""
        return [
            ProblemGroupBuilder(
                lambda question=f"Say something, {index}.{n}": Vowels(self._renderer, question), 8
            )
            for n in range(4)
        ]

    def __len__(self) -> int:
        return self._batches


@chz.chz
class VowelDatasetBuilder(RLDatasetBuilder):
    """What the loop's configuration holds."""

    batches: int

    async def __call__(self) -> tuple[RLDataset, RLDataset | None]:
        return VowelDataset(get_renderer(RENDERER, get_tokenizer(MODEL)), self.batches), None


def _reinforce(url: str, folder: Path, **options: Any) -> None:
    config = rl_train.Config(
        learning_rate=1e-2,
        dataset_builder=VowelDatasetBuilder(batches=8),
        model_name=MODEL,
        recipe_name="tandem_rl",
        max_tokens=12,
        log_path=str(folder),
        eval_every=0,
        save_every=3,
        renderer_name=RENDERER,
        lora_rank=_RANK,
        base_url=url,
        **options,
    )
    asyncio.run(rl_train.main(config))


def importance_sampling(url: str, folder: Path) -> None:
    """The loop's own default loss, with a penalty for leaving the base model."""
    _reinforce(url, folder, loss_fn="importance_sampling", compute_post_kl=True)


def ppo(url: str, folder: Path) -> None:
    """Two optimizer steps for each batch, so that the ratio moves away from 1."""
    _reinforce(url, folder, loss_fn="ppo", num_substeps=2)


# ---------------------------------------------------------------------------- preferences


def preference(url: str, folder: Path) -> None:
    """Of two answers the shorter one is preferred; the loss runs on the client."""
    draw = random.Random(3)
    rows = []
    for n in range(48):
        answers = [[_say("assistant", "yes")], [_say("assistant", "no no no")]]
        swapped = draw.random() < 0.5
        first, second = answers[::-1] if swapped else answers
        comparison = {
            "prompt_conversation": [_say("user", f"Is {n} big?")],
            "completion_A": first,
            "completion_B": second,
        }
        rows.append({"comparison": comparison, "label": "B" if swapped else "A"})
    data = DPODatasetBuilderFromComparisons(
        common_config=_common(8),
        comparison_builder=ComparisonBuilderFromJsonl(train_path=_write_lines(folder / "pairs.jsonl", rows)),
    )
    config = train_dpo.Config(
        log_path=str(folder),
        model_name=MODEL,
        recipe_name="tandem_dpo",
        renderer_name=RENDERER,
        dataset_builder=data,
        learning_rate=1e-3,
        num_epochs=2,
        lora_rank=_RANK,
        base_url=url,
        save_every=5,
        eval_every=0,
    )
    train_dpo.main(config)


LOOPS = {
    loop.__name__: loop for loop in (supervised, supervised_beginning, importance_sampling, ppo, preference)
}


if __name__ == "__main__":
    LOOPS[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))

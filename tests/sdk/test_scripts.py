"""What a person sees of a recipe that cannot go on: one line, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.engine_settings import BUILT_IN
from tests.served import ServedGateway

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    """The engine of tests under the built-in model's name."""
    engine = {"name": "tiny", "plugin": "fake", "base_model": BUILT_IN}
    served = ServedGateway(tmp_path_factory.mktemp("scripts"), [engine])
    served.start()
    yield served
    served.stop()
    served.close()


def start(home: Path, *command: str) -> subprocess.Popen[str]:
    """A recipe, with a cache of the hub of its own and no key in its environment."""
    strange = ("HF_", "TANDEM_", "TINKER_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(strange)}
    environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, f"cookbook/{command[0]}", *command[1:]],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_words(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit status, and standard error."""
    with process:
        _, errors = process.communicate(timeout=90)
    assert "Traceback" not in errors
    return process.returncode, errors


@pytest.mark.parametrize("recipe", ["sl_loop.py", "rl_loop.py", "openai_sample.py"])
def test_no_gateway(tmp_path: Path, recipe: str) -> None:
    status, errors = last_words(start(tmp_path, recipe, "--base-url", NOWHERE))
    assert (status, errors) == (
        1,
        f"cookbook/{recipe}: nothing answers at {NOWHERE}; start it with `tandem serve`\n",
    )


@pytest.mark.parametrize(
    ("recipe", "arguments", "sentence"),
    [
        (
            "sl_loop.py",
            ["--base-model", "nope"],
            "base model 'nope' is not trained here; available: tandem/tiny",
        ),
        ("sl_loop.py", ["--api-key", "abc"], "'tml-'"),
        ("rl_loop.py", ["--rank", "500"], "lora_config.rank is 500; tandem/tiny takes ranks from 1 to"),
        ("openai_sample.py", ["--model", "nope"], "base model 'nope' is not sampled here"),
    ],
)
def test_what_the_gateway_refuses_is_told_in_its_words(
    served: ServedGateway, tmp_path: Path, recipe: str, arguments: list[str], sentence: str
) -> None:
    status, errors = last_words(start(tmp_path, recipe, "--base-url", served.url, *arguments))
    assert status == 1
    assert sentence in errors
    assert len(errors.splitlines()) == 1
    assert "request_id" not in errors


@pytest.mark.parametrize("option", ["--steps", "--batch-size", "--rank"])
def test_counts_are_at_least_one(tmp_path: Path, option: str) -> None:
    status, errors = last_words(start(tmp_path, "sl_loop.py", option, "0"))
    assert status == 2
    assert f"argument {option}: 0 is too few; it must be at least 1" in errors


def test_an_interrupt_ends_it_quietly(served: ServedGateway, tmp_path: Path) -> None:
    process = start(tmp_path, "rl_loop.py", "--base-url", served.url, "--steps", "100000")
    assert process.stdout is not None
    while "Teaching" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert last_words(process) == (130, "")

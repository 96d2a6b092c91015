"""The cookbook's environment, and one of its loops run in it against a served gateway."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-cookbook"
COOKBOOK = "tinker-cookbook==0.6.1"
NEEDED = (
    "aiohttp anyio blobfile chz cloudpickle datasets huggingface-hub numpy pillow pydantic pyrage rich safetensors "
    "termcolor tiktoken tinker==0.38.0 torch>=2.13,<2.14 tqdm transformers>=5.16,<5.24"
).split()
"""What the cookbook asks for, but for `tml-renderers`: it is for models that are not served here, it is imported with
those only, and not every package index has the version that is asked for."""

_LONGEST_S = 300


def cookbook_python() -> Path:
    """The interpreter that has the cookbook; it is there only after `make_environment`."""
    return ENVIRONMENT / "bin" / "python"


def make_environment() -> None:
    """Install the cookbook into an environment of its own. Takes some minutes and 2 GB."""
    if not cookbook_python().exists():
        venv.create(ENVIRONMENT, with_pip=True)
    pip = [str(cookbook_python()), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *NEEDED], check=True)
    subprocess.run([*pip, "--no-deps", COOKBOOK], check=True)


def run_loop(loop: str, url: str, folder: Path, hub: Path) -> list[dict[str, Any]]:
    """What a loop has logged, one entry a step. `hub` is the hub's cache, which holds the model's tokenizer.

    Raises AssertionError with the end of its output when it breaks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "TINKER_API_KEY": "tml-cookbook",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(hub),
    }
    script = Path(__file__).with_name("loops.py")
    command = [str(cookbook_python()), str(script), loop, url, str(folder)]
    done = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, timeout=_LONGEST_S
    )
    assert done.returncode == 0, f"{loop} broke:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def series(log: list[dict[str, Any]], name: str) -> list[float]:
    """The values of one metric, in order."""
    return [float(entry[name]) for entry in log if name in entry]


def store_tokenizer(url: str, hub: Path) -> None:
    """Put the served model's tokenizer into a cache of the hub, as `sdk.connect` does; in a process of its own, since
    the cache's place is read from the environment once."""
    code = (
        "import sys, httpx; from sdk.tokenizers import serve_tokenizer;"
        "serve_tokenizer(httpx.Client(base_url=sys.argv[1], headers={'X-API-Key': 'tml-cookbook'}), 'tandem/tiny')"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(hub), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, url], env=environment, check=True, timeout=60)

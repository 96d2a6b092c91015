"""What a client does while its connection is mistreated, and what is there afterwards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import tinker

from tests.served import ServedGateway

KEY = "tml-chaos"
CHUNK_FLAGS = b'{"fwdbwd_max_chunk_len": 2}'
"""What client/config answers here: a call with five data is sent as three requests, the first one last."""

_VOCABULARY = 250
_LENGTH = 8


def example(number: int) -> tinker.Datum:
    """An example that no other number has."""
    tokens = [(number * 37 + 11 * position * position) % _VOCABULARY for position in range(_LENGTH + 1)]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64"),
            "weights": tinker.TensorData(data=[1.0] * _LENGTH, dtype="float32"),
        },
    )


def train(service: tinker.ServiceClient, steps: int, patience_s: float) -> str:
    """Pipelined steps, none awaited before the next is sent, each of three requests for gradients and one step; the
    name of the run. The end is saved. Raises TimeoutError for a result that is `patience_s` seconds late."""
    client = service.create_lora_training_client("fake/model", rank=4, seed=5).result(timeout=patience_s)
    promised: list[Any] = []
    for step in range(steps):
        data = [example(5 * step + index) for index in range(5)]
        promised.append(client.forward_backward(data, "cross_entropy"))
        promised.append(client.optim_step(tinker.AdamParams(learning_rate=1e-2 / (1 + step % 7))))
    for future in promised:
        future.result(timeout=patience_s)
    path: str = client.save_state("end").result(timeout=patience_s).path
    return path.removeprefix("tinker://").split("/")[0]


def new_files(gateway: ServedGateway, known: set[Path]) -> dict[str, bytes]:
    """The files of the one checkpoint that is not known yet, by name."""
    [folder] = set(folders(gateway)) - known
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def folders(gateway: ServedGateway) -> list[Path]:
    """The folders of all saved weights."""
    root = gateway.data_dir / "storage" / "checkpoints"
    return list(root.iterdir()) if root.is_dir() else []


def calls_of_run(gateway: ServedGateway, run_id: str) -> Counter[tuple[str, str]]:
    """How many calls of a run are recorded, by kind and status."""
    found: Counter[tuple[str, str]] = Counter()
    cursor: str | None = None
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}) as http:
        while True:
            params: dict[str, str] = {
                "run_id": run_id,
                "limit": "1000",
                **({"cursor": cursor} if cursor else {}),
            }
            page = http.get("/admin/v1/futures", params=params).raise_for_status().json()
            found.update((item["kind"], item["status"]) for item in page["items"])
            cursor = page["next_cursor"]
            if cursor is None:
                return found


def optimizer_steps(gateway: ServedGateway, run_id: str) -> int:
    """Optimizer steps that took effect."""
    with httpx.Client(base_url=gateway.url, headers={"X-API-Key": KEY}) as http:
        steps = http.get(f"/admin/v1/runs/{run_id}/metrics", params={"limit": 10_000}).raise_for_status()
        return len(steps.json())

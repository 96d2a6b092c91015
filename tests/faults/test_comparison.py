"""What the harness looks for is found when it is there."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from sqlalchemy import create_engine, delete, insert, update

from gateway.store import schema
from tests.faults.comparison import Left, accounted, differences, left_behind
from tests.faults.workload import Course, Followed

STEPS = 3
RUN = "session:train:0"
PATH = f"tinker://{RUN}/weights/end"


def followed() -> Followed:
    results: dict[str, Any] = {}
    for step in range(STEPS):
        outputs = [{"logprobs": [-1.0 - step, -2.5]}]
        results[f"pass {step}"] = {"metrics": {"loss:sum": 3.5 + step}, "outputs": outputs}
        results[f"step {step}"] = {"grad_norm": 0.25}
    results["sample 1 0"] = [{"tokens": [3, 4], "logprobs": [-0.5, -0.125], "stop": "length"}]
    return Followed(Course(1, 2, STEPS, "fake/model"), RUN, PATH, results)


OF_ALL = {"owner": "o", "base_model": "m"}
CALL = {"owner": "o", "engine": "e", "status": "done", "attempts": 1, "deaths": 0, "context": {}}
STEP = {
    "run_id": RUN,
    "tokens": 8,
    "grad_norm": 0.25,
    "learning_rate": 0.01,
    "seconds": 0.1,
    "finished_at": 0.0,
}
SAMPLER = {**OF_ALL, "sampler_id": "x", "session_id": "s", "engine": "e", "run_id": RUN, "created_at": 0.0}
CHECKPOINT = {
    **OF_ALL,
    "path": PATH,
    "run_id": RUN,
    "kind": "weights",
    "name": "end",
    "folder": "checkpoints/end",
    "lora": {},
    "has_optimizer": True,
    "size_bytes": 1,
    "public": False,
    "user_metadata": {},
    "created_at": 0.0,
}
USED = {
    **OF_ALL,
    "bucket": 0,
    "session_id": "s",
    "training_tokens": 24,
    "prefill_tokens": 0,
    "cached_tokens": 0,
    "sampled_tokens": 2,
    "checkpoints": 1,
}


def fill(url: str, storage: Path) -> None:
    """A database and a folder as one course leaves them."""
    kinds = ["create_run", *["forward_backward", "optim_step"] * STEPS, "save_weights"]
    calls: list[dict[str, Any]] = [
        {**CALL, "request_id": f"{RUN}:{seq}", "run_id": RUN, "sampler_id": None, "seq_id": seq, "kind": kind}
        for seq, kind in enumerate(kinds)
    ]
    calls.append(
        {**CALL, "request_id": "x:0", "run_id": None, "sampler_id": "x", "seq_id": 0, "kind": "sample"}
    )
    steps = [{**STEP, "step": n + 1, "seq_id": 2 * n + 2, "loss": 3.5 + n} for n in range(STEPS)]
    engine = create_engine(url)
    schema.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(schema.futures), [{**call, "created_at": 0.0} for call in calls])
        connection.execute(insert(schema.steps), steps)
        connection.execute(insert(schema.samplers), [SAMPLER])
        connection.execute(insert(schema.checkpoints), [CHECKPOINT])
        connection.execute(insert(schema.usage), [USED])
    engine.dispose()
    folder = storage / "checkpoints" / "end"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(save({"a": np.ones(4, dtype=np.float32)}))
    (folder / "adapter_config.json").write_text("{}")


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path / 'tandem.db'}"
    fill(url, tmp_path)
    return url


def left(url: str, tmp_path: Path) -> Left:
    [found] = left_behind(url, tmp_path, [followed()])
    return found


def change(url: str, statement: Any) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(statement)
    engine.dispose()


def test_equal_ends_differ_in_nothing(url: str, tmp_path: Path) -> None:
    assert differences(left(url, tmp_path), left(url, tmp_path), 0.0) == []
    assert accounted(url) == {"training_tokens": 24, "sampled_tokens": 2, "checkpoints": 1}


FUTURES, STEP_ROWS = schema.futures, schema.steps
RECORDED = {
    "a call that was left out": (
        delete(FUTURES).where(FUTURES.c.request_id == f"{RUN}:3"),
        r"numbered \[0, 1, 2, 4",
    ),
    "a call that failed": (
        update(FUTURES).where(FUTURES.c.request_id == f"{RUN}:3").values(status="failed", error="no memory"),
        ":3 is failed: no memory",
    ),
    "a call that is still open": (
        update(FUTURES).where(FUTURES.c.request_id == f"{RUN}:7").values(status="running"),
        ":7 is running",
    ),
    "a sample that failed": (
        update(FUTURES).where(FUTURES.c.request_id == "x:0").values(status="failed", error="gone"),
        "x:0 is failed: gone",
    ),
    "a step that was not recorded": (
        delete(STEP_ROWS).where(STEP_ROWS.c.step == 3),
        r"recorded are \[1, 2\]",
    ),
    "a step under the number of another call": (
        update(STEP_ROWS).where(STEP_ROWS.c.step == 3).values(seq_id=5),
        r"recorded as of \[2, 4, 5\]",
    ),
    "a step that was applied twice": (
        insert(STEP_ROWS).from_select(
            [column.name for column in STEP_ROWS.c],
            STEP_ROWS.select()
            .where(STEP_ROWS.c.step == 3)
            .with_only_columns(*[column + 1 if column.name == "step" else column for column in STEP_ROWS.c]),
        ),
        r"recorded are \[1, 2, 3, 4\]",
    ),
    "a checkpoint that was lost": (delete(schema.checkpoints), "0 checkpoints are registered"),
    "a step with another loss": (
        update(STEP_ROWS).where(STEP_ROWS.c.step == 2).values(loss=4.75),
        "recorded steps, 1, loss is 4.75, undisturbed 4.5",
    ),
}


@pytest.mark.parametrize("case", RECORDED)
def test_what_the_database_has_is_compared(url: str, tmp_path: Path, case: str) -> None:
    undisturbed = left(url, tmp_path)
    statement, said = RECORDED[case]
    change(url, statement)
    found = differences(left(url, tmp_path), undisturbed, 0.0)
    assert found
    assert re.search(said, "\n".join(found))


def test_results_are_compared_exactly_or_within_a_tolerance(url: str, tmp_path: Path) -> None:
    here, there = left(url, tmp_path), left(url, tmp_path)
    here.followed.results["pass 1"]["outputs"][0]["logprobs"] = [-2.0, -2.5 * (1 + 1e-7)]
    [line] = differences(here, there, 0.0)
    assert "client 1 course 2" in line
    assert RUN in line
    assert "results, pass 1, outputs, 0, logprobs" in line
    assert differences(here, there, 1e-5) == []
    here.followed.results["pass 1"]["outputs"][0]["logprobs"] = [-2.0, -2.6]
    assert len(differences(here, there, 1e-5)) == 1


def test_a_missing_result_and_another_token_are_differences(url: str, tmp_path: Path) -> None:
    here, there = left(url, tmp_path), left(url, tmp_path)
    here.followed.results["sample 1 0"][0]["tokens"] = [3, 5]
    assert "tokens, 1 is 5, undisturbed 4" in differences(here, there, 1e-5)[0]
    here = copy.deepcopy(there)
    del here.followed.results["step 2"]
    assert "results has" in differences(here, there, 0.0)[0]


def test_files_are_compared(url: str, tmp_path: Path) -> None:
    here, there = left(url, tmp_path), left(url, tmp_path)
    changed = np.ones(4, dtype=np.float32)
    changed[1] += 1e-6
    here.files["adapter_model.safetensors"] = save({"a": changed})
    assert "adapter_model.safetensors differs" in differences(here, there, 0.0)[0]
    for one, sums in ((here, b"{1}"), (there, b"{2}")):  # of files that may differ
        one.files["checksums.json"] = sums
    assert differences(here, there, 1e-5) == []
    here.files["adapter_model.safetensors"] = save({"a": changed * 2})
    assert "adapter_model.safetensors, a differs" in differences(here, there, 1e-5)[0]
    del here.files["adapter_model.safetensors"]
    assert "undisturbed" in differences(here, there, 0.0)[0]


def test_what_a_client_meets_is_a_difference(url: str, tmp_path: Path) -> None:
    there = left(url, tmp_path)
    course = followed()
    course.error = "RequestFailedError: no"
    [here] = left_behind(url, tmp_path, [course])
    assert "RequestFailedError: no" in differences(here, there, 0.0)[0]

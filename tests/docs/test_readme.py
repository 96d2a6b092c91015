"""What the README shows works as it stands there."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.engine_settings import BUILT_IN
from gateway.settings import load_settings
from sdk import AdminClient
from tests.docs.pages import ROOT, blocks
from tests.official import LEAVE
from tests.sdk.test_connect import run
from tests.served import ServedGateway

README = (ROOT / "README.md").read_text()


def test_the_training_example_runs(tmp_path: Path) -> None:
    """With the engine of tests under the built-in model's name."""
    example = blocks(README, "python")[0].replace('"http://127.0.0.1:8000"', "__import__('sys').argv[1]")
    gateway = ServedGateway(tmp_path / "data", [{"name": "tiny", "plugin": "fake", "base_model": BUILT_IN}])
    gateway.start()
    try:
        loss = run(example + LEAVE, gateway.url, tmp_path, HF_HUB_OFFLINE="1")
        with AdminClient(gateway.url) as admin:
            paths = {saved.path.partition("/weights/")[2] for saved in admin.checkpoints(kind="weights")}
            [step] = [step for found in admin.runs() for step in admin.steps(found.run_id)]
    finally:
        gateway.close()
    assert paths == {"first"}
    assert step.loss == pytest.approx(loss)
    assert step.tokens == len(b"Make hay while the sun shines.") - 1  # the model's tokens are bytes


def test_the_settings_example_needs_nothing_that_quickstart_does_not_install(tmp_path: Path) -> None:
    [example] = blocks(README, "toml")
    config = tmp_path / "tandem.toml"
    config.write_text(example)
    loaded = load_settings({"TANDEM_CONFIG": str(config)})
    assert loaded.embedded
    assert {engine.plugin for engine in loaded.engines} == {"hf"}
    assert [engine.base_model for engine in loaded.engines] == ["Qwen/Qwen3-0.6B", BUILT_IN]

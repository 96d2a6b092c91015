"""One gateway process for an embedded database, whatever names it is reached by."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.app import running_gateway
from gateway.engine_settings import EngineSettings
from gateway.errors import ConfigurationError
from gateway.settings import Settings

FAKE = EngineSettings(name="fake", plugin="fake", base_model="fake/model")


def settings(data_dir: Path, url: str = "") -> Settings:
    return Settings(data_dir=data_dir, database_url=url, engines=(FAKE,))


async def test_two_data_folders_with_one_database_are_refused(tmp_path: Path) -> None:
    """Both would dispatch for the same engines."""
    first, second = tmp_path / "first", tmp_path / "second"
    (tmp_path / "link").symlink_to(first)
    async with running_gateway(settings(first)):
        for url in (f"sqlite:///{first / 'tandem.db'}", f"sqlite:///{tmp_path / 'link' / 'tandem.db'}"):
            with pytest.raises(ConfigurationError, match=r"tandem\.db"):
                async with running_gateway(settings(second, url)):
                    pass
        async with running_gateway(settings(second)):
            pass
    async with running_gateway(settings(second, f"sqlite:///{first / 'tandem.db'}")):
        pass


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
async def test_a_database_in_memory_is_refused(tmp_path: Path, url: str) -> None:
    """Nothing accepted there would be durable."""
    with pytest.raises(ConfigurationError, match="database_url"):
        async with running_gateway(settings(tmp_path, url)):
            pass

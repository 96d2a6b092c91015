"""`python -m gateway.keys` before a gateway has been there: what it says, and what it makes."""

from __future__ import annotations

from pathlib import Path

from tests.gateway.test_keys import keys_command
from tests.served import ServedGateway


def test_the_first_key_says_what_it_hides_and_every_answer_where_it_was_looked_for(tmp_path: Path) -> None:
    unstarted = ServedGateway(tmp_path / "data")
    for words in (("list",), ("remove", "abc")):
        refused = keys_command(unstarted, *words)
        assert refused.returncode == 1
        assert f"there is no database at {tmp_path / 'data' / 'tandem.db'}" in refused.stderr
        assert not (tmp_path / "data").exists()
    first = keys_command(unstarted, "add", "alice").stdout
    assert "tandem keys add local" in first
    second = keys_command(unstarted, "add", "bob").stdout
    assert "local" not in second
    for said in (first, second, keys_command(unstarted, "list").stdout):
        assert f"(database: {tmp_path / 'data' / 'tandem.db'})" in said


def test_what_is_made_in_the_data_folder_is_its_owners_alone(tmp_path: Path) -> None:
    gateway = ServedGateway(tmp_path / "made" / "data")
    gateway.data_dir.parent.mkdir()
    assert keys_command(gateway, "add", "alice").returncode == 0
    gateway.start()
    try:
        made = [gateway.data_dir, *gateway.data_dir.rglob("*")]
        modes = {path.name: path.stat().st_mode & 0o077 for path in made if path != gateway.log}
    finally:
        gateway.stop()
    assert {"data", "storage", "tandem.db", "tandem.db.lock"} <= modes.keys()
    modes.pop("data")  # the test made it, for its log
    assert set(modes.values()) == {0}, modes

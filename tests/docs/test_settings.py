"""docs/settings.md has every setting with its default, and its examples can be loaded."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.hf.options import HfOptions
from engines.megatron.layout import Asked
from engines.megatron.options import MegatronOptions
from engines.vllm.options import VllmOptions
from gateway.engine_settings import EngineSettings
from gateway.errors import ConfigurationError
from gateway.ray_place import RayPlace
from gateway.settings import Settings, load_settings
from tests.docs.pages import ROOT, blocks, page, rows, section

TABLES: list[tuple[type[msgspec.Struct], str]] = [
    (Settings, "## Of the gateway"),
    (EngineSettings, "## Of an engine"),
    (HfOptions, "### Options of the plugin `hf`"),
    (MegatronOptions, "### Options of the plugin `megatron`"),
    (VllmOptions, "### Options of the plugin `vllm`"),
]
SPOKEN = {
    ("Settings", "engines"): "tandem/tiny",
    ("EngineSettings", "python"): "the gateway's",
    ("EngineSettings", "run_memory_bytes"): "40 % of what is free",
    ("EngineSettings", "adapter_memory_bytes"): "10 % of what is free",
    ("HfOptions", "threads"): "all cores it may use",
    ("HfOptions", "max_context"): "the model's",
    ("HfOptions", "pass_tokens"): "what memory holds",
    ("HfOptions", "memory_fraction"): "all that is free",
    ("MegatronOptions", "devices"): "all",
    ("MegatronOptions", "device_memory_gib"): "the device's",
    ("MegatronOptions", "max_context"): "the model's",
    **{("MegatronOptions", part): "chosen" for part in Asked.__struct_fields__},
    ("VllmOptions", "max_context"): "the model's",
}
"""Defaults that the page tells in words."""


def in_words(kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    """A default as the page writes it."""
    spoken = SPOKEN.get((kind.__name__, field.name))
    if spoken is not None:
        return spoken
    default: Any = field.default
    if default is msgspec.NODEFAULT or default in ("", None):
        return ""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return ", ".join(default)
    if isinstance(default, float):
        return f"{default:.10g}"
    return str(default)


@pytest.mark.parametrize(("kind", "heading"), TABLES, ids=[kind.__name__ for kind, _ in TABLES])
def test_every_setting_is_described_with_its_default(kind: type[msgspec.Struct], heading: str) -> None:
    described = {row[0]: row[1] for row in rows(section(page("settings.md"), heading))}
    assert described == {field.name: in_words(kind, field) for field in msgspec.structs.fields(kind)}


def test_what_an_engine_gets_from_ray_is_described_with_its_default() -> None:
    described = {row[0]: row[1] for row in rows(section(page("ray.md"), "## What an engine gets"))}
    assert described == {field.name: in_words(RayPlace, field) for field in msgspec.structs.fields(RayPlace)}


def test_the_defaults_in_words_are_true() -> None:
    assert EngineSettings(name="a", base_model="b").python == sys.executable
    assert [engine.base_model for engine in Settings().engines] == ["tandem/tiny"]


def environment_of(text: str) -> dict[str, str]:
    """What `export` lines of a shell put into the environment."""
    found = re.findall(r"^export (TANDEM_\w+)=(?:'([^']*)'|(\S*))$", text, re.MULTILINE)
    return {name: quoted or plain for name, quoted, plain in found}


def test_the_examples_load(tmp_path: Path) -> None:
    [shell] = blocks(page("settings.md"), "sh")
    variables = environment_of(shell)
    assert len(variables) == shell.count("export ")
    loaded = load_settings(variables)
    assert (str(loaded.data_dir), loaded.gap_timeout_s) == ("/srv/tandem", 120.0)
    assert [engine.name for engine in loaded.engines] == ["tiny"]
    toml, _replicas = blocks(page("settings.md"), "toml")
    config = tmp_path / "tandem.toml"
    config.write_text(toml)
    loaded = load_settings({"TANDEM_CONFIG": str(config)})
    assert loaded.engines[0].source == "/srv/models/qwen3-0.6b"
    assert loaded.engines[0].options == {"dtype": "bfloat16", "sample_slots": 64}
    assert loaded.max_queued_samples == 5000


def tomls() -> list[tuple[str, str]]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        found += [(path.name, code) for code in blocks(path.read_text(), "toml") if "[[engines]]" in code]
    return found


@pytest.mark.parametrize(("name", "code"), tomls(), ids=[name for name, _ in tomls()])
def test_settings_files_of_every_page_load(tmp_path: Path, name: str, code: str) -> None:
    config = tmp_path / "tandem.toml"
    config.write_text(code)
    assert load_settings({"TANDEM_CONFIG": str(config)}).engines


def test_variables_of_every_page_are_settings() -> None:
    known = {field.name for field in msgspec.structs.fields(Settings)} | {"config", "url", "api_key"}
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for variable in re.findall(r"\bTANDEM_(\w+)", path.read_text()):
            assert variable.lower() in known, f"TANDEM_{variable} in {path.name}"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"TANDEM_DATA_FOLDER": "x"}, ["TANDEM_DATA_FOLDER", "data_dir"]),
        ({"TANDEM_HOLD_S": "soon"}, ["hold_s"]),
        ({"TANDEM_HOLD_S": "41"}, ["hold_s", "41", "40"]),
        ({"TANDEM_HOLD_S": "nan"}, ["hold_s"]),
        ({"TANDEM_TOKEN_LIFETIME_S": "300"}, ["token_lifetime_s", "300", "900"]),
        ({"TANDEM_TOKEN_LIFETIME_S": "inf"}, ["token_lifetime_s", "604800"]),
        ({"TANDEM_PUBLIC_URL": "lab.example"}, ["public_url", "lab.example", "https://"]),
        ({"TANDEM_MAX_BODY_BYTES": "0"}, ["max_body_bytes", "0", "at least 1"]),
        ({"TANDEM_LEASE_S": "nan"}, ["lease_s", "nan"]),
        ({"TANDEM_MAX_QUEUED_SAMPLES": "0"}, ["max_queued_samples", "0", "at least 1"]),
        ({"TANDEM_RESULT_CACHE_BYTES": "-1"}, ["result_cache_bytes", "-1", "at least 0"]),
        ({"TANDEM_LOG_LEVEL": "LOUD"}, ["log_level"]),
        ({"TANDEM_ENGINES": "qwen"}, ["TANDEM_ENGINES", "JSON"]),
        ({"TANDEM_ENGINES": "[]"}, ["engines", "empty"]),
        ({"TANDEM_ENGINES": '[{"name": "a"}]'}, ["base_model", "engines"]),
        ({"TANDEM_ENGINES": '[{"name": "a", "base_model": "b", "gpu": 1}]'}, ["gpu"]),
        (
            {"TANDEM_ENGINES": '[{"name": "a", "base_model": "b"}, {"name": "a", "base_model": "c"}]'},
            ["'a'", "unique"],
        ),
        (
            {"TANDEM_ENGINES": '[{"name": "a", "base_model": "b", "sampling_share": 1}]'},
            ["sampling_share", "'a'", "1", "0.05", "0.95"],
        ),
        ({"TANDEM_CONFIG": "/no/such.toml"}, ["TANDEM_CONFIG", "/no/such.toml"]),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(environment)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://tandem:geheim@db/tandem",
        "postgres://tandem:geheim@db/tandem",
        "mysql+aiomysql://tandem:geheim@db/tandem",
        "postgresql+asyncpg://tandem:geheim@db:port/tandem",
        "tandem:geheim",
    ],
)
def test_a_database_that_is_not_served_is_named_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"database_url .*postgresql\+asyncpg") as caught:
        load_settings({"TANDEM_DATABASE_URL": url})
    assert "geheim" not in str(caught.value)


def test_a_postgres_needs_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.settings.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="extra `postgres`"):
        load_settings({"TANDEM_DATABASE_URL": "postgresql+asyncpg://tandem@db/tandem"})
    assert load_settings({}).embedded


def test_a_variable_wins_over_the_file(tmp_path: Path) -> None:
    config = tmp_path / "tandem.toml"
    config.write_text("hold_s = 5\nlease_s = 3\n")
    loaded = load_settings({"TANDEM_CONFIG": str(config), "TANDEM_HOLD_S": "7"})
    assert (loaded.hold_s, loaded.lease_s, loaded.gap_timeout_s) == (7.0, 3.0, 600.0)
    config.write_text("hold_s = [")
    with pytest.raises(ConfigurationError, match="is not TOML"):
        load_settings({"TANDEM_CONFIG": str(config)})

"""Plugins are found by name, and whoever asks for one that is not there reads what to do."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from engines import registry
from engines.interface import Engine, LoadError


def install(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """Have the interpreter know exactly these entry points."""
    entries = [EntryPoint(name, value, registry.GROUP) for name, value in values.items()]
    monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])


def test_built_in_plugins_need_no_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    found = registry.engine_class("fake")
    assert issubclass(found, Engine)
    assert found.__name__ == "FakeEngine"


def test_an_installed_plugin_is_found_and_wins_over_a_built_in(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, other="engines.fake:FakeEngine", hf="engines.interface:Engine")
    assert registry.engine_class("other").__name__ == "FakeEngine"
    assert registry.engine_class("hf") is Engine


def test_an_unknown_plugin_is_refused_with_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, mine="mine:Engine")
    with pytest.raises(LoadError, match=r"no engine plugin 'vlm'.*fake, hf, megatron, mine"):
        registry.engine_class("vlm")


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    monkeypatch.setitem(registry.BUILT_IN, "hf", "no_such_package_here:HfEngine")
    with pytest.raises(LoadError, match=r"no_such_package_here.*pip install 'tandem-gateway\[hf\]'"):
        registry.engine_class("hf")


def test_a_missing_package_of_somebody_elses_plugin_names_no_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, mine="no_such_package_here:Engine")
    with pytest.raises(LoadError, match="in the interpreter that the engine's settings name"):
        registry.engine_class("mine")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("engines.interface:NoSuchEngine", "names nothing"),
        ("engines.interface:UserError", "is not a subclass"),
    ],
)
def test_an_entry_point_must_name_an_engine(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    install(monkeypatch, mine=value)
    with pytest.raises(LoadError, match=words):
        registry.engine_class("mine")

"""The setting `ray` of an engine, and what becomes of it on a machine without Ray. Needs no Ray."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.engine_settings import EngineSettings
from gateway.errors import ConfigurationError
from gateway.launching import launch_of
from gateway.ray_place import RayPlace
from gateway.settings import Settings, load_settings
from tests.on_ray.standing_in import refused


def engines(*places: Any) -> dict[str, str]:
    """Settings with an engine for each place."""
    made = [
        {"name": f"engine-{number}", "base_model": "fake/model", "plugin": "fake", "ray": place}
        for number, place in enumerate(places)
    ]
    return {"TANDEM_ENGINES": json.dumps(made)}


def test_a_place_is_read_with_its_defaults() -> None:
    [engine] = load_settings(engines({"address": "10.0.0.5:6379", "gpus": 1})).engines
    assert engine.ray == RayPlace("10.0.0.5:6379", cpus=1, gpus=1, resources={}, labels={}, wait_s=30)


def test_an_engine_without_one_runs_here() -> None:
    [engine] = load_settings(engines(None)).engines
    assert engine.ray is None
    assert launch_of(engine, Settings()).command == [sys.executable, "-m", "engines.host"]


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ([{"gpus": 1}], ["address"]),
        ([{"address": "auto"}], ["engine-0", "auto", "host:port", "local"]),
        ([{"address": "ray://10.0.0.5:10001"}], ["ray://10.0.0.5:10001", "host:port"]),
        ([{"address": "10.0.0.5:70000"}], ["70000", "host:port"]),
        ([{"address": "h:1", "gpus": -1}], ["engine-0", "-1", "gpus"]),
        ([{"address": "h:1", "gpus": 1.5}], ["1.5", "gpus", "whole number"]),
        ([{"address": "h:1", "resources": {"nvme": -2}}], ["-2", "nvme"]),
        ([{"address": "h:1", "labels": {"pool": "in(a, b)"}}], ["pool", "in(a, b)", "letters"]),
        ([{"address": "h:1", "wait_s": 0}], ["wait_s", "above 0"]),
        ([{"address": "h:1", "ranks": 0}], ["engine-0", "ranks", "at least 1"]),
        ([{"address": "h:1", "ranks": 2, "cpus": 0}], ["engine-0", "is 2", "several need something"]),
        ([{"address": "h:1", "cpu": 2}], ["cpu"]),
        ([{"address": "local"}, {"address": "local"}], ["engine-0, engine-1", "local", "ray start"]),
    ],
)
def test_what_is_wrong_is_named(places: list[dict[str, Any]], words: list[str]) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load_settings(engines(*places))
    assert [word for word in words if word not in str(refusal.value)] == []


def test_one_machines_own_cluster_is_for_one_process() -> None:
    replicated = {"name": "a", "base_model": "m", "roles": ["sample"], "replicas": 2}
    for more, words in (
        ({"ray": {"address": "local"}}, ["a: several processes", "local", "ray start"]),
        ({"ray": {"address": "h:1"}, "devices": ["0", "1"]}, ["devices", "ray.gpus"]),
    ):
        with pytest.raises(ConfigurationError) as refusal:
            load_settings({"TANDEM_ENGINES": json.dumps([{**replicated, **more}])})
        assert [word for word in words if word not in str(refusal.value)] == []


def test_two_engines_may_be_in_one_cluster() -> None:
    place = {"address": "[::1]:6379", "gpus": 0.5}
    assert len(load_settings(engines(place, place)).engines) == 2


def test_what_stands_in_is_told_all_that_is_wanted(tmp_path: Path) -> None:
    place = RayPlace("h:1", cpus=2, gpus=1, resources={"nvme": 1}, labels={"pool": "a"}, wait_s=5)
    engine = EngineSettings(name="far", base_model="m", ray=place, python="/far/python")
    *command, told = launch_of(engine, Settings(data_dir=tmp_path)).command
    assert command == [sys.executable, "-m", "engines.on_ray", "--wanted"]
    assert json.loads(told) == {
        "address": "h:1",
        "cpus": 2.0,
        "gpus": 1.0,
        "resources": {"nvme": 1.0},
        "labels": {"pool": "a"},
        "wait_s": 5.0,
        "ranks": 1,
        "plugin": "hf",
        "storage": str(tmp_path / "storage"),
        "python": "/far/python",
    }


def test_the_gateways_own_interpreter_is_no_path_of_a_node(tmp_path: Path) -> None:
    engine = EngineSettings(name="far", base_model="m", ray=RayPlace("h:1"))
    assert json.loads(launch_of(engine, Settings(data_dir=tmp_path)).command[-1])["python"] == ""


def test_a_machine_without_ray_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray.py").write_text("raise ImportError('there is none')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = refused(tmp_path / "storage")
    assert failed.final
    assert [word for word in ("Ray", "there is none", "'.[ray]'") if word not in failed.message] == []

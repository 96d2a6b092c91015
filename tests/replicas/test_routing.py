"""The choice among engines that could all answer, and the bounds of their number."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.operations import AdapterRef, SampleRequest
from engines.tensors import Tensor
from gateway.engine_settings import EngineSettings
from gateway.errors import ConfigurationError
from gateway.replica_bounds import ReplicaBounds
from gateway.routing import Router, beginnings
from gateway.settings import load_settings

IDLE = dict.fromkeys(("a", "b", "c"), 0)


def request(tokens: list[int], session: str = "s", adapter: str | None = None) -> SampleRequest:
    prompt = Tensor.of(np.array(tokens, dtype=np.int32))
    ref = None if adapter is None else AdapterRef(adapter, adapter)
    return SampleRequest(prompt, num_samples=1, seed=0, adapter=ref, session=session)


def choose(router: Router, loads: dict[str, int], tokens: list[int], **more: Any) -> str:
    return router.choose(loads, beginnings(request(tokens, **more)))


def test_prompts_that_begin_alike_have_beginnings_in_common() -> None:
    one, other = list(range(100)), [*range(70), *range(200, 300)]
    shared = set(beginnings(request(one))) & set(beginnings(request(other)))
    assert len(shared) == 3  # of 64 tokens, of 32, and the sampler; 100 and 170 tokens differ, and so do 128
    assert not set(beginnings(request(one))) & set(beginnings(request(one, session="t")))
    of_one_adapter = [set(beginnings(request(one, session, "folder"))) for session in ("s", "t")]
    assert len(of_one_adapter[0] & of_one_adapter[1]) == 1  # which has to be loaded once only
    # The name of an adapter and that of a session do not run into each other.
    assert not set(beginnings(request(one, "bc", "a"))) & set(beginnings(request(one, "c", "ab")))


def test_a_conversation_stays_where_it_is_and_prompts_spread() -> None:
    router = Router()
    homes = Counter[str]()
    for number in range(300):
        start = [number] * 40
        first = choose(router, IDLE, start, session="")
        assert choose(router, IDLE, [*start, 1, 2, 3], session="") == first
        assert choose(router, IDLE, [*start, *range(500)], session="") == first
        homes[first] += 1
    assert set(homes) == set(IDLE)
    assert min(homes.values()) > 60


def test_a_warm_engine_is_left_when_it_has_clearly_more_to_do() -> None:
    router = Router()
    home = choose(router, IDLE, [1] * 50)
    others = [name for name in IDLE if name != home]
    assert choose(router, IDLE | {home: 7}, [1] * 50) == home
    elsewhere = choose(router, IDLE | {home: 8}, [1] * 50)
    assert elsewhere in others
    assert choose(router, IDLE, [1] * 50) == elsewhere  # which has it warm now
    busy = dict.fromkeys(IDLE, 100) | {elsewhere: 157}
    assert choose(router, busy, [1] * 50) == elsewhere
    assert choose(router, busy | {elsewhere: 158}, [1] * 50) != elsewhere


def test_samples_of_an_engine_that_has_gone_are_shared_by_the_others() -> None:
    router = Router()
    homes = {number: choose(router, IDLE, [number] * 50, session="") for number in range(60)}
    left = {name: 0 for name in IDLE if name != "b"}
    moved = Counter(
        choose(router, left, [number] * 50, session="") for number, home in homes.items() if home == "b"
    )
    assert set(moved) == {"a", "c"}
    for number, home in homes.items():
        assert home == "b" or choose(router, left, [number] * 50, session="") == home


def test_two_gateways_choose_alike_without_asking_each_other() -> None:
    one, other = Router(), Router()
    for number in range(50):
        assert choose(one, IDLE, [number] * 9) == choose(other, dict(reversed(IDLE.items())), [number] * 9)


@pytest.mark.parametrize(
    ("samples", "enough"), [(0, 2), (1, 2), (20, 2), (21, 3), (30, 3), (31, 4), (1000, 5)]
)
def test_how_many_are_enough(samples: int, enough: int) -> None:
    assert ReplicaBounds(2, 5, samples_each=10).enough(samples) == enough


def test_replicas_have_names_and_devices_of_their_own() -> None:
    entry = EngineSettings(name="e", base_model="m", roles=("sample",), replicas=3, devices=("0", "1", "2"))
    made = [entry.replica(number) for number in (1, 2, 3)]
    assert [(each.name, each.devices, each.bounds.max) for each in made] == [
        ("e", ("0",), 1),
        ("e-2", ("1",), 1),
        ("e-3", ("2",), 1),
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("replicas = 0", ["'e'", "min is 0", "1 <= min <= max <= 64"]),
        ("replicas = 65", ["max is 65"]),
        ("replicas = { min = 3, max = 2 }", ["min is 3 and max is 2"]),
        ("replicas = { min = 1 }", ["max"]),
        ("replicas = { min = 1, max = 2, samples_each = 0 }", ["samples_each is 0"]),
        ("replicas = { min = 1, max = 2, idle_s = nan }", ["idle_s is nan"]),
        ("replicas = { min = 1, max = 2, idle_s = -1 }", ["idle_s is -1"]),
        ("replicas = 2\nroles = ['train', 'sample']", ["'e'", 'roles = ["sample"]']),
        ("replicas = 2\ndevices = ['0']", ["'e'", "max is 2", "devices for 1"]),
        ("replicas = 2\n[[engines]]\nname = 'e-2'\nbase_model = 'm'", ["'e-2'", "another engine"]),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, more: str, words: list[str]) -> None:
    roles = "" if "roles" in more else "roles = ['sample']\n"
    config = tmp_path / "tandem.toml"
    config.write_text(f"[[engines]]\nname = 'e'\nbase_model = 'm'\n{roles}{more}\n")
    with pytest.raises(ConfigurationError) as refused:
        load_settings({"TANDEM_CONFIG": str(config)})
    for word in words:
        assert word in str(refused.value)

"""The short form of the fuzzing; `python -m tests.fuzz` is the long one."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import httpx
import pytest

from gateway.app import create_app
from tests.fuzz import by_bytes, by_schema
from tests.fuzz.living import HEADERS, LONGEST_S, SETTINGS, Broken, Tally, check_log, finished
from tests.served import ServedGateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedGateway]:
    served = ServedGateway(tmp_path_factory.mktemp("fuzzed"), **SETTINGS)
    served.start()
    yield served
    served.close()


@pytest.fixture
def http(gateway: ServedGateway) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, headers=HEADERS, timeout=LONGEST_S) as client:
        yield client


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_inputs_made_of_the_description_break_nothing(gateway: ServedGateway, http: httpx.Client) -> None:
    tally = Tally()
    by_schema.fuzz(gateway.url, tally, per_route=12, seed=11)
    assert tally.statuses[200] > 0.2 * tally.inputs
    assert tally.statuses[422] > 0
    assert finished(http, tally)["done"] > 0
    check_log(gateway.log)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_damaged_bytes_break_nothing(gateway: ServedGateway, http: httpx.Client) -> None:
    tally = Tally()
    by_bytes.fuzz(gateway.url, tally, count=3000, seed=5)
    assert tally.inputs == 3000
    ends = finished(http, tally)
    assert ends["done"] > 50, ends  # some get as far as the engine
    assert ends["user"] > 50, ends
    check_log(gateway.log)


def test_every_route_says_what_it_takes() -> None:
    assert by_schema.undescribed(create_app().openapi()) == []


@pytest.mark.parametrize("path", ["/api/v1/optim_step", "/api/v1/forward_backward", "/v1/completions"])
def test_a_route_that_does_not_say_so_is_found(path: str) -> None:
    page = copy.deepcopy(create_app().openapi())
    operation = page["paths"][path]["post"]
    operation["requestBody"]["content"]["application/json"]["schema"] = {}
    assert by_schema.undescribed(page) == [f"POST {path}"]
    del operation["requestBody"]
    assert by_schema.undescribed(page) == [f"POST {path}"]


@pytest.mark.parametrize(
    ("status", "text"), [(500, "{}"), (503, ""), (429, ""), (200, 'File "/a/b.py", line 3, in f')]
)
def test_what_must_not_be_answered_is_noticed(status: int, text: str) -> None:
    with pytest.raises(Broken, match="POST /x"):
        Tally().check("POST /x", status, text)
    Tally().check("POST /x", 400, "refused")

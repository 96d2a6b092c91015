"""docs/durability.md has every background duty of a gateway."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

from gateway.duties import standing_duties
from gateway.fleet import Fleet
from gateway.retention import Retention
from gateway.settings import Settings
from gateway.store import Store
from tests.docs.pages import page, rows, section


def test_every_duty_is_described() -> None:
    store, fleet = cast(Store, SimpleNamespace(retention=None)), cast(Fleet, None)
    duties = standing_duties(store, Settings(), Retention(store, Settings(), fleet, lambda sampler_id: None))
    named = [name for row in rows(section(page("durability.md"), "## Clocks")) for name in row[0].split(", ")]
    assert sorted(named) == sorted(duty.name for duty in duties)

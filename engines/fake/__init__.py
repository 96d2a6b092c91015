"""A tiny engine in numpy that computes everything for real: the gateway is tested with it, without torch."""

from engines.fake.engine import FakeEngine

__all__ = ["FakeEngine"]

"""What stands in the cells of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.measuring import median


def rate(side: Mapping[str, Any]) -> str:
    """The median of a side's tokens a second."""
    return f"{median(side['tokens_per_second']):,.0f}"


def span(ratios: Sequence[float]) -> str:
    """From the smallest to the largest."""
    return f"{min(ratios):.2f}–{max(ratios):.2f}"


def disturbed(shares: Sequence[float]) -> str:
    """How undisturbed rounds were."""
    return f"Other processes used {median(shares):.0%} of the machine, at most {max(shares):.0%}."

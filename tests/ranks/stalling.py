"""A follower that never joins: `python -m tests.ranks.stalling`."""

from __future__ import annotations

import time

if __name__ == "__main__":
    time.sleep(600)

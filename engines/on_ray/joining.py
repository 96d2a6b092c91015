"""A rank other than 0 that was started by others than rank 0, on a machine that may be another one.

`python -m engines.on_ray.joining --plugin P --meet HOST:PORT --own-ip IP --rank R --size N`. It ends with its parent.
"""

from __future__ import annotations

import argparse
import logging
import signal
import sys

from engines.host import die_with_parent, start_logging
from engines.interface import LoadError
from engines.ranks.following import perform_all
from engines.ranks.meeting import come, device_of
from engines.ranks.world import START_TIMEOUT_S, World
from engines.registry import engine_class

log = logging.getLogger("engines.ranks")

EXIT_NOT_JOINED = 1


def main() -> int:
    """The command line; gives the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engines.on_ray.joining", description="A rank of an engine on several machines."
    )
    parser.add_argument("--plugin", required=True)
    parser.add_argument("--meet", required=True, metavar="HOST:PORT", help="where rank 0 keeps the store")
    parser.add_argument("--own-ip", required=True, metavar="IP", help="by which the others reach this one")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--size", required=True, type=int)
    said = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    start_logging(f"rank {said.rank}")
    try:
        join = engine_class(said.plugin).follower()
        if join is None:
            raise LoadError(f"an engine of the plugin {said.plugin} is one process")
        post, terms = come(said.meet, said.own_ip, START_TIMEOUT_S)
        device = device_of(terms.device)
        world = World(post, said.rank, said.size, terms.timeout_s, device, terms.start_timeout_s)
    except (LoadError, RuntimeError) as error:
        log.error("it cannot join the others: %s", error)
        return EXIT_NOT_JOINED
    return perform_all(world, join)


if __name__ == "__main__":
    sys.exit(main())

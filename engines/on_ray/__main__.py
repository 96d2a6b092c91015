"""`python -m engines.on_ray --wanted JSON --connect ipc://… --vitals 7`, started by the gateway like `engines.host`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import time

import msgspec
import zmq

from engines.environment import set_defaults
from engines.host import EXIT_LOAD_FAILED, exit_with_owner, start_logging
from engines.messages import EXIT_NODE_LOST, LoadFailed, pack
from engines.on_ray.channel import LINGER_MS, Listener
from engines.on_ray.relay import SIGN, Relay, Wake, watch
from engines.vitals import Doing, Vitals

log = logging.getLogger("engines.on_ray")

QUIET = {
    "RAY_COLOR_PREFIX": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Read by Ray when it is imported: nothing is told to its makers, and the log has every line of the engine, once."""


def run(
    wanted_json: str, owner_timeout_s: float, gateway: zmq.Socket[bytes], vitals: Vitals, wake: Wake
) -> int:
    """From finding a place to the end of the engine process on it; gives the exit status to end with."""
    set_defaults(QUIET)
    try:
        from engines.on_ray import placing  # late: a machine without Ray gets a sentence
    except ImportError as error:
        message = f"Ray, on which this engine is to run, is not there ({error}): pip install -e '.[ray]'"
        gateway.send_multipart(pack(LoadFailed(message, final=True)))
        return EXIT_LOAD_FAILED
    wanted = msgspec.json.decode(wanted_json, type=placing.Wanted)
    with contextlib.ExitStack() as stack:
        try:
            with vitals.during(Doing.LOADING):
                placing.require_token()
                placing.enter(wanted)
                stack.callback(placing.leave)
                found = placing.find(wanted, lambda: vitals.beat(0))
        except placing.NoPlace as error:
            log.error("there is no place for it: %s", error)
            gateway.send_multipart(pack(LoadFailed(str(error), final=error.final)))
            return EXIT_LOAD_FAILED
        log.info(
            "it runs on %s in the Ray cluster at %s",
            found.described(),
            wanted.address,
        )
        listener = Listener(placing.own_ip(), found.introduction.public_key)
        serving = found.serve(listener.address, listener.public_key, owner_timeout_s)
        watch(lambda: placing.until_over(serving), wake)
        ended = Relay(gateway, listener, vitals, wake).run()
        if ended.status is not None:
            return ended.status
        if ended.heard_at is None:
            message = (
                f"{found.introduction.host} does not reach the gateway's machine at {listener.address}: nodes of a "
                "cluster have to be open to each other, on all ports"
            )
            gateway.send_multipart(pack(LoadFailed(message)))
            return EXIT_LOAD_FAILED
        log.error("its place on %s is lost", found.described())
        if not found.nodes_alive():
            # A node that nobody reaches may run on. Its engine process hears nothing either and has ended by then: what
            # it is writing is not in the way of the next one.
            time.sleep(max(0.0, ended.heard_at + owner_timeout_s - time.monotonic()))
        return EXIT_NODE_LOST


def end_like(status: int) -> int:
    """The exit status that says how the engine process has ended; one that was killed is followed."""
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m engines.on_ray", description="An engine process on Ray.")
    parser.add_argument("--wanted", required=True, metavar="JSON", help="what it needs of a node")
    parser.add_argument(
        "--connect", required=True, metavar="ADDRESS", help="where the gateway listens: ipc://…"
    )
    parser.add_argument("--vitals", required=True, type=int, metavar="FD", help="page for vital signs")
    parser.add_argument(
        "--owner-timeout", type=float, required=True, metavar="SECONDS", help="as of engines.host"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start_logging(f"on Ray, process {os.getpid()}")
    wake = Wake()
    exit_with_owner(arguments.owner_timeout, lambda: wake.tell(SIGN))
    vitals = Vitals(arguments.vitals)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    gateway = context.socket(zmq.DEALER)
    gateway.set_hwm(0)
    gateway.setsockopt(zmq.LINGER, LINGER_MS)
    gateway.connect(arguments.connect)
    try:
        status = run(arguments.wanted, arguments.owner_timeout, gateway, vitals, wake)
    finally:
        gateway.close()
        context.term()
    return end_like(status)


if __name__ == "__main__":
    sys.exit(main())

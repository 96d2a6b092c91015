"""`python -m tests.fuzz`: at least 20,000 inputs to a gateway with the numpy engine; takes some minutes."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import httpx

from tests.fuzz import by_bytes, by_schema
from tests.fuzz.living import HEADERS, LONGEST_S, SETTINGS, Tally, check_log, finished
from tests.served import ServedGateway


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--per-route", type=int, default=120, help="inputs made of the description, each route"
    )
    parser.add_argument("--damaged", type=int, default=16_000, help="inputs with damaged bytes")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        gateway = ServedGateway(Path(folder), **SETTINGS)
        gateway.start()
        tally, started = Tally(), time.monotonic()
        try:
            by_schema.fuzz(gateway.url, tally, arguments.per_route, arguments.seed)
            print(f"{tally.inputs} inputs made of the description: {dict(tally.statuses)}")
            by_bytes.fuzz(gateway.url, tally, arguments.damaged, arguments.seed)
            with httpx.Client(base_url=gateway.url, headers=HEADERS, timeout=LONGEST_S) as http:
                ends = finished(http, tally)
            check_log(gateway.log)
        finally:
            gateway.close()
    seconds = time.monotonic() - started
    print(
        f"{tally.inputs} inputs in {seconds:.0f} s, answered {dict(tally.statuses)}; accepted ones ended {dict(ends)}"
    )


if __name__ == "__main__":
    main()

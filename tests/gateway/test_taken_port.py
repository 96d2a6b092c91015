"""A port that another program has."""

from __future__ import annotations

import socket
from pathlib import Path

from tests.served import ServedGateway


def test_a_taken_port_ends_the_gateway_with_a_sentence_and_nothing_is_left_behind(tmp_path: Path) -> None:
    served = ServedGateway(tmp_path / "data")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", served.port))
        taken.listen()
        served.launch()
        try:
            assert served.wait() != 0
        finally:
            served.close()
    [error] = [line for line in served.log.read_text().splitlines() if "ERROR" in line]
    assert f"'127.0.0.1', {served.port}" in error
    assert "address already in use" in error
    assert "Traceback" not in served.log.read_text()
    served.start()  # the data folder is free again
    served.stop()

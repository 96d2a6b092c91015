"""Stands in for the interpreter of `.venv`: its gateway answers /readyz and nothing else, its recipe prints and ends.

The last arguments are those that quickstart.py passes; FAKE_GATEWAY and FAKE_RECIPE say how they behave.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Be ready at once; with FAKE_GATEWAY=fails, end soon after; with =loads, be ready the second time."""
        behaviour = os.environ.get("FAKE_GATEWAY")
        ready = behaviour != "broken" and (behaviour != "loads" or bool(asked))
        asked.append(self.path)
        state = "down: the model cannot be found" if behaviour == "broken" else "starting"
        self.send_response(200 if ready else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"ready": ready, "engines": {"tiny": state}}).encode())
        if behaviour == "fails":
            threading.Timer(0.3, os._exit, [5]).start()


asked: list[str] = []
"""The paths that were asked for."""


def _gateway(port: int) -> None:
    if os.environ.get("FAKE_GATEWAY") == "refuses":
        sys.exit("the settings name no engine")
    server = HTTPServer(("127.0.0.1", port), _Answers)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print(f"closed in good order, data in {os.environ['TANDEM_DATA_DIR']}", flush=True)


def _recipe(arguments: list[str]) -> None:
    print("the recipe runs:", *arguments, flush=True)
    behaviour = os.environ.get("FAKE_RECIPE", "0")
    if behaviour == "long":
        time.sleep(60)
    sys.exit(int(behaviour))


if __name__ == "__main__":
    if sys.argv[1:4] == ["-m", "uvicorn", "gateway.app:app"]:
        _gateway(int(sys.argv[sys.argv.index("--port") + 1]))
    else:
        _recipe(sys.argv[1:])

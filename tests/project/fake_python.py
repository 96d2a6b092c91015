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
        """Be ready at once; with FAKE_GATEWAY=fails or =stopped, end soon after; with =loads, be ready the second time.
        With =tandem, answer as a real one when asked what it is."""
        behaviour = os.environ.get("FAKE_GATEWAY")
        if behaviour == "tandem" and self.path != "/readyz":
            self._say({"status": "ok", "pid": 7, "data_dir": "/srv/data"})
            return
        ready = behaviour not in ("broken", "failed") and (behaviour != "loads" or bool(asked))
        asked.append(self.path)
        states = {"broken": "down: the model cannot be found", "failed": "failed: there is no such folder"}
        state = states.get(behaviour or "", "starting")
        self._say({"ready": ready, "engines": {"tiny": state}}, 200 if ready else 503)
        if behaviour in ("fails", "stopped"):
            threading.Timer(0.3, os._exit, [5 if behaviour == "fails" else 0]).start()

    def _say(self, body: dict[str, object], status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


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

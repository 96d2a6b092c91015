"""See Tandem work, with one command: `python3 quickstart.py`.

Makes `.venv` and installs into it, starts the gateway on its embedded database, fine-tunes the built-in model through
the official SDK (cookbook/sl_loop.py), samples before and after, and leaves the gateway running until Ctrl-C.
Needs nothing but Python 3.11 or newer.
"""

import argparse
import contextlib
import fcntl
import json
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from types import FrameType

import bootstrap
from bootstrap import ROOT, Unheard, say

HOST = "127.0.0.1"
READY_WITHIN_S = 600.0
"""Seconds for the gateway to load its model; as long as the gateway itself gives an engine."""
GIVE_UP_AFTER_S = 20.0
"""Seconds for which an engine may report a problem while starting; most do not mend by themselves."""
STOP_WITHIN_S = 30.0
"""Seconds for the gateway to finish what it does, before it is killed."""


class QuickstartError(Exception):
    """What went wrong, and what to do about it."""


class Gateway:
    """A gateway process of this script's own; its log goes to a file in the data folder."""

    def __init__(self, python: Path, port: int, data: Path) -> None:
        self.url = f"http://{HOST}:{port}"
        self.log = data / "gateway.log"
        self._command = [str(python), "-m", "uvicorn", "gateway.app:app", "--host", HOST]
        self._command += ["--port", str(port), "--no-access-log"]
        self._data = data
        self._process: subprocess.Popen[bytes] | None = None
        self._log_begins_at = 0

    def start(self) -> None:
        """Start it and wait until it answers. Raises QuickstartError with the end of its log when it does not."""
        self._data.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with self.log.open("ab") as log:
            self._log_begins_at = log.tell()
            # A session of its own: Ctrl-C reaches this script alone, which then stops the gateway in good order.
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=bootstrap.environment(TANDEM_DATA_DIR=str(self._data)),
            )
        say(f"Starting the gateway; its log: {self.log}")
        self._await_readiness(self._process, started)
        say(f"The gateway is ready after {time.monotonic() - started:.0f} s: {self.url}")

    def wait(self) -> None:
        """Return when it has been stopped, by `tandem stop`. Raises QuickstartError when it ends otherwise."""
        if self._process is not None:
            code = self._process.wait()
            if code == 0:
                return  # somebody has stopped it
            raise QuickstartError(f"The gateway ended (exit code {code}).\n{self._last_lines()}")

    def stop(self) -> None:
        """Ask it to end, and see that it does."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGINT)
        _mention("Stopping the gateway …")
        try:
            self._process.wait(STOP_WITHIN_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._process.kill()
            self._process.wait()
            _mention("It did not end in time and was killed; nothing that it had accepted is lost.")
        else:
            _mention(
                "Stopped. What was trained is kept in the data folder;\n"
                "python3 quickstart.py --no-train serves it again."
            )

    def _await_readiness(self, process: subprocess.Popen[bytes], started: float) -> None:
        """Return when it is ready, showing what its engines do until then. Raises QuickstartError."""
        shown: list[str] = []
        problem_since = None
        while (engines := self._engines_not_ready()) is not None:
            now = time.monotonic()
            for state in engines:
                if state not in shown:
                    say(f"  {state}")
            shown = engines or shown
            failed = next((state for state in engines if ": failed" in state), None)
            if failed is not None:
                raise QuickstartError(f"An engine cannot load its model.\n  {failed}")
            # An engine is its name, its state, and a problem if there was one.
            failing = any(state.count(": ") > 1 for state in engines)
            problem_since = (problem_since or now) if failing else None
            if process.poll() is not None:
                raise QuickstartError(f"The gateway stopped while starting.\n{self._last_lines()}")
            if problem_since is not None and now - problem_since > GIVE_UP_AFTER_S:
                raise QuickstartError(f"An engine does not start.\n{self._last_lines()}")
            if now - started > READY_WITHIN_S:
                raise QuickstartError(f"It was not ready in {READY_WITHIN_S:.0f} s.\n{self._last_lines()}")
            time.sleep(0.3)

    def _engines_not_ready(self) -> list[str] | None:
        """`name: state` or `name: state: problem` of each engine, as /readyz says; None when all are ready."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(f"{self.url}/readyz", timeout=5):
                return None
        except urllib.error.HTTPError as answer:
            with answer:
                states = json.loads(answer.read()).get("engines", {})
            return [f"engine {name}: {state}" for name, state in states.items()]
        except OSError:
            return []

    def _last_lines(self) -> str:
        with self.log.open("rb") as log:
            log.seek(self._log_begins_at)  # what stands before is of earlier gateways
            lines = log.read().decode(errors="replace").splitlines()[-20:]
        return "\n".join([f"The end of its log, {self.log}:", *(f"    {line}" for line in lines)])


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    for name in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
    ):  # also where a shell started this with signals ignored
        signal.signal(name, _interrupt)
    gateway: Gateway | None = None
    in_foreground = False
    try:
        _require_free_port(options.port)
        _require_free_folder(options)
        python = bootstrap.install(frozenset({"hf", "sdk"}))
        gateway = Gateway(python, options.port, options.data.resolve())
        gateway.start()
        if options.train:
            _run_recipe(python, gateway.url)
        if not options.exit:
            in_foreground = True
            say(_what_next(gateway.url))
            gateway.wait()
    except (QuickstartError, bootstrap.InstallError) as error:
        _mention(f"\n{error}")
        return 1
    except Unheard:
        return 1
    except KeyboardInterrupt:
        _mention("")
        return 0 if in_foreground else 130
    finally:
        if gateway is not None:
            gateway.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Install Tandem, start it, and watch a model being fine-tuned."
    )
    parser.add_argument("--port", type=int, default=8000, help="port of the gateway (default: 8000)")
    parser.add_argument(
        "--data",
        type=Path,
        default=ROOT / "data",
        help="folder for the database and checkpoints (default: ./data)",
    )
    parser.add_argument(
        "--no-train", dest="train", action="store_false", help="start the gateway without the training run"
    )
    parser.add_argument(
        "--exit", action="store_true", help="stop the gateway when the training run has ended"
    )
    return parser


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Make every way of asking this script to stop a KeyboardInterrupt."""
    raise KeyboardInterrupt


def _mention(text: str) -> None:
    """Say it if anybody listens; what is under way goes on."""
    with contextlib.suppress(Unheard):
        say(text)


def _require_free_port(port: int) -> None:
    """Raise QuickstartError unless the gateway can listen there."""
    if not 0 < port < 65536:
        raise QuickstartError(f"--port is {port}; a port is a number from 1 to 65535.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise QuickstartError(_tandem_at(port) or _other_program_at(port, error)) from error


def _other_program_at(port: int, error: OSError) -> str:
    other = port + 1 if port < 65535 else 8000
    return (
        f"Port {port} cannot be used ({error.strerror}), and no Tandem answers there.\n"
        f"Choose another port: python3 quickstart.py --port {other}"
    )


def _tandem_at(port: int) -> str | None:
    """What to do about a Tandem that answers at a port already; None if none does."""
    url = f"http://{HOST}:{port}"
    if _answer(f"{url}/healthz").get("status") != "ok":
        return None
    found = _answer(f"{url}/admin/v1/metrics")  # refused where there are keys
    facts = [f"process {found['pid']}", f"data in {found['data_dir']}"] if "pid" in found else []
    other = port + 1 if port < 65535 else 8000
    return (
        f"A Tandem runs already at {url}\n"
        + (f"({', '.join(facts)}).\n" if facts else "")
        + f"Use it as it is; or stop it:\n\n  {_tandem('stop', '--url', url)}\n\n"
        "or start a second one, which needs a data folder of its own:\n\n"
        f"  python3 quickstart.py --port {other} --data data-{other}"
    )


def _answer(address: str) -> dict[str, object]:
    """The JSON object at an address; empty if there is none."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(address, timeout=5) as answer:
            found = json.loads(answer.read(1 << 20))
    except (OSError, ValueError, HTTPException):
        return {}
    return found if isinstance(found, dict) else {}


def _require_free_folder(options: argparse.Namespace) -> None:
    """Raise QuickstartError when a gateway at another port uses the data folder."""
    try:
        lock = (options.data / "tandem.db.lock").open()
    except OSError:
        return  # no gateway has been there; whether it can be made is the gateway's to say
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            raise QuickstartError(
                f"A gateway (process {lock.read() or 'unknown'}) uses the data folder {options.data}\n"
                "already, at another port. Stop it with Ctrl-C in its terminal, or start a second one\n"
                "with a data folder of its own:\n\n"
                f"  python3 quickstart.py --port {options.port} --data data-{options.port}"
            ) from error


def _tandem(*arguments: str) -> str:
    """A command line of the installed `tandem`, from this folder."""
    return shlex.join([".venv/bin/tandem", *arguments])


def _run_recipe(python: Path, url: str) -> None:
    """Run the supervised recipe with its output passing through. Raises QuickstartError when it fails."""
    recipe = ["cookbook/sl_loop.py", "--base-url", url]
    say(f"Running {' '.join(recipe)}")
    say("It puts the model's tokenizer into Hugging Face's cache, as every client does.\n")
    started = time.monotonic()
    code = subprocess.run(
        [str(python), *recipe], cwd=ROOT, stdin=subprocess.DEVNULL, check=False, env=bootstrap.environment()
    ).returncode
    if code:
        raise QuickstartError(f"The recipe failed (exit code {code}); what it printed above says why.")
    say(f"\nTrained and sampled in {time.monotonic() - started:.0f} s.")


def _what_next(url: str) -> str:
    return f"""
The gateway keeps running at {url}; stop it with Ctrl-C.
Meanwhile, in another terminal, in {ROOT}:

  teach it arithmetic by reward
    .venv/bin/python cookbook/rl_loop.py --base-url {url}

  sample with the openai client
    .venv/bin/python cookbook/openai_sample.py --base-url {url}

  list what has been trained
    {_tandem("runs", "--url", url)}

Every route is described at {url}/docs
"""


if __name__ == "__main__":
    sys.exit(main())

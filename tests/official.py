"""Programs that use the official SDK in a process of their own end without shutting an interpreter down.

Before Python 3.14 a thread that runs Python code when its interpreter shuts down is ended by unwinding its stack
(https://github.com/python/cpython/issues/87135). Frames of native libraries do not survive that: a daemon thread that
validates with pydantic, whose core is Rust, ends its process with SIGABRT or SIGSEGV nearly each time. The SDK's
background loops are daemon threads that use pydantic. On a busy machine a program of the SDK ended with SIGABRT, its
work done, about once in some hundred times; nobody has caught the stack of one.
"""

from __future__ import annotations

LEAVE = """
import os, sys
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
"""
"""The last lines of a program that has done its work."""

COMMAND_LINE = """
import os, sys
from tinker.cli.__main__ import cli
status = 0
try:
    cli()
except SystemExit as end:
    status = end.code if isinstance(end.code, int) else int(end.code is not None)
    if isinstance(end.code, str):
        print(end.code, file=sys.stderr)
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""
"""The `tinker` command, with its output and exit status."""

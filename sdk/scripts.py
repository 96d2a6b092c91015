"""For scripts that a person runs: what went wrong in one sentence, and numbers that make sense.

if __name__ == "__main__":
    sys.exit(told(main))
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable

import openai
import tinker

from sdk.connection import ConnectionFailed

INTERRUPTED = 130


def told(main: Callable[[], object]) -> int:
    """Run a script; its exit status. What a gateway refuses or fails to do is told in a line on standard error, without
    a traceback; Ctrl-C and a reader that has gone away (`script | head`) end it quietly. Other errors are bugs, and
    raised."""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        # The SDK's call that was cut short may just have made a coroutine, about which Python would complain.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered goes nowhere
        return 1
    except (ConnectionFailed, tinker.TinkerError, openai.OpenAIError) as error:
        sys.stderr.write(f"{sys.argv[0]}: {sentence_of(error)}\n")
        return 1
    return 0


def sentence_of(error: Exception) -> str:
    """The gateway's own words, where it has answered; else what kept it from answering."""
    if isinstance(error, (tinker.APIStatusError, openai.APIStatusError)):
        return _detail(error.body) or str(error)
    if isinstance(error, (tinker.APIConnectionError, openai.APIConnectionError)):
        origin = f"{error.request.url.scheme}://{error.request.url.netloc.decode()}"
        return f"nothing answers at {origin}; start it with `tandem serve`"
    if isinstance(error, tinker.RequestFailedError):
        wrapped = re.fullmatch(r"Request failed: (.*) for self\.request_id=.*", error.message, re.DOTALL)
        return wrapped[1] if wrapped else error.message
    return str(error)


def _detail(body: object) -> str | None:
    """The sentence in a refusal of either dialect; the openai client unpacks `error` by itself."""
    if isinstance(body, dict):
        for name in ("detail", "message"):
            if isinstance(body.get(name), str):
                return str(body[name])
    return None


def at_least_one(text: str) -> int:
    """An argument of argparse that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; it must be at least 1")
    return number

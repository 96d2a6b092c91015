"""Chat templates: the model's own Jinja program, run in a sandbox, that turns messages into the text of a prompt.

The environment offers what templates on the hub are written for (the documentation of `apply_chat_template` in
transformers lists it), so that the same messages give the same text there and here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gateway.errors import BadRequest

Message = Mapping[str, Any]

MAX_CHARACTERS = 32 * 1024 * 1024
MAX_SECONDS = 10.0

_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
# A template is a program: besides Jinja's own errors it fails with whatever its expressions raise.
_TEMPLATE_FAILURES = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
)


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote; for rendering it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().astimezone().strftime(format)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """One model's chat template. `special_tokens` (`bos_token`, `eos_token`, …) are visible to it by name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises BadRequest when the source is not a template."""
        self.source = source
        self._special_tokens = dict(special_tokens)
        environment = _environment()
        try:
            self._template = environment.from_string(source)
            self.reads = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            """The names that it takes from outside."""
        except TemplateError as error:
            raise BadRequest(
                f"The chat template of this model cannot be compiled ({error}). Use /v1/completions with a prompt "
                "that you have rendered yourself.",
                param="model",
            ) from error

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, variables: Mapping[str, Any]
    ) -> str:
        """The prompt's text. Keys of a message whose value is None are left out, as templates expect.

        Raises BadRequest when the template refuses the messages, fails on them, writes more than MAX_CHARACTERS or
        takes longer than MAX_SECONDS; time is looked at whenever the template has written something.
        """
        if reserved := sorted(_RESERVED & variables.keys()):
            raise BadRequest(
                f"A variable of the chat template may not be called {reserved[0]!r}: that one is set from the request.",
                param="chat_template_kwargs",
            )
        known = self._special_tokens | dict(variables)
        known |= {
            "messages": [
                {key: value for key, value in message.items() if value is not None} for message in messages
            ],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._bounded(known)
        except _TEMPLATE_FAILURES as error:
            raise BadRequest(
                f"The chat template of this model does not accept these messages: {error}", param="messages"
            ) from error

    def _bounded(self, known: Mapping[str, Any]) -> str:
        deadline = time.monotonic() + MAX_SECONDS
        written: list[str] = []
        size = 0
        for part in self._template.generate(known):
            written.append(part)
            size += len(part)
            if size > MAX_CHARACTERS or time.monotonic() > deadline:
                raise BadRequest(
                    f"The chat template of this model wrote more than {MAX_CHARACTERS} characters or took longer than "
                    f"{MAX_SECONDS:g} seconds for these messages; send fewer or shorter ones.",
                    param="messages",
                )
        return "".join(written)

"""What an SDK offers, found by looking at it: the public methods of its client classes, and its commands.

Runs inside the SDK's environment.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import tinker
import tinker.lib.public_interfaces as interfaces

_OPERATORS = {"__enter__": "with", "__await__": "await", "__reduce__": "pickle"}
"""Special methods that users call by these words; `with` stands for `__exit__` too."""


def surface() -> list[str]:
    """Names such as `TrainingClient.forward`, `await APIFuture`, `RestClient()`, `tinker run list`, sorted."""
    names = {name for found in client_classes() for name in _of_class(found)}
    return sorted(names | set(_functions()) | set(_commands()))


def client_classes() -> set[type[Any]]:
    """The classes that users of this SDK hold: clients, futures, and handles of losses."""
    modules = [
        tinker,
        *(importlib.import_module(f"{interfaces.__name__}.{module.name}") for module in _modules()),
    ]
    return {item for module in modules for item in [*vars(module).values()] if _is_client(item)}


def _modules() -> Iterator[pkgutil.ModuleInfo]:
    return pkgutil.iter_modules(interfaces.__path__)


def _is_client(item: object) -> bool:
    if not inspect.isclass(item) or item.__name__.startswith("_"):
        return False
    named = item.__name__.endswith(("Client", "Future")) or item.__name__ == "LossHandle"
    # classes of the HTTP layer and of the wire have such names too
    ours = item.__module__ == "tinker" or item.__module__.startswith(f"{interfaces.__name__}.")
    return named and ours and item.__name__ not in ("AsyncTinker", "UntypedAPIFuture")


def _of_class(found: type[Any]) -> Iterator[str]:
    for name in dir(found):
        static = inspect.getattr_static(found, name)
        if name in _OPERATORS and name in {entry for base in found.__mro__[:-1] for entry in vars(base)}:
            yield f"{_OPERATORS[name]} {found.__name__}"
        method = callable(static) or isinstance(static, property | classmethod | staticmethod)
        if method and not name.startswith("_"):
            yield f"{found.__name__}.{name}"
    if found.__name__ in ("RestClient", "AdminClient"):
        if "base_url" in inspect.signature(found).parameters:
            yield f"{found.__name__}()"
    elif found.__name__ == "ServiceClient":
        yield "ServiceClient()"


def _functions() -> Iterator[str]:
    auth = getattr(tinker, "auth", None)
    for name in getattr(auth, "__all__", ()):
        yield f"tinker.auth.{name}"


def command_group() -> Any:
    """The SDK's command line as a click group, or None where it has none."""
    try:
        return importlib.import_module("tinker.cli.__main__").main_cli
    except ModuleNotFoundError:
        return None


def _commands() -> Iterator[str]:
    group = command_group()
    if group is not None:
        yield from (f"tinker {' '.join(path)}" for path in _leaves(group, ()))


def _leaves(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    import click

    if not isinstance(command, click.Group):
        yield path
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        yield from _leaves(command.get_command(context, name), (*path, name))

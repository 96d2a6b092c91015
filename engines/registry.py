"""Finding the class of a plugin by its name, in the interpreter that the engine process runs in.

Plugins announce themselves through the entry point group `tandem.engines`. The built-in ones are found even where
only the source tree is on the path and nothing is installed.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from engines.interface import Engine, LoadError

GROUP = "tandem.engines"

BUILT_IN: dict[str, str] = {
    "fake": "engines.fake:FakeEngine",
    "hf": "engines.hf:HfEngine",
    "megatron": "engines.megatron:MegatronEngine",
    "vllm": "engines.vllm:VllmEngine",
}


def plugins() -> dict[str, EntryPoint]:
    """Every plugin that this interpreter knows, by name. An installed one wins over the built-in of its name."""
    known = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    known.update((entry.name, entry) for entry in entry_points(group=GROUP))
    return known


def engine_class(plugin: str) -> type[Engine]:
    """The class of a plugin.

    Raises LoadError when no plugin has this name, when its package cannot be imported, or when what its entry point
    names is not an Engine.
    """
    known = plugins()
    if plugin not in known:
        names = ", ".join(sorted(known))
        raise LoadError(f"there is no engine plugin {plugin!r}; this interpreter knows {names}")
    entry = known[plugin]
    try:
        found = entry.load()
    except ImportError as error:
        raise LoadError(f"plugin {plugin} cannot be imported: {error}; {_remedy(entry)}") from error
    except AttributeError as error:
        raise LoadError(f"plugin {plugin}: its entry point {entry.value} names nothing: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Engine)):
        raise LoadError(f"plugin {plugin}: {entry.value} is not a subclass of engines.interface.Engine")
    return found


def _remedy(entry: EntryPoint) -> str:
    if BUILT_IN.get(entry.name) == entry.value:
        return (
            f"install what it needs: pip install 'tandem-gateway[{entry.name}]', or in a clone of the repository "
            f"pip install -e '.[{entry.name}]'"
        )
    return "install what it needs in the interpreter that the engine's settings name"

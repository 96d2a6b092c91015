"""Feeding engines: which operation is next, sending it, storing what became of it, recovering from deaths."""

from gateway.dispatch.dispatcher import Dispatcher

__all__ = ["Dispatcher"]

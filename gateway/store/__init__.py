"""The store: everything that must outlive a process, in Postgres or SQLite, behind one class."""

from gateway.store.store import Store

__all__ = ["Store"]

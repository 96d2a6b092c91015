"""Engines: the processes that hold a base model and train or sample adapters on it.

What is shared by all plugins lives here and needs nothing heavier than msgspec, pyzmq and numpy. A plugin is a
sub-package (`engines.hf`, `engines.fake`, ...) or any third-party class registered under the entry point group
`tandem.engines`. Nothing in this package knows the gateway, a database, HTTP or an API key.
"""
